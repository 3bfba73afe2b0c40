//! Properties of the layers for every input, tried on random ones: values against float64,
//! identities between layers, symmetries, other forms of a layer, memory layouts, edges.
//!
//! The cases are the same on every run, unless `CANDLE_NORM_SEED` is set.

mod edges;
mod forms;
mod identities;
mod symmetries;
mod values;
mod views;

use candle_core::DType;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::Config;

use testkit::data::Draw;
use testkit::subjects::{DTypes, Numbers, Subject};
use testkit::table::kinds;

/// `cases` cases, the same on every run unless [`testkit::properties::SEED`] is set.
fn config(cases: u32) -> Config {
    testkit::properties::config(cases, 20150211)
}

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// Sizes that neither divide nor are divided by what an implementation may cut an axis into, up to
/// 4096.
const RAGGED: [usize; 13] = [
    31, 32, 33, 37, 49, 64, 100, 127, 257, 1031, 1536, 2053, 4096,
];

/// Shapes of rank 2 to 5: mostly small ones, some with one long axis.
fn shapes() -> impl Strategy<Value = Vec<usize>> {
    let small = prop::collection::vec(1usize..8, 2..=5);
    let long = (
        prop::collection::vec(1usize..4, 2..=4),
        any::<Index>(),
        prop::sample::select(&RAGGED[..]),
    );
    let long = long.prop_map(|(mut dims, axis, size)| {
        let axis = axis.index(dims.len());
        dims[axis] = size;
        dims
    });
    prop_oneof![3 => small, 2 => long]
}

/// A layer, an input shape, and a seed for its numbers.
#[derive(Debug, Clone)]
struct Case {
    subject: Subject,
    dims: Vec<usize>,
    /// Whether there is a weight, and a bias.
    affine: (bool, bool),
    seed: u64,
}

impl Case {
    /// Numbers whose rows have a mean of `mean` and a spread of 1.
    fn numbers(&self, mean: f64) -> Numbers {
        let mut draw = Draw::new(self.seed);
        let n = self.dims.iter().product();
        let params = self.subject.param_dims(&self.dims).iter().product();
        Numbers {
            x: draw.normal(n).into_iter().map(|z| mean + z).collect(),
            dy: draw.normal(n),
            weight: self.affine.0.then(|| draw.weight(params)),
            bias: self.affine.1.then(|| draw.normal(params)),
        }
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let affine = (any::<bool>(), any::<bool>());
    let eps = prop::sample::select(vec![1e-5, 1e-3, 1e-12]);
    (shapes(), any::<Index>(), affine, eps, any::<u64>()).prop_map(
        |(dims, kind, (weight, bias), eps, seed)| {
            let kind = *kind.get(&kinds(&dims));
            Case {
                subject: Subject::new(kind, eps),
                dims,
                affine: (weight, bias && kind.has_bias()),
                seed,
            }
        },
    )
}

/// A dtype for inputs, and one for parameters that goes with it.
fn dtypes() -> impl Strategy<Value = DTypes> {
    let mixed = |input| DTypes {
        input,
        params: DType::F32,
    };
    let mut all: Vec<DTypes> = FLOATS.map(DTypes::from).to_vec();
    all.extend([mixed(DType::F16), mixed(DType::BF16)]);
    prop::sample::select(all)
}
