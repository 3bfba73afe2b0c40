//! Checkpoints of PyTorch and others load by every route that candle has, and give the outputs that
//! PyTorch gave.
//!
//! `scripts/make_checkpoints.py` writes the files: a state dict NAME.safetensors, and
//! NAME.io.safetensors with an input and PyTorch's output for it.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
use candle_nn::{Conv2dConfig, Optimizer, SGD, VarBuilder, VarMap};
use candle_norm::{
    Affine, InstanceNormOptions, WeightNormOptions, checkpoint, trainable_vars, weight_norm,
};
use safetensors::{Dtype, SafeTensors};

use testkit::data::values;
use testkit::table;
use testkit::tracked::{DEFAULTS, Settings, Tracked};

/// A stored state dict, the layer that it is of, and whether candle's own `VarMap::load` can read
/// it.
struct Checkpoint {
    name: &'static str,
    build: fn(VarBuilder) -> Result<Box<dyn ModuleT>>,
    plain: bool,
}

const CHECKPOINTS: [Checkpoint; 12] = [
    Checkpoint {
        name: "batch_norm2d",
        build: batch_norm,
        plain: true,
    },
    Checkpoint {
        name: "instance_norm2d",
        build: |vb| {
            let options = InstanceNormOptions {
                affine: Affine::WeightAndBias,
                track_running_stats: true,
                ..Default::default()
            };
            Ok(Box::new(candle_norm::instance_norm(3, options, vb)?))
        },
        plain: true,
    },
    Checkpoint {
        name: "switch_norm2d",
        build: |vb| Ok(Box::new(candle_norm::switch_norm(3, 1e-5, vb)?)),
        plain: false,
    },
    Checkpoint {
        name: "layer_norm",
        build: |vb| Ok(Box::new(candle_norm::layer_norm((3, 5), 1e-5, vb)?)),
        plain: true,
    },
    Checkpoint {
        name: "group_norm",
        build: |vb| Ok(Box::new(candle_norm::group_norm(2, 6, 1e-5, vb)?)),
        plain: true,
    },
    Checkpoint {
        name: "rms_norm",
        build: |vb| Ok(Box::new(candle_norm::rms_norm(7, 1e-6, vb)?)),
        plain: true,
    },
    Checkpoint {
        name: "weight_norm_linear",
        build: weight_norm_linear,
        plain: true,
    },
    Checkpoint {
        name: "weight_norm_conv2d",
        build: |vb| {
            let padded = Conv2dConfig {
                padding: 1,
                ..Default::default()
            };
            let options = WeightNormOptions::default();
            Ok(Box::new(weight_norm::conv2d(2, 3, 3, padded, options, vb)?))
        },
        plain: true,
    },
    Checkpoint {
        name: "weight_norm_old",
        build: weight_norm_linear,
        plain: false,
    },
    Checkpoint {
        name: "layer_norm_gamma_beta",
        build: |vb| {
            let vb = vb.pp("encoder").pp("LayerNorm");
            Ok(Box::new(candle_norm::layer_norm(6, 1e-12, vb)?))
        },
        plain: false,
    },
    Checkpoint {
        name: "batch_norm_no_counter",
        build: batch_norm,
        plain: false,
    },
    Checkpoint {
        name: "batch_norm_half_stats",
        build: batch_norm,
        plain: false,
    },
];

fn batch_norm(vb: VarBuilder) -> Result<Box<dyn ModuleT>> {
    Ok(Box::new(candle_norm::batch_norm(3, 1e-5, vb)?))
}

fn weight_norm_linear(vb: VarBuilder) -> Result<Box<dyn ModuleT>> {
    let options = WeightNormOptions::default();
    Ok(Box::new(weight_norm::linear(5, 4, options, vb)?))
}

impl Checkpoint {
    /// Asserts that a layer built from this checkpoint gives what PyTorch gave.
    fn reproduces(&self, layer: &dyn ModuleT, route: &str) -> Result<()> {
        let io = candle_core::safetensors::load(file(&format!("{}.io", self.name)), &Device::Cpu)?;
        let got = layer.forward_t(&io["input"], false)?;
        assert_eq!(got.dims(), io["output"].dims(), "{}, {route}", self.name);
        let (got, want) = (values(&got)?, values(&io["output"])?);
        let rms = (want.iter().map(|w| w * w).sum::<f64>() / want.len() as f64).sqrt();
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(
                (got - want).abs() <= 2e-6 * want.abs().max(rms),
                "{}, {route}: element {i} is {got}, in PyTorch {want}",
                self.name
            );
        }
        Ok(())
    }

    /// The layer with new variables, and the map that they are in.
    fn fresh(&self) -> Result<(VarMap, Box<dyn ModuleT>)> {
        let vars = VarMap::new();
        let layer = (self.build)(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
        Ok((vars, layer))
    }
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .join("tests/fixtures/checkpoints")
        .join(format!("{name}.safetensors"))
}

fn buffered(name: &str) -> Result<VarBuilder<'static>> {
    VarBuilder::from_buffered_safetensors(std::fs::read(file(name))?, DType::F32, &Device::Cpu)
}

#[test]
fn buffered_safetensors_reproduce_pytorch() -> Result<()> {
    for c in CHECKPOINTS {
        let layer = (c.build)(buffered(c.name)?)?;
        c.reproduces(&*layer, "from_buffered_safetensors")?;
    }
    Ok(())
}

#[test]
fn var_map_load_reproduces_pytorch_where_the_names_allow_it() -> Result<()> {
    for c in CHECKPOINTS {
        let (mut vars, layer) = c.fresh()?;
        let loaded = vars.load(file(c.name));
        assert_eq!(loaded.is_ok(), c.plain, "{}: {loaded:?}", c.name);
        if c.plain {
            c.reproduces(&*layer, "VarMap::load")?;
        }
    }
    Ok(())
}

#[test]
fn load_into_reproduces_pytorch() -> Result<()> {
    for c in CHECKPOINTS {
        let (vars, layer) = c.fresh()?;
        let report = checkpoint::load_into(&vars, file(c.name))?;
        assert!(report.missing.is_empty(), "{}: {report}", c.name);
        c.reproduces(&*layer, "load_into")?;
    }
    Ok(())
}

#[test]
fn pth_files_reproduce_pytorch() -> Result<()> {
    let c = &CHECKPOINTS[0];
    let path = file(c.name).with_extension("pth");
    let vb = VarBuilder::from_pth(&path, DType::F32, &Device::Cpu)?;
    let layer = (c.build)(vb.clone())?;
    c.reproduces(&*layer, "from_pth")?;
    let counted = candle_norm::batch_norm(3, 1e-5, vb)?;
    assert_eq!(counter(&counted)?, 7);
    Ok(())
}

fn counter(norm: &candle_norm::BatchNorm) -> Result<i64> {
    let stats = norm.running_stats().expect("a layer that tracks");
    Ok(stats.snapshot()?.num_batches_tracked)
}

#[test]
fn load_into_says_what_it_did() -> Result<()> {
    let load = |name: &str| -> Result<_> {
        let c = CHECKPOINTS
            .iter()
            .find(|c| c.name == name)
            .expect("a name of the table");
        let (vars, _layer) = c.fresh()?;
        checkpoint::load_into(&vars, file(name))
    };
    let pairs = |pairs: &[(&str, &str)]| -> Vec<_> {
        let owned = |(to, from): &(&str, &str)| (to.to_string(), from.to_string());
        pairs.iter().map(owned).collect()
    };
    let old = load("weight_norm_old")?;
    let [g, v] = [0, 1].map(|n| format!("parametrizations.weight.original{n}"));
    assert_eq!(old.renamed, pairs(&[(&g, "weight_g"), (&v, "weight_v")]));
    let old = load("layer_norm_gamma_beta")?;
    let [gamma, beta] = ["gamma", "beta"].map(|name| format!("encoder.LayerNorm.{name}"));
    let [weight, bias] = ["weight", "bias"].map(|name| format!("encoder.LayerNorm.{name}"));
    assert_eq!(old.renamed, pairs(&[(&bias, &beta), (&weight, &gamma)]));
    assert_eq!(
        load("batch_norm_no_counter")?.counters_reset,
        ["num_batches_tracked"]
    );
    for c in CHECKPOINTS.iter().filter(|c| c.plain) {
        let report = load(c.name)?;
        let silent = report.renamed.is_empty() && report.counters_reset.is_empty();
        let whole = report.missing.is_empty() && report.unexpected.is_empty();
        assert!(silent && whole, "{}: {report}", c.name);
    }
    Ok(())
}

#[test]
fn a_negative_running_variance_is_refused_by_every_route() -> Result<()> {
    let name = "batch_norm_negative_var";
    let refused =
        |error: candle_core::Error| assert!(error.to_string().contains("running_var"), "{error}");
    let built = candle_norm::batch_norm(3, 1e-5, buffered(name)?);
    refused(built.expect_err("from_buffered_safetensors"));

    let (vars, _layer) = CHECKPOINTS[0].fresh()?;
    let before = bits(&vars)?;
    refused(checkpoint::load_into(&vars, file(name)).expect_err("load_into"));
    assert_eq!(bits(&vars)?, before, "all or nothing");

    // candle writes the variables itself, so that the layer can only notice when it uses them.
    let (mut vars, layer) = CHECKPOINTS[0].fresh()?;
    vars.load(file(name))?;
    let x = Tensor::ones((2, 3, 4, 4), DType::F32, &Device::Cpu)?;
    refused(layer.forward_t(&x, false).expect_err("VarMap::load"));
    Ok(())
}

/// A linear layer and a norm with running statistics, trained by plain gradient descent.
struct Model {
    vars: VarMap,
    linear: candle_nn::Linear,
    norm: Box<dyn ModuleT>,
    optimizer: SGD,
}

/// A norm of a [`Model`], with both kinds of momentum.
#[derive(Debug, Clone, Copy)]
struct ModelNorm {
    tracked: &'static Tracked,
    momentum: Option<f64>,
}

impl ModelNorm {
    /// Every norm with running statistics.
    fn all() -> impl Iterator<Item = Self> {
        table::tracked().flat_map(|tracked| {
            let with = move |momentum| Self { tracked, momentum };
            [Some(0.3), None].map(with)
        })
    }

    fn build(self, vb: VarBuilder) -> Result<Box<dyn ModuleT>> {
        let settings = Settings {
            momentum: self.momentum,
            ..DEFAULTS
        };
        Ok(self.tracked.build(6, settings, vb)?)
    }
}

impl Model {
    fn new(norm: ModelNorm) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let linear = candle_nn::linear(5, 5, vb.pp("linear"))?;
        let norm = norm.build(vb.pp("norm"))?;
        let optimizer = SGD::new(trainable_vars(&vars), 0.05)?;
        Ok(Self {
            vars,
            linear,
            norm,
            optimizer,
        })
    }

    /// One step on a batch that depends on nothing but its number.
    fn step(&mut self, number: usize) -> Result<Vec<u32>> {
        let wave = |i: usize| ((i * (number + 3)) as f32 * 0.37).sin() * 2. + 1.;
        let x = Tensor::from_vec((0..8 * 6 * 5).map(wave).collect(), (8, 6, 5), &Device::Cpu)?;
        let y = self.norm.forward_t(&self.linear.forward(&x)?, true)?;
        let loss = (&y * &x)?.sqr()?.mean_all()?;
        self.optimizer.backward_step(&loss)?;
        bits_of(&y)
    }

    fn infer(&self) -> Result<Vec<u32>> {
        let x = Tensor::arange(0f32, 60., &Device::Cpu)?.reshape((2, 6, 5))?;
        bits_of(&self.norm.forward_t(&self.linear.forward(&x)?, false)?)
    }
}

fn bits_of(t: &Tensor) -> Result<Vec<u32>> {
    let values = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

/// The bits of every variable by name, and its dtype.
fn bits(vars: &VarMap) -> Result<HashMap<String, (DType, Vec<u32>)>> {
    let data = vars.data().lock().expect("no thread panicked");
    data.iter()
        .map(|(name, var)| Ok((name.clone(), (var.dtype(), bits_of(var.as_tensor())?))))
        .collect()
}

#[test]
fn training_goes_on_after_save_and_load_bit_for_bit() -> Result<()> {
    type Load = fn(&mut VarMap, &std::path::Path) -> Result<()>;
    let routes: [(&str, Load); 2] = [
        ("VarMap::load", |vars, path| vars.load(path)),
        ("load_into", |vars, path| {
            checkpoint::load_into(vars, path).map(|_| ())
        }),
    ];
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    for norm in ModelNorm::all() {
        for (route, load) in routes {
            let what = format!("{norm:?}, {route}");
            let mut first = Model::new(norm)?;
            let fresh = bits(&first.vars)?;
            for number in 0..3 {
                first.step(number)?;
            }
            first.vars.save(&path)?;
            let saved = bits(&first.vars)?;
            for (variable, bits) in &saved {
                let stays = !norm.tracked.centered && variable == "norm.running_mean";
                let moved = bits != &fresh[variable];
                assert_eq!(moved, !stays, "{what}: {variable} moved: {moved}");
            }

            let mut second = Model::new(norm)?;
            load(&mut second.vars, &path)?;
            assert_eq!(bits(&second.vars)?, saved, "{what}: loaded");
            assert_eq!(second.infer()?, first.infer()?, "{what}: inference");
            for number in 3..6 {
                let y = first.step(number)?;
                assert_eq!(second.step(number)?, y, "{what}: step {number}");
            }
            assert_eq!(
                bits(&second.vars)?,
                bits(&first.vars)?,
                "{what}: trained on"
            );
            assert_eq!(
                second.infer()?,
                first.infer()?,
                "{what}: inference at the end"
            );
        }
    }
    Ok(())
}

#[test]
fn a_trained_layer_loads_from_a_buffer_bit_for_bit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    for norm in ModelNorm::all() {
        let mut trained = Model::new(norm)?;
        for number in 0..3 {
            trained.step(number)?;
        }
        trained.vars.save(&path)?;
        let bytes = std::fs::read(&path)?;
        let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)?;
        let loaded = norm.build(vb.pp("norm"))?;
        // The statistics move on from where they were, count included: it is the momentum of the
        // next batch.
        let x = Tensor::arange(0f32, 60., &Device::Cpu)?.reshape((2, 6, 5))?;
        for train in [false, true, false] {
            let want = bits_of(&trained.norm.forward_t(&x, train)?)?;
            let got = bits_of(&loaded.forward_t(&x, train)?)?;
            assert_eq!(got, want, "{norm:?}, train {train}");
        }
    }
    Ok(())
}

#[test]
fn a_half_precision_model_saves_its_statistics_in_f32() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    for dtype in [DType::F16, DType::BF16] {
        let vars = VarMap::new();
        let norm =
            candle_norm::batch_norm(2, 1e-5, VarBuilder::from_varmap(&vars, dtype, &Device::Cpu))?;
        let x = Tensor::arange(0f32, 16., &Device::Cpu)?.reshape((8, 2))?;
        norm.forward_t(&x.to_dtype(dtype)?, true)?;
        vars.save(&path)?;
        let bytes = std::fs::read(&path)?;
        let saved = SafeTensors::deserialize(&bytes)?;
        let mut names = saved.names();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "bias",
                "num_batches_tracked",
                "running_mean",
                "running_var",
                "weight"
            ]
        );
        let stored = |name: &str| saved.tensor(name).map(|t| (t.dtype(), t.shape().to_vec()));
        assert_eq!(stored("running_mean")?, (Dtype::F32, vec![2]));
        assert_eq!(stored("running_var")?, (Dtype::F32, vec![2]));
        assert_eq!(stored("num_batches_tracked")?, (Dtype::I64, vec![]));

        let mut again = VarMap::new();
        let vb = VarBuilder::from_varmap(&again, dtype, &Device::Cpu);
        let loaded = candle_norm::batch_norm(2, 1e-5, vb)?;
        again.load(&path)?;
        let mean = bits_of(norm.running_mean())?;
        assert_eq!(bits_of(loaded.running_mean())?, mean);
        // A tenth of 7 is a number that the model's dtype does not have.
        assert_ne!(bits_of(&norm.running_mean().to_dtype(dtype)?)?, mean);
        assert_eq!(counter(&loaded)?, 1);
    }
    Ok(())
}
