//! How many workers fit into the memory that a run may take.
//!
//! Owns the sum over all buffers of a stream: those that workers read into and write from, windows of
//! a mapping, and moments that wait for earlier ones. It includes neither what grows with a model
//! (names, shapes and one sum for each pair) nor the page cache.

use super::chunk::{Chunks, longest};
use super::encode::Encoded;
use super::options::Options;
use super::order::Order;
use super::read::ReadDemand;
use crate::align::pair::Pair;
use crate::error::{Error, Result};
use crate::output::Storage;

/// The most bytes that one worker has at a time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Demand {
    pub(crate) reasoning: ReadDemand,
    pub(crate) multimodal: ReadDemand,
    /// Δ of one chunk before it is written.
    pub(crate) out: usize,
    /// Elements of one chunk.
    pub(crate) longest: usize,
}

impl Demand {
    /// The demand of chunks of up to `longest` elements.
    pub(crate) fn of_length(pair: &Pair<'_>, longest: usize, out: Option<Storage>) -> Self {
        Self {
            reasoning: ReadDemand::of(&pair.reasoning, longest, 0),
            multimodal: ReadDemand::of_operand(&pair.multimodal, longest),
            out: out.map_or(0, |storage| Encoded::nbytes_of(storage, longest)),
            longest,
        }
    }

    pub(crate) fn nbytes(&self) -> usize {
        self.reasoning.nbytes() + self.multimodal.nbytes() + self.out
    }

    pub(crate) fn most(self, other: Self) -> Self {
        Self {
            reasoning: self.reasoning.most(other.reasoning),
            multimodal: self.multimodal.most(other.multimodal),
            out: self.out.max(other.out),
            longest: self.longest.max(other.longest),
        }
    }
}

/// How much the workers of a stream may allocate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WorkerBudget {
    pub(crate) demand: Demand,
    pub(crate) workers: usize,
}

impl WorkerBudget {
    /// As many workers as `options` allow and there are chunks for; `out` says how files store Δ.
    ///
    /// # Errors
    /// The memory is less than one worker needs.
    pub(crate) fn new(pairs: &[Pair<'_>], out: Option<Storage>, options: &Options) -> Result<Self> {
        let mut demand = Demand::default();
        let mut largest: (usize, &str) = (0, "");
        for pair in pairs {
            let one = Demand::of_length(pair, longest(pair), out);
            if one.nbytes() > largest.0 {
                largest = (one.nbytes(), &pair.multimodal.tensor.name);
            }
            demand = demand.most(one);
        }
        let chunks = Chunks::new(pairs).take(options.threads.max(1)).count();
        let needed = |workers| {
            let buffers = demand.nbytes().saturating_mul(workers);
            buffers.saturating_add(Order::window_nbytes(workers))
        };
        Ok(Self { demand, workers: workers_within(options, chunks, largest.1, needed)? })
    }
}

/// The most workers, up to one for each chunk, whose bytes fit into the memory.
///
/// # Errors
/// The memory is less than one worker needs; the message names the tensor that needs most.
pub(crate) fn workers_within(
    options: &Options,
    chunks: usize,
    largest: &str,
    needed: impl Fn(usize) -> usize,
) -> Result<usize> {
    let most = options.threads.min(chunks).max(1);
    // Nobody asks for so many threads that this loop takes long.
    (1..=most).rev().find(|&workers| needed(workers) <= options.memory).ok_or_else(|| {
        Error::Argument(format!(
            "memory of {} bytes is too small: one thread needs {} for these tensors, of which \
             {largest} is the largest; pass memory={} or more",
            options.memory,
            needed(1),
            needed(1),
        ))
    })
}
