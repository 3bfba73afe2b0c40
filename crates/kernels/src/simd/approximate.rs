//! Numbers that approximations of functions are made of.

use super::Real;

/// Numbers that approximations in a type are made of.
pub(crate) trait Approximate: Real {
    /// Below this, `eˣ` counts as zero.
    const LEAST_EXPONENT: f64;
    /// `ln 2` in two parts, the first with few digits: a multiple of it is exact.
    const LN_2: [f64; 2];
    /// Adding it moves the integer nearest to a number to the end of its bits.
    const TO_INTEGER: f64;
    /// Bias of the exponent.
    const BIAS: f64;
    /// Coefficients of `(eʳ − 1 − r) / r²` for `|r| ≤ ln 2 / 2`, the highest power first.
    const EXP: &'static [f64];
    /// How many of [`ERFC`] matter.
    const ERFC_TERMS: usize;
    /// How many of [`ERF`] matter.
    const ERF_TERMS: usize;
}

impl Approximate for f32 {
    const LEAST_EXPONENT: f64 = -87.;
    const LN_2: [f64; 2] = [0.693359375, -2.121_944_4e-4];
    const TO_INTEGER: f64 = 12_582_912.;
    const BIAS: f64 = 127.;
    const EXP: &'static [f64] = &[
        1.987_569_15e-4,
        1.398_199_950_7e-3,
        8.333_451_907_3e-3,
        4.166_579_589_4e-2,
        1.666_666_545_9e-1,
        5.000_000_120_1e-1,
    ];
    const ERFC_TERMS: usize = 12;
    const ERF_TERMS: usize = 9;
}

impl Approximate for f64 {
    const LEAST_EXPONENT: f64 = -708.;
    const LN_2: [f64; 2] = [6.931_457_519_531_25e-1, 1.428_606_820_309_417_2e-6];
    const TO_INTEGER: f64 = 6_755_399_441_055_744.;
    const BIAS: f64 = 1023.;
    /// Those of the power series.
    const EXP: &'static [f64] = &[
        1. / 6_227_020_800.,
        1. / 479_001_600.,
        1. / 39_916_800.,
        1. / 3_628_800.,
        1. / 362_880.,
        1. / 40_320.,
        1. / 5_040.,
        1. / 720.,
        1. / 120.,
        1. / 24.,
        1. / 6.,
        1. / 2.,
    ];
    const ERFC_TERMS: usize = ERFC.len();
    const ERF_TERMS: usize = ERF.len();
}

/// Chebyshev coefficients of `ln(erfc(z) / t) + z²` in `2t − 1`, with `t = 2 / (2 + z)` and `z ≥ 0`
/// (Press et al., Numerical Recipes, third edition, 6.2.2). They count to a relative error of
/// 1.2e-16.
pub(crate) const ERFC: [f64; 28] = [
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

/// Up to this distance from zero, the power series of the error function serves; beyond, it is well
/// below 1.
pub(crate) const ERF_RANGE: f64 = 0.75;

/// Coefficients of `erf(z) / z` in `z²`, `(−1)ⁿ · 2 / (√π · n! · (2n + 1))`. What follows them is
/// below 1e-17 of it for `z` up to [`ERF_RANGE`].
pub(crate) const ERF: [f64; 16] = {
    let mut coefficients = [0.; 16];
    let mut term = std::f64::consts::FRAC_2_SQRT_PI;
    let mut n = 0;
    while n < 16 {
        coefficients[n] = term / (2 * n + 1) as f64;
        n += 1;
        term /= -(n as f64);
    }
    coefficients
};
