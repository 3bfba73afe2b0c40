//! Gradients through transform and inverse, in every dtype.

use candle_core::{DType, Tensor, Var};
use candle_norm::gradcheck::gradcheck;
use candle_norm::scaling::{MinMaxScaler, MinMaxScalerOptions, Scaler};

use super::kinds::{each, rows};
use testkit::data::{tensor, values};

const DATA: [f64; 12] = [1., 20., -3., 2.5, 80., 4., -1., 30., 9., 0.25, 55., 1.];

#[test]
fn gradients_pass_through_transform_and_inverse() {
    each(|kind, scaler| {
        scaler.fit(&rows(&DATA, 3)).unwrap();
        let x = rows(&[0.3, 25., -1., 2., 60., 3.], 3);
        gradcheck(|v| scaler.transform(&v[0])?.sqr(), std::slice::from_ref(&x))
            .unwrap_or_else(|e| panic!("{kind}: {e}"));
        gradcheck(
            |v| scaler.inverse_transform(&v[0])?.sqr(),
            &[(x / 50.).unwrap()],
        )
        .unwrap_or_else(|e| panic!("{kind}, inverse: {e}"));
    });
}

/// The gradient of `y = (x − center) / scale` is `1 / scale`, in half precision too.
#[test]
fn the_gradient_is_one_over_the_scale_in_every_dtype() {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
        each(|kind, scaler| {
            let data = rows(&DATA, 3).to_dtype(dtype).unwrap();
            scaler.fit(&data).unwrap();
            let x = Var::from_tensor(&data).unwrap();
            let y = scaler.transform(&x).unwrap();
            assert_eq!((y.dtype(), y.dims()), (dtype, data.dims()), "{kind}");
            let grads = y.backward().unwrap();
            let got = values(grads.get(&x).expect("a gradient")).unwrap();
            let unit = scaler
                .transform(&rows(&[0., 0., 0., 1., 1., 1.], 3))
                .unwrap();
            let unit = unit.to_vec2::<f64>().unwrap();
            for (i, got) in got.iter().enumerate() {
                let want = unit[1][i % 3] - unit[0][i % 3];
                assert!(
                    (got - want).abs() <= tolerance * want.abs(),
                    "{kind} {dtype:?}: {got}, should be {want}"
                );
            }
        });
    }
}

#[test]
fn what_is_clipped_has_no_gradient() {
    let options = MinMaxScalerOptions {
        clip: true,
        ..Default::default()
    };
    let scaler = MinMaxScaler::new(options).unwrap();
    scaler.fit(&rows(&[0., 10.], 1)).unwrap();
    let x = tensor(&[-5., 0., 4., 10., 25., f64::NAN], &[6, 1], DType::F64).unwrap();
    let x = Var::from_tensor(&x).unwrap();
    let y = scaler.transform(&x).unwrap();
    let cut = values(&y).unwrap();
    assert_eq!(cut[..5], [0., 0., 0.4, 1., 1.]);
    assert!(cut[5].is_nan());
    let grads = y.backward().unwrap();
    // The ends of the range are what was fitted, and not cut.
    let grads = values(grads.get(&x).unwrap()).unwrap();
    assert_eq!(grads, [0., 0.1, 0.1, 0.1, 0., 0.1]);
}

/// A loss in dollars reaches the parameters of a model that predicts scaled prices.
#[test]
fn a_loss_in_original_units_trains() {
    each(|kind, scaler| {
        scaler.fit(&rows(&DATA, 3)).unwrap();
        let prediction = Var::from_tensor(&rows(&[0.1, 0.2, 0.3], 3)).unwrap();
        let dollars = scaler.inverse_transform(&prediction).unwrap();
        let target = rows(&[1., 20., 3.], 3);
        let loss: Tensor = (&dollars - target)
            .unwrap()
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap();
        let grads = loss.backward().unwrap();
        let grad = values(grads.get(&prediction).expect("a gradient")).unwrap();
        // d/dy of mean (x(y) - t)²: 2 (x - t) / 3 · the scale, which is the distance of the
        // inverses of 0 and 1.
        let ends = scaler.inverse_transform(&rows(&[0., 0., 0., 1., 1., 1.], 3));
        let (ends, x) = (values(&ends.unwrap()).unwrap(), values(&dollars).unwrap());
        for (i, target) in [1., 20., 3.].into_iter().enumerate() {
            let want = 2. / 3. * (x[i] - target) * (ends[i + 3] - ends[i]);
            let near = (grad[i] - want).abs() <= 1e-12 * want.abs();
            assert!(near && want != 0., "{kind}: {grad:?}, should be {want}");
        }
    });
}
