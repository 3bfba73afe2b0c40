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
    for file in FILES {
        let text = fs::read_to_string(sources.join(file)).expect("a source file");
        let name = Path::new(file).file_name().expect("a file");
        fs::write(out.join(name), converted(&text)).expect("a file of this build");
    }
}

/// The source with the names of this crate. Documentation of a file cannot stand where it is
/// included.
fn converted(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with("//!"));
    let renames = [
        ("candle::", "candle_core::"),
        ("candle_nn", "candle_norm::nn"),
        ("crate::models::", "crate::"),
    ];
    let rename = |text: String, (from, to): &(&str, &str)| text.replace(from, to);
    renames
        .iter()
        .fold(lines.collect::<Vec<_>>().join("\n"), rename)
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
