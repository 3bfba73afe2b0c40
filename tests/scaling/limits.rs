//! States at the limits of numbers: refused, or what they become is accepted; never saved and then
//! refused.

use candle_core::Result;
use candle_norm::scaling::{
    DriftMonitor, DriftOptions, LossBalancer, Nan, Scaler, Seen, State, from_state,
};

use super::kinds::{each_of_all, rows};
use candle_core::DType;
use testkit::data::{tensor, values};

const MOST: u64 = 1 << 53;

/// Any state that a scaler reaches is one that a file may have, and an error leaves it as it was.
#[track_caller]
fn goes_on(what: &str, scaler: &dyn Scaler) {
    for more in [[1., 2.], [-3., 1e6], [1e145, -1e145], [1e300, -1e300]] {
        let before = format!("{:?}", scaler.state().unwrap());
        if scaler.partial_fit(&rows(&more, 2)).is_err() {
            assert_eq!(format!("{:?}", scaler.state().unwrap()), before, "{what}");
        }
        let state = scaler.state().unwrap();
        let restored = from_state(&state).unwrap_or_else(|e| panic!("{what}: {e}: {state:?}"));
        assert_eq!(
            format!("{:?}", restored.state().unwrap()),
            format!("{state:?}")
        );
        let _ = restored.transform(&rows(&more, 2));
    }
}

/// A state with other counts.
fn counted(state: &State, seen: Seen) -> State {
    let features = state.features().clone();
    state.clone().with_features(features, vec![seen; 2])
}

#[test]
fn counts_end_where_a_file_ends_them() {
    each_of_all(|kind, build| {
        let scaler = build(Nan::Ignore);
        scaler.fit(&rows(&[1., 2., 3., 5., 4., 4.], 2)).unwrap();
        let state = scaler.state().unwrap();
        for (values, nan) in [
            (MOST, 0),
            (MOST - 1, 0),
            (3, MOST),
            (MOST, MOST),
            (MOST + 1, 0),
            (u64::MAX, 0),
        ] {
            if let Ok(restored) = from_state(&counted(&state, Seen { values, nan })) {
                goes_on(&format!("{kind}, {values} and {nan}"), &*restored);
                let nan = rows(&[f64::NAN; 2], 2);
                let _ = restored.partial_fit(&nan);
                from_state(&restored.state().unwrap()).unwrap();
            }
        }
    });
    // Those that keep a count of what they saw refuse what is one too many, and say so.
    for kind in [
        "StandardScaler",
        "MinMaxScaler",
        "MaxAbsScaler",
        "SlidingScaler",
        "EwmScaler",
    ] {
        each_of_all(|name, build| {
            if name == kind {
                let scaler = build(Nan::Refuse);
                scaler.fit(&rows(&[1., 2., 3., 5.], 2)).unwrap();
                let full = counted(
                    &scaler.state().unwrap(),
                    Seen {
                        values: MOST,
                        nan: 0,
                    },
                );
                let full = from_state(&full).unwrap();
                let told = full
                    .partial_fit(&rows(&[1., 2.], 2))
                    .unwrap_err()
                    .to_string();
                assert!(
                    told.contains("at most 9007199254740992 values of feature 0"),
                    "{told}"
                );
                assert_eq!(full.seen()[0].values, MOST);
                let told = full.merge(&*full.snapshot()).unwrap_err().to_string();
                assert!(told.contains(kind), "{told}");
            }
        });
    }
}

/// Every number of every state, as large, as small and as wrong as numbers are.
#[test]
fn numbers_at_their_limits_are_refused_or_go_on() {
    each_of_all(|kind, build| {
        let scaler = build(Nan::Ignore);
        scaler.fit(&rows(&[1., 2., 3., 5., 4., 4.], 2)).unwrap();
        scaler
            .partial_fit(&rows(&[7., f64::NAN, 1., 2.], 2))
            .unwrap();
        // Where weights are known, they are a part of the state.
        let weight = tensor(&[0.5], &[1], DType::F64).unwrap();
        let _ = scaler.partial_fit_weighted(&rows(&[2., 3.], 2), &weight);
        let state = scaler.state().unwrap();
        assert!(kind != "StandardScaler" || state.tensor("weight").is_ok());
        let names = [
            "weight",
            "weight_squares",
            "mean",
            "mean_error",
            "m2",
            "pairs",
            "var",
            "gap",
            "min",
            "max",
            "rows",
            "middle",
            "recent",
            "monitor.reference",
            "monitor.recent",
            "scaler.mean",
            "scaler.m2",
            "scaler.weight",
        ];
        let mut tried = 0;
        for name in names {
            let Ok(tensor_of_state) = state.tensor(name) else {
                continue;
            };
            let dims = tensor_of_state.dims().to_vec();
            let good = values(tensor_of_state).unwrap();
            for place in 0..good.len() {
                for limit in [
                    1.7e308,
                    -1.7e308,
                    f64::MAX,
                    1e200,
                    -1e200,
                    1e146,
                    1e145,
                    -1e145,
                    1e-320,
                    -0.,
                    -1.,
                    0.5,
                    f64::NAN,
                    f64::INFINITY,
                    9007199254740992.,
                    9007199254740993e3,
                    0.,
                ] {
                    let mut values = good.clone();
                    values[place] = limit;
                    let other = tensor(&values, &dims, DType::F64).unwrap();
                    let other = state.clone().with_tensor(name, other);
                    if let Ok(restored) = from_state(&other) {
                        tried += 1;
                        goes_on(&format!("{kind}: {name} {place} of {limit:e}"), &*restored);
                    }
                }
            }
        }
        println!("{kind}: {tried} states went on");
    });
}

/// The words of the issue: a mean that no sum of squares can be taken about, and the infinite
/// variance that would follow.
#[test]
fn a_mean_whose_squares_no_number_holds_is_refused() {
    each_of_all(|kind, build| {
        if kind != "EwmScaler" {
            return;
        }
        let scaler = build(Nan::Refuse);
        scaler.fit(&rows(&[1., 2., 3., 5.], 2)).unwrap();
        let far = scaler
            .state()
            .unwrap()
            .with_values("mean", &[1.7e308, 1.])
            .unwrap();
        let told = from_state(&far).unwrap_err().to_string();
        assert!(
            told.contains("EwmScaler: expected a possible mean of feature 0"),
            "{told}"
        );
    });
}

#[test]
fn a_monitor_counts_no_farther_than_a_file() -> Result<()> {
    let options = DriftOptions {
        bins: 2,
        window: 4,
        min_count: 2,
        ..Default::default()
    };
    let monitor = DriftMonitor::new(options)?;
    monitor.fit(&rows(&[1., 2., 3., 5.], 2))?;
    monitor.observe(&rows(&[1., 2.], 2))?;
    let state = monitor.state()?;
    for step in [MOST - 1, MOST, MOST + 1, u64::MAX] {
        let Ok(restored) = DriftMonitor::from_state(&state.clone().with_option("step", step))
        else {
            assert!(step > MOST);
            continue;
        };
        for _ in 0..3 {
            let before = restored.steps();
            match restored.observe(&rows(&[1., 2.], 2)) {
                Ok(_) => assert!(restored.steps() <= MOST),
                Err(e) => {
                    assert!(
                        e.to_string().contains("at most 9007199254740992 rows"),
                        "{e}"
                    );
                    assert_eq!(restored.steps(), before);
                }
            }
            DriftMonitor::from_state(&restored.state()?)?;
        }
    }
    // A monitor that were quiet for ever would see nothing.
    let quiet = state
        .clone()
        .with_option("quiet", format!("{} 0", u64::MAX));
    assert!(DriftMonitor::from_state(&quiet).is_err());
    Ok(())
}

#[test]
fn a_balancer_goes_no_farther_than_a_file() -> Result<()> {
    let balancer = LossBalancer::new(["a", "b"], Default::default())?;
    let terms = |a: f64| [a, 1.].map(|v| tensor(&[v], &[], DType::F64).unwrap());
    balancer.balance(&terms(2.))?;
    let state = balancer.state()?;
    for running in [1.7e308, f64::MAX, 1e-320, 0., 1.] {
        for steps in [0, 1, MOST - 1, MOST, MOST + 1] {
            let seen = Seen {
                values: steps,
                nan: 0,
            };
            let other = counted(&state, seen).with_values("running", &[running, 1.])?;
            let Ok(restored) = LossBalancer::from_state(&other) else {
                continue;
            };
            for loss in [f64::MAX, 1e-320, 0., 5.] {
                let before = format!("{:?}", restored.state()?);
                if restored.balance(&terms(loss)).is_err() {
                    assert_eq!(format!("{:?}", restored.state()?), before);
                }
                LossBalancer::from_state(&restored.state()?)?;
                assert!(
                    restored.sizes().iter().all(|s| s.is_finite()),
                    "{running} {steps}"
                );
            }
        }
    }
    let full = counted(
        &state,
        Seen {
            values: MOST,
            nan: 0,
        },
    );
    let told = LossBalancer::from_state(&full)?
        .balance(&terms(1.))
        .unwrap_err();
    assert!(
        told.to_string().contains("at most 9007199254740992 steps"),
        "{told}"
    );
    Ok(())
}
