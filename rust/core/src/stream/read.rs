//! Read elements of one model: as they are stored, gathered from blocks, or with codes dequantized.
//!
//! Owns the buffers, which a worker keeps from chunk to chunk, and how large they can get.

use std::ops::Range;

use crate::align::compose::Blocks;
use crate::align::pair::Source;
use crate::checkpoint::operand::Dequantized;
use crate::checkpoint::{Operand, Reader};
use crate::error::Result;
use crate::kernel::Elements;

/// The most bytes that reading chunks of one model takes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ReadDemand {
    /// What a chunk is read or gathered into.
    bytes: usize,
    /// A run of rows of a chunk that has several.
    run: usize,
    /// Elements of a block before they are put into their places.
    aside: usize,
    /// Values of codes that have scales.
    values: usize,
    /// Windows of a mapping.
    mapped: usize,
}

impl ReadDemand {
    /// The demand of chunks of up to `longest` elements.
    pub(crate) fn of_operand(operand: &Operand<'_>, longest: usize) -> Self {
        let nbytes = longest * operand.element_nbytes();
        let is_mapped = operand.shard.reader() == Reader::Mmap;
        Self {
            bytes: if is_mapped { 0 } else { nbytes },
            mapped: if is_mapped { nbytes } else { 0 },
            values: operand.dequantized_nbytes(longest),
            ..Self::default()
        }
    }

    /// The demand of chunks of up to `longest` elements. If a chunk of blocks has several runs, they
    /// have up to `run` elements.
    pub(crate) fn of(source: &Source<'_>, longest: usize, run: usize) -> Self {
        match source {
            Source::Whole(operand) => Self::of_operand(operand, longest),
            Source::Blocks(blocks) => Self {
                bytes: longest * blocks.dtype().nbytes(),
                run: run * blocks.dtype().nbytes(),
                aside: blocks.scratch_nbytes(),
                ..Self::default()
            },
        }
    }

    pub(crate) fn nbytes(&self) -> usize {
        self.bytes + self.run + self.aside + self.values + self.mapped
    }

    pub(crate) fn most(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.max(other.bytes),
            run: self.run.max(other.run),
            aside: self.aside.max(other.aside),
            values: self.values.max(other.values),
            mapped: self.mapped.max(other.mapped),
        }
    }
}

/// The buffers of one model.
#[derive(Default)]
pub(crate) struct SideBuffer {
    bytes: Vec<u8>,
    run: Vec<u8>,
    aside: Vec<u8>,
    values: Dequantized,
}

impl SideBuffer {
    /// Buffers of the size of `demand`, since a vector that grows may take twice what it contains.
    pub(crate) fn with_room(demand: &ReadDemand) -> Self {
        Self {
            bytes: Vec::with_capacity(demand.bytes),
            run: Vec::with_capacity(demand.run),
            aside: Vec::with_capacity(demand.aside),
            values: Dequantized::default(),
        }
    }

    /// Bytes that are allocated.
    pub(crate) fn held_nbytes(&self) -> usize {
        self.bytes.capacity()
            + self.run.capacity()
            + self.aside.capacity()
            + self.values.held_nbytes()
    }

    /// Elements of a source, and how many bytes were read. If it is made of blocks, `elements` are whole
    /// rows, and rows that are not stored are zero.
    pub(crate) fn read<'b>(
        &'b mut self,
        source: &Source<'b>,
        elements: &Range<usize>,
    ) -> Result<(Elements<'b>, u64)> {
        match source {
            Source::Whole(operand) => self.read_operand(operand, elements),
            Source::Blocks(blocks) => self.gather(blocks, elements),
        }
    }

    /// Elements of a stored tensor, and how many bytes were read.
    pub(crate) fn read_operand<'b>(
        &'b mut self,
        operand: &Operand<'b>,
        elements: &Range<usize>,
    ) -> Result<(Elements<'b>, u64)> {
        let range = operand.byte_range(elements);
        let nbytes = range.end - range.start;
        let stored = operand.shard.bytes(range, &mut self.bytes)?;
        Ok((operand.values(elements.start, stored, &mut self.values)?, nbytes))
    }

    fn gather<'b>(
        &'b mut self,
        blocks: &Blocks<'_>,
        elements: &Range<usize>,
    ) -> Result<(Elements<'b>, u64)> {
        let Self { bytes, run: packed, aside, .. } = self;
        let (dtype, nbytes) = (blocks.dtype(), blocks.dtype().nbytes());
        let mut read = 0;
        match blocks.run(elements.start, elements.end) {
            (end, Some(band)) if end >= elements.end => {
                read += blocks.gather(band, elements, bytes, aside)?;
            }
            _ => {
                bytes.clear();
                bytes.resize(elements.len() * nbytes, 0);
                for (run, band) in blocks.runs(elements) {
                    read += blocks.gather(band, &run, packed, aside)?;
                    let at = (run.start - elements.start) * nbytes;
                    bytes[at..at + packed.len()].copy_from_slice(packed);
                }
            }
        }
        Ok((Elements { dtype, bytes }, read))
    }
}
