//! Activations and their slopes.

use candle_core::cpu::erf::erfc_f64 as erfc;

use crate::computations::Activation;

const TANH_SLOPE: f64 = 0.797_884_560_802_865_4;
const TANH_CUBE: f64 = 0.044_715;

/// From the side that does not overflow.
fn sigmoid(u: f64) -> f64 {
    let e = (-u.abs()).exp();
    match u > 0. {
        true => 1. / (1. + e),
        false => e / (1. + e),
    }
}

/// `Φ(u)`.
fn distribution(u: f64) -> f64 {
    erfc(-u / 2f64.sqrt()) / 2.
}

/// The density of the normal distribution.
fn density(u: f64) -> f64 {
    (-u * u / 2.).exp() / (2. * std::f64::consts::PI).sqrt()
}

/// `tanh(ln(1 + eᵘ))`.
fn tanh_of_softplus(u: f64) -> f64 {
    match u > 0. {
        true => (u + (-u).exp().ln_1p()).tanh(),
        false => u.exp().ln_1p().tanh(),
    }
}

fn tanh_argument(u: f64) -> f64 {
    2. * TANH_SLOPE * (u + TANH_CUBE * u * u * u)
}

impl Activation {
    pub(super) fn of(self, u: f64) -> f64 {
        if u.is_nan() {
            return u;
        }
        match self {
            Self::Relu => u.max(0.),
            Self::Relu6 => u.clamp(0., 6.),
            Self::LeakyRelu(slope) if u <= 0. => slope * u,
            Self::LeakyRelu(_) => u,
            Self::Silu => u * sigmoid(u),
            Self::Gelu => u * distribution(u),
            Self::GeluTanh => u * sigmoid(tanh_argument(u)),
            Self::HardSwish => u * (u + 3.).clamp(0., 6.) / 6.,
            Self::Sigmoid => sigmoid(u),
            Self::Mish => u * tanh_of_softplus(u),
        }
    }

    pub(super) fn slope_at(self, u: f64) -> f64 {
        let step = |is_there: bool| if is_there { 1. } else { 0. };
        match self {
            Self::Relu => step(u > 0.),
            Self::Relu6 => step(u > 0. && u < 6.),
            Self::LeakyRelu(_) if u > 0. => 1.,
            Self::LeakyRelu(slope) => slope,
            Self::Silu => sigmoid(u) * (1. + u * sigmoid(-u)),
            Self::Gelu => distribution(u) + u * density(u),
            Self::GeluTanh => {
                let (s, rest) = (sigmoid(tanh_argument(u)), sigmoid(-tanh_argument(u)));
                let inner = 2. * TANH_SLOPE * (1. + 3. * TANH_CUBE * u * u);
                match rest * s == 0. {
                    true => s,
                    false => s + u * s * rest * inner,
                }
            }
            Self::HardSwish if u <= -3. => 0.,
            Self::HardSwish if u >= 3. => 1.,
            Self::HardSwish => (2. * u + 3.) / 6.,
            Self::Sigmoid => sigmoid(u) * sigmoid(-u),
            Self::Mish => {
                // 1 − tanh² of a softplus, with (1 + eᵘ)² = q: 4q / (q + 1)².
                let e = (-u.abs()).exp();
                let (above, below) = match u > 0. {
                    true => (
                        4. * (e * (1. + e)).powi(2),
                        ((1. + e).powi(2) + e * e).powi(2),
                    ),
                    false => (4. * (1. + e).powi(2), ((1. + e).powi(2) + 1.).powi(2)),
                };
                tanh_of_softplus(u) + u * sigmoid(u) * above / below
            }
        }
    }
}
