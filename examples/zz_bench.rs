//! Scratch.
use candle_core::*;
use candle_norm::ops::hook::{Op, saved};
use candle_norm::*;
use std::time::Instant;
#[global_allocator]
static G: mimalloc::MiMalloc = mimalloc::MiMalloc;
fn med(mut f: impl FnMut()) -> f64 {
    for _ in 0..3 {
        f();
    }
    let t = Instant::now();
    f();
    let e = t.elapsed().as_secs_f64();
    let it = ((1e-3 / e) as usize).clamp(1, 500);
    let n = if e > 5e-3 { 12 } else { 150 };
    let mut v: Vec<f64> = (0..n)
        .map(|_| {
            let t = Instant::now();
            for _ in 0..it {
                f();
            }
            t.elapsed().as_secs_f64() / it as f64 * 1e3
        })
        .collect();
    v.sort_by(|a, b| a.total_cmp(b));
    v[0]
}
fn main() -> Result<()> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    let ln = Op::LayerNorm;
    let rms = Op::RmsNorm;
    let bn = Op::BatchNorm;
    let ino = Op::InstanceNorm;
    let cases: Vec<(&str, Op, Vec<usize>)> = vec![
        ("ln", ln.clone(), vec![1, 768]),
        ("ln", ln.clone(), vec![128, 768]),
        ("ln", ln.clone(), vec![4096, 768]),
        ("ln", ln.clone(), vec![512, 4096]),
        ("ln", ln.clone(), vec![16384, 1024]),
        ("ln", ln.clone(), vec![1024, 49]),
        ("ln", ln.clone(), vec![1024, 100]),
        ("rms", rms.clone(), vec![1, 768]),
        ("rms", rms.clone(), vec![128, 768]),
        ("rms", rms.clone(), vec![4096, 768]),
        ("rms", rms.clone(), vec![512, 4096]),
        ("rms", rms.clone(), vec![16384, 1024]),
        ("rms", rms.clone(), vec![1024, 49]),
        ("rms", rms.clone(), vec![1024, 100]),
        ("bn", bn.clone(), vec![32, 64, 56, 56]),
        ("bn", bn.clone(), vec![8, 256, 14, 14]),
        ("bn", bn.clone(), vec![8192, 256]),
        ("bn", bn.clone(), vec![64, 16, 8, 8]),
        ("gn", Op::GroupNorm { num_groups: 32 }, vec![8, 256, 32, 32]),
        ("gn", Op::GroupNorm { num_groups: 32 }, vec![32, 64, 56, 56]),
        ("gn", Op::GroupNorm { num_groups: 32 }, vec![2, 320, 64, 64]),
        ("in", ino.clone(), vec![8, 64, 128, 128]),
        ("in", ino.clone(), vec![16, 32, 32, 32]),
        ("wn", Op::WeightNorm { dim: Some(0) }, vec![1024, 1024]),
        ("wn", Op::WeightNorm { dim: Some(0) }, vec![256, 256, 3, 3]),
    ];
    for dt in [DType::F32, DType::BF16, DType::F16] {
        for (name, op, dims) in &cases {
            if !name.contains(&filter) && !filter.is_empty() {
                continue;
            }
            let c = if ["ln", "rms"].contains(name) {
                dims[dims.len() - 1]
            } else {
                dims[1]
            };
            let x = Tensor::randn(0f32, 1., dims.as_slice(), &Device::Cpu)?.to_dtype(dt)?;
            let (w, b) = if *name == "wn" {
                let mut s = vec![1; dims.len()];
                s[0] = dims[0];
                (Tensor::ones(s, dt, &Device::Cpu)?, None)
            } else {
                (
                    Tensor::ones(c, dt, &Device::Cpu)?,
                    if *name == "rms" {
                        None
                    } else {
                        Some(Tensor::zeros(c, dt, &Device::Cpu)?)
                    },
                )
            };
            let f = med(|| {
                saved(op.clone(), &x, Some(&w), b.as_ref(), 1e-5).unwrap();
            });
            let c = med(|| {
                x.copy().unwrap();
            });
            let xv = Var::from_tensor(&x)?;
            let wv = Var::from_tensor(&w)?;
            let bv = b.as_ref().map(|b| Var::from_tensor(b).unwrap());
            let dy = x.copy()?;
            let s = saved(
                op.clone(),
                &xv,
                Some(&wv),
                bv.as_ref().map(|b| b.as_tensor()),
                1e-5,
            )?;
            let bw = med(|| {
                s.backward(&dy).unwrap();
            });
            println!("{dt:?} {name} {dims:?} fwd {f:.4} bwd {bw:.4} copy {c:.4}");
        }
    }
    Ok(())
}
