//! A stored tensor as an operand of arithmetic: its elements, and the scales of its codes.

use std::ops::Range;

use super::block_scales::{BlockScales, DEQUANTIZED};
use super::header::Tensor;
use super::shard::Shard;
use crate::dtype::{Dtype, Fp8};
use crate::error::{Error, Result};
use crate::kernel::Elements;

/// A stored tensor, with block scales if its elements are codes.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    /// The file.
    pub shard: &'a Shard,
    /// The tensor in it.
    pub tensor: &'a Tensor,
    /// The scales of its elements, if they are 8-bit codes.
    pub scales: Option<BlockScales<'a>>,
}

impl<'a> Operand<'a> {
    /// The files that its values come from.
    pub(crate) fn shards(&self) -> impl Iterator<Item = &'a Shard> + use<'a> {
        std::iter::once(self.shard).chain(self.scales.map(|scales| scales.shard()))
    }

    /// Bytes of one element as it is stored.
    pub(crate) fn element_nbytes(&self) -> usize {
        let nbytes = (self.tensor.range.end - self.tensor.range.start) as usize;
        nbytes.checked_div(self.tensor.numel()).unwrap_or(0)
    }

    /// The most bytes that the values of `numel` codes take; zero if there are no codes.
    pub(crate) fn dequantized_nbytes(&self, numel: usize) -> usize {
        self.scales.map_or(0, |scales| {
            let (values, scales) = scales.scratch_nbytes(numel);
            values + scales
        })
    }

    /// The values of stored elements; the first one is number `start`.
    pub(crate) fn values<'b>(
        &self,
        start: usize,
        stored: &'b [u8],
        scratch: &'b mut Dequantized,
    ) -> Result<Elements<'b>> {
        let Some(scales) = &self.scales else {
            return Ok(Elements { dtype: self.dtype()?, bytes: stored });
        };
        scales.dequantize(stored, start, &mut scratch.scales, &mut scratch.values)?;
        Ok(Elements { dtype: DEQUANTIZED, bytes: &scratch.values })
    }

    /// The dtype of the values.
    ///
    /// # Errors
    /// A dtype other than those of [`Dtype`], with what to do about it.
    pub(crate) fn dtype(&self) -> Result<Dtype> {
        Dtype::from_header(self.tensor.dtype).ok_or_else(|| {
            if Fp8::from_header(self.tensor.dtype).is_some() {
                return Error::tensor(
                    self.shard.path(),
                    &self.tensor.name,
                    format!(
                        "its {} codes under block scales cannot be put together with parts of other \
                         tensors; save the checkpoint in BF16, or take one that stores this tensor as \
                         the other checkpoint does",
                        self.tensor.dtype
                    ),
                );
            }
            Error::tensor(
                self.shard.path(),
                &self.tensor.name,
                format!(
                    "dtype {} is not supported (supported: {}); \
                     a quantized checkpoint must be replaced by the unquantized one",
                    self.tensor.dtype,
                    Dtype::SUPPORTED
                ),
            )
        })
    }

    /// Check that the elements have values.
    ///
    /// # Errors
    /// A dtype other than those of [`Dtype`], or a block scale that is not a positive number.
    pub(crate) fn check(&self) -> Result<()> {
        match &self.scales {
            Some(scales) => scales.check(),
            None => self.dtype().map(|_| ()),
        }
    }

    /// The byte range of elements in the file.
    pub(crate) fn byte_range(&self, elements: &Range<usize>) -> Range<u64> {
        let (start, nbytes) = (self.tensor.range.start, self.element_nbytes() as u64);
        start + elements.start as u64 * nbytes..start + elements.end as u64 * nbytes
    }

    /// Ask the disk ahead of time for elements that are read later.
    pub(crate) fn prefetch(&self, elements: &Range<usize>) {
        self.shard.prefetch(self.byte_range(elements));
    }

    /// Give back the pages of elements that were read.
    pub(crate) fn release(&self, elements: &Range<usize>) {
        self.shard.release(self.byte_range(elements));
    }
}

/// Room for the values of codes, kept from chunk to chunk.
#[derive(Default)]
pub(crate) struct Dequantized {
    scales: Vec<u8>,
    values: Vec<u8>,
}

impl Dequantized {
    pub(crate) fn held_nbytes(&self) -> usize {
        self.scales.capacity() + self.values.capacity()
    }
}
