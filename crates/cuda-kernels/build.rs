//! With the feature `ptx`: compiles the kernels to PTX of compute capability 8.0, which every card
//! from Ampere on takes. Without it: nothing.
use std::path::{Path, PathBuf};
use std::process::Command;
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

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_PTX").is_none() {
        return;
    }
    for variable in ["CUDA_HOME", "NVCC"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=kernels");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut sources: Vec<_> = fs::read_dir("kernels")
        .expect("kernels/ is readable")
        .map(|entry| entry.expect("an entry of kernels/").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "cu"))
        .collect();
    sources.sort();
    let mut units = Vec::new();
    for source in &sources {
        let stem = source.file_stem().unwrap().to_str().unwrap();
        if fs::read_to_string(source)
            .expect("a source is readable")
            .contains("HAS(")
        {
            units.extend(MODULES.map(|types| (source.clone(), format!("{stem}_{types}"), types)));
        } else {
            units.push((source.clone(), stem.to_string(), ""));
        }
    }
    let headers = fs::read_dir("kernels")
        .expect("kernels/ is readable")
        .map(|entry| entry.expect("an entry of kernels/").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "cuh"));
    let shared = headers.map(|path| changed(&path)).max();
    let left = Mutex::new(units.iter());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap().next();
                    let Some((source, module, types)) = next else {
                        break;
                    };
                    let newest = shared.max(Some(changed(source)));
                    compile(source, &out.join(format!("{module}.ptx")), types, newest);
                }
            });
        }
    });
    let mut modules = String::from("/// Name and text of each module.\n");
    modules += "pub(crate) const MODULES: &[(&str, &str)] = &[\n";
    for (_, module, _) in &units {
        let path = out.join(format!("{module}.ptx"));
        modules += &format!("    ({module:?}, include_str!({path:?})),\n");
    }
    modules += "];\n";
    fs::write(out.join("modules.rs"), modules).expect("OUT_DIR is writable");
}

fn changed(path: &Path) -> SystemTime {
    fs::metadata(path)
        .and_then(|data| data.modified())
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Compiles what has changed since `target` was made, or is compiled by another command.
fn compile(source: &Path, target: &Path, types: &str, newest: Option<SystemTime>) {
    let nvcc = env::var_os("NVCC").map(PathBuf::from).unwrap_or_else(|| {
        env::var_os("CUDA_HOME").map_or("nvcc".into(), |home| PathBuf::from(home).join("bin/nvcc"))
    });
    let mut command = Command::new(&nvcc);
    // `-fmad=false`: what is fused is written as such, so that bits are those of IEEE 754.
    command.args([
        "-ptx",
        "-arch=compute_80",
        "-std=c++17",
        "-fmad=false",
        "-O3",
    ]);
    command.args(["-diag-suppress", "128"]);
    if !types.is_empty() {
        command.arg(format!("-DONLY={types}"));
    }
    command.arg("-o").arg(target).arg(source);
    let made_by = target.with_extension("command");
    let line = format!("{command:?}");
    let same = fs::read_to_string(&made_by).is_ok_and(|made_by| made_by == line);
    if same && fs::metadata(target).is_ok() && Some(changed(target)) > newest {
        return;
    }
    match command.status() {
        Ok(status) if status.success() => {
            fs::write(&made_by, line).expect("OUT_DIR is writable");
        }
        Ok(status) => panic!("{command:?} ended with {status}"),
        Err(error) => panic!(
            "the feature `ptx` needs nvcc: {} cannot be run ({error}). Set CUDA_HOME to a CUDA \
             toolkit from 12.0 on, or NVCC to its compiler.",
            nvcc.display()
        ),
    }
}
