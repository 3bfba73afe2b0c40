//! Writes the emulator's outputs of a table of shapes, and the launches that made them, for
//! `device/rows.py` to repeat on a GPU: `cargo run --example emulated -- FOLDER`.
use candle_norm_cuda_emulator::Order;
use candle_norm_cuda_kernels::Launch;
use candle_norm_cuda_kernels::geometry::rows::Norm;
use half::{bf16, f16};
use std::fmt::Write;

#[path = "../tests/common/mod.rs"]
mod common;
use common::{Elem, Options, USUAL, case};

const SHAPES: [(usize, usize); 13] = [
    (130, 1),
    (70, 32),
    (37, 49),
    (33, 100),
    (9, 256),
    (30, 257),
    (9, 769),
    (10, 1000),
    (12, 1024),
    (3, 4096),
    (3, 5001),
    (2, 8192),
    (2, 16_387),
];

fn launch(what: &Launch) -> String {
    format!(
        r#"["{}", {:?}, {:?}, {}]"#,
        what.kernel, what.grid, what.block, what.shared
    )
}

fn one<T: Elem, P: Elem>(
    rows: usize,
    cols: usize,
    index: usize,
    json: &mut String,
    data: &mut Vec<u8>,
) {
    let norm = Norm::ALL[index];
    let mean = if T::ELEMENT.size() >= 4 && norm.center {
        1000.
    } else {
        0.25
    };
    let options = Options {
        mean,
        offset: if norm.center { 0. } else { 1. },
        round_first: !norm.center && cols.is_multiple_of(2),
        at: cols % 3,
        ..USUAL
    };
    let case = case::<T, P>(norm, rows, cols, &options);
    let bytes = case.run(Order::Ascending).bytes();
    let plan = case.shape.backward().unwrap();
    let columns = plan.columns.as_ref().map_or("null".to_string(), launch);
    let separator = if json.is_empty() { "[" } else { ",\n" };
    write!(
        json,
        r#"{separator}{{"types": "{}", "norm": {index}, "rows": {rows}, "cols": {cols}, "mean": {mean}, "offset": {}, "round_first": {}, "at": {}, "forward": {}, "dx": {}, "columns": {columns}, "finish": {}, "parts": {}, "begin": {}, "bytes": {}}}"#,
        case.shape.types.name(),
        options.offset,
        options.round_first,
        options.at,
        launch(&case.shape.forward().unwrap()),
        launch(&plan.dx),
        launch(&plan.finish),
        plan.parts,
        data.len(),
        bytes.len(),
    )
    .unwrap();
    data.extend(bytes);
}

fn main() {
    let folder = std::env::args().nth(1).expect("a folder");
    let (mut json, mut data) = (String::new(), Vec::new());
    for (rows, cols) in SHAPES {
        for norm in 0..4 {
            one::<f32, f32>(rows, cols, norm, &mut json, &mut data);
            one::<f16, f16>(rows, cols, norm, &mut json, &mut data);
            one::<bf16, bf16>(rows, cols, norm, &mut json, &mut data);
            one::<f16, f32>(rows, cols, norm, &mut json, &mut data);
            one::<bf16, f32>(rows, cols, norm, &mut json, &mut data);
            one::<f64, f64>(rows, cols, norm, &mut json, &mut data);
        }
    }
    // More rows than teams.
    one::<f32, f32>(34_000, 3, 0, &mut json, &mut data);
    one::<bf16, bf16>(34_000, 3, 0, &mut json, &mut data);
    one::<f32, f32>(1_100, 257, 1, &mut json, &mut data);
    json.push_str("]\n");
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    std::fs::write(format!("{folder}/rows.json"), json).expect("rows.json can be written");
    std::fs::write(format!("{folder}/rows.bin"), &data).expect("rows.bin can be written");
    println!("{} bytes", data.len());
}
