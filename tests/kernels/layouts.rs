//! Inputs and cotangents that lie in memory in other ways: channels-last, sliced, transposed,
//! broadcast.

use candle_core::{DType, Device, Result, Tensor};
use candle_norm::{internals, ops};

use crate::common::compare::{assert_close, assert_gradient};
use crate::common::data::{Draw, tensor, values, variable};
use crate::common::oracle::{self, Gradient, along};
use crate::common::subjects::{DTypes, Kind, Numbers, Params, Subject, backward, gradient};
use crate::common::view::View;
use crate::{FORMS, Stamp, numbers};

/// Layers with shapes whose planes are shorter and longer than lanes.
fn subjects() -> Vec<(Subject, Vec<usize>)> {
    let maps = [vec![3, 6, 5], vec![3, 4, 5, 7]];
    let kinds = |dims: &[usize]| {
        let rank = dims.len();
        let rms = |axes| Kind::Rms { axes, offset: 1. };
        [
            Kind::Layer { axes: 1 },
            Kind::Layer { axes: rank - 1 },
            Kind::LayerChannelsFirst,
            Kind::LayerNoMean,
            rms(1),
            rms(rank - 1),
            Kind::RmsChannelsFirst,
            Kind::Group { groups: 2 },
            Kind::Instance,
            Kind::Batch,
            Kind::BatchNoMean,
            Kind::Switch,
        ]
    };
    let mut all = vec![];
    for dims in maps {
        all.extend(kinds(&dims).map(|kind| (Subject::new(kind, 1e-3), dims.clone())));
    }
    // More channels than a tile has, and planes longer and shorter than a run.
    for dims in [vec![2, 37, 6, 7], vec![1, 18, 43, 49]] {
        for kind in [Kind::Batch, Kind::BatchNoMean] {
            all.push((Subject::new(kind, 1e-3), dims.clone()));
        }
    }
    for kind in [
        Kind::Layer { axes: 1 },
        Kind::Batch,
        Kind::Group { groups: 3 },
    ] {
        all.push((Subject::new(kind, 1e-3), vec![33, 18]));
    }
    all
}

/// Parameters of a layer, and its numbers, which are the same whatever the layout.
struct Parameters {
    tensors: Params,
    numbers: Numbers,
}

impl Parameters {
    fn new(subject: Subject, dims: &[usize], form: (bool, bool), dtypes: DTypes) -> Result<Self> {
        let numbers = numbers(subject, dims, form, 0.5).rounded(dtypes)?;
        let shape = subject.param_dims(dims);
        let param = |v: &Option<Vec<f64>>| {
            let v = v.as_ref();
            v.map(|v| variable(v, shape, dtypes.params)).transpose()
        };
        let tensors = Params {
            weight: param(&numbers.weight)?,
            bias: param(&numbers.bias)?,
        };
        Ok(Self { tensors, numbers })
    }

    /// Results for `x` and `dy` by the oracle.
    fn want(&self, subject: Subject, dims: &[usize], x: &[f64], dy: &[f64]) -> Want {
        let (norm, n) = (subject.oracle(dims), &self.numbers);
        Want {
            y: norm.forward(x, n.weight.as_deref(), n.bias.as_deref()).y,
            back: norm.backward(x, n.weight.as_deref(), dy),
        }
    }
}

struct Want {
    y: Vec<f64>,
    back: oracle::Backward,
}

/// The element of its storage that each element of a view of shape `dims` is.
fn places(view: View, dims: &[usize]) -> Result<Vec<f64>> {
    let stored = view.stored(dims);
    let count = stored.iter().product::<usize>();
    let numbers = Tensor::arange(0f64, count as f64, &Device::Cpu)?;
    values(&view.of(&numbers.reshape(stored)?, dims)?)
}

/// The gradient of a storage from that of a view of it.
fn of_storage(view: View, dims: &[usize], of_view: &Gradient) -> Result<Gradient> {
    let count = view.stored(dims).iter().product();
    let mut all = Gradient {
        values: vec![0.; count],
        terms: vec![0.; count],
    };
    for (i, place) in places(view, dims)?.into_iter().enumerate() {
        all.values[place as usize] += of_view.values[i];
        all.terms[place as usize] += of_view.terms[i];
    }
    Ok(all)
}

pub(crate) fn layouts_of_the_input(stamp: Stamp) {
    let mut case = 0;
    for (subject, dims) in subjects() {
        for view in View::all(dims.len()) {
            input(stamp, case, subject, &dims, view).expect("tensors that fit");
            case += 1;
        }
    }
}

fn input(stamp: Stamp, case: usize, subject: Subject, dims: &[usize], view: View) -> Result<()> {
    let (form, dtypes) = (FORMS[case % FORMS.len()], stamp.dtypes(case / FORMS.len()));
    let params = Parameters::new(subject, dims, form, dtypes)?;
    let (base, x) = view.draw(dims, dtypes.input, &mut Draw::new(case as u64))?;
    let dy = tensor(&params.numbers.dy, dims, dtypes.input)?;
    let (y, grads) = stamp.run(|| {
        let y = subject.forward(&x, &params.tensors)?;
        let grads = backward(&y, &dy)?;
        Ok((y, grads))
    });
    let want = params.want(subject, dims, &values(&x)?, &params.numbers.dy);
    let what = |name: &str| {
        format!(
            "{:?}: {name} of {dims:?}, {view:?}, {dtypes:?}",
            subject.kind
        )
    };
    let tolerance = stamp.tolerance();
    assert!(y.is_contiguous(), "{}", what("y"));
    assert_close(&what("y"), &y, &want.y, tolerance);
    // Where an element of the storage is read several times, candle adds in the dtype.
    let repeated = matches!(view, View::Broadcast(_));
    let dx = of_storage(view, dims, &want.back.dx)?;
    let of_dx = if repeated { 2. * tolerance } else { tolerance };
    assert_gradient(&what("dx"), &gradient(&grads, &base), &dx, of_dx);
    if let Some(w) = &params.tensors.weight {
        assert_gradient(
            &what("dweight"),
            &gradient(&grads, w),
            &want.back.dweight,
            tolerance,
        );
    }
    if let Some(b) = &params.tensors.bias {
        assert_gradient(
            &what("dbias"),
            &gradient(&grads, b),
            &want.back.dbias,
            tolerance,
        );
    }
    Ok(())
}

/// candle hands contiguous gradients on; an op that is asked directly takes any.
pub(crate) fn layouts_of_the_cotangent(stamp: Stamp) {
    let mut case = 0;
    for (subject, dims) in subjects() {
        // These move axes around the op that would be asked; the mixture is several ops.
        if matches!(
            subject.kind,
            Kind::LayerChannelsFirst | Kind::RmsChannelsFirst | Kind::Switch
        ) {
            continue;
        }
        for view in View::all(dims.len()) {
            cotangent(stamp, case, subject, &dims, view).expect("tensors that fit");
            case += 1;
        }
    }
}

fn cotangent(
    stamp: Stamp,
    case: usize,
    subject: Subject,
    dims: &[usize],
    view: View,
) -> Result<()> {
    let (form, dtypes) = (FORMS[case % FORMS.len()], stamp.dtypes(case / FORMS.len()));
    let params = Parameters::new(subject, dims, form, dtypes)?;
    let x = variable(&params.numbers.x, dims, dtypes.input)?;
    let (_, dy) = view.draw(dims, dtypes.input, &mut Draw::new(case as u64))?;
    let (dx, dweight, dbias) = stamp.run(|| {
        let saved = internals::recorded(|| subject.forward(&x, &params.tensors))?;
        saved.backward(&dy)
    });
    // By position: a bias alone comes first.
    let (dweight, dbias) = match form {
        (false, true) => (None, dweight),
        _ => (dweight, dbias),
    };
    let want = params.want(subject, dims, &params.numbers.x, &values(&dy)?);
    let what = |name: &str| {
        format!(
            "{:?}: {name} of {dims:?}, {view:?}, {dtypes:?}",
            subject.kind
        )
    };
    let tolerance = stamp.tolerance();
    assert!(dx.is_contiguous() && dx.dims() == dims, "{}", what("dx"));
    assert_gradient(&what("dx"), &dx, &want.back.dx, tolerance);
    assert_eq!(
        (dweight.is_some(), dbias.is_some()),
        form,
        "{}",
        what("parameters")
    );
    for (name, got, want) in [
        ("dweight", dweight, want.back.dweight),
        ("dbias", dbias, want.back.dbias),
    ] {
        if let Some(got) = got {
            assert_gradient(&what(name), &got, &want, tolerance);
        }
    }
    Ok(())
}

/// Weight norm of views, along every axis.
pub(crate) fn layouts_of_a_direction(stamp: Stamp) {
    for dims in [vec![5, 18], vec![4, 3, 7], vec![3, 4, 5, 2]] {
        for dim in (0..dims.len()).map(Some).chain([None]) {
            for view in View::all(dims.len()) {
                direction(stamp, &dims, dim, view).expect("tensors that fit");
            }
        }
    }
}

fn direction(stamp: Stamp, dims: &[usize], dim: Option<usize>, view: View) -> Result<()> {
    let mut draw = Draw::new(3);
    let dtype: DType = stamp.dtype;
    let (base, v) = view.draw(dims, dtype, &mut draw)?;
    let rows = along(dims, &Vec::from_iter(dim));
    let mut g_dims = vec![1; if dim.is_some() { dims.len() } else { 0 }];
    if let Some(dim) = dim {
        g_dims[dim] = dims[dim];
    }
    let g = variable(&draw.weight(g_dims.iter().product()), &g_dims, dtype)?;
    let dw = tensor(&draw.normal(rows.len()), dims, dtype)?;
    let (w, grads) = stamp.run(|| {
        let w = ops::weight_norm(&v, &g, dim)?;
        let grads = backward(&w, &dw)?;
        Ok((w, grads))
    });
    let (v, g_values) = (values(&v)?, values(&g)?);
    let (dv, dg) = oracle::weight_norm_backward(&v, &g_values, &rows, &values(&dw)?);
    let what = |name: &str| format!("{name} of {dims:?} along {dim:?}, {view:?}");
    let tolerance = stamp.tolerance();
    assert_close(
        &what("w"),
        &w,
        &oracle::weight_norm(&v, &g_values, &rows),
        tolerance,
    );
    let dv = of_storage(view, dims, &dv)?;
    assert_gradient(&what("dv"), &gradient(&grads, &base), &dv, 2. * tolerance);
    assert_gradient(&what("dg"), &gradient(&grads, &g), &dg, tolerance);
    Ok(())
}
