//! Terms of a loss on one scale.

use candle_core::{DType, Device, Tensor, Var};
use candle_norm::scaling::{Archive, LossBalancer, LossBalancerOptions, Seen};

use testkit::data::{tensor, values};

fn terms(losses: &[f64]) -> Vec<Tensor> {
    let term = |l: &f64| Tensor::new(*l, &Device::Cpu).unwrap();
    losses.iter().map(term).collect()
}

fn number(t: &Tensor) -> f64 {
    values(t).unwrap()[0]
}

fn balancer(decay: f64) -> LossBalancer {
    LossBalancer::new(["dollars", "class"], LossBalancerOptions { decay }).unwrap()
}

#[test]
fn no_term_leads_by_its_unit() {
    let balancer = balancer(0.9);
    let total = balancer.balance(&terms(&[5e8, 0.7])).unwrap();
    assert!((number(&total) - 2.).abs() < 1e-12);

    // The same losses in other units give the same total at every step.
    let (dollars, cents) = (self::balancer(0.9), self::balancer(0.9));
    for step in 0..20 {
        let losses = [4. / f64::from(step + 1), 0.7];
        let total = number(&dollars.balance(&terms(&losses)).unwrap());
        let other = number(
            &cents
                .balance(&terms(&[losses[0] * 1e4, losses[1]]))
                .unwrap(),
        );
        assert!((total - other).abs() < 1e-12, "{total}, {other}");
    }
}

/// The running size is the weighted mean of all that came, the weights falling by the decay.
#[test]
fn the_size_is_the_bias_corrected_mean() {
    let decay: f64 = 0.8;
    let balancer = balancer(decay);
    let losses = [3., 1., 7., 2., 5.];
    for (t, loss) in losses.iter().enumerate() {
        balancer.balance(&terms(&[-loss, 0.])).unwrap();
        let weights: Vec<f64> = (0..=t).map(|i| decay.powi((t - i) as i32)).collect();
        let weighted: f64 = weights.iter().zip(losses).map(|(w, l)| w * l).sum();
        let want = weighted / weights.iter().sum::<f64>();
        let got = balancer.sizes();
        assert!((got[0] - want).abs() < 1e-12, "{got:?}, should be {want}");
        // A term that was always zero is divided by 1.
        assert_eq!(got[1], 1.);
    }
}

#[test]
fn the_gradient_is_that_of_the_terms_over_their_sizes() {
    let balancer = balancer(0.9);
    let x = Var::from_tensor(&tensor(&[3.], &[1], DType::F64).unwrap()).unwrap();
    let total = || {
        let cube = x.powf(3.).unwrap().sum_all().unwrap();
        let square = x.sqr().unwrap().sum_all().unwrap();
        [cube, square]
    };
    for _ in 0..2 {
        let loss = balancer.balance(&total()).unwrap();
        let sizes = balancer.sizes();
        let grads = loss.backward().unwrap();
        let got = number(grads.get(&x).expect("a gradient"));
        // d(x³)/dx = 27, d(x²)/dx = 6 at 3: nothing of the sizes, though they hold the terms.
        let want = 27. / sizes[0] + 6. / sizes[1];
        assert!((got - want).abs() < 1e-12, "{got}, should be {want}");
        x.set(&tensor(&[3.], &[1], DType::F64).unwrap()).unwrap();
    }
}

#[test]
fn half_precision_terms_are_added_in_f32() {
    let balancer = balancer(0.9);
    let half = |v: f64| tensor(&[v], &[], DType::F16).unwrap();
    let total = balancer.balance(&[half(6e-8), half(60000.)]).unwrap();
    assert_eq!(total.dtype(), DType::F32);
    assert!((number(&total) - 2.).abs() < 1e-6);
}

#[test]
fn evaluation_changes_nothing() {
    let balancer = balancer(0.9);
    balancer.balance(&terms(&[4., 2.])).unwrap();
    let total = balancer.evaluate(&terms(&[8., 1.])).unwrap();
    assert!((number(&total) - 2.5).abs() < 1e-12);
    assert_eq!(balancer.sizes(), [4., 2.]);
}

#[test]
fn a_restored_balancer_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("all.safetensors");
    let balancer = balancer(0.9);
    for i in 1..10 {
        balancer.balance(&terms(&[f64::from(i), 0.1])).unwrap();
    }
    let mut archive = Archive::default();
    archive.put("losses", &balancer.state().unwrap()).unwrap();
    archive.write(&file).unwrap();
    let state = Archive::read(&file).unwrap().state("losses").unwrap();
    let restored = LossBalancer::from_state(&state).unwrap();
    let again = self::balancer(0.5);
    again.restore(&state).unwrap();
    for _ in 0..3 {
        let all = [&balancer, &restored, &again];
        let [a, b, c] = all.map(|b| number(&b.balance(&terms(&[2., 3.])).unwrap()));
        assert_eq!([b.to_bits(), c.to_bits()], [a.to_bits(); 2]);
    }
    let other = LossBalancer::new(["dollars", "sound"], Default::default()).unwrap();
    assert!(other.restore(&state).is_err());
    let seen = |values: [u64; 2]| values.map(|values| Seen { values, nan: 0 }).to_vec();
    let with = |values| {
        let features = state.features().clone();
        state.clone().with_features(features, seen(values))
    };
    assert!(LossBalancer::from_state(&with([9, 9])).is_ok());
    for wrong in [[9, 8], [u64::MAX, u64::MAX]] {
        let message = LossBalancer::from_state(&with(wrong))
            .unwrap_err()
            .to_string();
        assert!(message.contains("a possible count"), "{message}");
    }
}

/// One over the size of such a term is beyond `f32`.
#[test]
fn the_gradient_of_a_tiny_term_is_finite() {
    let balancer = LossBalancer::new(["a"], Default::default()).unwrap();
    let x = Var::from_tensor(&tensor(&[1e-39], &[], DType::F32).unwrap()).unwrap();
    let total = balancer.balance(&[x.as_tensor().clone()]).unwrap();
    let grads = total.backward().unwrap();
    let want = 1. / f64::from(f32::MIN_POSITIVE);
    assert!((number(grads.get(&x).unwrap()) / want - 1.).abs() < 1e-6);
    assert!(
        (number(&total) / (1e-39 * want) - 1.).abs() < 1e-5,
        "{total}"
    );
}

#[test]
fn errors_change_nothing() {
    let balancer = balancer(0.9);
    balancer.balance(&terms(&[4., 2.])).unwrap();
    let vector = tensor(&[1., 2.], &[2], DType::F64).unwrap();
    let single = tensor(&[1.], &[], DType::F32).unwrap();
    let one = terms(&[1.]).remove(0);
    for (terms, expected) in [
        (
            terms(&[1.]),
            r#"expected 2 terms, got 1: feature 1 "class" is missing"#,
        ),
        (terms(&[1., 2., 3.]), "got 3: feature 2 is too many"),
        (
            terms(&[1., f64::NAN]),
            r#"expected a finite feature 1 "class", got NaN"#,
        ),
        (
            terms(&[f64::INFINITY, 1.]),
            r#"expected a finite feature 0 "dollars""#,
        ),
        (
            vec![one.clone(), vector],
            "as one number, got shape [2]; take its mean",
        ),
        (
            vec![one, single],
            "expected feature 1 \"class\" with dtype F64, got F32",
        ),
    ] {
        for result in [balancer.balance(&terms), balancer.evaluate(&terms)] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert_eq!(balancer.sizes(), [4., 2.]);
    }
    for decay in [-0.1, 1., f64::NAN] {
        let options = LossBalancerOptions { decay };
        let message = LossBalancer::new(["a"], options).unwrap_err().to_string();
        assert!(
            message.contains("expected decay from 0 to below 1"),
            "{message}"
        );
    }
    assert!(LossBalancer::new([""; 0], Default::default()).is_err());
    assert!(LossBalancer::new(["a", "a"], Default::default()).is_err());
}
