//! Half precision by integer arithmetic, without branches, so that it vectorizes. Rounding is to
//! nearest, ties to even; a NaN keeps its sign and leading payload and becomes quiet, as the
//! conversion instructions of x86 do it.

#[inline(always)]
pub(super) fn widen_bf16(v: u16) -> f32 {
    f32::from_bits((v as u32) << 16)
}

#[inline(always)]
pub(super) fn narrow_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    // Half a unit in the last place, less one where the kept part is even.
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if v.is_nan() { quiet } else { rounded }) as u16
}

#[inline(always)]
pub(super) fn widen_f16(v: u16) -> f32 {
    let sign = ((v & 0x8000) as u32) << 16;
    let magnitude = (v & 0x7fff) as u32;
    // The exponent of f32 is 112 higher; multiplying also makes subnormal numbers normal.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    // Infinity and NaN, which the product made finite.
    let special = (magnitude << 13) | 0x7f80_0000;
    let quiet = if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
    let bits = if magnitude >= 0x7c00 {
        special | quiet
    } else {
        scaled.to_bits()
    };
    f32::from_bits(sign | bits)
}

#[inline(always)]
pub(super) fn narrow_f16(v: f32) -> u16 {
    let bits = v.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    // Normal results: the exponent lowered by 112, half a unit in the last place added.
    let normal = magnitude
        .wrapping_sub(112 << 23)
        .wrapping_add(0x0fff + ((magnitude >> 13) & 1))
        >> 13;
    // Subnormal results: adding 0.5 moves the last place of f16 to that of f32, and rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5)
        .to_bits()
        .wrapping_sub(0x3f00_0000);
    let nan = 0x7e00 | ((magnitude >> 13) & 0x1ff);
    let finite = if magnitude < 113 << 23 {
        subnormal
    } else {
        normal
    };
    // From 65520 on, rounding gives infinity.
    let number = if magnitude >= 0x477f_f000 {
        0x7c00
    } else {
        finite
    };
    let number = if magnitude > 0x7f80_0000 { nan } else { number };
    (sign | number) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn every_half_value_survives() {
        for bits in 0..=u16::MAX {
            for (wide, back, reference) in [
                (
                    widen_f16(bits),
                    narrow_f16(widen_f16(bits)),
                    f16::from_bits(bits).to_f32(),
                ),
                (
                    widen_bf16(bits),
                    narrow_bf16(widen_bf16(bits)),
                    bf16::from_bits(bits).to_f32(),
                ),
            ] {
                if reference.is_nan() {
                    assert!(
                        wide.is_nan()
                            && f16::from_bits(back).is_nan() | bf16::from_bits(back).is_nan()
                    );
                } else {
                    assert_eq!(wide.to_bits(), reference.to_bits());
                    assert_eq!(back, bits);
                }
            }
        }
    }

    #[test]
    fn every_kind_of_f32_rounds_as_the_half_crate_does() {
        // All exponents and signs, with leading, trailing and tie-making bits of the mantissa.
        for high in 0..=0x3ffu32 {
            for low in [
                0, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x3000, 0x7fff, 0x8000, 0x8001,
                0x18000, 0x2_0000, 0x3f_ffff,
            ] {
                let v = f32::from_bits((high << 22) | low);
                if v.is_nan() {
                    assert!(f16::from_bits(narrow_f16(v)).is_nan());
                    assert!(bf16::from_bits(narrow_bf16(v)).is_nan());
                    continue;
                }
                assert_eq!(narrow_f16(v), f16::from_f32(v).to_bits(), "{v:e}");
                assert_eq!(narrow_bf16(v), bf16::from_f32(v).to_bits(), "{v:e}");
            }
        }
    }
}
