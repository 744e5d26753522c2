//! The reference kernel: plain loops over fixed-size lanes, which compilers vectorise.

use super::{LANES, Moments};
use crate::dtype::{Dtype, Narrow, f32_to_bf16, f32_to_f16, f64_to_f32_odd};

/// A block's sums in float32, to judge their range, and folded into float64.
pub(super) struct Sums {
    pub(super) delta_sq: f32,
    pub(super) reasoning_sq: f32,
    pub(super) multimodal_sq: f32,
    pub(super) dot: f32,
    pub(super) folded: Moments,
}

#[derive(Default, Clone, Copy)]
struct Lanes {
    delta_sq: [f32; LANES],
    reasoning_sq: [f32; LANES],
    multimodal_sq: [f32; LANES],
    dot: [f32; LANES],
    max_abs: [f32; LANES],
    /// Zero differences in the lower half and agreeing signs in the upper one: a lane sees at most
    /// BLOCK / LANES elements, and one register less is what keeps the loop from spilling.
    counts: [u32; LANES],
}

impl Lanes {
    #[inline(always)]
    fn add<A: Narrow, B: Narrow>(&mut self, a: &[u8], b: &[u8], difference: &mut [f32; LANES]) {
        // Indexed: seven arrays in step, which the compiler turns into vector registers.
        #[allow(clippy::needless_range_loop)]
        for i in 0..LANES {
            let (x, y) = (A::load(a, i), B::load(b, i));
            let d = x - y;
            difference[i] = d;
            self.delta_sq[i] += d * d;
            self.reasoning_sq[i] += x * x;
            self.multimodal_sq[i] += y * y;
            self.dot[i] += x * y;
            let magnitude = d.abs();
            self.max_abs[i] = if magnitude > self.max_abs[i] { magnitude } else { self.max_abs[i] };
            // Bits, since the product of two tiny values can underflow.
            let agree = ((x.to_bits() ^ y.to_bits()) >> 31 == 0) & (x != 0.0) & (y != 0.0);
            self.counts[i] += u32::from(d == 0.0) + (u32::from(agree) << 16);
        }
    }
}

/// Sum one block of at most `BLOCK` elements and write the float32 differences.
#[inline(always)]
pub(super) fn sums<A: Narrow, B: Narrow>(a: &[u8], b: &[u8], difference: &mut [f32]) -> Sums {
    let mut lanes = Lanes::default();
    let (whole, rest) = difference.as_chunks_mut::<LANES>();
    let (a_lanes, b_lanes) = (a.chunks_exact(A::NBYTES * LANES), b.chunks_exact(B::NBYTES * LANES));
    let (a_rest, b_rest) = (a_lanes.remainder(), b_lanes.remainder());
    for ((x, y), d) in a_lanes.zip(b_lanes).zip(whole) {
        lanes.add::<A, B>(x, y, d);
    }
    let mut padding = 0;
    if !rest.is_empty() {
        // Zeros add nothing to any sum but the count of zeros, so the tail goes through the same
        // lanes.
        padding = (LANES - rest.len()) as u64;
        let (mut x, mut y, mut d) = ([0u8; 4 * LANES], [0u8; 4 * LANES], [0f32; LANES]);
        x[..a_rest.len()].copy_from_slice(a_rest);
        y[..b_rest.len()].copy_from_slice(b_rest);
        lanes.add::<A, B>(&x[..A::NBYTES * LANES], &y[..B::NBYTES * LANES], &mut d);
        rest.copy_from_slice(&d[..rest.len()]);
    }
    let folded = Moments {
        delta_sq: fold(&lanes.delta_sq),
        reasoning_sq: fold(&lanes.reasoning_sq),
        multimodal_sq: fold(&lanes.multimodal_sq),
        dot: fold(&lanes.dot),
        max_abs: f64::from(lanes.max_abs.iter().fold(0f32, |most, &lane| most.max(lane))),
        zeros: lanes.counts.iter().map(|&lane| u64::from(lane & 0xffff)).sum::<u64>() - padding,
        agreeing: lanes.counts.iter().map(|&lane| u64::from(lane >> 16)).sum(),
        ..Moments::default()
    };
    Sums {
        delta_sq: folded.delta_sq as f32,
        reasoning_sq: folded.reasoning_sq as f32,
        multimodal_sq: folded.multimodal_sq as f32,
        dot: folded.dot as f32,
        folded,
    }
}

#[inline(always)]
fn fold(lanes: &[f32; LANES]) -> f64 {
    lanes.iter().map(|&lane| f64::from(lane)).sum()
}

/// Write the float64 differences brought to float32 by rounding to odd, so that [`store`] to a type
/// of at most 22 bits rounds them once.
#[inline(always)]
pub(super) fn odd<A: Narrow, B: Narrow>(a: &[u8], b: &[u8], difference: &mut [f32]) {
    for (index, out) in difference.iter_mut().enumerate() {
        *out = f64_to_f32_odd(f64::from(A::load(a, index)) - f64::from(B::load(b, index)));
    }
}

/// Round float32 differences to the output dtype, which is no wider.
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
