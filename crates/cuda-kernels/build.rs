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
    let units: Vec<Unit> = sources.iter().flat_map(|source| units_of(source)).collect();
    let name = |unit: &Unit| out.join(format!("{}.ptx", unit.module));
    // Modules of another version of the sources.
    for entry in fs::read_dir(&out).expect("OUT_DIR is readable").flatten() {
        let path = entry.path();
        let is_ptx = path.extension().is_some_and(|ext| ext == "ptx");
        if is_ptx && !units.iter().any(|unit| name(unit) == path) {
            fs::remove_file(path).expect("OUT_DIR is writable");
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
                    let Some(unit) = next else {
                        break;
                    };
                    compile(unit, &name(unit), shared.max(Some(changed(&unit.source))));
                }
            });
        }
    });
    let mut modules = String::from("/// Name, text and kernels of each module.\n");
    modules += "pub(crate) const MODULES: &[(&str, &str, &[&str])] = &[\n";
    for unit in &units {
        let path = name(unit);
        let text = fs::read_to_string(&path).expect("a module was made");
        let kernels = text.split(".entry ").skip(1);
        let kernels: Vec<_> = kernels.filter_map(|rest| rest.split('(').next()).collect();
        // Some parts have no kernels of some types.
        if !kernels.is_empty() {
            let module = &unit.module;
            modules += &format!("    ({module:?}, include_str!({path:?}), &{kernels:?}),\n");
        }
    }
    modules += "];\n";
    fs::write(out.join("modules.rs"), modules).expect("OUT_DIR is writable");
}

/// A module: what of which source is in it.
struct Unit {
    source: PathBuf,
    module: String,
    types: Option<&'static str>,
    part: Option<String>,
}

/// One for each pair of types and each part that the source asks for.
fn units_of(source: &Path) -> Vec<Unit> {
    let stem = source.file_stem().unwrap().to_str().unwrap();
    let text = fs::read_to_string(source).expect("a source is readable");
    let types: Vec<_> = match text.contains("HAS(") {
        true => MODULES.into_iter().map(Some).collect(),
        false => vec![None],
    };
    let asked = text.lines().filter_map(|line| line.strip_prefix("#if IN("));
    let mut parts: Vec<_> = asked
        .filter_map(|rest| rest.split(')').next())
        .map(|part| Some(part.to_string()))
        .collect();
    if parts.is_empty() {
        parts.push(None);
    }
    let mut units = Vec::new();
    for part in &parts {
        for &types in &types {
            let name = [Some(stem), part.as_deref(), types];
            units.push(Unit {
                source: source.to_path_buf(),
                module: name.into_iter().flatten().collect::<Vec<_>>().join("_"),
                types,
                part: part.clone(),
            });
        }
    }
    units
}

fn changed(path: &Path) -> SystemTime {
    fs::metadata(path)
        .and_then(|data| data.modified())
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Compiles what has changed since `target` was made, or is compiled by another command.
fn compile(unit: &Unit, target: &Path, newest: Option<SystemTime>) {
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
    command.args(unit.types.map(|types| format!("-DONLY={types}")));
    command.args(unit.part.as_ref().map(|part| format!("-DPART={part}")));
    command.arg("-o").arg(target).arg(&unit.source);
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
