//! Elements of a delta that is stored as int8, as bfloat16.

use std::ops::Range;

use crate::checkpoint::{Checkpoint, Shard, Tensor};
use crate::error::{Error, Result};
use crate::kernel::{INT8_BLOCK, decode_int8};
use crate::output::format::SCALE;

/// Elements that are decoded at a time: a multiple of [`INT8_BLOCK`].
const DECODED: usize = 1 << 18;

/// Fill `out` with elements of an int8 Δ as bfloat16; memory does not grow with how many.
///
/// # Errors
/// A tensor that is not there or of another type, elements that it does not have, `out` of another
/// size, or a failed read.
pub fn decode(
    delta: &Checkpoint,
    name: &str,
    elements: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    let (shard, codes) = delta.tensor(name)?;
    if codes.dtype != safetensors::Dtype::I8 {
        let message = format!("dtype {}, expected codes of I8", codes.dtype);
        return Err(Error::tensor(shard.path(), name, message));
    }
    let numel = codes.numel();
    if elements.start > elements.end || elements.end > numel {
        let message = format!("{name} has {numel} elements, not {elements:?}");
        return Err(Error::Argument(message));
    }
    if out.len() != 2 * elements.len() {
        return Err(Error::Argument(format!(
            "the buffer for {name} has {} bytes, expected {}",
            out.len(),
            2 * elements.len()
        )));
    }
    let (mut bytes, mut scales) = (Vec::new(), Vec::new());
    let mut start = elements.start;
    while start < elements.end {
        let end = elements.end.min((start / DECODED + 1) * DECODED);
        let piece = &mut out[2 * (start - elements.start)..2 * (end - elements.start)];
        bytes.resize(end - start, 0);
        shard.read_exact_at(&mut bytes, codes.range.start + start as u64)?;
        let (shard, stored) = scales_of(delta, name, numel)?;
        let blocks = start / INT8_BLOCK..end.div_ceil(INT8_BLOCK);
        scales.resize(2 * blocks.len(), 0);
        let at = stored.range.start + 2 * blocks.start as u64;
        shard.read_exact_at(&mut scales, at)?;
        decode_int8(&bytes, &scales, start % INT8_BLOCK, piece);
        start = end;
    }
    Ok(())
}

fn scales_of<'a>(
    delta: &'a Checkpoint,
    name: &str,
    numel: usize,
) -> Result<(&'a Shard, &'a Tensor)> {
    let (shard, scales) = delta.tensor(&format!("{name}{SCALE}"))?;
    let expected = [numel.div_ceil(INT8_BLOCK)];
    if scales.dtype != safetensors::Dtype::F16 || scales.shape != expected {
        let message = format!(
            "dtype {} and shape {:?}, expected F16 and {expected:?}; compute the delta again",
            scales.dtype, scales.shape
        );
        return Err(Error::tensor(shard.path(), &scales.name, message));
    }
    Ok((shard, scales))
}
