//! Block scales, which give the 8-bit codes of a weight their values.
//!
//! Beside a weight `X.weight` of R × C codes there is a tensor `X.weight_scale_inv` of ⌈R/r⌉ × ⌈C/c⌉
//! float32 scales, one for each block of r × c codes, as in DeepSeek-V3. The value of an element is
//! float32(code) × scale in float32, as such models compute it. Only the scales of the rows at hand
//! are read, so memory does not grow with the model.

use std::ops::Range;

use super::{Shard, Tensor};
use crate::dtype::{Dtype, Fp8};
use crate::error::{Error, Result};
use crate::kernel::dequantize;
use crate::kernel::rounding::Grid;

/// The suffix that turns the name of codes into that of their scales.
const SUFFIX: &str = "_scale_inv";
/// Scales that are checked at a time.
const CHECKED_NBYTES: usize = 1 << 16;

/// The name of the tensor with the scales of `codes`.
pub fn name_of(codes: &str) -> String {
    format!("{codes}{SUFFIX}")
}

/// Where the scales of one tensor of codes are stored; their shape fits.
#[derive(Debug, Clone, Copy)]
pub struct BlockScales<'a> {
    format: Fp8,
    shard: &'a Shard,
    tensor: &'a Tensor,
    block: (usize, usize),
    columns: usize,
    /// The number, in the whole tensor, of the first of the codes at hand.
    first: usize,
}

impl<'a> BlockScales<'a> {
    /// Combine codes and scales, without reading any scale.
    ///
    /// # Errors
    /// Codes that are not a matrix, or scales that are missing, not float32 or not one for each block.
    pub fn new(
        format: Fp8,
        (shard, codes): (&Shard, &Tensor),
        scales: Option<(&'a Shard, &'a Tensor)>,
        block: (usize, usize),
    ) -> Result<Self> {
        let name = name_of(&codes.name);
        let &[rows, columns] = codes.shape.as_slice() else {
            return Err(Error::tensor(
                shard.path(),
                &codes.name,
                format!(
                    "{} codes of shape {:?}: block scales are defined for matrices only; save the \
                     checkpoint in BF16",
                    codes.dtype, codes.shape
                ),
            ));
        };
        if block.0 == 0 || block.1 == 0 {
            let message = format!("blocks of {} × {} codes have no scales", block.0, block.1);
            return Err(Error::Argument(message));
        }
        let expected = [rows.div_ceil(block.0), columns.div_ceil(block.1)];
        let Some((scale_shard, scales)) = scales else {
            return Err(Error::tensor(
                shard.path(),
                &codes.name,
                format!(
                    "its {} codes have no value without their block scales: expected {name:?} of \
                     dtype F32 and shape {expected:?} (blocks of {} × {}) in the checkpoint; get \
                     the checkpoint again, or take the BF16 one it was quantized from",
                    codes.dtype, block.0, block.1
                ),
            ));
        };
        if scales.dtype != safetensors::Dtype::F32 || scales.shape != expected {
            return Err(Error::tensor(
                scale_shard.path(),
                &scales.name,
                format!(
                    "dtype {} and shape {:?}, expected F32 and {expected:?}: one scale for each \
                     {} × {} codes of {} {:?}; see weight_block_size in config.json's \
                     quantization_config, or take the BF16 checkpoint",
                    scales.dtype, scales.shape, block.0, block.1, codes.name, codes.shape
                ),
            ));
        }
        Ok(Self { format, shard: scale_shard, tensor: scales, block, columns, first: 0 })
    }

    /// The file with the scales.
    pub fn shard(&self) -> &'a Shard {
        self.shard
    }

    /// The same scales for the codes from element `first` on.
    pub fn from_element(self, first: usize) -> Self {
        Self { first: self.first + first, ..self }
    }

    /// Read and check every scale.
    ///
    /// # Errors
    /// A scale that is NaN, infinite, zero or negative, or a failed read.
    pub fn check(&self) -> Result<()> {
        let (start, end) = (self.tensor.range.start, self.tensor.range.end);
        let mut bytes = Vec::new();
        for at in (start..end).step_by(CHECKED_NBYTES) {
            let stop = end.min(at + CHECKED_NBYTES as u64);
            bytes.resize((stop - at) as usize, 0);
            self.shard.read_exact_at(&mut bytes, at)?;
            for (index, scale) in bytes.as_chunks::<4>().0.iter().enumerate() {
                let scale = f32::from_le_bytes(*scale);
                if !(scale > 0.0 && scale.is_finite()) {
                    let index = (at - start) as usize / 4 + index;
                    return Err(Error::tensor(
                        self.shard.path(),
                        &self.tensor.name,
                        format!(
                            "scale {index} is {scale}, expected a finite positive number; get the \
                             checkpoint again, or take the BF16 one it was quantized from"
                        ),
                    ));
                }
            }
        }
        Ok(())
    }

    /// The most bytes that [`BlockScales::dequantize`] needs for `numel` codes: their values, and the
    /// scales of their rows.
    pub(crate) fn scratch_nbytes(&self, numel: usize) -> (usize, usize) {
        if numel == 0 {
            return (0, 0);
        }
        let block_rows = numel.div_ceil(self.columns.max(1)).div_ceil(self.block.0) + 1;
        (4 * numel, 4 * block_rows * self.columns.div_ceil(self.block.1))
    }

    /// Turn `codes`, which begin at element `start` of those at hand, into float32 values.
    ///
    /// # Errors
    /// A failed read.
    pub(crate) fn dequantize(
        &self,
        codes: &[u8],
        start: usize,
        scales: &mut Vec<u8>,
        values: &mut Vec<u8>,
    ) -> Result<()> {
        values.resize(4 * codes.len(), 0);
        if codes.is_empty() {
            return Ok(());
        }
        let start = self.first + start;
        let end = start + codes.len();
        let per_row = self.columns.div_ceil(self.block.1);
        let first_block_row = start / self.columns / self.block.0;
        let block_rows = first_block_row..(end - 1) / self.columns / self.block.0 + 1;
        let scales = self.read(&block_rows, per_row, scales)?;
        let mut element = start;
        while element < end {
            let (row, column) = (element / self.columns, element % self.columns);
            // The run of elements with this element's scale.
            let next = (column / self.block.1 + 1) * self.block.1;
            let stop = end.min(row * self.columns + self.columns.min(next));
            let at = (row / self.block.0 - first_block_row) * per_row + column / self.block.1;
            let run = element - start..stop - start;
            let scale = f32::from_le_bytes(scales[at]);
            let out = &mut values[4 * run.start..4 * run.end];
            dequantize(self.format, &codes[run], scale, out);
            element = stop;
        }
        Ok(())
    }

    /// The grid that the value of code number `element` of those at hand was rounded to.
    ///
    /// # Errors
    /// A failed read.
    pub(crate) fn grid(&self, element: usize) -> Result<Grid> {
        let (nbits, lowest, one) = match self.format {
            Fp8::E4M3 => (4, -6, 0x38),
            Fp8::E5M2 => (3, -14, 0x3c),
        };
        let (mut scales, mut value) = (Vec::new(), Vec::new());
        self.dequantize(&[one], element, &mut scales, &mut value)?;
        let scale = value.first_chunk().map_or(1.0, |bytes| f32::from_le_bytes(*bytes));
        Ok(Grid::of_codes(nbits, lowest, f64::from(scale)))
    }

    fn read<'b>(
        &self,
        rows: &Range<usize>,
        per_row: usize,
        bytes: &'b mut Vec<u8>,
    ) -> Result<&'b [[u8; 4]]> {
        bytes.resize(4 * rows.len() * per_row, 0);
        let start = self.tensor.range.start + (4 * rows.start * per_row) as u64;
        self.shard.read_exact_at(bytes, start)?;
        Ok(bytes.as_chunks::<4>().0)
    }
}

/// The dtype of the values: float32 for codes with scales.
pub(crate) const DEQUANTIZED: Dtype = Dtype::F32;
