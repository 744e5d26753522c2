//! Two tensors that belong together, and what the reasoning tensor is made of.
//!
//! Owns the check of shapes: whatever reads a pair may rely on both having the same.

use std::ops::Range;

use super::compose::Blocks;
use crate::checkpoint::Operand;
use crate::error::{Error, Result};

/// The reasoning model's values for a tensor of the multimodal model.
pub enum Source<'a> {
    /// A tensor of the same shape.
    Whole(Operand<'a>),
    /// Blocks of tensors that form its shape together.
    Blocks(Blocks<'a>),
}

/// A multimodal tensor, whose name and shape the result gets, and its match in the reasoning model.
pub struct Pair<'a> {
    /// W_reason.
    pub reasoning: Source<'a>,
    /// W_multimodal.
    pub multimodal: Operand<'a>,
}

impl<'a> Pair<'a> {
    /// The stored tensors that the pair is read from.
    pub(crate) fn operands(&self) -> impl Iterator<Item = Operand<'a>> + '_ {
        self.reasoning.operands().chain([self.multimodal])
    }
}

impl<'a> Source<'a> {
    /// Bytes of one element as it is stored.
    pub(crate) fn element_nbytes(&self) -> usize {
        match self {
            Source::Whole(operand) => operand.element_nbytes(),
            Source::Blocks(blocks) => blocks.dtype().nbytes(),
        }
    }

    /// The stored tensors that it is read from, each once for every block.
    pub(crate) fn operands(&self) -> Box<dyn Iterator<Item = Operand<'a>> + '_> {
        match self {
            Source::Whole(operand) => Box::new(std::iter::once(*operand)),
            Source::Blocks(blocks) => Box::new(blocks.sources()),
        }
    }

    /// Check that the dtype has values and that the shape is that of `multimodal`.
    ///
    /// # Errors
    /// Either does not hold. Blocks were checked when they were put together.
    pub(crate) fn check(&self, multimodal: &Operand<'_>) -> Result<()> {
        let Source::Whole(operand) = self else { return Ok(()) };
        operand.check()?;
        if operand.tensor.shape == multimodal.tensor.shape {
            return Ok(());
        }
        Err(Error::Alignment(format!(
            "shapes differ: {} {:?} in {} and {} {:?} in {}",
            operand.tensor.name,
            operand.tensor.shape,
            operand.shard.path().display(),
            multimodal.tensor.name,
            multimodal.tensor.shape,
            multimodal.shard.path().display(),
        )))
    }

    /// Ask the disk ahead of time for elements that are read later.
    pub(crate) fn prefetch(&self, elements: &Range<usize>) {
        match self {
            Source::Whole(operand) => operand.prefetch(elements),
            Source::Blocks(blocks) => blocks.prefetch(elements),
        }
    }

    /// Give back the pages of elements that were read.
    pub(crate) fn release(&self, elements: &Range<usize>) {
        if let Source::Whole(operand) = self {
            operand.release(elements);
        }
    }

    /// The stored ones among some elements, in ascending order; with blocks, `elements` are whole rows.
    pub(crate) fn present(&self, elements: &Range<usize>) -> Vec<Range<usize>> {
        let Source::Blocks(blocks) = self else { return vec![elements.clone()] };
        let mut found: Vec<Range<usize>> = Vec::new();
        for (run, _) in blocks.runs(elements) {
            match found.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => found.push(run),
            }
        }
        found
    }
}
