//! The arithmetic of merging, on at most a block of float64 values at a time.
//!
//! Owns formulas, loads and the one rounding; knows neither names nor files. Everything is computed
//! in float64, in one fixed order and without fused multiply-add, so every processor gives the same
//! bits. Each function is compiled for the baseline, for AVX2 and for AVX-512.

use super::{Elements, ieee, wide};
use crate::dtype::{Bf16, Dtype, F16, F32, Narrow, f32_to_bf16, f32_to_f16, f64_to_f32_odd};

/// Values that are loaded, merged and rounded at a time: few enough that those of all models fit in
/// the first-level cache.
pub(crate) const BLOCK: usize = 512;

/// A block of values.
pub(crate) type Values = [f64; BLOCK];

/// Keeps the IEEE 754 default environment on this thread until dropped.
pub(crate) struct Environment {
    _ieee: ieee::DefaultFloat,
}

impl Environment {
    pub(crate) fn enter() -> Self {
        Self { _ieee: ieee::DefaultFloat::enter() }
    }
}

/// Instruction sets that the functions below are compiled for, the widest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The widest that the processor supports.
    #[inline(always)]
    fn of_processor() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                return Self::Avx512;
            }
            if has!("avx2") {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }

    /// The widest to use; a test can lower it on its own thread.
    #[inline(always)]
    pub(super) fn used() -> Self {
        #[cfg(test)]
        return Self::of_processor().min(tests::WIDEST.get().unwrap_or(Self::of_processor()));
        #[cfg(not(test))]
        Self::of_processor()
    }
}

/// Define functions that are compiled for every level and run the widest one that is supported.
macro_rules! vectorised {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {
        $(
            $(#[$doc])*
            #[allow(clippy::too_many_arguments)]
            pub(crate) fn $name($($arg: $type),*) $(-> $result)? {
                #[inline(always)]
                fn inner($($arg: $type),*) $(-> $result)? $body
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $type),*) $(-> $result)? { inner($($arg),*) }
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) $(-> $result)? { inner($($arg),*) }
                match $crate::kernel::blend::Level::used() {
                    // SAFETY: the processor has all that the function asks for.
                    #[cfg(target_arch = "x86_64")]
                    #[allow(unsafe_code)]
                    $crate::kernel::blend::Level::Avx512 => unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    #[allow(unsafe_code)]
                    $crate::kernel::blend::Level::Avx2 => unsafe { avx2($($arg),*) },
                    $crate::kernel::blend::Level::Baseline => inner($($arg),*),
                }
            }
        )*
    };
}

pub(super) use vectorised;

#[inline(always)]
fn load_all<T: Narrow>(bytes: &[u8], out: &mut [f64]) {
    let bytes = &bytes[..T::NBYTES * out.len()];
    for (index, value) in out.iter_mut().enumerate() {
        *value = f64::from(T::load(bytes, index));
    }
}

vectorised! {
    /// The values of elements, exactly.
    fn widen(elements: Elements<'_>, out: &mut [f64]) {
        match elements.dtype {
            Dtype::BF16 => load_all::<Bf16>(elements.bytes, out),
            Dtype::F16 => load_all::<F16>(elements.bytes, out),
            Dtype::F32 => load_all::<F32>(elements.bytes, out),
            Dtype::F64 => {
                for (index, value) in out.iter_mut().enumerate() {
                    *value = wide::load(&elements, index);
                }
            }
        }
    }

    /// Round each value once, to nearest and ties to even.
    fn round(values: &[f64], dtype: Dtype, bytes: &mut [u8]) {
        match dtype {
            Dtype::BF16 => {
                for (out, &value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *out = f32_to_bf16(f64_to_f32_odd(value)).to_le_bytes();
                }
            }
            Dtype::F16 => {
                for (out, &value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *out = f32_to_f16(f64_to_f32_odd(value)).to_le_bytes();
                }
            }
            Dtype::F32 => {
                for (out, &value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *out = (value as f32).to_le_bytes();
                }
            }
            Dtype::F64 => {
                for (out, &value) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(values) {
                    *out = value.to_le_bytes();
                }
            }
        }
    }

    /// Count the values that are NaN or infinite.
    fn nonfinite(values: &[f64]) -> u64 {
        let mut count = 0u64;
        for value in values {
            count += u64::from(!value.is_finite());
        }
        count
    }

    /// The largest magnitude; NaN if any value is NaN.
    fn largest(values: &[f64]) -> f64 {
        // Without their sign, bits are ordered as magnitudes are, and NaN comes last.
        f64::from_bits(values.iter().fold(0, |most, &value| most.max(magnitude(value))))
    }

    /// x − y.
    fn difference(left: &[f64], right: &[f64], out: &mut [f64]) {
        for ((out, x), y) in out.iter_mut().zip(left).zip(right) {
            *out = x - y;
        }
    }

    /// Add x to each value, except where x is not finite, which stays a matter of its own tensor.
    fn completed(by: &[f64], out: &mut [f64]) {
        for (out, x) in out.iter_mut().zip(by) {
            *out += if x.is_finite() { *x } else { 0.0 };
        }
    }

    /// a·x + b·y.
    fn weighted(a: f64, x: &[f64], b: f64, y: &[f64], out: &mut [f64]) {
        for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
            *out = a * x + b * y;
        }
    }

    /// start + w·step.
    fn moved(start: &[f64], w: f64, step: &[f64], out: &mut [f64]) {
        for ((out, start), step) in out.iter_mut().zip(start).zip(step) {
            *out = start + w * step;
        }
    }

    /// base + (w·first + v·second).
    fn added(base: &[f64], w: f64, first: &[f64], v: f64, second: &[f64], out: &mut [f64]) {
        for (((out, base), first), second) in out.iter_mut().zip(base).zip(first).zip(second) {
            *out = base + (w * first + v * second);
        }
    }

    /// base + the mean of those of w·first and v·second that are not zero and have the sign of their
    /// sum. If the sum is zero nothing is added; if it is NaN the result is NaN.
    fn elected(base: &[f64], w: f64, first: &[f64], v: f64, second: &[f64], out: &mut [f64]) {
        for (((out, base), first), second) in out.iter_mut().zip(base).zip(first).zip(second) {
            let (x, y) = (w * first, v * second);
            let sum = x + y;
            let up = f64::from(u8::from(sum > 0.0));
            let down = f64::from(u8::from(sum < 0.0));
            let sign = up - down;
            let (with_x, with_y) = (x * sign > 0.0, y * sign > 0.0);
            let count = f64::from(u8::from(with_x)) + f64::from(u8::from(with_y));
            let total = if with_x { x } else { 0.0 } + if with_y { y } else { 0.0 };
            let mean = total / count.max(1.0);
            // Comparing with NaN gives false, so NaN would count as zero.
            *out = base + if sum.is_nan() { sum } else { mean };
        }
    }

    /// Set values below the threshold in magnitude to zero, and return how many are left.
    fn trim(values: &mut [f64], threshold: f64) -> u64 {
        let mut kept = 0u64;
        for value in values {
            // Not the complement: NaN fails both comparisons, and it must stay visible.
            let drop = value.abs() < threshold;
            kept += u64::from(!drop);
            *value = if drop { 0.0 } else { *value };
        }
        kept
    }

    /// Keep the values whose random number is below the limit, divided by the share that is kept, and
    /// set the others to zero. Returns how many are left.
    fn drop_out(values: &mut [f64], key: u64, first: u64, limit: u64, density: f64) -> u64 {
        let mut kept = 0u64;
        for (value, index) in values.iter_mut().zip(first..) {
            let keep = random(key, index) < limit;
            kept += u64::from(keep);
            *value = if keep { *value / density } else { 0.0 };
        }
        kept
    }

    /// Put the magnitudes from `low` to `high` into `within`, in order. Returns how many those are, how
    /// many are below them, and how many finite ones above.
    fn sift(values: &[f64], low: u64, high: u64, within: &mut [u64; BLOCK]) -> (usize, u64, u64) {
        let (mut below, mut above, mut nonfinite) = (0u64, 0u64, 0u64);
        for &value in values {
            let magnitude = magnitude(value);
            below += u64::from(magnitude < low);
            above += u64::from(magnitude > high);
            nonfinite += u64::from(magnitude > LARGEST);
        }
        let mut count = 0;
        if below + above < values.len() as u64 {
            // One comparison and no branch, which would be mispredicted for one value in two.
            for &value in values {
                let magnitude = magnitude(value);
                within[count % BLOCK] = magnitude;
                count += usize::from(magnitude.wrapping_sub(low) <= high - low);
            }
        }
        (count, below, above - nonfinite)
    }

    /// (Σx², Σy², Σxy), summed in eight lanes.
    fn products(x: &[f64], y: &[f64]) -> [f64; 3] {
        let mut sums = [[0f64; 8]; 3];
        let ((x_chunks, x_rest), (y_chunks, y_rest)) = (x.as_chunks::<8>(), y.as_chunks::<8>());
        for (x, y) in x_chunks.iter().zip(y_chunks) {
            for lane in 0..8 {
                sums[0][lane] += x[lane] * x[lane];
                sums[1][lane] += y[lane] * y[lane];
                sums[2][lane] += x[lane] * y[lane];
            }
        }
        for (lane, (x, y)) in x_rest.iter().zip(y_rest).enumerate() {
            sums[0][lane] += x * x;
            sums[1][lane] += y * y;
            sums[2][lane] += x * y;
        }
        sums.map(|lanes| lanes.iter().sum())
    }
}

/// Bits of a random number.
pub(crate) const RANDOM_NBITS: u32 = 53;

/// The random number of an index, of 53 bits: SplitMix64 (Steele, Lea and Flood, "Fast splittable
/// pseudorandom number generators", 2014) at state key + (index + 1)·γ, so that each can be
/// computed without those before it.
#[inline(always)]
pub(crate) fn random(key: u64, index: u64) -> u64 {
    let mut z = key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) >> (64 - RANDOM_NBITS)
}

/// The largest finite magnitude.
pub(crate) const LARGEST: u64 = f64::MAX.to_bits();

/// A number that sorts as magnitudes do: the bits of a float64 without its sign.
#[inline(always)]
pub(crate) fn magnitude(value: f64) -> u64 {
    value.to_bits() & !(1 << 63)
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// The widest level that this thread uses; None means the processor's widest.
        pub(in crate::kernel) static WIDEST: Cell<Option<Level>> = const { Cell::new(None) };
    }

    /// Values of every kind, a few of them again and again, in an odd number.
    #[cfg(target_arch = "x86_64")]
    fn values(key: u64) -> Vec<f64> {
        let special = [0.0, -0.0, 1.5, -1.5, 5e-324, 3e38, -7e38, 1e-41, 65520.0, f64::MAX];
        (0..517)
            .map(|index| match random(key, index) % 16 {
                0 => f64::from_bits(random(key, index + 1000) << 11),
                1 => [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][index as usize % 3],
                2..5 => special[index as usize % special.len()],
                _ => random(key, index + 2000) as f64 / 2f64.powi(52) - 1.0,
            })
            .collect()
    }

    /// The results of every function for some values, as bits.
    #[cfg(target_arch = "x86_64")]
    fn everything(key: u64) -> Vec<u64> {
        let (x, y, z) = (values(key), values(key + 1), values(key + 2));
        let mut found = Vec::new();
        let mut out = vec![0.0; x.len()];
        let mut keep = |out: &[f64]| {
            // If both are NaN, the processor decides which one results.
            let bits = |v: &f64| if v.is_nan() { f64::NAN.to_bits() } else { v.to_bits() };
            found.extend(out.iter().map(bits));
        };
        difference(&x, &y, &mut out);
        keep(&out);
        weighted(0.7, &x, 0.3, &y, &mut out);
        keep(&out);
        completed(&y, &mut out);
        keep(&out);
        moved(&x, 0.3, &y, &mut out);
        keep(&out);
        added(&x, 0.3, &y, 0.7, &z, &mut out);
        keep(&out);
        elected(&x, 0.3, &y, 0.7, &z, &mut out);
        keep(&out);
        out.copy_from_slice(&x);
        let trimmed = trim(&mut out, 0.4);
        keep(&out);
        out.copy_from_slice(&x);
        let dropped = drop_out(&mut out, key, 3, 1 << 52, 0.5);
        keep(&out);
        keep(&products(&x, &y));
        let (mut within, [low, high]) = ([0; BLOCK], [0.3, 0.6].map(f64::to_bits));
        for x in x.chunks(BLOCK) {
            let (count, below, above) = sift(x, low, high, &mut within);
            keep(&within[..count].iter().map(|&bits| f64::from_bits(bits)).collect::<Vec<_>>());
            keep(&[below as f64, above as f64]);
        }
        keep(&[largest(&x), largest(&x[..1])]);
        keep(&[trimmed as f64, dropped as f64, nonfinite(&x) as f64]);
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64] {
            let mut bytes = vec![0u8; x.len() * dtype.nbytes()];
            round(&x, dtype, &mut bytes);
            widen(Elements { dtype, bytes: &bytes }, &mut out);
            keep(&out);
        }
        found
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_level_gives_the_same_bits() {
        for key in 0..40 {
            let found = [Level::Baseline, Level::Avx2, Level::Avx512].map(|level| {
                WIDEST.set(Some(level));
                everything(key)
            });
            WIDEST.set(None);
            assert_eq!(found[0], found[1], "{key}");
            assert_eq!(found[0], found[2], "{key}");
        }
    }

    #[test]
    fn the_largest_magnitude_is_not_a_number_where_a_value_is_none() {
        assert_eq!(largest(&[1.0, -3.0, 2.0]), 3.0);
        assert_eq!(largest(&[1.0, f64::NEG_INFINITY]), f64::INFINITY);
        assert!(largest(&[f64::INFINITY, -f64::NAN, 1.0]).is_nan());
        assert_eq!(largest(&[]), 0.0);
    }

    #[test]
    fn magnitudes_are_sifted_in_order_and_what_is_not_finite_is_in_no_part() {
        let values = [0.5, -1.0, f64::NAN, 2.0, -2.0, f64::NEG_INFINITY, 3.0, 0.0, 1.5];
        let (low, high) = (1f64.to_bits(), 2f64.to_bits());
        let mut within = [0; BLOCK];
        assert_eq!(sift(&values, low, high, &mut within), (4, 2, 1));
        assert_eq!(within[..4], [1.0, 2.0, 2.0, 1.5].map(f64::to_bits));
        assert_eq!(sift(&values, 0, LARGEST, &mut within), (7, 0, 0));
        assert_eq!(sift(&[1.0; BLOCK], low, high, &mut within), (BLOCK, 0, 0));
        assert_eq!(sift(&[], low, high, &mut within), (0, 0, 0));
    }

    #[test]
    fn random_numbers_are_those_of_the_published_generator() {
        // The first outputs of java.util.SplittableRandom's mixer for seed 1234567.
        let expected: [u64; 3] = [6457827717110365317, 3203168211198807973, 9817491932198370423];
        for (index, value) in expected.into_iter().enumerate() {
            assert_eq!(random(1234567, index as u64), value >> 11);
        }
    }

    #[test]
    fn an_elected_sign_takes_the_mean_of_those_that_have_it_and_a_draw_takes_nothing() {
        let mut out = [0.0; 6];
        let first = [3.0, -1.0, 2.0, 0.0, -4.0, 0.0];
        let second = [1.0, 4.0, -2.0, 5.0, -2.0, 0.0];
        elected(&[10.0; 6], 1.0, &first, 1.0, &second, &mut out);
        assert_eq!(out, [12.0, 14.0, 10.0, 15.0, 7.0, 10.0]);
    }

    #[test]
    fn what_is_not_a_number_on_either_side_is_elected() {
        let mut out = [0.0; 4];
        let first = [f64::NAN, 1.0, f64::INFINITY, f64::INFINITY];
        let second = [1.0, f64::NAN, f64::NEG_INFINITY, -1.0];
        elected(&[10.0; 4], 1.0, &first, 1.0, &second, &mut out);
        assert!(out[..3].iter().all(|value| value.is_nan()), "{out:?}");
        assert_eq!(out[3], f64::INFINITY);
    }
}
