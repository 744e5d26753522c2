//! Subtract two runs of elements and accumulate their moments, in one pass.
//!
//! Owns the arithmetic of one chunk; knows nothing of files or threads. The same source is compiled
//! for the baseline and, on x86-64, for AVX2 where the processor has it; on AArch64 the baseline has
//! NEON, so there is nothing to choose. No fused multiply-add is used, so all give the same bits and
//! [`scalar`] is the reference. F16C widens and rounds binary16 if the processor has it.
//!
//! Accuracy: squares and products are summed in float32 over at most [`BLOCK`] values spread over
//! [`LANES`] sums, then folded into float64. A block whose sums overflow or underflow float32, or
//! that holds NaN or infinity, is summed again in float64.

#[macro_use]
mod by_type;

#[cfg(target_arch = "x86_64")]
mod avx2;
pub(crate) mod blend;
#[cfg(target_arch = "x86_64")]
mod f16c;
mod fp8;
mod ieee;
mod int8;
mod mixture;
pub(crate) mod rounding;
mod scalar;
mod scaled;
mod wide;

pub use fp8::dequantize;
pub use int8::{INT8_BLOCK, decode_int8, subtract_int8};
pub use scaled::subtract_scaled;

use crate::dtype::{Bf16, Dtype, F16, F32};
use crate::error::{Error, Result};

/// Values whose float32 partial sums are added to float64 at once.
pub const BLOCK: usize = 2048;

/// Independent float32 sums per moment.
pub(crate) const LANES: usize = 16;

/// Sums over the elements of one pair, from which norms and cosines follow.
///
/// Elements where either side is NaN or infinite are counted and left out of the sums.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moments {
    /// Σ(r − m)² of the reasoning side r and the multimodal side m, of the exact difference rather than of its rounded form.
    pub delta_sq: f64,
    /// Σ of the squares as written (decoded, if the output is compressed). It differs from `delta_sq`
    /// only if the output is compressed or has a narrower range than the inputs, where values may have
    /// been lost to underflow.
    pub written_sq: f64,
    /// Σr², the reasoning side.
    pub reasoning_sq: f64,
    /// Σm², the multimodal side.
    pub multimodal_sq: f64,
    /// Σrm.
    pub dot: f64,
    /// The largest |r − m|; in a block that was summed in float32, of the differences so rounded.
    pub max_abs: f64,
    /// Elements that do not differ.
    pub zeros: u64,
    /// Elements where neither side is zero and both have the same sign.
    pub agreeing: u64,
    /// Σ of exact difference times stored value, if the output is compressed.
    pub stored_dot: f64,
    /// Differences other than zero that are stored as zero, if the output is compressed.
    pub flushed: u64,
    /// NaN and infinities on the reasoning side.
    pub nonfinite_reasoning: u64,
    /// NaN and infinities on the multimodal side.
    pub nonfinite_multimodal: u64,
    /// Differences of finite values that became infinite in the output dtype.
    pub overflow: u64,
    /// The part of `delta_sq` that is rounding of both sides, estimated from a sample of the elements
    /// where a whole tensor is streamed; zero elsewhere.
    pub rounding_sq: f64,
}

impl Moments {
    /// Add the sums of a later run of elements. The last bits depend on the order of additions, so
    /// callers add in element order.
    pub fn add(&mut self, later: &Moments) {
        self.delta_sq += later.delta_sq;
        self.written_sq += later.written_sq;
        self.reasoning_sq += later.reasoning_sq;
        self.multimodal_sq += later.multimodal_sq;
        self.dot += later.dot;
        self.max_abs = self.max_abs.max(later.max_abs);
        self.zeros += later.zeros;
        self.agreeing += later.agreeing;
        self.stored_dot += later.stored_dot;
        self.flushed += later.flushed;
        self.nonfinite_reasoning += later.nonfinite_reasoning;
        self.nonfinite_multimodal += later.nonfinite_multimodal;
        self.overflow += later.overflow;
        self.rounding_sq += later.rounding_sq;
    }
}

/// A run of little-endian elements at any alignment.
#[derive(Clone, Copy)]
pub struct Elements<'a> {
    /// How to read them.
    pub dtype: Dtype,
    /// A whole number of elements.
    pub bytes: &'a [u8],
}

impl<'a> Elements<'a> {
    /// View `bytes` as elements.
    ///
    /// # Errors
    /// `bytes` is not a whole number of elements.
    pub fn new(dtype: Dtype, bytes: &'a [u8]) -> Result<Self> {
        if !bytes.len().is_multiple_of(dtype.nbytes()) {
            let message =
                format!("{} bytes are not a whole number of {}", bytes.len(), dtype.name());
            return Err(Error::Argument(message));
        }
        Ok(Self { dtype, bytes })
    }

    /// Count of elements.
    pub fn numel(&self) -> usize {
        self.bytes.len() / self.dtype.nbytes()
    }

    /// One element, exactly.
    pub(crate) fn value(&self, index: usize) -> f64 {
        wide::load(self, index)
    }

    /// The elements from `start` up to `end`.
    pub(crate) fn slice(&self, start: usize, end: usize) -> Elements<'a> {
        let nbytes = self.dtype.nbytes();
        Elements { dtype: self.dtype, bytes: &self.bytes[start * nbytes..end * nbytes] }
    }
}

/// Accumulate the moments of `reasoning` and `multimodal` and, if asked, write their difference.
///
/// Each difference equals the float64 subtraction rounded once to `out`'s dtype. Both runs and the
/// output hold the same number of elements; otherwise this panics.
pub fn subtract(
    reasoning: Elements<'_>,
    multimodal: Elements<'_>,
    mut out: Option<(Dtype, &mut [u8])>,
) -> Moments {
    let numel = reasoning.numel();
    assert_eq!(numel, multimodal.numel(), "both sides hold the same number of elements");
    if let Some((dtype, bytes)) = &out {
        assert_eq!(numel * dtype.nbytes(), bytes.len(), "the output holds as many elements");
    }
    let _ieee = ieee::DefaultFloat::enter();
    let mut total = Moments::default();
    let mut difference = [0f32; BLOCK];
    for start in (0..numel).step_by(BLOCK) {
        let end = numel.min(start + BLOCK);
        let (a, b) = (reasoning.slice(start, end), multimodal.slice(start, end));
        let out = out.as_mut().map(|(dtype, bytes)| {
            let nbytes = dtype.nbytes();
            (*dtype, &mut bytes[start * nbytes..end * nbytes])
        });
        let block = block(a, b, out, &mut difference[..end - start]);
        total.add(&block);
    }
    total
}

/// Write the difference that [`subtract`] writes, and nothing else.
///
/// Returns false, with `out` untouched, where a finite output does not say that all is well: binary16 may
/// have lost differences to its narrower range, of which only moments tell, and so may what is made of
/// float64. Both runs and the output hold the same number of elements; otherwise this panics.
pub fn subtract_plainly(
    reasoning: Elements<'_>,
    multimodal: Elements<'_>,
    (dtype, out): (Dtype, &mut [u8]),
) -> bool {
    let numel = reasoning.numel();
    assert_eq!(numel, multimodal.numel(), "both sides hold the same number of elements");
    assert_eq!(numel * dtype.nbytes(), out.len(), "the output holds as many elements");
    if dtype == Dtype::F16 || [reasoning.dtype, multimodal.dtype, dtype].contains(&Dtype::F64) {
        return false;
    }
    let _ieee = ieee::DefaultFloat::enter();
    let mut difference = [0f32; BLOCK];
    for (number, out) in out.chunks_mut(BLOCK * dtype.nbytes()).enumerate() {
        let (start, end) = (number * BLOCK, numel.min((number + 1) * BLOCK));
        let (a, b) = (reasoning.slice(start, end), multimodal.slice(start, end));
        let difference = &mut difference[..end - start];
        if narrow_is_exact(a.dtype, b.dtype, dtype) {
            differences(a, b, difference);
        } else {
            odd(a, b, difference);
        }
        store(difference, dtype, out);
    }
    true
}

/// ‖x‖², to the bit what [`subtract`] finds of either side; NaN where an element is not finite.
pub fn square(elements: Elements<'_>) -> f64 {
    let _ieee = ieee::DefaultFloat::enter();
    let numel = elements.numel();
    let mut total = 0.0;
    for start in (0..numel).step_by(BLOCK) {
        let block = elements.slice(start, numel.min(start + BLOCK));
        let sum = if block.dtype == Dtype::F64 { f64::NAN } else { squares(block) };
        total += if faithful(sum as f32) { sum } else { wide::finite_square(block) };
    }
    total
}

/// Whether a sum of squares in float32 lost nothing: below this, some may have underflowed, and
/// beyond float32 it is infinite.
fn faithful(sum: f32) -> bool {
    sum.is_finite() && sum > 1e-20
}

impl scalar::Sums {
    /// Whether the sums over each side lost nothing.
    fn are_faithful(&self) -> bool {
        faithful(self.reasoning_sq) && faithful(self.multimodal_sq) && self.dot.is_finite()
    }
}

/// Whether a float32 subtraction followed by one rounding equals the float64 one rounded once.
///
/// Float32 has more than twice the bits of either half type plus two, which makes the second
/// rounding innocuous when operands and result share a type (Figueroa, "When is double rounding
/// innocuous?", 1995). For mixed types it is not: a binary16 operand can sit on a bfloat16 midpoint.
fn narrow_is_exact(a: Dtype, b: Dtype, out: Dtype) -> bool {
    a != Dtype::F64 && b != Dtype::F64 && (out == Dtype::F32 || (a == b && b == out))
}

/// Σx², Σy² and Σxy, summed as [`subtract`] sums them; NaN where an element is not finite. Both runs hold
/// the same number of elements; otherwise this panics.
pub fn products(left: Elements<'_>, right: Elements<'_>) -> [f64; 3] {
    let _ieee = ieee::DefaultFloat::enter();
    let numel = left.numel();
    assert_eq!(numel, right.numel(), "both sides hold the same number of elements");
    let mut total = [0.0; 3];
    for start in (0..numel).step_by(BLOCK) {
        let end = numel.min(start + BLOCK);
        let (x, y) = (left.slice(start, end), right.slice(start, end));
        let wide = x.dtype == Dtype::F64 || y.dtype == Dtype::F64;
        let narrow = if wide { None } else { Some(sums::<false>(x, y, &mut [])) };
        let sums = match narrow {
            Some(sums) if sums.are_faithful() => {
                [sums.folded.reasoning_sq, sums.folded.multimodal_sq, sums.folded.dot]
            }
            _ => wide::products(&x, &y),
        };
        total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    total
}

/// Count elements of one sign.
fn agreeing(a: Elements<'_>, b: Elements<'_>) -> u64 {
    by_processor!(a, b, |A, B| agreeing::<A, B>(a.bytes, b.bytes))
}

/// Σ of the products in float64, for sums that differ little from one another; not finite where an
/// element is not. Both runs hold the same number of elements; otherwise this panics.
pub fn dot(left: Elements<'_>, right: Elements<'_>) -> f64 {
    let _ieee = ieee::DefaultFloat::enter();
    assert_eq!(left.numel(), right.numel(), "both sides hold the same number of elements");
    if left.dtype == Dtype::F64 || right.dtype == Dtype::F64 {
        return (0..left.numel()).map(|i| left.value(i) * right.value(i)).sum();
    }
    narrow_dot(left, right)
}

fn narrow_dot(left: Elements<'_>, right: Elements<'_>) -> f64 {
    by_processor!(left, right, |A, B| dot::<A, B>(left.bytes, right.bytes))
}

fn block(
    a: Elements<'_>,
    b: Elements<'_>,
    out: Option<(Dtype, &mut [u8])>,
    difference: &mut [f32],
) -> Moments {
    let Some((dtype, bytes)) = out else { return measured::<false>(a, b, difference) };
    let mut moments = measured::<true>(a, b, difference);
    let wide_input = a.dtype == Dtype::F64 || b.dtype == Dtype::F64;
    if narrow_is_exact(a.dtype, b.dtype, dtype) {
        store(difference, dtype, bytes);
    } else if wide_input || dtype == Dtype::F64 {
        wide::difference(a, b, dtype, bytes);
    } else {
        odd(a, b, difference);
        store(difference, dtype, bytes);
    }
    if dtype == Dtype::F16 {
        moments.written_sq = square_of_halves(bytes, difference);
    } else if wide_input {
        moments.written_sq = wide::square(dtype, bytes);
    }
    Moments { overflow: overflow(a, b, dtype, bytes, &moments), ..moments }
}

/// Σ of the squares of at most a block of binary16, widened into `room`.
fn square_of_halves(halves: &[u8], room: &mut [f32]) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, which the function asks for.
        #[allow(unsafe_code)]
        unsafe {
            return avx2::square_of_halves(halves, room);
        }
    }
    scalar::widen(halves, room);
    scalar::square(room)
}

/// The moments of one block and, if `STORE` and no side is float64, the float32 differences.
fn measured<const STORE: bool>(
    a: Elements<'_>,
    b: Elements<'_>,
    difference: &mut [f32],
) -> Moments {
    let mut moments = if a.dtype == Dtype::F64 || b.dtype == Dtype::F64 {
        wide::moments(a, b)
    } else {
        let sums = sums::<STORE>(a, b, difference);
        // A block without any difference (a frozen layer, for example) needs no second look.
        if (faithful(sums.delta_sq) || sums.unchanged) && sums.are_faithful() {
            let counted = if sums.undecided { agreeing(a, b) } else { sums.folded.agreeing };
            Moments { agreeing: counted, ..sums.folded }
        } else {
            wide::moments(a, b)
        }
    };
    moments.written_sq = moments.delta_sq;
    moments
}

/// The float64 differences of types no wider than float32, rounded to odd.
fn odd(a: Elements<'_>, b: Elements<'_>, difference: &mut [f32]) {
    by_processor!(a, b, |A, B| odd::<A, B>(a.bytes, b.bytes, difference))
}

/// The float32 differences of types no wider than that.
fn differences(a: Elements<'_>, b: Elements<'_>, difference: &mut [f32]) {
    by_processor!(a, b, |A, B| differences::<A, B>(a.bytes, b.bytes, difference))
}

#[cfg(target_arch = "x86_64")]
fn has_f16c() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("f16c")
}

/// Count differences of finite values that left the output dtype's range.
fn overflow(a: Elements<'_>, b: Elements<'_>, out: Dtype, bytes: &[u8], moments: &Moments) -> u64 {
    // A block's norm bounds each of its elements, which settles nearly every block.
    if moments.delta_sq.sqrt() <= out.max_finite() {
        return 0;
    }
    wide::overflow(a, b, out, bytes)
}

fn store(difference: &[f32], out: Dtype, bytes: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        if out == Dtype::F16 && std::arch::is_x86_feature_detected!("f16c") {
            return f16c::round(difference, bytes);
        }
        // SAFETY: the processor has AVX2, which the function asks for.
        #[allow(unsafe_code)]
        unsafe {
            return avx2::store(difference, out, bytes);
        }
    }
    scalar::store(difference, out, bytes);
}

/// Sum a block and, if `STORE`, write the float32 differences.
fn sums<const STORE: bool>(
    a: Elements<'_>,
    b: Elements<'_>,
    difference: &mut [f32],
) -> scalar::Sums {
    by_processor!(a, b, |A, B| sums::<A, B, STORE>(a.bytes, b.bytes, difference))
}

/// Returns the sum of the squares of a block of float32 or a narrower type.
fn squares(block: Elements<'_>) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        if has_f16c() && block.dtype == Dtype::F16 {
            // SAFETY: the processor has both instruction sets that the function asks for.
            #[allow(unsafe_code)]
            unsafe {
                return f16c::squares(block.bytes);
            }
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, which the function asks for.
            #[allow(unsafe_code)]
            unsafe {
                return match block.dtype {
                    Dtype::BF16 => avx2::squares::<Bf16>(block.bytes),
                    Dtype::F16 => avx2::squares::<F16>(block.bytes),
                    _ => avx2::squares::<F32>(block.bytes),
                };
            }
        }
    }
    match block.dtype {
        Dtype::BF16 => scalar::squares::<Bf16>(block.bytes),
        Dtype::F16 => scalar::squares::<F16>(block.bytes),
        _ => scalar::squares::<F32>(block.bytes),
    }
}

#[cfg(test)]
mod tests;
