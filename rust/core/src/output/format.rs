//! How a delta is laid out on disk: which tensors hold one Δ, and how a chunk of it is written and
//! read back.
//!
//! Owns names, types and places; the arithmetic is [`crate::kernel`]'s. docs/format.md describes the
//! same for a reader who has safetensors and nothing else.

use std::ops::Range;

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::{Elements, INT8_BLOCK, Moments, decode_int8, subtract, subtract_int8};
use crate::output::writer::{Slot, Writer};

/// What is appended to a tensor's name to name its scales.
const SCALE: &str = ".scale";
/// Elements that are decoded at a time: a multiple of [`INT8_BLOCK`].
const DECODED: usize = 1 << 18;

/// How each difference is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As a value of that type.
    Plain(Dtype),
    /// As integers of eight bits and a binary16 scale for every [`INT8_BLOCK`] of them.
    Int8,
}

impl Storage {
    /// The tensors that hold one Δ of this name and shape.
    pub fn slots(self, name: String, shape: Vec<usize>) -> Vec<Slot> {
        let dtype = match self {
            Storage::Plain(Dtype::BF16) => safetensors::Dtype::BF16,
            Storage::Plain(Dtype::F16) => safetensors::Dtype::F16,
            Storage::Plain(Dtype::F32) => safetensors::Dtype::F32,
            Storage::Plain(Dtype::F64) => safetensors::Dtype::F64,
            Storage::Int8 => safetensors::Dtype::I8,
        };
        let numel: usize = shape.iter().product();
        let scales = (self == Storage::Int8).then(|| Slot {
            name: format!("{name}{SCALE}"),
            shape: vec![numel.div_ceil(INT8_BLOCK)],
            dtype: safetensors::Dtype::F16,
        });
        std::iter::once(Slot { name, shape, dtype }).chain(scales).collect()
    }

    /// The first of the slots that hold difference number `index`.
    pub(crate) fn slot(self, index: usize) -> usize {
        if self == Storage::Int8 { 2 * index } else { index }
    }

    /// Elements that a chunk must begin at a multiple of.
    pub(crate) fn granularity(self) -> usize {
        if self == Storage::Int8 { INT8_BLOCK } else { 1 }
    }
}

/// A chunk's bytes on the way to disk, kept from chunk to chunk.
#[derive(Default)]
pub(crate) struct Encoded {
    main: Vec<u8>,
    scales: Vec<u8>,
}

impl Encoded {
    /// Subtract a chunk into the bytes that [`Encoded::write`] takes.
    pub(crate) fn subtract(
        &mut self,
        storage: Storage,
        reasoning: Elements<'_>,
        multimodal: Elements<'_>,
    ) -> Moments {
        self.clear(storage, reasoning.numel());
        match storage {
            Storage::Plain(dtype) => subtract(reasoning, multimodal, Some((dtype, &mut self.main))),
            Storage::Int8 => subtract_int8(reasoning, multimodal, &mut self.main, &mut self.scales),
        }
    }

    /// Room for `numel` elements, which is allocated at once.
    pub(crate) fn with_room(storage: Storage, numel: usize) -> Self {
        let (main, scales) = Self::sizes(storage, numel);
        Self { main: Vec::with_capacity(main), scales: Vec::with_capacity(scales) }
    }

    /// Bytes that so many elements take.
    pub(crate) fn nbytes_of(storage: Storage, numel: usize) -> usize {
        let (main, scales) = Self::sizes(storage, numel);
        main + scales
    }

    /// Bytes that are allocated.
    pub(crate) fn held_nbytes(&self) -> usize {
        self.main.capacity() + self.scales.capacity()
    }

    /// Zeros for `numel` elements, in any storage.
    pub(crate) fn clear(&mut self, storage: Storage, numel: usize) {
        let (main, scales) = Self::sizes(storage, numel);
        self.main.clear();
        self.main.resize(main, 0);
        self.scales.clear();
        self.scales.resize(scales, 0);
    }

    fn sizes(storage: Storage, numel: usize) -> (usize, usize) {
        match storage {
            Storage::Plain(dtype) => (numel * dtype.nbytes(), 0),
            Storage::Int8 => (numel, 2 * numel.div_ceil(INT8_BLOCK)),
        }
    }

    /// Write what begins at element `start` of difference number `index`.
    pub(crate) fn write(&self, writer: &Writer, index: usize, start: usize) -> Result<()> {
        let storage = writer.storage();
        let slot = storage.slot(index);
        match storage {
            Storage::Plain(dtype) => writer.write_at(slot, start * dtype.nbytes(), &self.main),
            Storage::Int8 => {
                writer.write_at(slot, start, &self.main)?;
                writer.write_at(slot + 1, start / INT8_BLOCK * 2, &self.scales)
            }
        }
    }
}

/// Fill `out` with elements of an int8 Δ as bfloat16; memory does not grow with how many.
///
/// # Errors
/// A tensor that is not there or of another type, elements that it does not have, `out` of another
/// size, or a failed read.
pub fn read(delta: &Checkpoint, name: &str, elements: Range<usize>, out: &mut [u8]) -> Result<()> {
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
        let (shard, stored) = block_scales(delta, name, numel)?;
        let blocks = start / INT8_BLOCK..end.div_ceil(INT8_BLOCK);
        scales.resize(2 * blocks.len(), 0);
        let at = stored.range.start + 2 * blocks.start as u64;
        shard.read_exact_at(&mut scales, at)?;
        decode_int8(&bytes, &scales, start % INT8_BLOCK, piece);
        start = end;
    }
    Ok(())
}

fn block_scales<'a>(
    delta: &'a Checkpoint,
    name: &str,
    numel: usize,
) -> Result<(&'a crate::checkpoint::shard::Shard, &'a crate::checkpoint::shard::Tensor)> {
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
