//! Options as configuration files have them, with the feature `serde`.

use candle_norm::scaling::{
    Causal, DriftOptions, EwmScalerOptions, MinMaxScalerOptions, Nan, OnDrift, SlidingScalerOptions,
};
use serde_json::{from_value, json, to_value};

#[test]
fn what_is_not_given_is_the_default_and_what_is_unknown_is_refused() {
    let read: MinMaxScalerOptions = from_value(json!({"clip": true, "nan": "ignore"})).unwrap();
    let wanted = MinMaxScalerOptions {
        clip: true,
        nan: Nan::Ignore,
        ..Default::default()
    };
    assert_eq!(read, wanted);
    assert!(from_value::<MinMaxScalerOptions>(json!({"clib": true})).is_err());
    let read: SlidingScalerOptions = from_value(json!({"window": 7})).unwrap();
    assert_eq!(read, SlidingScalerOptions::from(7));
    assert!(from_value::<SlidingScalerOptions>(json!({})).is_err());
    let read: EwmScalerOptions = from_value(json!({"alpha": 0.5, "causal": "before"})).unwrap();
    let wanted = EwmScalerOptions {
        causal: Causal::Before,
        ..EwmScalerOptions::alpha(0.5).unwrap()
    };
    assert_eq!(read, wanted);
    let options = DriftOptions {
        ks_p_value: None,
        ..Default::default()
    };
    assert_eq!(
        from_value::<DriftOptions>(to_value(options).unwrap()).unwrap(),
        options
    );
    let blend = to_value(OnDrift::Blend(0.5)).unwrap();
    assert_eq!(blend, json!({"blend": 0.5}));
}
