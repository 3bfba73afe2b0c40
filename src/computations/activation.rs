//! Activations after a normalization, in candle's tensor operations, with slopes of our own.
//!
//! candle's gradient of relu is 1 at 0, that of GELU has constants of six digits. So a kink is a
//! choice between two smooth functions, by a mask that has no gradient, and the normal distribution
//! function is built from exponentials. Exponentials are taken of numbers that are not positive:
//! nothing overflows, in the gradients of any order neither.

use std::f64::consts::FRAC_2_SQRT_PI;

use candle_core::{Result, Tensor};

/// A function after a normalization.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Activation {
    Relu,
    Relu6,
    LeakyRelu(f64),
    Silu,
    /// By the normal distribution function.
    Gelu,
    /// By a hyperbolic tangent.
    GeluTanh,
    HardSwish,
    Sigmoid,
    Mish,
}

/// The slope of the argument of the hyperbolic tangent of GELU at zero, and its cubic term.
pub(crate) const TANH_SLOPE: f64 = 0.797_884_560_802_865_4;
pub(crate) const TANH_CUBE: f64 = 0.044_715;

/// Chebyshev coefficients of `ln(erfc(z) / t) + z²` in `2t − 1`, with `t = 2 / (2 + z)` and `z ≥ 0`
/// (Press et al., Numerical Recipes, third edition, 6.2.2).
const ERFC: [f64; 28] = [
    -1.302_653_719_781_709_4,
    6.419_697_923_564_902e-1,
    1.947_647_320_418_583_6e-2,
    -9.561_514_786_808_63e-3,
    -9.465_953_444_820_36e-4,
    3.668_394_978_527_61e-4,
    4.252_332_480_690_7e-5,
    -2.027_857_811_253_4e-5,
    -1.624_290_004_647e-6,
    1.303_655_835_58e-6,
    1.562_644_172_2e-8,
    -8.523_809_591_5e-8,
    6.529_054_439e-9,
    5.059_343_495e-9,
    -9.913_641_56e-10,
    -2.273_651_22e-10,
    9.646_791_1e-11,
    2.394_038e-12,
    -6.886_027e-12,
    8.944_87e-13,
    3.130_92e-13,
    -1.127_08e-13,
    3.81e-16,
    7.106e-15,
    -1.523e-15,
    -9.4e-17,
    1.21e-16,
    -2.8e-17,
];

/// A tensor by parts: those above zero, and the others.
struct Sides {
    /// Ones above zero, else zeros.
    above: Tensor,
    /// `|u|`, whose gradient at zero is that of a number below.
    size: Tensor,
}

impl Sides {
    fn of(u: &Tensor) -> Result<Self> {
        let above = u.detach().gt(0f64)?;
        let sign = (above.to_dtype(u.dtype())? * 2.)?.affine(1., -1.)?;
        Ok(Self {
            size: (u * sign)?,
            above,
        })
    }

    fn pick(&self, above: &Tensor, below: &Tensor) -> Result<Tensor> {
        self.above.where_cond(above, below)
    }

    /// `e^−|u|`.
    fn decay(&self) -> Result<Tensor> {
        self.size.neg()?.exp()
    }
}

/// `σ(u)` and `1 − σ(u)`.
fn sigmoid(u: &Tensor) -> Result<[Tensor; 2]> {
    let sides = Sides::of(u)?;
    let e = sides.decay()?;
    let large = (&e + 1.)?.recip()?;
    let small = (e * &large)?;
    Ok([sides.pick(&large, &small)?, sides.pick(&small, &large)?])
}

/// The density of the normal distribution.
fn density(u: &Tensor) -> Result<Tensor> {
    (u.sqr()? * -0.5)?.exp()? * (0.5 * std::f64::consts::FRAC_1_SQRT_2 * FRAC_2_SQRT_PI)
}

/// `Φ(u)`.
fn normal_distribution(u: &Tensor) -> Result<Tensor> {
    let sides = Sides::of(u)?;
    let z = (&sides.size * std::f64::consts::FRAC_1_SQRT_2)?;
    let t = ((&z + 2.)?.recip()? * 2.)?;
    let x2 = t.affine(4., -2.)?;
    let mut d = x2.zeros_like()?;
    let mut before = d.clone();
    for c in ERFC[1..].iter().rev() {
        let next = ((&x2 * &d)? - &before)?.affine(1., *c)?;
        (before, d) = (d, next);
    }
    let series = ((x2 * d)?.affine(0.5, 0.5 * ERFC[0])? - before)?;
    let tail = ((t * (series - z.sqr()?)?.exp()?)? * 0.5)?;
    sides.pick(&tail.affine(-1., 1.)?, &tail)
}

/// The argument of the logistic function that GELU by a hyperbolic tangent is `u` times.
///
/// Beyond ±30 that function is 0 or 1, and the cube would overflow.
fn tanh_argument(u: &Tensor) -> Result<Tensor> {
    let far = |v: f64| u.detach().zeros_like()? + v;
    let u = &pieces(u, [-30., 30.], [&far(-30.)?, u, &far(30.)?])?;
    let cube = ((u.sqr()? * u)? * TANH_CUBE)?;
    (u + cube)? * (2. * TANH_SLOPE)
}

/// `tanh(ln(1 + eᵘ))`, what it is short of, and `σ(u)`: `[t, 1 − t², σ]`.
fn mish(u: &Tensor) -> Result<[Tensor; 3]> {
    let sides = Sides::of(u)?;
    let e = sides.decay()?;
    let square = e.sqr()?;
    let above = e.affine(2., 1.)?;
    let below = (&square + (&e * 2.)?)?;
    let rest = [(&square * 2.)?, (square.zeros_like()? + 2.)?];
    let numerator = sides.pick(&above, &below)?;
    let rest = sides.pick(&rest[0], &rest[1])?;
    let inverse = (&numerator + &rest)?.recip()?;
    let doubled = ((&numerator * 2.)? + &rest)?;
    let large = (&e + 1.)?.recip()?;
    let logistic = sides.pick(&large, &(e * &large)?)?;
    let short = ((rest * doubled)? * inverse.sqr()?)?;
    Ok([(numerator * inverse)?, short, logistic])
}

/// `low` up to `from`, `high` from `to` on, else `middle`; NaN goes to the middle.
fn pieces(u: &Tensor, [from, to]: [f64; 2], [low, middle, high]: [&Tensor; 3]) -> Result<Tensor> {
    let u = u.detach();
    let rest = u.ge(to)?.where_cond(high, middle)?;
    u.le(from)?.where_cond(low, &rest)
}

impl Activation {
    /// The values at `u`, of the accumulator's dtype.
    pub(super) fn value(self, u: &Tensor) -> Result<Tensor> {
        let zeros = || u.detach().zeros_like();
        match self {
            Self::Relu => u.detach().le(0f64)?.where_cond(&zeros()?, u),
            Self::Relu6 => pieces(u, [0., 6.], [&zeros()?, u, &(zeros()? + 6.)?]),
            Self::LeakyRelu(slope) => u.detach().le(0f64)?.where_cond(&(u * slope)?, u),
            Self::Silu => u * &sigmoid(u)?[0],
            Self::Gelu => u * normal_distribution(u)?,
            Self::GeluTanh => u * &sigmoid(&tanh_argument(u)?)?[0],
            Self::HardSwish => {
                let middle = ((u * (u + 3.)?)? / 6.)?;
                pieces(u, [-3., 3.], [&zeros()?, &middle, u])
            }
            Self::Sigmoid => {
                let [s, _] = sigmoid(u)?;
                Ok(s)
            }
            Self::Mish => u * &mish(u)?[0],
        }
    }

    /// The slopes at `u`, of the accumulator's dtype.
    pub(super) fn slope(self, u: &Tensor) -> Result<Tensor> {
        let constant = |v: f64| u.detach().zeros_like()? + v;
        match self {
            Self::Relu => u
                .detach()
                .gt(0f64)?
                .where_cond(&constant(1.)?, &constant(0.)?),
            Self::Relu6 => {
                let [zeros, ones] = [constant(0.)?, constant(1.)?];
                pieces(u, [0., 6.], [&zeros, &ones, &zeros])
            }
            Self::LeakyRelu(slope) => {
                let above = u.detach().gt(0f64)?;
                above.where_cond(&constant(1.)?, &constant(slope)?)
            }
            Self::Silu => {
                let [s, rest] = sigmoid(u)?;
                s * ((u * rest)? + 1.)?
            }
            Self::Gelu => normal_distribution(u)? + (u * density(u)?)?,
            Self::GeluTanh => {
                let [s, rest] = sigmoid(&tanh_argument(u)?)?;
                let zeros = constant(0.)?;
                let inner = pieces(u, [-30., 30.], [&zeros, u, &zeros])?
                    .sqr()?
                    .affine(6. * TANH_SLOPE * TANH_CUBE, 2. * TANH_SLOPE)?;
                &s + (u * ((&s * rest)? * inner)?)?
            }
            Self::HardSwish => {
                let middle = u.affine(1. / 3., 0.5)?;
                pieces(u, [-3., 3.], [&constant(0.)?, &middle, &constant(1.)?])
            }
            Self::Sigmoid => {
                let [s, rest] = sigmoid(u)?;
                s * rest
            }
            Self::Mish => {
                let [t, short, logistic] = mish(u)?;
                t + (u * (short * logistic)?)?
            }
        }
    }
}

/// The values of an activation that there may be.
pub(crate) fn activated(activation: Option<Activation>, u: Tensor) -> Result<Tensor> {
    match activation {
        Some(activation) => activation.value(&u),
        None => Ok(u),
    }
}
