//! Converts models of candle-transformers to the layers of candle-norm: a rename of candle-nn.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const VERSION: &str = "0.11.1";

/// Models, and what they are built of.
const FILES: [&str; 5] = [
    "models/llama.rs",
    "models/vit.rs",
    "models/with_tracing.rs",
    "quantized_var_builder.rs",
    "utils.rs",
];

/// Models with layers that candle-nn does not have, and the passages where this crate's take their
/// place.
const EDITED: [(&str, &[(&str, &str)]); 5] = [
    ("models/convnext.rs", &[GRN]),
    ("models/mamba2.rs", &GATED_NORM),
    ("models/flux/model.rs", &FLUX),
    ("models/mmdit/blocks.rs", &SD3),
    ("models/mmdit/projections.rs", &[]),
];

const GRN: (&str, &str) = (
    "channels_last: bool, vb: VarBuilder) -> Result<Func<'static>> {",
    "channels_last: bool, vb: VarBuilder) -> Result<Func<'static>> {
    let options = candle_norm::GlobalResponseNormOptions {
        channels_first: !channels_last,
        ..Default::default()
    };
    let norm = candle_norm::global_response_norm(dim, options, vb.clone())?;
    return Ok(Func::new(move |xs| xs.apply(&norm)));",
);

const GATED_NORM: [(&str, &str); 4] = [
    (
        "    norm: RmsNorm,\n    d_inner: usize,",
        "    norm: candle_norm::GatedRmsNorm,\n    d_inner: usize,",
    ),
    (
        "candle_nn::rms_norm(d_inner, 1e-5, vb.pp(\"norm\"))?",
        "candle_norm::gated_rms_norm(
            d_inner,
            candle_norm::GatedRmsNormOptions {
                eps: 1e-5,
                gate: candle_norm::Gate::Before,
                group_size: Some(d_inner / ngroups),
                ..Default::default()
            },
            vb.pp(\"norm\"),
        )?",
    ),
    (
        "let y = (y * candle_nn::ops::silu(&z)?)?;
        let y = self.norm.forward(&y)?;",
        "let y = self.norm.forward(&y, Some(&z))?;",
    ),
    (
        "let y = (y * candle_nn::ops::silu(&z)?)?;
        let y = y.reshape((b_sz * padded_len, self.d_inner))?;
        let y = self.norm.forward(&y)?;
        let y = y.reshape((b_sz, padded_len, self.d_inner))?;",
        "let y = self.norm.forward(&y, Some(&z))?;",
    ),
];

const FLUX: [(&str, &str); 8] = [
    (
        "fn scale_shift(&self, xs: &Tensor) -> Result<Tensor> {
        xs.broadcast_mul(&(&self.scale + 1.)?)?
            .broadcast_add(&self.shift)
    }",
        "fn modulated(&self, norm: &LayerNorm, xs: &Tensor) -> Result<Tensor> {
        norm.forward_modulated(xs, Some(&self.scale), Some(&self.shift))
    }",
    ),
    (
        "self.gate.broadcast_mul(xs)",
        "candle_norm::ops::layer_scale(xs, &self.gate.squeeze(1)?, None, Default::default())",
    ),
    (
        "img.apply(&self.img_norm1)?;
        let img_modulated = img_mod1.scale_shift(&img_modulated)?;",
        "img_mod1.modulated(&self.img_norm1, img)?;",
    ),
    (
        "txt.apply(&self.txt_norm1)?;
        let txt_modulated = txt_mod1.scale_shift(&txt_modulated)?;",
        "txt_mod1.modulated(&self.txt_norm1, txt)?;",
    ),
    (
        ".scale_shift(&img.apply(&self.img_norm2)?)?",
        ".modulated(&self.img_norm2, &img)?",
    ),
    (
        ".scale_shift(&txt.apply(&self.txt_norm2)?)?",
        ".modulated(&self.txt_norm2, &txt)?",
    ),
    (
        "mod_.scale_shift(&xs.apply(&self.pre_norm)?)?",
        "mod_.modulated(&self.pre_norm, xs)?",
    ),
    (
        "let xs = xs
            .apply(&self.norm_final)?
            .broadcast_mul(&(scale.unsqueeze(1)? + 1.0)?)?
            .broadcast_add(&shift.unsqueeze(1)?)?;",
        "let xs = self.norm_final.forward_modulated(xs, Some(scale), Some(shift))?;",
    ),
];

const SD3: [(&str, &str); 9] = [
    (
        "impl Module for LayerNormNoAffine {",
        "impl LayerNormNoAffine {
    fn modulated(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let outside = candle_norm::Modulation::new(Some(scale), Some(shift));
        let size = x.dim(D::Minus1)?;
        candle_norm::ops::modulated_layer_norm(x, size, [None, None], self.eps, &outside)
    }
}

impl Module for LayerNormNoAffine {",
    ),
    (
        "let norm_x = self.norm1.forward(x)?;
        let modulated_x = modulate(&norm_x, ",
        "let modulated_x = self.norm1.modulated(x, ",
    ),
    (
        "modulate(&norm_x, &shift_msa2",
        "self.norm1.modulated(x, &shift_msa2",
    ),
    (
        "let norm_x = self.norm2.forward(&x)?;
        let modulated_x = modulate(&norm_x, ",
        "let modulated_x = self.norm2.modulated(&x, ",
    ),
    (
        "let norm_x = self.norm_final.forward(x)?;
        let modulated_x = modulate(&norm_x, ",
        "let modulated_x = self.norm_final.modulated(x, ",
    ),
    (
        "x.add(&attn_out.broadcast_mul(&mod_interm.gate_msa.unsqueeze(1)?)?)?",
        "gated(x, &attn_out, &mod_interm.gate_msa)?",
    ),
    (
        "x.add(&attn_out2.broadcast_mul(&mod_interm.gate_msa2.unsqueeze(1)?)?)?",
        "gated(&x, &attn_out2, &mod_interm.gate_msa2)?",
    ),
    (
        "x.add(&mlp_out.broadcast_mul(&mod_interm.gate_mlp.unsqueeze(1)?)?)?",
        "gated(&x, &mlp_out, &mod_interm.gate_mlp)?",
    ),
    (
        "fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {",
        "fn gated(residual: &Tensor, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    candle_norm::ops::gated_residual(residual, x, gate, None, Default::default())
}

fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {",
    ),
];

/// Functions that tests call, private in their sources.
const SHOWN: [(&str, &str); 1] = [("\nfn convnext2_grn", "\npub fn convnext2_grn")];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(converted)");
    let out = PathBuf::from(env::var("OUT_DIR").expect("a folder of this build"));
    let sources = match sources(&out) {
        Ok(sources) => sources,
        Err(error) => {
            println!("cargo::warning=SKIPPED, without the sources of candle-transformers: {error}");
            return;
        }
    };
    println!("cargo::rustc-cfg=converted");
    let read = |file: &str| fs::read_to_string(sources.join(file)).expect("a source file");
    let write = |folder: &str, file: &str, text: String| {
        let name = Path::new(file).file_name().expect("a file");
        fs::create_dir_all(out.join(folder)).expect("a folder of this build");
        fs::write(out.join(folder).join(name), text).expect("a file of this build");
    };
    let plain = |file| replaced(&without_documentation(&read(file)), &SHOWN, false);
    let originals = [("crate::models::", "crate::originals::")];
    for file in FILES {
        write("converted", file, renamed(&plain(file), &NORMS));
    }
    write("originals", FILES[2], renamed(&plain(FILES[2]), &originals));
    for (file, edits) in EDITED {
        let text = plain(file);
        let ours = replaced(&text, edits, true);
        write("converted", file, renamed(&ours, &NORMS));
        write("originals", file, renamed(&text, &originals));
    }
}

/// The source without the documentation of the file, which cannot stand where it is included.
fn without_documentation(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with("//!"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Names of candle-nn to those of this crate.
const NORMS: [(&str, &str); 2] = [
    ("candle_nn", "candle_norm::nn"),
    ("crate::models::", "crate::"),
];

fn renamed(text: &str, renames: &[(&str, &str)]) -> String {
    let core = [("candle::", "candle_core::")];
    replaced(&replaced(text, &core, false), renames, false)
}

/// The source with passages replaced, each of which must be there where `all` is set.
fn replaced(text: &str, edits: &[(&str, &str)], all: bool) -> String {
    edits.iter().fold(text.to_string(), |text, (from, to)| {
        assert!(!all || text.contains(from), "no such passage: {from}");
        text.replace(from, to)
    })
}

/// The folder of the sources, which cargo downloads if they are not there. They are of no package
/// that is built: candle-transformers would be one of many crates.
fn sources(out: &Path) -> Result<PathBuf, String> {
    let package = out.join("originals");
    fs::create_dir_all(package.join("src")).expect("a folder of this build");
    fs::write(package.join("src/lib.rs"), "").expect("a file of this build");
    let manifest = format!(
        "[package]\nname = \"originals\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n\
         [dependencies]\ncandle-transformers = \"={VERSION}\"\n\n[workspace]\n"
    );
    fs::write(package.join("Cargo.toml"), manifest).expect("a file of this build");
    let metadata = |more: &[&str]| {
        Command::new(env::var("CARGO").expect("the cargo of this build"))
            .args(["metadata", "--quiet", "--format-version", "1"])
            .args(["--filter-platform", &env::var("TARGET").expect("a target")])
            .arg("--manifest-path")
            .arg(package.join("Cargo.toml"))
            .args(more)
            .output()
            .expect("cargo")
    };
    let mut found = metadata(&[]);
    if !found.status.success() {
        found = metadata(&["--offline"]);
    }
    if !found.status.success() {
        let error = String::from_utf8_lossy(&found.stderr);
        return Err(error.lines().next().unwrap_or_default().to_string());
    }
    let text = String::from_utf8_lossy(&found.stdout);
    let end = format!("candle-transformers-{VERSION}/Cargo.toml");
    let mut paths = text.split('"').filter(|part| part.ends_with(&end));
    let manifest = paths
        .next_back()
        .expect("the manifest of candle-transformers");
    Ok(Path::new(manifest).parent().expect("a folder").join("src"))
}
