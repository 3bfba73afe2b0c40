//! Compiles every `.cu` file of `cuda-kernels` as C++ behind `cuda_host.h`, each into a library of
//! its own, and again only
//! when it or what it includes has changed.
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;
use std::{env, fs, thread};

/// The modules of a source that asks `HAS`: see common.cuh.
const MODULES: [&str; 6] = [
    "f32_f32",
    "f16_f16",
    "bf16_bf16",
    "f16_f32",
    "bf16_f32",
    "f64_f64",
];

struct Unit {
    name: String,
    text: String,
    newest: SystemTime,
}

fn main() {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let kernels = here.join("../cuda-kernels/kernels");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    for changed in ["build.rs", "cuda_host.h", "emulator.cpp", "self_test.cu"] {
        println!("cargo:rerun-if-changed={changed}");
    }
    println!("cargo:rerun-if-changed={}", kernels.display());
    let asan = env::var_os("CARGO_FEATURE_ADDRESS_SANITIZER").is_some();

    let mut sources = vec![here.join("self_test.cu")];
    let mut headers = vec![here.join("cuda_host.h"), here.join("build.rs")];
    for entry in fs::read_dir(&kernels).expect("crates/cuda-kernels/kernels is readable") {
        let path = entry.expect("an entry of kernels/").path();
        match path.extension().and_then(|ext| ext.to_str()) {
            Some("cu") => sources.push(path),
            Some("cuh") => headers.push(path),
            _ => {}
        }
    }
    sources.sort();
    let shared = headers
        .iter()
        .map(|path| changed(path))
        .max()
        .expect("there are headers");
    let mut units = Vec::new();
    for source in &sources {
        let stem = source.file_stem().unwrap().to_str().unwrap();
        let asks = fs::read_to_string(source)
            .expect("a source is readable")
            .contains("HAS(");
        for types in if asks { &MODULES[..] } else { &[""] } {
            let only = if asks {
                format!("#define ONLY {types}\n")
            } else {
                String::new()
            };
            units.push(Unit {
                name: format!("emulated_{stem}_{types}"),
                text: format!("{only}#include \"cuda_host.h\"\n#include \"{stem}.cu\"\n"),
                newest: shared.max(changed(source)),
            });
        }
    }

    let queue = Mutex::new(units.iter());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no thread has panicked").next();
                    let Some(unit) = next else { break };
                    let library = out.join(format!("lib{}.a", unit.name));
                    if fs::metadata(&library).is_ok() && changed(&library) > unit.newest {
                        continue;
                    }
                    let file = out.join(format!("{}.cpp", unit.name));
                    fs::write(&file, &unit.text).expect("OUT_DIR is writable");
                    compiler(&here, &kernels, asan)
                        .cargo_metadata(false)
                        .file(file)
                        .compile(&unit.name);
                }
            });
        }
    });
    if asan {
        // Static: as a shared library it would have to come before all others, which rustc orders.
        let library = sanitizer(&compiler(&here, &kernels, asan));
        let folder = library.parent().expect("a file is in a folder");
        println!("cargo:rustc-link-search=native={}", folder.display());
        println!("cargo:rustc-link-lib=static:+whole-archive=asan");
    }
    println!("cargo:rustc-link-search=native={}", out.display());
    for unit in &units {
        // A kernel registers itself in a static constructor, which nothing else refers to.
        println!("cargo:rustc-link-lib=static:+whole-archive={}", unit.name);
    }
    compiler(&here, &kernels, asan)
        .file(here.join("emulator.cpp"))
        .compile("emulator");
}

fn changed(path: &Path) -> SystemTime {
    fs::metadata(path)
        .and_then(|data| data.modified())
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The library of AddressSanitizer that the compiler has.
fn sanitizer(build: &cc::Build) -> PathBuf {
    let printed = build
        .get_compiler()
        .to_command()
        .arg("-print-file-name=libasan.a")
        .output()
        .expect("the C++ compiler runs");
    let path = PathBuf::from(String::from_utf8_lossy(&printed.stdout).trim());
    assert!(
        path.is_absolute(),
        "the feature `address-sanitizer` needs GCC with its static libasan.a"
    );
    path
}

fn compiler(here: &Path, kernels: &Path, asan: bool) -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(1)
        .debug(asan)
        .warnings(false)
        .include(here)
        .include(kernels)
        // The device's arithmetic: a product and a sum are fused only where the source says `fma`.
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing");
    #[cfg(target_arch = "x86_64")]
    if env::var("HOST") == env::var("TARGET") && std::is_x86_feature_detected!("fma") {
        build.flag("-mfma");
    }
    if asan {
        build
            .flag("-fsanitize=address")
            .flag("-fno-omit-frame-pointer");
    }
    build
}
