//! The scalar source compiled for AVX2, which gives the bits of [`scalar`].

use super::scalar;
use crate::dtype::{Dtype, Narrow};

compiled_for!("avx2");

#[target_feature(enable = "avx2")]
pub(super) fn squares<A: Narrow>(elements: &[u8]) -> f64 {
    scalar::squares::<A>(elements)
}

#[target_feature(enable = "avx2")]
pub(super) fn square_of_halves(halves: &[u8], room: &mut [f32]) -> f64 {
    scalar::widen(halves, room);
    scalar::square(room)
}

#[target_feature(enable = "avx2")]
pub(super) fn store(difference: &[f32], out: Dtype, bytes: &mut [u8]) {
    scalar::store(difference, out, bytes);
}
