//! The reference kernel: plain loops over fixed-size lanes, which compilers vectorize.

// Several arrays are indexed together, which become vector registers; iterators would not.
#![allow(clippy::needless_range_loop)]

use super::{LANES, Moments};
use crate::dtype::{Dtype, Narrow, f16_to_f32, f32_to_bf16, f32_to_f16, f64_to_f32_odd};

/// A block's sums in float32, to judge their range, and added up in float64.
pub(super) struct Sums {
    pub(super) delta_sq: f32,
    pub(super) reasoning_sq: f32,
    pub(super) multimodal_sq: f32,
    pub(super) dot: f32,
    pub(super) unchanged: bool,
    /// Whether products leave open how many elements agree.
    pub(super) undecided: bool,
    pub(super) folded: Moments,
}

/// Half the lanes: counts take two lanes at a time, so that all sums stay in registers.
const HALF: usize = LANES / 2;

#[derive(Default, Clone, Copy)]
struct Lanes {
    delta_sq: [f32; LANES],
    reasoning_sq: [f32; LANES],
    multimodal_sq: [f32; LANES],
    dot: [f32; LANES],
    max_sq: [f32; HALF],
    zeros: [u32; HALF],
    agreeing: [u32; HALF],
    /// Whether a product was zero, because an operand is or by underflow.
    undecided: [u32; HALF],
}

impl Lanes {
    #[inline(always)]
    fn add(&mut self, x: &[f32; LANES], y: &[f32; LANES]) -> [f32; LANES] {
        let (mut difference, mut sq, mut dot) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
        for i in 0..LANES {
            let d = x[i] - y[i];
            difference[i] = d;
            sq[i] = d * d;
            dot[i] = x[i] * y[i];
            self.delta_sq[i] += sq[i];
            self.reasoning_sq[i] += x[i] * x[i];
            self.multimodal_sq[i] += y[i] * y[i];
            self.dot[i] += dot[i];
        }
        for i in 0..HALF {
            let larger = if sq[i] > sq[i + HALF] { sq[i] } else { sq[i + HALF] };
            self.max_sq[i] = if larger > self.max_sq[i] { larger } else { self.max_sq[i] };
            let either = |holds: fn(f32) -> bool, values: &[f32; LANES]| {
                u32::from(holds(values[i])) + u32::from(holds(values[i + HALF]))
            };
            self.zeros[i] += either(|d| d == 0.0, &difference);
            self.agreeing[i] += either(|product| product > 0.0, &dot);
            self.undecided[i] |= either(|product| product == 0.0, &dot);
        }
        difference
    }
}

/// Sum one block of at most `BLOCK` elements and, if `STORE`, write the float32 differences.
#[inline(always)]
pub(super) fn sums<A: Narrow, B: Narrow, const STORE: bool>(
    a: &[u8],
    b: &[u8],
    difference: &mut [f32],
) -> Sums {
    let mut lanes = Lanes::default();
    let (a_lanes, b_lanes) = (a.chunks_exact(A::NBYTES * LANES), b.chunks_exact(B::NBYTES * LANES));
    let (a_rest, b_rest) = (a_lanes.remainder(), b_lanes.remainder());
    let numel = a.len() / A::NBYTES;
    if STORE {
        let (whole, _) = difference.as_chunks_mut::<LANES>();
        for ((x, y), d) in a_lanes.zip(b_lanes).zip(whole) {
            *d = lanes.add(&A::lanes(x), &B::lanes(y));
        }
    } else {
        for (x, y) in a_lanes.zip(b_lanes) {
            lanes.add(&A::lanes(x), &B::lanes(y));
        }
    }
    let count = numel % LANES;
    let mut padding = 0;
    if count > 0 {
        // Zeros change no sum but the count of zeros, so the tail can use the same lanes.
        padding = (LANES - count) as u64;
        let (mut x, mut y) = ([0f32; LANES], [0f32; LANES]);
        for i in 0..count {
            (x[i], y[i]) = (A::load(a_rest, i), B::load(b_rest, i));
        }
        let undecided = lanes.undecided;
        let d = lanes.add(&x, &y);
        let decided = x.iter().zip(&y).take(count).all(|(x, y)| x * y != 0.0);
        if decided {
            lanes.undecided = undecided;
        }
        if STORE {
            difference[numel - count..].copy_from_slice(&d[..count]);
        }
    }
    let total = |counts: &[u32; HALF]| counts.iter().map(|&count| u64::from(count)).sum::<u64>();
    let folded = Moments {
        delta_sq: fold(&lanes.delta_sq),
        reasoning_sq: fold(&lanes.reasoning_sq),
        multimodal_sq: fold(&lanes.multimodal_sq),
        dot: fold(&lanes.dot),
        // Without overflow and underflow, the root of a rounded square is the number itself; blocks
        // with either are summed in float64.
        max_abs: f64::from(lanes.max_sq.iter().fold(0f32, |most, &sq| most.max(sq)).sqrt()),
        zeros: total(&lanes.zeros) - padding,
        agreeing: total(&lanes.agreeing),
        ..Moments::default()
    };
    Sums {
        delta_sq: folded.delta_sq as f32,
        reasoning_sq: folded.reasoning_sq as f32,
        multimodal_sq: folded.multimodal_sq as f32,
        dot: folded.dot as f32,
        unchanged: folded.zeros == numel as u64,
        undecided: total(&lanes.undecided) > 0,
        folded,
    }
}

/// The squares of at most `BLOCK` elements, added up as [`sums`] does.
#[inline(always)]
pub(super) fn squares<A: Narrow>(elements: &[u8]) -> f64 {
    let mut sums = [0f32; LANES];
    let lanes = elements.chunks_exact(A::NBYTES * LANES);
    let rest = lanes.remainder();
    for x in lanes {
        let x = A::lanes::<LANES>(x);
        for i in 0..LANES {
            sums[i] += x[i] * x[i];
        }
    }
    for i in 0..rest.len() / A::NBYTES {
        let x = A::load(rest, i);
        sums[i] += x * x;
    }
    fold(&sums)
}

/// Σ of the products in float64, where those of float32 and narrower types are exact.
#[inline(always)]
pub(super) fn dot<A: Narrow, B: Narrow>(a: &[u8], b: &[u8]) -> f64 {
    let mut sums = [0f64; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(A::NBYTES * LANES), b.chunks_exact(B::NBYTES * LANES));
    let (a_rest, b_rest) = (a_lanes.remainder(), b_lanes.remainder());
    for (x, y) in a_lanes.zip(b_lanes) {
        let (x, y) = (A::lanes::<LANES>(x), B::lanes::<LANES>(y));
        for i in 0..LANES {
            sums[i] += f64::from(x[i]) * f64::from(y[i]);
        }
    }
    for (i, sum) in sums.iter_mut().enumerate().take(a_rest.len() / A::NBYTES) {
        *sum += f64::from(A::load(a_rest, i)) * f64::from(B::load(b_rest, i));
    }
    sums.iter().sum()
}

/// Count elements of one sign by their bits, since a product of tiny ones can underflow.
#[inline(always)]
pub(super) fn agreeing<A: Narrow, B: Narrow>(a: &[u8], b: &[u8]) -> u64 {
    let one = |x: f32, y: f32| {
        u32::from(((x.to_bits() ^ y.to_bits()) >> 31 == 0) & (x != 0.0) & (y != 0.0))
    };
    let mut counts = [0u32; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(A::NBYTES * LANES), b.chunks_exact(B::NBYTES * LANES));
    let (a_rest, b_rest) = (a_lanes.remainder(), b_lanes.remainder());
    for (x, y) in a_lanes.zip(b_lanes) {
        let (x, y) = (A::lanes::<LANES>(x), B::lanes::<LANES>(y));
        for i in 0..LANES {
            counts[i] += one(x[i], y[i]);
        }
    }
    for (i, count) in counts.iter_mut().enumerate().take(a_rest.len() / A::NBYTES) {
        *count += one(A::load(a_rest, i), B::load(b_rest, i));
    }
    counts.iter().map(|&count| u64::from(count)).sum()
}

#[inline(always)]
fn fold(lanes: &[f32; LANES]) -> f64 {
    lanes.iter().map(|&lane| f64::from(lane)).sum()
}

/// Write the float64 differences in float32, rounded to odd, so that [`store`] to a type of at most
/// 22 bits rounds them once.
#[inline(always)]
pub(super) fn odd<A: Narrow, B: Narrow>(a: &[u8], b: &[u8], difference: &mut [f32]) {
    each::<A, B>(a, b, difference, |x, y| f64_to_f32_odd(f64::from(x) - f64::from(y)));
}

/// Write the float32 differences.
#[inline(always)]
pub(super) fn differences<A: Narrow, B: Narrow>(a: &[u8], b: &[u8], difference: &mut [f32]) {
    each::<A, B>(a, b, difference, |x, y| x - y);
}

/// Write what `subtract` makes of each pair of elements.
#[inline(always)]
fn each<A: Narrow, B: Narrow>(
    a: &[u8],
    b: &[u8],
    difference: &mut [f32],
    subtract: impl Fn(f32, f32) -> f32,
) {
    let (a_lanes, b_lanes) = (a.chunks_exact(A::NBYTES * LANES), b.chunks_exact(B::NBYTES * LANES));
    let (a_rest, b_rest) = (a_lanes.remainder(), b_lanes.remainder());
    let (whole, rest) = difference.as_chunks_mut::<LANES>();
    for ((x, y), out) in a_lanes.zip(b_lanes).zip(whole) {
        let (x, y) = (A::lanes::<LANES>(x), B::lanes::<LANES>(y));
        for i in 0..LANES {
            out[i] = subtract(x[i], y[i]);
        }
    }
    for (i, out) in rest.iter_mut().enumerate() {
        *out = subtract(A::load(a_rest, i), B::load(b_rest, i));
    }
}

/// Σ of the squares of finite values.
#[inline(always)]
pub(super) fn square(values: &[f32]) -> f64 {
    let mut sums = [0f64; LANES];
    let mut add = |values: &[f32]| {
        for (sum, &value) in sums.iter_mut().zip(values) {
            let value = f64::from(if value.is_finite() { value } else { 0.0 });
            *sum += value * value;
        }
    };
    let (whole, rest) = values.as_chunks::<LANES>();
    for values in whole {
        add(values);
    }
    add(rest);
    sums.iter().sum()
}

/// Widen binary16 to float32.
#[inline(always)]
pub(super) fn widen(halves: &[u8], values: &mut [f32]) {
    for (half, value) in halves.as_chunks::<2>().0.iter().zip(values) {
        *value = f16_to_f32(u16::from_le_bytes(*half));
    }
}

/// Round float32 differences to the output dtype, which is float32 or narrower.
#[inline(always)]
pub(super) fn store(difference: &[f32], out: Dtype, bytes: &mut [u8]) {
    match out {
        Dtype::BF16 => store_as(difference, bytes, |d| f32_to_bf16(d).to_le_bytes()),
        Dtype::F16 => store_as(difference, bytes, |d| f32_to_f16(d).to_le_bytes()),
        Dtype::F32 => store_as(difference, bytes, f32::to_le_bytes),
        Dtype::F64 => store_as(difference, bytes, |d| f64::from(d).to_le_bytes()),
    }
}

#[inline(always)]
fn store_as<const N: usize>(difference: &[f32], bytes: &mut [u8], round: impl Fn(f32) -> [u8; N]) {
    for (out, &d) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(difference) {
        *out = round(d);
    }
}
