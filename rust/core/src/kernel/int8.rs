//! Differences in eight bits: integers with one scale for every 64.
//!
//! Owns how a difference becomes a code, how a code becomes a bfloat16 again, and the sums over the
//! decoded values.
//!
//! The scale is the smallest binary16 that is at least the block's largest |Δ| / 127. So no code
//! overflows, and the scale is zero only if the whole block is. A subnormal scale leaves fewer
//! levels: what is below half of it becomes zero and is counted. The code is Δ / scale in float32,
//! rounded to an integer; code × scale is rounded to bfloat16 once. A difference that is not finite
//! becomes zero, since integers have no NaN.

use super::{BLOCK, Dtype, Elements, LANES, Moments, measured, wide};
use crate::dtype::{f16_to_f32, f32_to_bf16, f32_to_f16};

/// Consecutive elements that share one scale.
pub const INT8_BLOCK: usize = 64;

const CODE_MAX: f32 = 127.0;
/// The largest finite binary16.
const F16_MAX: u16 = 0x7bff;

/// Accumulate the moments as [`subtract`](super::subtract) does and store the differences: one byte
/// in `codes` for each element, in two's complement, and a little-endian binary16 in `scales` for
/// every [`INT8_BLOCK`].
///
/// `written_sq`, `stored_dot` and `flushed` are about the values that [`decode_int8`] returns. The
/// runs start at a multiple of [`INT8_BLOCK`]. Lengths that do not fit panic.
pub fn subtract_int8(
    reasoning: Elements<'_>,
    multimodal: Elements<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Moments {
    let numel = reasoning.numel();
    assert_eq!(numel, multimodal.numel(), "both sides hold the same number of elements");
    let fits = codes.len() == numel && scales.len() == 2 * numel.div_ceil(INT8_BLOCK);
    assert!(fits, "the output holds as many elements");
    let _ieee = super::ieee::DefaultFloat::enter();
    let mut total = Moments::default();
    let mut difference = [0f32; BLOCK];
    let mut decoded = [0f32; BLOCK];
    for start in (0..numel).step_by(BLOCK) {
        let end = numel.min(start + BLOCK);
        let (a, b) = (reasoning.slice(start, end), multimodal.slice(start, end));
        let (difference, decoded) = (&mut difference[..end - start], &mut decoded[..end - start]);
        let mut moments = measured::<true>(a, b, difference);
        if a.dtype == Dtype::F64 || b.dtype == Dtype::F64 {
            nearest(a, b, difference);
        }
        let scales = &mut scales[start / INT8_BLOCK * 2..end.div_ceil(INT8_BLOCK) * 2];
        encode_int8(difference, &mut codes[start..end], scales, decoded);
        let stored = Stored::of(difference, decoded);
        moments.written_sq = stored.sq;
        moments.stored_dot = stored.dot;
        moments.flushed = stored.flushed;
        moments.overflow = overflow(a, b, difference, moments.max_abs);
        total.add(&moments);
    }
    total
}

fn nearest(a: Elements<'_>, b: Elements<'_>, difference: &mut [f32]) {
    for (index, out) in difference.iter_mut().enumerate() {
        *out = (wide::load(&a, index) - wide::load(&b, index)) as f32;
    }
}

/// Count differences of finite values that are beyond the range of the codes.
fn overflow(a: Elements<'_>, b: Elements<'_>, difference: &[f32], max_abs: f64) -> u64 {
    // A value that rounds to the last code is still within it.
    let limit = (f64::from(CODE_MAX) + 0.5) * f64::from(f16_to_f32(F16_MAX));
    if max_abs <= limit {
        return 0;
    }
    (0..difference.len())
        .filter(|&i| wide::load(&a, i).is_finite() && wide::load(&b, i).is_finite())
        .filter(|&i| f64::from(difference[i]).abs() > limit)
        .count() as u64
}

/// Sums over the stored values of differences that are finite and within the range of the codes.
struct Stored {
    sq: f64,
    dot: f64,
    flushed: u64,
}

impl Stored {
    fn of(difference: &[f32], decoded: &[f32]) -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, which the function asks for.
            #[allow(unsafe_code)]
            unsafe {
                return Self::of_avx2(difference, decoded);
            }
        }
        Self::summed(difference, decoded)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn of_avx2(difference: &[f32], decoded: &[f32]) -> Self {
        Self::summed(difference, decoded)
    }

    #[inline(always)]
    fn summed(difference: &[f32], decoded: &[f32]) -> Self {
        let (mut sq, mut dot) = ([0f64; LANES], [0f64; LANES]);
        let mut flushed = [0u32; LANES];
        let mut add = |difference: &[f32], decoded: &[f32]| {
            for (i, (&d, &s)) in difference.iter().zip(decoded).enumerate() {
                let counts = d.is_finite() & s.is_finite();
                let (d, s) = if counts { (d, s) } else { (0.0, 0.0) };
                sq[i] += f64::from(s) * f64::from(s);
                dot[i] += f64::from(d) * f64::from(s);
                flushed[i] += u32::from((s == 0.0) & (d != 0.0));
            }
        };
        let (whole, rest) = difference.as_chunks::<LANES>();
        let (decoded_whole, decoded_rest) = decoded.as_chunks::<LANES>();
        for (difference, decoded) in whole.iter().zip(decoded_whole) {
            add(difference, decoded);
        }
        add(rest, decoded_rest);
        Self {
            sq: sq.iter().sum(),
            dot: dot.iter().sum(),
            flushed: flushed.iter().map(|&lane| u64::from(lane)).sum(),
        }
    }
}

/// Define a function that runs the same source compiled for AVX2 if the processor has it.
macro_rules! dispatched {
    ($(#[$doc:meta])* $name:ident, $source:ident, ($($argument:ident: $type:ty),*)) => {
        $(#[$doc])*
        fn $name($($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) {
                    $source($($argument),*);
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2, which the function asks for.
                    #[allow(unsafe_code)]
                    unsafe {
                        return avx2($($argument),*);
                    }
                }
            }
            $source($($argument),*);
        }
    };
}

dispatched!(encode_int8, encode_int8_scalar,
    (difference: &[f32], codes: &mut [u8], scales: &mut [u8], decoded: &mut [f32]));
dispatched!(int8_to_bf16, int8_to_bf16_scalar, (codes: &[u8], scale: f32, out: &mut [u8]));

#[inline(always)]
fn encode_int8_scalar(
    difference: &[f32],
    codes: &mut [u8],
    scales: &mut [u8],
    decoded: &mut [f32],
) {
    let blocks = difference
        .chunks(INT8_BLOCK)
        .zip(codes.chunks_mut(INT8_BLOCK))
        .zip(decoded.chunks_mut(INT8_BLOCK));
    for (((difference, codes), decoded), stored) in blocks.zip(scales.as_chunks_mut::<2>().0) {
        let mut most = [0f32; INT8_BLOCK];
        for (&d, most) in difference.iter().zip(&mut most) {
            *most = if d.is_finite() { d.abs() } else { 0.0 };
        }
        let most = most.iter().fold(0f32, |most, &d| if d > most { d } else { most });
        let bits = scale_for(most);
        *stored = bits.to_le_bytes();
        let scale = f16_to_f32(bits);
        let divisor = if scale == 0.0 { 1.0 } else { scale };
        for ((&d, code), decoded) in difference.iter().zip(codes).zip(decoded) {
            let d = if d.is_finite() { d } else { 0.0 };
            let ratio = d / divisor;
            let ratio = if ratio > CODE_MAX { CODE_MAX } else { ratio };
            let ratio = if ratio < -CODE_MAX { -CODE_MAX } else { ratio };
            // 1.5 · 2²³: the sum's last place is one, so it rounds to an integer, ties to even.
            let integer = ((ratio + 12_582_912.0).to_bits() & 0xff) as u8;
            *code = integer;
            *decoded = widened(f32_to_bf16(f32::from(integer as i8) * scale));
        }
    }
}

/// The smallest binary16 that is at least `most` / 127, or the largest finite one.
fn scale_for(most: f32) -> u16 {
    let least = f64::from(most) / f64::from(CODE_MAX);
    let nearest = f32_to_f16(least as f32).min(F16_MAX);
    let short = f64::from(f16_to_f32(nearest)) < least;
    if short { (nearest + 1).min(F16_MAX) } else { nearest }
}

#[inline(always)]
fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Write code × scale as bfloat16, rounded once. The first code is number `first` of its block;
/// `scales` are those of that block and the following ones.
///
/// `out` holds two bytes for each code; otherwise this panics.
pub fn decode_int8(codes: &[u8], scales: &[u8], first: usize, out: &mut [u8]) {
    let blocks = (first + codes.len()).div_ceil(INT8_BLOCK);
    assert!(first < INT8_BLOCK && 2 * codes.len() == out.len(), "two bytes for each code");
    assert!(codes.is_empty() || scales.len() == 2 * blocks, "one scale for each block");
    let _ieee = super::ieee::DefaultFloat::enter();
    let mut at = 0;
    for scale in scales.as_chunks::<2>().0 {
        let end = codes.len().min((at + first) / INT8_BLOCK * INT8_BLOCK + INT8_BLOCK - first);
        let scale = f16_to_f32(u16::from_le_bytes(*scale));
        int8_to_bf16(&codes[at..end], scale, &mut out[2 * at..2 * end]);
        at = end;
    }
}

#[inline(always)]
fn int8_to_bf16_scalar(codes: &[u8], scale: f32, out: &mut [u8]) {
    for (&code, out) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
        *out = f32_to_bf16(f32::from(code as i8) * scale).to_le_bytes();
    }
}
