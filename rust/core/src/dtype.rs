//! The element types that can be subtracted, and how their values round.
//!
//! Arithmetic is done on a [`Dtype`]. An 8-bit float is a code that has no value without its scale, so
//! [`Fp8`] is a type of its own and no kernel can confuse the two.
//!
//! Loads read single bytes in little-endian order, since safetensors promises no alignment.
//! Rounding is to nearest, ties to even, and happens once: a value that comes from float64 is
//! first brought to float32 by rounding to odd, which makes the second rounding exact (Boldo and
//! Melquiond, "Emulation of FMA and correctly rounded sums", 2008).

use half::f16;

/// An element type that can be read, subtracted and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 8 significant bits, the exponent range of [`Dtype::F32`].
    BF16,
    /// IEEE 754 binary16.
    F16,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary64.
    F64,
}

impl Dtype {
    /// The names that messages list as supported.
    pub const SUPPORTED: &'static str = "BF16, F16, F32, F64";

    /// Bytes of one element.
    pub const fn nbytes(self) -> usize {
        match self {
            Dtype::BF16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
            Dtype::F64 => 8,
        }
    }

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::BF16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::F32 => "F32",
            Dtype::F64 => "F64",
        }
    }

    /// The largest finite value.
    pub fn max_finite(self) -> f64 {
        match self {
            Dtype::BF16 => f64::from(f32::from_bits(0x7f7f_0000)),
            Dtype::F16 => 65504.0,
            Dtype::F32 => f64::from(f32::MAX),
            Dtype::F64 => f64::MAX,
        }
    }

    /// The type for a header's dtype, if it can be subtracted.
    pub const fn from_header(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::BF16 => Some(Dtype::BF16),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::F64 => Some(Dtype::F64),
            _ => None,
        }
    }

    /// The header's dtype for it.
    pub const fn to_header(self) -> safetensors::Dtype {
        match self {
            Dtype::BF16 => safetensors::Dtype::BF16,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F64 => safetensors::Dtype::F64,
        }
    }
}

/// An 8-bit floating-point code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fp8 {
    /// Four exponent bits, no infinity, NaN at 0x7f and 0xff, largest value 448.
    E4M3,
    /// The upper byte of a binary16, infinities and NaN included.
    E5M2,
}

impl Fp8 {
    /// The type of codes for a header's dtype.
    pub const fn from_header(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F8_E4M3 => Some(Fp8::E4M3),
            safetensors::Dtype::F8_E5M2 => Some(Fp8::E5M2),
            _ => None,
        }
    }
}

/// The value of an E4M3 code, exactly.
///
/// Shifted into float32's fields, the exponent is 120 too small. One exact multiplication corrects
/// it, as in [`f16_to_f32`].
#[inline(always)]
pub(crate) fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f) << 20;
    let sign = u32::from(code & 0x80) << 24;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((120 + 127) << 23)).to_bits();
    f32::from_bits(if code & 0x7f == 0x7f { 0x7fc0_0000 } else { scaled } | sign)
}

/// The value of an E5M2 code, exactly.
#[inline(always)]
pub(crate) fn e5m2_to_f32(code: u8) -> f32 {
    f16_to_f32(u16::from(code) << 8)
}

/// An element no wider than float32, loaded from its little-endian bytes.
pub(crate) trait Narrow: Copy {
    const NBYTES: usize;
    fn load(bytes: &[u8], index: usize) -> f32;

    /// The first `N` elements.
    #[inline(always)]
    fn lanes<const N: usize>(bytes: &[u8]) -> [f32; N] {
        let mut values = [0.0; N];
        // Cut to size, so that no bounds are checked and the loop vectorizes.
        let bytes = &bytes[..Self::NBYTES * N];
        for (index, value) in values.iter_mut().enumerate() {
            *value = Self::load(bytes, index);
        }
        values
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Bf16;
#[derive(Clone, Copy)]
pub(crate) struct F16;
#[derive(Clone, Copy)]
pub(crate) struct F32;

#[inline(always)]
fn u16_at(bytes: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]])
}

impl Narrow for Bf16 {
    const NBYTES: usize = 2;
    #[inline(always)]
    fn load(bytes: &[u8], index: usize) -> f32 {
        f32::from_bits(u32::from(u16_at(bytes, index)) << 16)
    }
}

impl Narrow for F16 {
    const NBYTES: usize = 2;
    #[inline(always)]
    fn load(bytes: &[u8], index: usize) -> f32 {
        f16_to_f32(u16_at(bytes, index))
    }
}

impl Narrow for F32 {
    const NBYTES: usize = 4;
    #[inline(always)]
    fn load(bytes: &[u8], index: usize) -> f32 {
        let at = 4 * index;
        f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    }
}

/// Widen binary16 without a branch, so that a loop over it vectorizes.
///
/// Shifted into float32's fields, the exponent is 112 too small. One exact multiplication corrects it
/// for normal and subnormal values. Infinities and NaN keep their mantissa.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let value = if bits & 0x7c00 == 0x7c00 { special } else { scaled };
    f32::from_bits(value | sign)
}

/// Round to bfloat16, to nearest and ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x0040;
    (if value.is_nan() { quiet } else { rounded }) as u16
}

/// Round to binary16, to nearest and ties to even.
#[inline(always)]
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    f16::from_f32(value).to_bits()
}

/// Round float64 to float32, to odd, so that rounding the result again cannot round twice.
#[inline(always)]
pub(crate) fn f64_to_f32_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    // If inexact, take the neighbor whose last bit is set. Without a branch, so that a loop over it
    // vectorizes.
    let up = u32::from(back.abs() < value.abs());
    let down = u32::from(back.abs() > value.abs());
    let even = 1 - (bits & 1);
    f32::from_bits(bits.wrapping_add(even * up).wrapping_sub(even * down))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_as_the_half_crate_widens_it() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
                "{bits:#06x}: {ours} {theirs}"
            );
        }
    }

    #[test]
    fn bfloat16_rounds_as_the_half_crate_rounds_it() {
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                let (ours, theirs) = (f32_to_bf16(value), half::bf16::from_f32(value).to_bits());
                assert!(ours == theirs || value.is_nan(), "{value}: {ours:#06x} {theirs:#06x}");
                assert_eq!(half::bf16::from_bits(ours).is_nan(), value.is_nan());
            }
        }
    }

    /// An 8-bit float by the definition of its format: sign, exponent, mantissa.
    fn defined(code: u8, mantissa_nbits: u32, bias: i32) -> f64 {
        let mantissa = f64::from(code & ((1 << mantissa_nbits) - 1));
        let exponent = i32::from((code & 0x7f) >> mantissa_nbits);
        let unit = 2f64.powi(exponent.max(1) - bias - mantissa_nbits as i32);
        let hidden = if exponent > 0 { f64::from(1u32 << mantissa_nbits) } else { 0.0 };
        let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
        sign * (hidden + mantissa) * unit
    }

    #[test]
    fn every_8_bit_code_has_the_value_that_its_format_defines() {
        for code in 0..=u8::MAX {
            let value = e4m3_to_f32(code);
            if code & 0x7f == 0x7f {
                assert!(value.is_nan());
            } else {
                assert_eq!(f64::from(value).to_bits(), defined(code, 3, 7).to_bits(), "{code:#x}");
            }
            let value = e5m2_to_f32(code);
            match code & 0x7f {
                0x7c => assert!(value.is_infinite() && value.is_sign_negative() == (code > 0x7f)),
                0x7d..=0x7f => assert!(value.is_nan()),
                _ => assert_eq!(f64::from(value).to_bits(), defined(code, 2, 15).to_bits()),
            }
        }
    }

    #[test]
    fn rounding_to_odd_keeps_a_tie_from_becoming_one() {
        // A bfloat16 midpoint plus something far below float32's last bit.
        let midpoint = 1.0 + f64::from(2f32.powi(-8));
        let above = midpoint + 2f64.powi(-40);
        let below = midpoint - 2f64.powi(-40);
        assert_eq!(f32_to_bf16(f64_to_f32_odd(above)), 0x3f81);
        assert_eq!(f32_to_bf16(f64_to_f32_odd(below)), 0x3f80);
        assert_eq!(f32_to_bf16(f64_to_f32_odd(midpoint)), 0x3f80);
        assert_eq!(f64_to_f32_odd(f64::MAX), f32::MAX);
        assert_eq!(f64_to_f32_odd(-1e-60), -f32::from_bits(1));
        assert!(f64_to_f32_odd(f64::NAN).is_nan());
    }
}
