//! Binary16 to float32 and back, eight at a time, where the processor has F16C.
//!
//! Widening is exact and rounding to nearest, ties to even, so both give the bits of the portable
//! functions. Which payload a NaN keeps is not specified.

use std::arch::x86_64::{
    __m128i, _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps,
    _mm256_cvtps_ph, _mm256_loadu_ps, _mm256_storeu_ps,
};

use super::scalar;
use crate::dtype::{Narrow, f16_to_f32, f32_to_f16};

/// Binary16 that F16C widens. Only functions of this module name it; they are compiled for F16C and
/// called if the processor has it.
#[derive(Clone, Copy)]
pub(super) struct F16c;

impl Narrow for F16c {
    const NBYTES: usize = 2;

    #[inline(always)]
    fn load(bytes: &[u8], index: usize) -> f32 {
        f16_to_f32(u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]))
    }

    #[inline(always)]
    fn lanes<const N: usize>(bytes: &[u8]) -> [f32; N] {
        let mut values = [0.0; N];
        // SAFETY: only code that runs on processors with F16C names this type.
        #[allow(unsafe_code)]
        unsafe {
            widen(&bytes[..2 * N], &mut values);
        }
        values
    }
}

compiled_for!("avx2,f16c");

#[target_feature(enable = "avx2,f16c")]
pub(super) fn squares(elements: &[u8]) -> f64 {
    scalar::squares::<F16c>(elements)
}

/// Round float32 to binary16. The caller has checked that the processor has AVX and F16C.
pub(super) fn round(values: &[f32], bytes: &mut [u8]) {
    // SAFETY: the caller has detected both instruction sets.
    #[allow(unsafe_code)]
    unsafe {
        narrow(values, bytes);
    }
}

#[inline]
#[target_feature(enable = "avx,f16c")]
fn widen(halves: &[u8], values: &mut [f32]) {
    let (groups, rest) = halves.as_chunks::<16>();
    let (wide, wide_rest) = values.as_chunks_mut::<8>();
    for (group, wide) in groups.iter().zip(wide) {
        // SAFETY: both pointers are to arrays of the sixteen and thirty-two bytes that the
        // instructions touch, at any alignment.
        #[allow(unsafe_code)]
        unsafe {
            let eight = _mm256_cvtph_ps(_mm_loadu_si128(group.as_ptr().cast::<__m128i>()));
            _mm256_storeu_ps(wide.as_mut_ptr(), eight);
        }
    }
    for (half, wide) in rest.as_chunks::<2>().0.iter().zip(wide_rest) {
        *wide = f16_to_f32(u16::from_le_bytes(*half));
    }
}

#[target_feature(enable = "avx,f16c")]
fn narrow(values: &[f32], out: &mut [u8]) {
    let (groups, rest) = values.as_chunks::<8>();
    let (halves, halves_rest) = out.as_chunks_mut::<16>();
    for (group, halves) in groups.iter().zip(halves) {
        // SAFETY: both pointers are to arrays of the thirty-two and sixteen bytes that the
        // instructions touch, at any alignment.
        #[allow(unsafe_code)]
        unsafe {
            let eight = _mm256_loadu_ps(group.as_ptr());
            let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(eight);
            _mm_storeu_si128(halves.as_mut_ptr().cast::<__m128i>(), rounded);
        }
    }
    for (value, half) in rest.iter().zip(halves_rest.as_chunks_mut::<2>().0) {
        *half = f32_to_f16(*value).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::BLOCK;

    fn has_f16c() -> bool {
        std::arch::is_x86_feature_detected!("f16c") && std::arch::is_x86_feature_detected!("avx")
    }

    #[test]
    fn every_half_widens_and_comes_back_as_in_the_portable_functions() {
        if !has_f16c() {
            return;
        }
        // An odd start and length: no alignment, and a tail that is not a whole vector.
        for numel in [0, 1, 7, 8, 9, 1000, BLOCK] {
            for first in (0..=u16::MAX).step_by(BLOCK / 2) {
                let halves: Vec<u16> = (0..numel).map(|i| first.wrapping_add(i as u16)).collect();
                let mut bytes = vec![0u8];
                bytes.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
                let mut values = vec![0f32; numel];
                // SAFETY: the processor was checked above.
                #[allow(unsafe_code)]
                unsafe {
                    widen(&bytes[1..], &mut values);
                }
                let mut back = vec![0; 2 * numel];
                round(&values, &mut back);
                for (i, &half) in halves.iter().enumerate() {
                    let (value, expected) = (values[i], f16_to_f32(half));
                    let same = value.to_bits() == expected.to_bits();
                    assert!(same || (value.is_nan() && expected.is_nan()), "{half:#06x}");
                    let returned = u16::from_le_bytes([back[2 * i], back[2 * i + 1]]);
                    assert!(returned == half || expected.is_nan(), "{half:#06x} {returned:#06x}");
                }
            }
        }
    }

    #[test]
    fn rounding_to_binary16_is_that_of_the_half_crate() {
        if !has_f16c() {
            return;
        }
        let values: Vec<f32> =
            (0..1 << 16).map(|i: u32| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
        let mut bytes = vec![0; 2 * values.len()];
        round(&values, &mut bytes);
        for (value, half) in values.iter().zip(bytes.as_chunks::<2>().0) {
            let (ours, theirs) = (u16::from_le_bytes(*half), f32_to_f16(*value));
            assert!(ours == theirs || value.is_nan(), "{value}: {ours:#06x} {theirs:#06x}");
        }
    }
}
