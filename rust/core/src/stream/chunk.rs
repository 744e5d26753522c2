//! How a pair is cut into chunks: by its shape alone, so that no option changes a bit of the sums.

use std::ops::Range;

use crate::align::pair::{Pair, Source};

/// Elements of one chunk: half a mebibyte of bfloat16 of either model, which fits in a core's cache.
pub const CHUNK: usize = 1 << 18;

/// A run of elements of one pair, the unit of summation.
#[derive(Clone)]
pub(crate) struct Chunk {
    pub(crate) pair: usize,
    pub(crate) elements: Range<usize>,
    /// Whether the reasoning model stores it; if it does not, Δ is zero.
    pub(crate) is_stored: bool,
}

/// The chunks of all pairs in order, cut on demand.
#[derive(Clone)]
pub(crate) struct Chunks<'a> {
    pairs: &'a [Pair<'a>],
    pair: usize,
    start: usize,
}

impl<'a> Chunks<'a> {
    pub(crate) fn new(pairs: &'a [Pair<'a>]) -> Self {
        Self { pairs, pair: 0, start: 0 }
    }
}

impl Iterator for Chunks<'_> {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        loop {
            let pair = self.pairs.get(self.pair)?;
            let numel = pair.multimodal.tensor.numel();
            if self.start >= numel {
                (self.pair, self.start) = (self.pair + 1, 0);
                continue;
            }
            let (end, is_stored) = match &pair.reasoning {
                Source::Whole(_) => (numel.min(self.start + CHUNK), true),
                Source::Blocks(blocks) => {
                    let (end, band) = blocks.run(self.start, numel);
                    (end, band.is_some())
                }
            };
            let start = std::mem::replace(&mut self.start, end);
            return Some(Chunk { pair: self.pair, elements: start..end, is_stored });
        }
    }
}

/// The most elements of a chunk of a pair.
pub(crate) fn longest(pair: &Pair<'_>) -> usize {
    let numel = pair.multimodal.tensor.numel();
    match &pair.reasoning {
        Source::Whole(_) => numel.min(CHUNK),
        Source::Blocks(blocks) => blocks.longest(numel),
    }
}
