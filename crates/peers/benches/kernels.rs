//! Forward and backward of each kernel over row lengths, plane sizes and dtypes, for those who work
//! on them; of switchable norm, whose backward is several, the train step.
//!
//! `cargo bench --bench kernels -- --save-baseline before`, then `-- --baseline before` after a
//! change; a name such as `layer_norm/backward/bf16` selects. How the layers compare with others is
//! the subject of the peers bench.

#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "peers/case.rs"]
mod case;
#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "peers/ours.rs"]
mod ours;
#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "peers/step.rs"]
mod step;

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Error, Result, Tensor};
use candle_nn::{Module, ModuleT, VarBuilder, VarMap};
use candle_norm::{LayerNormOptions, batch_norm, layer_norm, ops};
use criterion::{BenchmarkId, Criterion, Throughput};

use case::{Case, Inputs, Op, Pass};

/// See the peers bench.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Elements of every input: two of them in f32 fit the cache of most machines.
const ELEMENTS: usize = 1 << 20;

/// Multiples of the lanes, tails, and rows that no first-level cache holds.
const ROW_LENGTHS: [usize; 8] = [16, 49, 100, 256, 768, 1023, 4096, 65536];

/// The side of square maps: pixels of a late layer, tails, and an early layer.
const SIDES: [usize; 5] = [1, 7, 14, 56, 128];

/// Divides into the groups of every group norm.
const CHANNELS: usize = 64;

const DTYPES: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F64];

fn main() -> Result<()> {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30)
        .configure_from_args();
    for op in [Op::LayerNorm, Op::RmsNorm, Op::WeightNorm] {
        let shapes = ROW_LENGTHS.map(|len| vec![ELEMENTS / len, len]);
        kernel(&mut criterion, op, &shapes)?;
    }
    for op in [Op::LayerNormGelu, Op::GatedRmsNorm] {
        let shapes = ROW_LENGTHS.map(|len| vec![ELEMENTS / len, len]);
        kernel(&mut criterion, op, &shapes)?;
    }
    let shapes = ROW_LENGTHS.map(|len| vec![8, ELEMENTS / len / 8, len]);
    kernel(&mut criterion, Op::ModulatedLayerNorm, &shapes)?;
    residual(&mut criterion)?;
    layout(&mut criterion)?;
    few_and_long(&mut criterion)?;
    for op in [
        Op::BatchNorm,
        Op::BatchNormInference,
        Op::GroupNorm,
        Op::InstanceNorm,
        Op::SwitchNorm,
        Op::GroupNormSilu,
        Op::BatchNormRelu,
    ] {
        // A single pixel has no statistics of its own; for batch norm it is the kernel of `[N, C]`.
        let own = matches!(op, Op::InstanceNorm | Op::SwitchNorm);
        let sides = &SIDES[usize::from(own)..];
        let maps = sides.iter().map(|&side| {
            let samples = (ELEMENTS / (CHANNELS * side * side)).max(1);
            vec![samples, CHANNELS, side, side]
        });
        kernel(&mut criterion, op, &maps.collect::<Vec<_>>())?;
    }
    criterion.final_summary();
    Ok(())
}

fn kernel(criterion: &mut Criterion, op: Op, shapes: &[Vec<usize>]) -> Result<()> {
    for &pass in op.passes() {
        if pass == Pass::TrainStep && op.passes().contains(&Pass::Backward) {
            continue;
        }
        let mut group = criterion.benchmark_group(format!("{}/{}", op.name(), pass.name()));
        for dtype in DTYPES {
            for shape in shapes {
                let case = Case::new(op, shape, dtype);
                group.throughput(Throughput::Bytes(case.bytes(pass) as u64));
                let id = BenchmarkId::new(dtype.as_str(), case.shape_name());
                // Criterion calls this for selected benchmarks only, so that the others cost
                // nothing.
                group.bench_with_input(id, &case, |bencher, case| {
                    let step = step(case, pass).expect("the case is one that the layer takes");
                    bencher.iter(|| black_box(step()));
                });
            }
        }
        group.finish();
    }
    Ok(())
}

/// Channels behind the pixels: read as they are, copied first, or normalized where they lie.
fn layout(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group("layout/forward");
    for (n, c, side) in [(32, 64, 56), (8, 256, 14)] {
        let pixels = Tensor::randn(0f32, 1., (n, side, side, c), &Device::Cpu)?;
        let maps = pixels.permute((0, 3, 1, 2))?;
        let whole = maps.contiguous()?;
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        let batch = batch_norm(c, 1e-5, vb.pp("batch"))?;
        let last = layer_norm(c, 1e-5, vb.pp("last"))?;
        let options = LayerNormOptions {
            channels_first: true,
            ..Default::default()
        };
        let first = layer_norm(c, options, vb.pp("first"))?;
        let name = format!("{n}x{c}x{side}x{side}");
        let mut bench = |what: &str, run: &dyn Fn() -> Result<Tensor>| {
            group.bench_function(BenchmarkId::new(what, &name), |b| b.iter(run));
        };
        bench("BatchNorm, contiguous", &|| batch.forward_t(&whole, true));
        bench("BatchNorm, channels last", &|| batch.forward_t(&maps, true));
        bench("BatchNorm, channels last, copied first", &|| {
            batch.forward_t(&maps.contiguous()?, true)
        });
        bench("LayerNorm, last axis", &|| last.forward(&pixels));
        bench("LayerNorm, channels_first", &|| first.forward(&whole));
    }
    group.finish();
    Ok(())
}

/// Rows, groups and channels that are fewer than the threads of a machine.
fn few_and_long(criterion: &mut Criterion) -> Result<()> {
    use candle_norm::internals;
    let mut group = criterion.benchmark_group("few_and_long");
    let one_group = internals::Op::GroupNorm { num_groups: 1 };
    for (name, op, dims) in [
        ("LayerNorm", internals::Op::LayerNorm, vec![1, 1 << 23]),
        ("GroupNorm of one group", one_group, vec![1, 64, 112, 112]),
        ("BatchNorm", internals::Op::BatchNorm, vec![32, 3, 224, 224]),
    ] {
        let noise = || Tensor::randn(0f32, 1., dims.as_slice(), &Device::Cpu);
        let (x, dy) = (noise()?, noise()?);
        let weight = Tensor::ones(dims[1], DType::F32, &Device::Cpu)?;
        let bias = weight.zeros_like()?;
        let forward = || internals::saved(op.clone(), &x, Some(&weight), Some(&bias), 1e-5);
        let saved = forward()?;
        group.bench_function(BenchmarkId::new("forward", name), |b| b.iter(forward));
        group.bench_function(BenchmarkId::new("backward", name), |b| {
            b.iter(|| saved.backward(&dy));
        });
    }
    group.finish();
    Ok(())
}

/// A residual added and the sum normalized, in one pass and one after the other.
fn residual(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group("residual/forward");
    for dtype in [DType::F32, DType::BF16] {
        for (rows, len) in [(128, 768), (4096, 768), (16384, 1024)] {
            let noise = || Tensor::randn(0f32, 1., (rows, len), &Device::Cpu)?.to_dtype(dtype);
            let (x, residual) = (noise()?, noise()?);
            let weight = Tensor::ones(len, dtype, &Device::Cpu)?;
            let bias = weight.zeros_like()?;
            let (w, bias) = (Some(&weight), Some(&bias));
            let name = format!("{}/{rows}x{len}", dtype.as_str());
            group.bench_function(BenchmarkId::new("at once", &name), |bencher| {
                bencher.iter(|| ops::add_layer_norm(&x, &residual, len, [w, bias], 1e-5));
            });
            group.bench_function(BenchmarkId::new("apart", &name), |bencher| {
                bencher.iter(|| {
                    let sum = (&x + &residual)?;
                    Ok::<_, Error>((ops::layer_norm(&sum, len, w, bias, 1e-5)?, sum))
                });
            });
        }
    }
    group.finish();
    Ok(())
}

fn step(case: &Case, pass: Pass) -> Result<step::Step> {
    let inputs = Inputs::new(case)?;
    match pass {
        Pass::Forward => step::forward(case, &inputs, ours::layer),
        Pass::Backward => ours::backward(case, &inputs),
        Pass::TrainStep => step::train_step(case, &inputs, ours::layer),
    }
}
