//! Values of 8-bit codes under block scales, as the models compute them themselves.

use crate::dtype::{Fp8, e4m3_to_f32, e5m2_to_f32};

/// Write float32(code) × scale in float32, rounded once, for codes that share `scale`.
///
/// `out` holds four bytes for each code; otherwise this panics.
pub fn dequantize(format: Fp8, codes: &[u8], scale: f32, out: &mut [u8]) {
    assert_eq!(4 * codes.len(), out.len(), "four bytes for each code");
    let _ieee = super::ieee::DefaultFloat::enter();
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, which the function asks for.
        #[allow(unsafe_code)]
        unsafe {
            return avx2(format, codes, scale, out);
        }
    }
    scalar(format, codes, scale, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(format: Fp8, codes: &[u8], scale: f32, out: &mut [u8]) {
    scalar(format, codes, scale, out);
}

#[inline(always)]
fn scalar(format: Fp8, codes: &[u8], scale: f32, out: &mut [u8]) {
    match format {
        Fp8::E4M3 => each(codes, out, |code| e4m3_to_f32(code) * scale),
        Fp8::E5M2 => each(codes, out, |code| e5m2_to_f32(code) * scale),
    }
}

#[inline(always)]
fn each(codes: &[u8], out: &mut [u8], value: impl Fn(u8) -> f32) {
    for (&code, out) in codes.iter().zip(out.as_chunks_mut::<4>().0) {
        *out = value(code).to_le_bytes();
    }
}
