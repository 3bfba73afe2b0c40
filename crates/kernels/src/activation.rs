//! Activations after a normalization, and functions in place of one: values, and slopes.
//!
//! Exponentials are taken of numbers that are not positive, so that none overflows, and everything
//! else follows from them by a division. A slope at a kink is the one that PyTorch takes.
//!
//! They are kernels of their own, on a few thousand values at a time that another kernel left in
//! the cache: inlined into every loop of every kernel, they would make these many times as large.

use std::mem::MaybeUninit;

use super::buffer::Scratch;
use super::loops::{map, map2};
use super::simd::{
    Approximate, ERF, ERF_RANGE, ERFC, Elem, Isa, Kernel, Lanes, Real, Vector, splat, zero,
};

/// A function after a normalization.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `max(u, 0)`, of slope 0 at 0.
    Relu,
    /// `min(max(u, 0), 6)`, of slope 0 at 0 and at 6.
    Relu6,
    /// `u` above 0, else `u` times this slope.
    LeakyRelu(f64),
    /// `u · σ(u)`.
    Silu,
    /// `u · Φ(u)`, with the distribution function of the normal distribution.
    Gelu,
    /// `u / 2 · (1 + tanh(√(2/π) · (u + 0.044715 u³)))`.
    GeluTanh,
    /// `u · clamp(u + 3, 0, 6) / 6`, of slope 0 at −3 and 1 at 3.
    HardSwish,
    /// `σ(u) = 1 / (1 + e⁻ᵘ)`.
    Sigmoid,
    /// `u · tanh(ln(1 + eᵘ))`.
    Mish,
}

/// The slope of the argument of the hyperbolic tangent of GELU at zero, and its cubic term.
const TANH_SLOPE: f64 = 0.797_884_560_802_865_4;
const TANH_CUBE: f64 = 0.044_715;

/// Arithmetic on lanes with numbers of `f64`.
#[derive(Clone, Copy)]
struct Math<I: Isa> {
    isa: I,
}

impl<I: Isa> Math<I> {
    #[inline(always)]
    fn number<T: Real>(self, v: f64) -> Lanes<I, T> {
        splat(self.isa, T::from_f64(v))
    }

    /// `eʳ − 1` and a power of two, of which `eˣ = eʳ · 2ⁿ` with `|r| ≤ ln 2 / 2`, for `x` that is
    /// not above zero by more than a rounding; below the least exponent those of that.
    #[inline(always)]
    fn exp_parts<T: Approximate>(self, x: Lanes<I, T>) -> [Lanes<I, T>; 2] {
        let least = self.number::<T>(T::LEAST_EXPONENT);
        // NaN stays NaN.
        let bounded = least.max(x);
        let shift = self.number::<T>(T::TO_INTEGER);
        let n = (bounded * self.number::<T>(std::f64::consts::LOG2_E) + shift) - shift;
        let [high, low] = T::LN_2.map(
            #[inline(always)]
            |v| self.number::<T>(v),
        );
        let r = (bounded - n * high) - n * low;
        let mut sum = self.number::<T>(T::EXP[0]);
        for c in &T::EXP[1..] {
            sum = sum * r + self.number::<T>(*c);
        }
        let two = (n + self.number::<T>(T::TO_INTEGER + T::BIAS)).integer_as_exponent();
        [sum * (r * r) + r, two]
    }

    /// `eˣ` for `x` that is not above zero by more than a rounding.
    #[inline(always)]
    fn exp<T: Approximate>(self, x: Lanes<I, T>) -> Lanes<I, T> {
        self.exp_of_parts::<T>(x, self.exp_parts::<T>(x))
    }

    #[inline(always)]
    fn exp_of_parts<T: Approximate>(
        self,
        x: Lanes<I, T>,
        [less_one, two]: [Lanes<I, T>; 2],
    ) -> Lanes<I, T> {
        let least = self.number::<T>(T::LEAST_EXPONENT);
        let result = (less_one + self.number::<T>(1.)) * two;
        // Zero for what was raised to the least exponent; a comparison with NaN fails.
        least.if_above(x, zero::<I, T>(self.isa), result)
    }

    /// `e^−|u|`.
    #[inline(always)]
    fn decay<T: Approximate>(self, u: Lanes<I, T>) -> Lanes<I, T> {
        let negative = zero::<I, T>(self.isa) - u;
        self.exp::<T>(zero::<I, T>(self.isa) - u.max(negative))
    }

    /// `σ(u)` and `1 − σ(u)`.
    #[inline(always)]
    fn sigmoid<T: Approximate>(self, u: Lanes<I, T>) -> [Lanes<I, T>; 2] {
        let e = self.decay::<T>(u);
        let one = self.number::<T>(1.);
        let large = one / (one + e);
        let small = e * large;
        let zero = zero::<I, T>(self.isa);
        [
            u.if_above(zero, large, small),
            u.if_above(zero, small, large),
        ]
    }

    /// The argument of the logistic function that GELU by a hyperbolic tangent is `u` times.
    #[inline(always)]
    fn tanh_argument<T: Approximate>(self, u: Lanes<I, T>) -> Lanes<I, T> {
        let cube = self.number::<T>(TANH_CUBE) * (u * u) * u;
        self.number::<T>(2. * TANH_SLOPE) * (u + cube)
    }

    /// `1 − erf(z)` for `z` that is not negative.
    #[inline(always)]
    fn erfc<T: Approximate>(self, z: Lanes<I, T>) -> Lanes<I, T> {
        let zero = zero::<I, T>(self.isa);
        let two = self.number::<T>(2.);
        let t = two / (two + z);
        let x2 = self.number::<T>(4.) * t - two;
        let (mut d, mut before) = (zero, zero);
        for c in ERFC[1..T::ERFC_TERMS].iter().rev() {
            let next = (x2 * d - before) + self.number::<T>(*c);
            (before, d) = (d, next);
        }
        let half = self.number::<T>(0.5);
        let series = half * (self.number::<T>(ERFC[0]) + x2 * d) - before;
        t * self.exp::<T>(series - z * z)
    }

    /// `Φ(u)`.
    #[inline(always)]
    fn normal_distribution<T: Approximate>(self, u: Lanes<I, T>) -> Lanes<I, T> {
        let zero = zero::<I, T>(self.isa);
        let (one, half) = (self.number::<T>(1.), self.number::<T>(0.5));
        let z = u.max(zero - u) * self.number::<T>(std::f64::consts::FRAC_1_SQRT_2);
        let tail = half * self.erfc::<T>(z);
        u.if_above(zero, one - tail, tail)
    }

    /// `tanh(u)` and its slope `4e / (1 + e)²` with `e = e^−2|u|`: `1 − e` is small near zero, and
    /// `1 − tanh²` far from it, so that neither is a difference of close numbers.
    #[inline(always)]
    fn tanh<T: Approximate>(self, u: Lanes<I, T>) -> [Lanes<I, T>; 2] {
        let zero = zero::<I, T>(self.isa);
        let (one, two) = (self.number::<T>(1.), self.number::<T>(2.));
        let size = u.max(zero - u);
        let x = zero - two * size;
        let [less_one, power] = self.exp_parts::<T>(x);
        let e = self.exp_of_parts::<T>(x, [less_one, power]);
        let short = zero - (less_one * power + (power - one));
        let inverse = one / (two - short);
        let above = short * inverse;
        let slope = self.number::<T>(4.) * e * (inverse * inverse);
        [u.if_above(zero, above, zero - above), slope]
    }

    /// `erf(u)` and its slope.
    #[inline(always)]
    fn erf<T: Approximate>(self, u: Lanes<I, T>) -> [Lanes<I, T>; 2] {
        let zero = zero::<I, T>(self.isa);
        let size = u.max(zero - u);
        let square = size * size;
        let mut sum = self.number::<T>(ERF[T::ERF_TERMS - 1]);
        for c in ERF[..T::ERF_TERMS - 1].iter().rev() {
            sum = sum * square + self.number::<T>(*c);
        }
        let far = self.number::<T>(1.) - self.erfc::<T>(size);
        let above = size.if_above(self.number::<T>(ERF_RANGE), far, size * sum);
        let slope = self.number::<T>(std::f64::consts::FRAC_2_SQRT_PI);
        let slope = slope * self.exp::<T>(zero - square);
        [u.if_above(zero, above, zero - above), slope]
    }

    /// `tanh(ln(1 + eᵘ))` as a fraction, and `e^−|u|`.
    #[inline(always)]
    fn mish<T: Approximate>(self, u: Lanes<I, T>) -> ([Lanes<I, T>; 2], Lanes<I, T>) {
        let e = self.decay::<T>(u);
        let zero = zero::<I, T>(self.isa);
        let (one, two) = (self.number::<T>(1.), self.number::<T>(2.));
        let twice = two * e;
        let square = e * e;
        let above = [one + twice, (one + twice) + two * square];
        let below = [square + twice, (square + twice) + two];
        let pick = |i: usize| u.if_above(zero, above[i], below[i]);
        ([pick(0), pick(1)], e)
    }
}

/// Odd function of bounded values, in place of a normalization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Squash {
    /// The hyperbolic tangent.
    Tanh,
    /// The error function.
    Erf,
}

/// The value at `u` and the slope there.
#[inline(always)]
pub(crate) fn squashed<T: Approximate, I: Isa>(
    isa: I,
    squash: Squash,
    u: Lanes<I, T>,
) -> [Lanes<I, T>; 2] {
    let math = Math { isa };
    match squash {
        Squash::Tanh => math.tanh::<T>(u),
        Squash::Erf => math.erf::<T>(u),
    }
}

/// The value of an activation at `u`.
#[inline(always)]
fn value<T: Approximate, I: Isa>(isa: I, activation: Activation, u: Lanes<I, T>) -> Lanes<I, T> {
    let math = Math { isa };
    let zero = zero::<I, T>(isa);
    match activation {
        Activation::Relu => zero.max(u),
        Activation::Relu6 => {
            let six = math.number::<T>(6.);
            let above = zero.max(u);
            above.if_above(six, six, above)
        }
        Activation::LeakyRelu(slope) => u.if_above(zero, u, u * math.number::<T>(slope)),
        Activation::Silu => u * math.sigmoid::<T>(u)[0],
        Activation::Gelu => u * math.normal_distribution::<T>(u),
        Activation::GeluTanh => u * math.sigmoid::<T>(math.tanh_argument::<T>(u))[0],
        Activation::HardSwish => {
            let six = math.number::<T>(6.);
            let above = zero.max(u + math.number::<T>(3.));
            u * above.if_above(six, six, above) / six
        }
        Activation::Sigmoid => math.sigmoid::<T>(u)[0],
        Activation::Mish => {
            let ([above, below], _) = math.mish::<T>(u);
            u * (above / below)
        }
    }
}

/// The slope of an activation at `u`.
#[inline(always)]
fn slope<T: Approximate, I: Isa>(isa: I, activation: Activation, u: Lanes<I, T>) -> Lanes<I, T> {
    let math = Math { isa };
    let zero = zero::<I, T>(isa);
    let one = math.number::<T>(1.);
    match activation {
        Activation::Relu => u.if_above(zero, one, zero),
        Activation::Relu6 => {
            let below = math.number::<T>(6.).if_above(u, one, zero);
            u.if_above(zero, below, zero)
        }
        Activation::LeakyRelu(slope) => u.if_above(zero, one, math.number::<T>(slope)),
        Activation::Silu => {
            let [s, rest] = math.sigmoid::<T>(u);
            s * (one + u * rest)
        }
        Activation::Gelu => {
            let half_square = math.number::<T>(-0.5) * u * u;
            let density = math.number::<T>(0.398_942_280_401_432_7) * math.exp::<T>(half_square);
            math.normal_distribution::<T>(u) + u * density
        }
        Activation::GeluTanh => {
            // Beyond it the slope is 0 or 1, and products would overflow.
            let far = math.number::<T>(30.);
            let u = (zero - far).max(u);
            let u = u.if_above(far, far, u);
            let [s, rest] = math.sigmoid::<T>(math.tanh_argument::<T>(u));
            let cube = math.number::<T>(3. * TANH_CUBE) * (u * u);
            let inner = math.number::<T>(2. * TANH_SLOPE) * (one + cube);
            s + u * (s * rest) * inner
        }
        Activation::HardSwish => {
            let three = math.number::<T>(3.);
            let middle = (u + u + three) / math.number::<T>(6.);
            let below = three.if_above(u, middle, one);
            u.if_above(zero - three, below, zero)
        }
        Activation::Sigmoid => {
            let [s, rest] = math.sigmoid::<T>(u);
            s * rest
        }
        Activation::Mish => {
            let ([above, below], e) = math.mish::<T>(u);
            let two = math.number::<T>(2.);
            let large = one / (one + e);
            let sigmoid = u.if_above(zero, large, e * large);
            let rest = u.if_above(zero, two * (e * e), two) * (below + above);
            above / below + u * (rest / (below * below)) * sigmoid
        }
    }
}

/// Runs `$body` with `$a` as a known activation, so that no loop asks which it is.
macro_rules! known {
    ($activation:expr, |$a:ident| $body:expr) => {
        match $activation {
            Activation::Relu => known!(@ Activation::Relu, $a, $body),
            Activation::Relu6 => known!(@ Activation::Relu6, $a, $body),
            Activation::LeakyRelu(slope) => known!(@ Activation::LeakyRelu(slope), $a, $body),
            Activation::Silu => known!(@ Activation::Silu, $a, $body),
            Activation::Gelu => known!(@ Activation::Gelu, $a, $body),
            Activation::GeluTanh => known!(@ Activation::GeluTanh, $a, $body),
            Activation::HardSwish => known!(@ Activation::HardSwish, $a, $body),
            Activation::Sigmoid => known!(@ Activation::Sigmoid, $a, $body),
            Activation::Mish => known!(@ Activation::Mish, $a, $body),
        }
    };
    (@ $known:expr, $a:ident, $body:expr) => {{
        let $a = $known;
        $body
    }};
}

/// `y = act(u)`.
pub(crate) struct Activate<'u, 'y, E: Elem> {
    pub(crate) activation: Activation,
    pub(crate) u: &'u [E::Acc],
    pub(crate) y: &'y mut [MaybeUninit<E>],
}

impl<'y, E: Elem> Kernel for Activate<'_, 'y, E> {
    type Output = &'y mut [E];

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> &'y mut [E] {
        let Self { activation, u, y } = self;
        known!(activation, |activation| map(
            isa,
            u,
            y,
            #[inline(always)]
            |_, u| value::<E::Acc, I>(isa, activation, u),
        ))
    }
}

/// `g = dy · act′(u)`.
pub(crate) struct ThroughActivation<'a, 'g, E: Elem> {
    pub(crate) activation: Activation,
    pub(crate) u: &'a [E::Acc],
    pub(crate) dy: &'a [E],
    pub(crate) g: &'g mut [MaybeUninit<E::Acc>],
}

impl<'g, E: Elem> Kernel for ThroughActivation<'_, 'g, E> {
    type Output = &'g mut [E::Acc];

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> &'g mut [E::Acc] {
        let Self {
            activation,
            u,
            dy,
            g,
        } = self;
        known!(activation, |activation| map2(
            isa,
            u,
            dy,
            g,
            #[inline(always)]
            |_, u, dy| dy * slope::<E::Acc, I>(isa, activation, u),
        ))
    }
}

/// `dy · act′(u)` of a few values, added to `g`. Their `u` passes through `scratch`, where `write`
/// writes it.
#[inline(always)]
pub(crate) fn through<E: Elem, I: Isa>(
    isa: I,
    activation: Activation,
    dy: &[E],
    scratch: &mut Scratch<E::Acc>,
    g: &mut Scratch<E::Acc>,
    write: impl for<'b> FnOnce(&'b mut [MaybeUninit<E::Acc>]) -> &'b mut [E::Acc],
) {
    scratch.clear();
    scratch.push(dy.len(), write);
    let u = scratch.get();
    g.push(
        dy.len(),
        #[inline(always)]
        |g| {
            isa.call(ThroughActivation {
                activation,
                u,
                dy,
                g,
            })
        },
    );
}

/// `act(u)` of a few values. Their `u` passes through `scratch`, where `write` writes it.
#[inline(always)]
pub(crate) fn activate<'y, E: Elem, I: Isa>(
    isa: I,
    activation: Activation,
    scratch: &mut Scratch<E::Acc>,
    y: &'y mut [MaybeUninit<E>],
    write: impl for<'b> FnOnce(&'b mut [MaybeUninit<E::Acc>]) -> &'b mut [E::Acc],
) -> &'y mut [E] {
    scratch.clear();
    scratch.push(y.len(), write);
    isa.call(Activate {
        activation,
        u: scratch.get(),
        y,
    })
}
