//! Strided, sliced, broadcast and transposed tensors give what their contiguous copies give, to the
//! bit, and results are contiguous.

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::weight_norm;
use candle_norm::{BatchNormOptions, InstanceNormOptions, batch_norm, instance_norm, ops};
use proptest::prelude::*;

use super::{Case, cases, config, dtypes};
use testkit::compare::{assert_close, assert_same_bits, tolerance};
use testkit::data::{Draw, tensor, values, variable};
use testkit::subjects::{Params, Subject, backward, gradient};
use testkit::view::View;

/// A variable that holds a contiguous copy.
fn copied(view: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(&view.detach().force_contiguous()?)?.into_inner())
}

/// Runs `f` on views and on copies of them, with a strided cotangent and with a copy of that, and
/// compares.
fn check_views(
    what: &str,
    inputs: &[(Tensor, Tensor)],
    draw: &mut Draw,
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let views: Vec<Tensor> = inputs.iter().map(|(_, view)| view.clone()).collect();
    let copies = views.iter().map(copied).collect::<Result<Vec<_>>>()?;
    let (y, want) = (f(&views)?, f(&copies)?);
    assert!(
        y.is_contiguous() && want.is_contiguous(),
        "{what}: y is not contiguous"
    );
    assert_same_bits(&format!("{what}: y"), &y, &want);

    let (_, dy) = View::ReversedAndSliced.draw(y.dims(), y.dtype(), draw)?;
    let dy = dy.detach();
    let grads = backward(&y, &dy)?;
    let of_copies = backward(&want, &dy.force_contiguous()?)?;
    for (i, ((base, view), copy)) in inputs.iter().zip(&copies).enumerate() {
        let got = gradient(&grads, base);
        let of_copy = gradient(&of_copies, copy);
        assert!(
            got.is_contiguous() && of_copy.is_contiguous(),
            "{what}: gradient {i}"
        );
        // Where each element of the view comes from once, the gradient of the base is that of the
        // view, put in place.
        let want = gradient(&backward(view, &of_copy)?, base);
        let what = format!("{what}: gradient {i}");
        match view.elem_count() > base.elem_count() {
            false => assert_same_bits(&what, &got, &want),
            true => assert_close(&what, &got, &values(&want)?, 2. * tolerance(want.dtype())),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(120))]

    #[test]
    fn layers_on_views_of_the_input(case in cases(), dtypes in dtypes()) {
        let Case { dims, seed, affine, mut subject } = case;
        subject.eps = 1e-3;
        let mut draw = Draw::new(seed);
        let param_dims = subject.param_dims(&dims).to_vec();
        let param = |there: bool, draw: &mut Draw| {
            let count = param_dims.iter().product();
            there.then(|| variable(&draw.weight(count), &param_dims, dtypes.params)).transpose()
        };
        let params = Params {
            weight: param(affine.0, &mut draw).unwrap(),
            bias: param(affine.1, &mut draw).unwrap(),
        };
        for view in View::all(dims.len()) {
            let x = view.draw(&dims, dtypes.input, &mut draw).unwrap();
            let what = format!("{:?} of {dims:?} in {dtypes:?}, {view:?}", subject.kind);
            check_views(&what, &[x], &mut draw, |x| subject.forward(&x[0], &params)).unwrap();
        }
    }

    /// Channels that are more and fewer than a tile has, planes that are longer and shorter than a
    /// run, and what is left of both.
    #[test]
    fn batch_norm_of_channels_that_are_last(
        n in 1usize..4,
        c in 1usize..70,
        space in prop_oneof![(2usize..40, 1usize..9), (40usize..60, 40usize..60)],
        training in any::<bool>(),
        dtypes in dtypes(),
        seed in any::<u64>(),
    ) {
        let dims = [n, c, space.0, space.1];
        let mut draw = Draw::new(seed);
        let x = View::ChannelsLast.draw(&dims, dtypes.input, &mut draw).unwrap();
        let params = [(); 2].map(|()| {
            let param = variable(&draw.weight(c), &[c], dtypes.params).unwrap();
            (param.clone(), param)
        });
        let mean = tensor(&draw.normal(c), &[c], DType::F64).unwrap();
        let var = tensor(&draw.weight(c), &[c], DType::F64).unwrap().sqr().unwrap();
        let [weight, bias] = params;
        let what = format!("{dims:?} in {dtypes:?}, training: {training}");
        check_views(&what, &[x, weight, bias], &mut draw, |t| {
            let (weight, bias) = (Some(&t[1]), Some(&t[2]));
            match training {
                true => Ok(ops::batch_norm(&t[0], weight, bias, 1e-3)?.0),
                false => ops::batch_norm_inference(&t[0], [&mean, &var], weight, bias, 1e-3),
            }
        }).unwrap();
    }

    #[test]
    fn layers_with_views_as_parameters(case in cases(), dtypes in dtypes()) {
        let Case { dims, seed, subject, .. } = case;
        let subject = Subject { eps: 1e-3, ..subject };
        let mut draw = Draw::new(seed);
        let param_dims = subject.param_dims(&dims).to_vec();
        let x = variable(&draw.normal(dims.iter().product()), &dims, dtypes.input).unwrap();
        for view in View::all(param_dims.len()) {
            let what = format!("{:?} of {dims:?} in {dtypes:?}, {view:?}", subject.kind);
            let params: Vec<_> = (0..subject.kind.num_params())
                .map(|_| view.draw(&param_dims, dtypes.params, &mut draw).unwrap())
                .collect();
            check_views(&what, &params, &mut draw, |p| subject.forward(&x, &Params::new(p)))
                .unwrap();
        }
    }

    #[test]
    fn weight_norm_of_views(
        dims in super::shapes(),
        dim in proptest::option::of(0usize..2),
        dtypes in dtypes(),
        seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let g_dims: Vec<usize> = match dim {
            None => vec![],
            Some(d) => (0..dims.len()).map(|a| if a == d { dims[a] } else { 1 }).collect(),
        };
        for view in View::all(dims.len()) {
            let v = view.draw(&dims, dtypes.input, &mut draw).unwrap();
            let g = match dim {
                Some(d) => View::Sliced(d).draw(&g_dims, dtypes.params, &mut draw).unwrap(),
                None => {
                    let g = variable(&draw.weight(1), &[], dtypes.params).unwrap();
                    (g.clone(), g)
                }
            };
            let what = format!("{dims:?} in {dtypes:?}, {view:?}");
            let norm = |t: &[Tensor]| ops::weight_norm(&t[0], &t[1], dim);
            check_views(&what, &[v, g], &mut draw, norm).unwrap();
        }
    }

    /// Inference by running statistics, and what training adds to them.
    #[test]
    fn running_statistics_of_views(
        (n, c, space) in (1usize..4, 1usize..6, 2usize..9),
        instance in any::<bool>(),
        dtypes in dtypes(),
        seed in any::<u64>(),
    ) {
        let dims = [n, c, space];
        let build = || -> Result<(Box<dyn ModuleT>, _, _)> {
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, dtypes.params, &Device::Cpu);
            Ok(match instance {
                true => {
                    let options = InstanceNormOptions {
                        track_running_stats: true,
                        ..Default::default()
                    };
                    let layer = instance_norm(c, options, vb)?;
                    let (stats, frozen) = (layer.running_stats().cloned(), layer.frozen()?);
                    (Box::new(layer), stats, frozen)
                }
                false => {
                    let layer = batch_norm(c, BatchNormOptions::default(), vb)?;
                    let (stats, frozen) = (layer.running_stats().cloned(), layer.frozen()?);
                    (Box::new(layer), stats, frozen)
                }
            })
        };
        let mut draw = Draw::new(seed);
        for view in View::all(3) {
            let (a, a_stats, frozen) = build().unwrap();
            let (b, b_stats, _) = build().unwrap();
            let x = view.draw(&dims, dtypes.input, &mut draw).unwrap();
            a.forward_t(&x.1, true).unwrap();
            b.forward_t(&copied(&x.1).unwrap(), true).unwrap();
            let (a_stats, b_stats) = (a_stats.unwrap(), b_stats.unwrap());
            let (s, want) = (a_stats.snapshot().unwrap(), b_stats.snapshot().unwrap());
            assert_same_bits("mean", &s.mean, &want.mean);
            assert_same_bits("var", &s.var, &want.var);
            let what = format!("{view:?} in {dtypes:?}");
            let inference = |x: &[Tensor]| a.forward_t(&x[0], false);
            check_views(&what, std::slice::from_ref(&x), &mut draw, inference).unwrap();
            check_views(&what, &[x], &mut draw, |x| frozen.forward(&x[0])).unwrap();
        }
    }
}

/// Layers around linear maps make what they multiply contiguous: candle's product of a transposed
/// tensor with a broadcast one is wrong.
#[test]
fn weight_normalized_layers_on_views() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        let options = weight_norm::WeightNormOptions::default();
        let dense = weight_norm::linear(6, 3, options, vb.pp("linear"))?;
        let conv1d = weight_norm::conv1d(4, 3, 3, Default::default(), options, vb.pp("conv1d"))?;
        let conv2d = weight_norm::conv2d(4, 3, 3, Default::default(), options, vb.pp("conv2d"))?;
        let up1d =
            weight_norm::conv_transpose1d(4, 3, 3, Default::default(), options, vb.pp("up1d"))?;
        let up2d =
            weight_norm::conv_transpose2d(4, 3, 3, Default::default(), options, vb.pp("up2d"))?;
        let layers: [(&str, &dyn ModuleT, &[usize]); 5] = [
            ("linear", &dense, &[2, 5, 6]),
            ("conv1d", &conv1d, &[2, 4, 7]),
            ("conv2d", &conv2d, &[2, 4, 5, 6]),
            ("conv_transpose1d", &up1d, &[2, 4, 7]),
            ("conv_transpose2d", &up2d, &[2, 4, 5, 6]),
        ];
        let mut draw = Draw::new(12);
        for (name, layer, dims) in layers {
            for view in View::all(dims.len()) {
                let x = view.draw(dims, dtype, &mut draw)?;
                let what = format!("{name} in {dtype:?}, {view:?}");
                check_views(&what, &[x], &mut draw, |x| layer.forward_t(&x[0], true))?;
            }
        }
    }
    Ok(())
}

/// A view is what it says it is: this file would pass on contiguous tensors alone.
#[test]
fn views_are_not_contiguous() -> Result<()> {
    let mut draw = Draw::new(1);
    for view in View::all(3) {
        let (base, v) = view.draw(&[2, 3, 4], DType::F32, &mut draw)?;
        let outermost_slice = view == View::Sliced(0);
        assert_eq!(v.is_contiguous(), outermost_slice, "{view:?}");
        assert!(base.is_contiguous() && base.is_variable() && !v.is_variable());
    }
    let x = tensor(&[1., 2.], &[2], DType::F32)?;
    assert!(copied(&x.broadcast_as((3, 2))?)?.is_contiguous());
    Ok(())
}
