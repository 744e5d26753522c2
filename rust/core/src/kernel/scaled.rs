//! Subtract a multiple of one run of elements from another, in place.
//!
//! Every value is computed in float64 and rounded to the target's type, so that neither a large
//! coefficient nor 16-bit operands cost accuracy; memory limits the speed anyway.

use super::{Dtype, Elements};
use crate::dtype::{Bf16, F16, F32, Narrow, f32_to_bf16, f32_to_f16};

/// Compute `target[i] -= c * delta[i]`.
///
/// Both hold the same number of elements; otherwise this panics.
pub fn subtract_scaled(dtype: Dtype, target: &mut [u8], delta: Elements<'_>, c: f64) {
    assert_eq!(target.len(), delta.numel() * dtype.nbytes(), "both hold as many elements");
    let _ieee = super::ieee::DefaultFloat::enter();
    match (dtype, delta.dtype) {
        (Dtype::F64, _) => wide(target, delta, c),
        (_, Dtype::F64) => narrowed(dtype, target, delta, c),
        (_, Dtype::BF16) => run::<Bf16>(dtype, target, delta.bytes, c),
        (_, Dtype::F16) => run::<F16>(dtype, target, delta.bytes, c),
        (_, Dtype::F32) => run::<F32>(dtype, target, delta.bytes, c),
    }
}

fn run<D: Narrow>(dtype: Dtype, target: &mut [u8], delta: &[u8], c: f64) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, which the function asks for.
        #[allow(unsafe_code)]
        unsafe {
            return by_dtype_avx2::<D>(dtype, target, delta, c);
        }
    }
    by_dtype::<D>(dtype, target, delta, c);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn by_dtype_avx2<D: Narrow>(dtype: Dtype, target: &mut [u8], delta: &[u8], c: f64) {
    by_dtype::<D>(dtype, target, delta, c);
}

#[inline(always)]
fn by_dtype<D: Narrow>(dtype: Dtype, target: &mut [u8], delta: &[u8], c: f64) {
    match dtype {
        Dtype::BF16 => each::<Bf16, D, 2>(target, delta, c, |v| f32_to_bf16(v).to_le_bytes()),
        Dtype::F16 => each::<F16, D, 2>(target, delta, c, |v| f32_to_f16(v).to_le_bytes()),
        Dtype::F32 | Dtype::F64 => each::<F32, D, 4>(target, delta, c, f32::to_le_bytes),
    }
}

#[inline(always)]
fn each<T: Narrow, D: Narrow, const N: usize>(
    target: &mut [u8],
    delta: &[u8],
    c: f64,
    round: impl Fn(f32) -> [u8; N],
) {
    let steps = target.as_chunks_mut::<N>().0.iter_mut().zip(delta.chunks_exact(D::NBYTES));
    for (element, step) in steps {
        let value = f64::from(T::load(element, 0)) - c * f64::from(D::load(step, 0));
        *element = round(value as f32);
    }
}

fn wide(target: &mut [u8], delta: Elements<'_>, c: f64) {
    for (index, element) in target.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let value = f64::from_le_bytes(*element) - c * super::wide::load(&delta, index);
        *element = value.to_le_bytes();
    }
}

/// A float64 Δ on a narrower gradient, which only a caller's own mapping of tensors can contain.
fn narrowed(dtype: Dtype, target: &mut [u8], delta: Elements<'_>, c: f64) {
    let nbytes = dtype.nbytes();
    for (index, element) in target.chunks_exact_mut(nbytes).enumerate() {
        let old = super::wide::load(&Elements { dtype, bytes: element }, 0);
        let value = (old - c * super::wide::load(&delta, index)) as f32;
        match dtype {
            Dtype::BF16 => element.copy_from_slice(&f32_to_bf16(value).to_le_bytes()),
            Dtype::F16 => element.copy_from_slice(&f32_to_f16(value).to_le_bytes()),
            Dtype::F32 | Dtype::F64 => element.copy_from_slice(&value.to_le_bytes()),
        }
    }
}
