//! Elements normalized by statistics that other kernels formed, or by none, with weights of any
//! spread, a residual or an activation. Kernels in `pointwise.cu`.

use super::list;
use crate::{Launch, Types};

/// The bit of `flags` by which the normalized value is rounded before it meets the weight.
pub const ROUND_FIRST: i32 = 1;
/// The bit of `flags` by which `grad` is the gradient of the normalized value.
pub const TIMES_WEIGHT: i32 = 2;

/// A function after a normalization, by the number that kernels know it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Function {
    /// None.
    Identity = 0,
    /// `max(u, 0)`.
    Relu = 1,
    /// `min(max(u, 0), 6)`.
    Relu6 = 2,
    /// `u` above zero, else `u` times `slope`.
    LeakyRelu = 3,
    /// `u` times its logistic function.
    Silu = 4,
    /// `u` times its normal distribution function.
    Gelu = 5,
    /// The same by a hyperbolic tangent.
    GeluTanh = 6,
    /// `u · clamp(u + 3, 0, 6) / 6`.
    HardSwish = 7,
    /// The logistic function.
    Sigmoid = 8,
    /// `u · tanh(ln(1 + eᵘ))`.
    Mish = 9,
}

/// A tensor of `[outer, middle, inner]`, and where the weight and the statistics of an element are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointwise {
    /// The types of x and of the parameters.
    pub types: Types,
    /// The axes of the tensor.
    pub dims: [u64; 3],
    /// The weight of element `(o, m, i)` is at `o · weights[0] + m · weights[1] + i · weights[2]`;
    /// the last is zero or one.
    pub weights: [u64; 3],
    /// Its statistics are at `(o · stats[0] + m · stats[1]) / stats[2]`.
    pub stats: [u64; 3],
}

impl Pointwise {
    /// The sizes that kernels take: elements, the two inner axes, and both places.
    pub fn sizes(self) -> [u64; 9] {
        let [outer, middle, inner] = self.dims;
        let ([a, b, c], [d, e, f]) = (self.weights, self.stats);
        [outer * middle * inner, middle, inner, a, b, c, d, e, f]
    }

    /// `pointwise_forward`. Arguments: `x, residual?, y, weight?, bias?, mean?, rest?, third?`,
    /// the sizes, `of_var: i32, eps: f64, offset: f64, flags: i32, function: i32, slope: f64`. The
    /// residual has the type of x; `offset` is added to weights.
    pub fn forward(self) -> Launch {
        self.launch("forward")
    }

    /// `pointwise_backward`. Arguments: `x, dy, grad?, wide?, dx?, dweight?, dbias?, weight?,
    /// bias?, ..` as those of [`forward`](Self::forward). `grad` and `wide` are of the
    /// accumulator's type; dweight and dbias have one value for each element.
    pub fn backward(self) -> Launch {
        self.launch("backward")
    }

    fn launch(self, what: &str) -> Launch {
        let slots = self.sizes()[0].div_ceil(self.types.x().lanes() as u64);
        Launch {
            kernel: format!("pointwise_{what}_{}", self.types.name()),
            grid: list(slots.div_ceil(256)),
            block: [256, 1, 1],
            shared: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::{check, check_list, tensor};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_elements_go_beyond_the_limits((types, dims) in tensor::<3>()) {
            let elements = Pointwise { types, dims, weights: [0, 1, 0], stats: [1, 0, 1] };
            let slots = dims.iter().product::<u64>().div_ceil(types.x().lanes() as u64);
            for launch in [elements.forward(), elements.backward()] {
                check(&launch)?;
                check_list(&launch, slots.div_ceil(256))?;
            }
        }
    }
}
