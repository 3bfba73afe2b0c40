//! Scratch.
use candle_core::*;
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
    let it = ((2e-3 / e) as usize).clamp(1, 2000);
    let mut v: Vec<f64> = (0..15)
        .map(|_| {
            let t = Instant::now();
            for _ in 0..it {
                f();
            }
            t.elapsed().as_secs_f64() / it as f64 * 1e3
        })
        .collect();
    v.sort_by(|a, b| a.total_cmp(b));
    v[7]
}
fn main() -> Result<()> {
    for dt in [DType::F32, DType::BF16, DType::F16] {
        for (r, n) in [
            (1, 768),
            (128, 768),
            (4096, 768),
            (512, 4096),
            (16384, 1024),
            (1024, 49),
            (1024, 100),
        ] {
            let x = Tensor::randn(0f32, 1., (r, n), &Device::Cpu)?.to_dtype(dt)?;
            let w = Tensor::ones(n, dt, &Device::Cpu)?;
            let b = w.zeros_like()?;
            let f = med(|| {
                ops::layer_norm(&x, n, Some(&w), Some(&b), 1e-5).unwrap();
            });
            let g = med(|| {
                ops::rms_norm(&x, n, Some(&w), Some(1e-5), 0., Cast::AfterWeight).unwrap();
            });
            let c = med(|| {
                x.copy().unwrap();
            });
            let xv = Var::from_tensor(&x)?;
            let wv = Var::from_tensor(&w)?;
            let bv = Var::from_tensor(&b)?;
            let dy = x.copy()?;
            let s = ops::hook::saved(ops::hook::Op::LayerNorm, &xv, Some(&wv), Some(&bv), 1e-5)?;
            let bw = med(|| {
                s.backward(&dy).unwrap();
            });
            println!("{dt:?} {r}x{n} ln {f:.4} rms {g:.4} copy {c:.4} ln_bwd {bw:.4}");
        }
    }
    Ok(())
}
