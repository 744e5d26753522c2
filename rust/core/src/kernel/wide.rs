//! The float64 kernel: exact for every mix of dtypes, used where float32 would lose something.

use super::{Elements, Moments};
use crate::dtype::{Bf16, Dtype, F16, F32, Narrow, f32_to_bf16, f32_to_f16, f64_to_f32_odd};

pub(super) fn load(elements: &Elements<'_>, index: usize) -> f64 {
    match elements.dtype {
        Dtype::BF16 => f64::from(Bf16::load(elements.bytes, index)),
        Dtype::F16 => f64::from(F16::load(elements.bytes, index)),
        Dtype::F32 => f64::from(F32::load(elements.bytes, index)),
        Dtype::F64 => {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&elements.bytes[8 * index..8 * index + 8]);
            f64::from_le_bytes(bytes)
        }
    }
}

/// Sum in float64, leaving out and counting what is not finite.
pub(super) fn moments(a: Elements<'_>, b: Elements<'_>) -> Moments {
    let mut moments = Moments::default();
    for i in 0..a.numel() {
        let (x, y) = (load(&a, i), load(&b, i));
        moments.nonfinite_reasoning += u64::from(!x.is_finite());
        moments.nonfinite_multimodal += u64::from(!y.is_finite());
        if x.is_finite() && y.is_finite() {
            let d = x - y;
            moments.delta_sq += d * d;
            moments.reasoning_sq += x * x;
            moments.multimodal_sq += y * y;
            moments.dot += x * y;
            moments.max_abs = moments.max_abs.max(d.abs());
            moments.zeros += u64::from(d == 0.0);
            let agree = x.is_sign_negative() == y.is_sign_negative() && x != 0.0 && y != 0.0;
            moments.agreeing += u64::from(agree);
        }
    }
    moments
}

/// Σx², Σy² and Σxy in order; NaN where an element is not finite.
pub(super) fn products(left: &Elements<'_>, right: &Elements<'_>) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for (x, y) in (0..left.numel()).map(|i| (load(left, i), load(right, i))) {
        if !(x.is_finite() && y.is_finite()) {
            return [f64::NAN; 3];
        }
        sums = [sums[0] + x * x, sums[1] + y * y, sums[2] + x * y];
    }
    sums
}

/// Σ of the squares in order; NaN where an element is not finite.
pub(super) fn finite_square(elements: Elements<'_>) -> f64 {
    let values = (0..elements.numel()).map(|i| load(&elements, i));
    values.fold(0.0, |sum, value| if value.is_finite() { sum + value * value } else { f64::NAN })
}

/// Subtract in float64 and round once.
pub(super) fn difference(a: Elements<'_>, b: Elements<'_>, out: Dtype, bytes: &mut [u8]) {
    for i in 0..a.numel() {
        let d = load(&a, i) - load(&b, i);
        match out {
            Dtype::BF16 => put(bytes, i, f32_to_bf16(f64_to_f32_odd(d)).to_le_bytes()),
            Dtype::F16 => put(bytes, i, f32_to_f16(f64_to_f32_odd(d)).to_le_bytes()),
            Dtype::F32 => put(bytes, i, (d as f32).to_le_bytes()),
            Dtype::F64 => put(bytes, i, d.to_le_bytes()),
        }
    }
}

fn put<const N: usize>(bytes: &mut [u8], index: usize, value: [u8; N]) {
    bytes[N * index..N * (index + 1)].copy_from_slice(&value);
}

/// Count outputs that are infinite although both inputs are finite.
pub(super) fn overflow(a: Elements<'_>, b: Elements<'_>, out: Dtype, bytes: &[u8]) -> u64 {
    let written = Elements { dtype: out, bytes };
    (0..a.numel())
        .filter(|&i| {
            !load(&written, i).is_finite() && load(&a, i).is_finite() && load(&b, i).is_finite()
        })
        .count() as u64
}

/// Σ of the squares of what was written, without values that are not finite.
pub(super) fn square(dtype: Dtype, bytes: &[u8]) -> f64 {
    let written = Elements { dtype, bytes };
    (0..written.numel())
        .map(|i| load(&written, i))
        .filter(|value| value.is_finite())
        .map(|value| value * value)
        .sum()
}
