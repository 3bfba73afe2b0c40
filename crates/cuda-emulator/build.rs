//! Compiles every `.cu` file of `cuda-kernels` as C++ behind `cuda_host.h`.
use std::{env, fs, path::PathBuf};

/// The modules of a source that asks `HAS`: see common.cuh.
const MODULES: [&str; 6] =
    ["f32_f32", "f16_f16", "bf16_bf16", "f16_f32", "bf16_f32", "f64_f64"];

fn main() {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    let kernels = here.join("../cuda-kernels/kernels");
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let mut sources: Vec<_> = fs::read_dir(&kernels)
        .expect("crates/cuda-kernels/kernels is readable")
        .map(|entry| entry.expect("an entry of kernels/").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "cu"))
        .collect();
    sources.push(here.join("self_test.cu"));
    sources.sort();
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(1)
        .warnings(false)
        .include(&here)
        .include(&kernels)
        // The device's arithmetic: an addition and a multiplication are fused only where the
        // source says `fma`.
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        // Registers every kernel from a static constructor: no object may be dropped.
        .link_lib_modifier("+whole-archive");
    let here_runs = env::var("HOST") == env::var("TARGET");
    #[cfg(target_arch = "x86_64")]
    if here_runs && std::is_x86_feature_detected!("fma") {
        build.flag("-mfma");
    }
    let _ = here_runs;
    if env::var_os("CARGO_FEATURE_ADDRESS_SANITIZER").is_some() {
        build.flag("-fsanitize=address").flag("-fno-omit-frame-pointer").debug(true);
        println!("cargo:rustc-link-lib=asan");
    }
    for source in &sources {
        let stem = source.file_stem().unwrap().to_str().unwrap();
        let asks = fs::read_to_string(source).expect("a source is readable").contains("HAS(");
        for types in if asks { &MODULES[..] } else { &[""] } {
            let unit = out.join(format!("{stem}_{types}.cpp"));
            let only = if asks { format!("#define ONLY {types}\n") } else { String::new() };
            let text = format!("{only}#include \"cuda_host.h\"\n#include \"{stem}.cu\"\n");
            fs::write(&unit, text).expect("OUT_DIR is writable");
            build.file(unit);
        }
    }
    build.file(here.join("emulator.cpp"));
    build.compile("candle_norm_cuda_emulated");
    println!("cargo:rerun-if-changed=cuda_host.h");
    println!("cargo:rerun-if-changed=self_test.cu");
    println!("cargo:rerun-if-changed=emulator.cpp");
    println!("cargo:rerun-if-changed={}", kernels.display());
}
