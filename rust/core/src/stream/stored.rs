//! The tensors of a delta on disk, whose bytes are compared with their checksums as they are read.
//!
//! Owns the reading of whole blocks where only parts of them are wanted, and the decoding of int8.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::checkpoint::{Checkpoint, Reader, Shard, Tensor};
use crate::error::{Error, Result};
use crate::kernel::{INT8_BLOCK, decode_int8};
use crate::output::checksums::{BLOCK_NBYTES, block, checksum, parse};
use crate::output::format::SCALE;

/// Elements that are decoded at a time: those of one block of codes.
const DECODED: usize = BLOCK_NBYTES;

/// An open delta.
#[derive(Debug)]
pub struct StoredDelta {
    checkpoint: Checkpoint,
    /// Of each tensor; none of a delta that was written without.
    checksums: Option<HashMap<String, Vec<u32>>>,
}

impl StoredDelta {
    /// Open a delta by its index; `checksums` are the texts that its description has, by tensor.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`], or checksums that are not those of its tensors.
    pub fn open(index: &Path, checksums: Option<&HashMap<String, String>>) -> Result<Self> {
        let checkpoint = Checkpoint::open(index, Reader::Auto)?;
        let checksums = checksums.map(|texts| parse_all(&checkpoint, texts)).transpose()?;
        Ok(Self { checkpoint, checksums })
    }

    /// Its tensors.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Fill `out` with all of a tensor, or with some of its elements, as they are stored; `compared`
    /// with its checksums, or as part of a copy that [`StoredDelta::compare`] is called for.
    ///
    /// # Errors
    /// A tensor or elements that are not there, `out` of another size, a failed read, or bytes that
    /// are not those that were written.
    pub fn read(
        &self,
        name: &str,
        elements: Option<Range<usize>>,
        out: &mut [u8],
        compared: bool,
    ) -> Result<()> {
        let mut reader = self.reader(name)?;
        let tensor = reader.tensor;
        let range = match elements {
            None => tensor.range.clone(),
            Some(elements) => tensor.elements(elements.start, elements.end)?.range,
        };
        check_room(name, out, (range.end - range.start) as usize)?;
        if !compared {
            return reader.shard.read_exact_at(out, range.start);
        }
        reader.read((range.start - tensor.range.start) as usize, out)
    }

    /// Compare the checksums of a copy of a tensor, as [`crate::output::Writer::checksums`] gives them, with
    /// those that it has here.
    ///
    /// # Errors
    /// Bytes that are not those that were written.
    pub fn compare(&self, name: &str, copied: &str) -> Result<()> {
        let reader = self.reader(name)?;
        let copied = parse(copied, reader.nbytes()).unwrap_or_default();
        let known = reader.checksums.unwrap_or(&copied);
        for number in 0..known.len() {
            reader.check(number, copied.get(number).copied())?;
        }
        Ok(())
    }

    /// Fill `out` with elements of an int8 Δ as bfloat16; memory does not grow with how many.
    ///
    /// # Errors
    /// Those of [`StoredDelta::read`], or a tensor of another type.
    pub fn decode(&self, name: &str, elements: Range<usize>, out: &mut [u8]) -> Result<()> {
        let mut codes = self.reader(name)?;
        let (path, numel) = (codes.shard.path(), codes.tensor.numel());
        if codes.tensor.dtype != safetensors::Dtype::I8 {
            let message = format!("dtype {}, expected codes of I8", codes.tensor.dtype);
            return Err(Error::tensor(path, name, message));
        }
        if elements.start > elements.end || elements.end > numel {
            let message = format!("{name} has {numel} elements, not {elements:?}");
            return Err(Error::Argument(message));
        }
        check_room(name, out, 2 * elements.len())?;
        let mut scales = self.reader(&format!("{name}{SCALE}"))?;
        check_scales(&scales, numel)?;
        let (mut bytes, mut stored) = (Vec::new(), Vec::new());
        let mut start = elements.start;
        while start < elements.end {
            let end = elements.end.min((start / DECODED + 1) * DECODED);
            let piece = &mut out[2 * (start - elements.start)..2 * (end - elements.start)];
            bytes.resize(end - start, 0);
            codes.read(start, &mut bytes)?;
            let blocks = start / INT8_BLOCK..end.div_ceil(INT8_BLOCK);
            stored.resize(2 * blocks.len(), 0);
            scales.read(2 * blocks.start, &mut stored)?;
            decode_int8(&bytes, &stored, start % INT8_BLOCK, piece);
            start = end;
        }
        Ok(())
    }

    fn reader(&self, name: &str) -> Result<TensorReader<'_>> {
        let (shard, tensor) = self.checkpoint.tensor(name)?;
        let checksums =
            self.checksums.as_ref().map(|all| all.get(name).map_or(&[][..], Vec::as_slice));
        Ok(TensorReader { shard, tensor, checksums, kept: Vec::new(), kept_number: None })
    }
}

/// Reads bytes of one tensor.
struct TensorReader<'a> {
    shard: &'a Shard,
    tensor: &'a Tensor,
    /// One for each block; none where they are not known.
    checksums: Option<&'a [u32]>,
    /// The block that was last read for a part of it, and its number.
    kept: Vec<u8>,
    kept_number: Option<usize>,
}

impl TensorReader<'_> {
    /// Fill `out` with the bytes from `start` on, which the tensor has.
    fn read(&mut self, mut start: usize, mut out: &mut [u8]) -> Result<()> {
        if self.checksums.is_none() {
            return self.shard.read_exact_at(out, self.tensor.range.start + start as u64);
        }
        while !out.is_empty() {
            let number = start / BLOCK_NBYTES;
            let block = block(number, self.nbytes());
            let length = out.len().min(block.end - start);
            let (piece, rest) = out.split_at_mut(length);
            if length == block.len() {
                self.read_block(number, piece)?;
            } else {
                if self.kept_number != Some(number) {
                    let mut kept = std::mem::take(&mut self.kept);
                    kept.resize(block.len(), 0);
                    self.read_block(number, &mut kept)?;
                    (self.kept, self.kept_number) = (kept, Some(number));
                }
                let from = start - block.start;
                piece.copy_from_slice(&self.kept[from..from + length]);
            }
            (start, out) = (start + length, rest);
        }
        Ok(())
    }

    fn read_block(&self, number: usize, out: &mut [u8]) -> Result<()> {
        let start = block(number, self.nbytes()).start;
        self.shard.read_exact_at(out, self.tensor.range.start + start as u64)?;
        self.check(number, Some(checksum(out)))
    }

    fn check(&self, number: usize, found: Option<u32>) -> Result<()> {
        let expected = self.checksums.and_then(|sums| sums.get(number).copied());
        if self.checksums.is_none() || (found.is_some() && found == expected) {
            return Ok(());
        }
        let Range { start, end } = block(number, self.nbytes());
        let shown = |sum: Option<u32>| sum.map_or("none".to_owned(), |sum| format!("{sum:08x}"));
        Err(Error::tensor(
            self.shard.path(),
            &self.tensor.name,
            format!(
                "its bytes {start} to {end} are not those that were written (checksum {}, expected \
                 {}): the file was damaged or edited; copy the delta again from where it is whole, \
                 or compute it again",
                shown(found),
                shown(expected)
            ),
        ))
    }

    fn nbytes(&self) -> usize {
        (self.tensor.range.end - self.tensor.range.start) as usize
    }
}

fn parse_all(
    checkpoint: &Checkpoint,
    texts: &HashMap<String, String>,
) -> Result<HashMap<String, Vec<u32>>> {
    let of = |shard: &Shard, tensor: &Tensor| {
        let nbytes = (tensor.range.end - tensor.range.start) as usize;
        let sums = texts.get(&tensor.name).and_then(|text| parse(text, nbytes));
        sums.map(|sums| (tensor.name.clone(), sums)).ok_or_else(|| {
            let message = "the delta's description has no valid checksums of it; copy the delta \
                           again from where it is whole, or compute it again";
            Error::tensor(shard.path(), &tensor.name, message)
        })
    };
    checkpoint.tensors().map(|(shard, tensor)| of(shard, tensor)).collect()
}

fn check_room(name: &str, out: &[u8], expected: usize) -> Result<()> {
    if out.len() == expected {
        return Ok(());
    }
    let message = format!("the buffer for {name} has {} bytes, expected {expected}", out.len());
    Err(Error::Argument(message))
}

fn check_scales(scales: &TensorReader<'_>, numel: usize) -> Result<()> {
    let expected = [numel.div_ceil(INT8_BLOCK)];
    let tensor = scales.tensor;
    if tensor.dtype == safetensors::Dtype::F16 && tensor.shape == expected {
        return Ok(());
    }
    let message = format!(
        "dtype {} and shape {:?}, expected F16 and {expected:?}; compute the delta again",
        tensor.dtype, tensor.shape
    );
    Err(Error::tensor(scales.shard.path(), &tensor.name, message))
}
