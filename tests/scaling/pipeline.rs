//! Scaler, model and inverse in one file.

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
use candle_nn::{Linear, VarBuilder, VarMap};
use candle_norm::scaling::{
    Archive, LossBalancer, MinMaxScaler, Pipeline, Scaler, StandardScaler, TargetScaler,
};
use candle_norm::{BatchNorm, batch_norm};

use super::kinds::{everything, rows};
use testkit::data::{bits, values};

/// A model with two modes and statistics of its own.
#[derive(Debug)]
struct Model(Linear, BatchNorm, Linear);

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        let first = candle_nn::linear(2, 4, vb.pp("first"))?;
        let norm = batch_norm(4, 1e-5, vb.pp("norm"))?;
        Ok(Self(first, norm, candle_nn::linear(4, 1, vb.pp("last"))?))
    }
}

impl ModuleT for Model {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.2
            .forward(&self.1.forward_t(&self.0.forward(x)?, train)?)
    }
}

fn data() -> Tensor {
    rows(&[10_000., 2., 30_000., 4., 20_000., 4., 5_000., 2.], 2)
        .to_dtype(DType::F32)
        .unwrap()
}

fn pipeline() -> Pipeline<Model> {
    let vars = VarMap::new();
    let model = Model::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)).unwrap();
    let (inputs, prices) = (StandardScaler::default(), MinMaxScaler::default());
    let inputs = inputs.with_names(["mileage", "doors"]).unwrap();
    inputs.fit(&data()).unwrap();
    prices.fit(&rows(&[9_000., 41_000.], 1)).unwrap();
    let pipeline = Pipeline::new(model, vars)
        .with_inputs(inputs)
        .with_targets(TargetScaler::new(prices));
    // Running statistics that are not those of a fresh layer.
    pipeline.predict_scaled(&data(), true).unwrap();
    pipeline
}

#[test]
fn a_prediction_is_the_inverse_of_the_model_of_the_scaled_data() {
    let pipeline = pipeline();
    let x = pipeline.inputs().unwrap().transform(&data()).unwrap();
    let y = pipeline.model().forward_t(&x, false).unwrap();
    let want = pipeline.targets().unwrap().invert(&y).unwrap();
    assert_eq!(
        bits(&pipeline.predict(&data()).unwrap()).unwrap(),
        bits(&want).unwrap()
    );
    assert_eq!(
        bits(&pipeline.predict_scaled(&data(), false).unwrap()).unwrap(),
        bits(&y).unwrap()
    );
}

#[test]
fn one_file_restores_all_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pipeline.safetensors");
    let pipeline = pipeline();
    pipeline.save(&file).unwrap();
    let restored = Pipeline::load(&file, DType::F32, &Device::Cpu, Model::new).unwrap();
    assert_eq!(
        bits(&restored.predict(&data()).unwrap()).unwrap(),
        bits(&pipeline.predict(&data()).unwrap()).unwrap()
    );
    let inputs = |p: &Pipeline<Model>| everything(p.inputs().unwrap()).unwrap();
    assert_eq!(inputs(&restored), inputs(&pipeline));
    // The scaler that comes back can be fed.
    restored.inputs().unwrap().partial_fit(&data()).unwrap();
    assert_eq!(restored.inputs().unwrap().seen()[0].values, 8);
}

#[test]
fn one_car_at_a_time_is_the_same_prediction() {
    let pipeline = pipeline();
    let all = values(&pipeline.predict(&data()).unwrap()).unwrap();
    for (i, want) in all.iter().enumerate() {
        let one = pipeline.predict(&data().narrow(0, i, 1).unwrap()).unwrap();
        let got = values(&one).unwrap()[0];
        assert!(
            (got - want).abs() <= 1e-6 * want.abs(),
            "{got}, should be {want}"
        );
    }
}

#[test]
fn scalers_are_optional_and_more_can_be_added() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let pipeline = Pipeline::new(candle_nn::linear(2, 1, vb).unwrap(), vars);
    let balancer = LossBalancer::new(["a"], Default::default()).unwrap();
    let mut archive = pipeline.archive().unwrap();
    archive.put("losses", &balancer.state().unwrap()).unwrap();
    let build = |vb: VarBuilder| candle_nn::linear(2, 1, vb);
    let restored = Pipeline::from_archive(&archive, DType::F32, &Device::Cpu, build).unwrap();
    assert!(restored.inputs().is_none() && restored.targets().is_none());
    let x = data();
    assert_eq!(
        bits(&restored.predict(&x).unwrap()).unwrap(),
        bits(&pipeline.predict(&x).unwrap()).unwrap()
    );
}

#[test]
fn what_is_no_pipeline_of_the_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pipeline.safetensors");
    let pipeline = pipeline();
    pipeline.save(&file).unwrap();
    let load = || Pipeline::load(&file, DType::F32, &Device::Cpu, Model::new).map(|_| ());
    let smaller = |vb: VarBuilder| candle_nn::linear(2, 4, vb.pp("first"));
    let other = Pipeline::load(&file, DType::F32, &Device::Cpu, smaller).map(|_| ());
    let message = other.unwrap_err().to_string();
    assert!(
        message.contains("Pipeline: expected exactly the tensors of the model"),
        "{message}"
    );
    assert!(message.contains("norm.running_mean"), "{message}");

    // A scaler does not write over a pipeline.
    assert!(pipeline.inputs().unwrap().save(&file).is_err());
    std::fs::remove_file(&file).unwrap();
    pipeline.inputs().unwrap().save(&file).unwrap();
    let message = load().unwrap_err().to_string();
    assert!(
        message.contains(r#"expected a part "pipeline" in the file"#),
        "{message}"
    );

    pipeline.vars().save(&file).unwrap();
    let message = load().unwrap_err().to_string();
    assert!(message.contains(r#"got the parts []"#), "{message}");

    // A part that the pipeline says it has.
    let state = pipeline.archive().unwrap().state("pipeline").unwrap();
    let mut archive = Archive::default();
    archive.put("pipeline", &state).unwrap();
    archive.put_vars(pipeline.vars()).unwrap();
    archive.write(&file).unwrap();
    let message = load().unwrap_err().to_string();
    assert!(
        message.contains(r#"expected a part "pipeline_inputs""#),
        "{message}"
    );
}

/// A part that was never fitted is reported before there is a file, not where it is used.
#[test]
fn a_pipeline_that_was_never_fitted_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pipeline.safetensors");
    let build = || {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        Pipeline::new(candle_nn::linear(2, 1, vb).unwrap(), vars)
    };
    let inputs = StandardScaler::default();
    inputs.fit(&data()).unwrap();
    let targets = || TargetScaler::new(MinMaxScaler::default());
    let message = |p: &Pipeline<Linear>| p.save(&file).unwrap_err().to_string();
    let told = message(&build().with_inputs(inputs).with_targets(targets()));
    assert!(
        told.contains("Pipeline: expected fitted targets, got a MinMaxScaler without data"),
        "{told}"
    );
    let told = message(&build().with_inputs(StandardScaler::default()));
    assert!(
        told.contains("expected fitted inputs, got a StandardScaler without data"),
        "{told}"
    );
    assert!(!file.exists());
    let fitted = targets();
    fitted.fit(&rows(&[1., 2.], 1)).unwrap();
    build().with_targets(fitted).save(&file).unwrap();
    // A pipeline is no scaler.
    let told = candle_norm::scaling::load(&file).unwrap_err().to_string();
    assert!(
        told.contains("it is the file of a Pipeline: read it by Pipeline::load"),
        "{told}"
    );
}
