//! How many workers and buffers fit the memory that a run may take, and how much it took.
//!
//! Owns the sum of every buffer of a stream: what workers read into and write from, windows of a
//! mapping, and the moments that wait for earlier ones. What grows with a model
//! (names, shapes and one sum for each pair) is not part of it, nor is the page cache.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::checkpoint::shard::Reader;
use crate::error::{Error, Result};
use crate::output::format::{Encoded, Storage};
use crate::stream::order::{Chunks, Order};
use crate::stream::{CHUNK, COMPOSED_CHUNK, Minuend, Options, Pair, Side};

/// The most that one worker holds at a time, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Demand {
    /// Read from the reasoning side, or gathered from parts.
    pub(crate) reasoning: usize,
    /// Runs of a part on their way to where they belong.
    pub(crate) runs: usize,
    /// Read from the multimodal side.
    pub(crate) multimodal: usize,
    /// Lent by mappings, of both sides.
    pub(crate) mapped: usize,
    /// Values of codes that have scales, of both sides.
    pub(crate) dequantised: usize,
    /// Δ of one chunk on its way to a file.
    pub(crate) out: usize,
    /// Elements of one chunk.
    pub(crate) longest: usize,
}

impl Demand {
    fn of(pair: &Pair<'_>, out: Option<Storage>) -> Self {
        let numel = pair.multimodal.tensor.numel();
        let (longest, reasoning, runs) = match &pair.reasoning {
            Minuend::Whole(side) => {
                let longest = numel.min(CHUNK);
                (longest, Window::of(side, longest), 0)
            }
            Minuend::Composed(composed) => {
                let longest = composed.longest(numel, COMPOSED_CHUNK);
                let packed = longest * composed.dtype().nbytes();
                (longest, Window::Read(packed), composed.scratch_nbytes(COMPOSED_CHUNK))
            }
        };
        let multimodal = Window::of(&pair.multimodal, longest);
        let coded = match &pair.reasoning {
            Minuend::Whole(side) => side.dequantised_nbytes(longest),
            Minuend::Composed(_) => 0,
        };
        Self {
            reasoning: reasoning.read(),
            runs,
            multimodal: multimodal.read(),
            mapped: reasoning.mapped() + multimodal.mapped(),
            dequantised: coded + pair.multimodal.dequantised_nbytes(longest),
            out: out.map_or(0, |storage| Encoded::nbytes_of(storage, longest)),
            longest,
        }
    }

    fn nbytes(&self) -> usize {
        self.reasoning + self.runs + self.multimodal + self.mapped + self.dequantised + self.out
    }

    fn most(self, other: Self) -> Self {
        Self {
            reasoning: self.reasoning.max(other.reasoning),
            runs: self.runs.max(other.runs),
            multimodal: self.multimodal.max(other.multimodal),
            mapped: self.mapped.max(other.mapped),
            dequantised: self.dequantised.max(other.dequantised),
            out: self.out.max(other.out),
            longest: self.longest.max(other.longest),
        }
    }
}

/// A chunk of a stored tensor, in a buffer or in a mapping.
pub(crate) enum Window {
    Read(usize),
    Mapped(usize),
}

impl Window {
    pub(crate) fn of(side: &Side<'_>, numel: usize) -> Self {
        let nbytes = numel * side.element_nbytes();
        match side.shard.reader() {
            Reader::Mmap => Window::Mapped(nbytes),
            Reader::Auto | Reader::Pread => Window::Read(nbytes),
        }
    }

    pub(crate) fn read(&self) -> usize {
        if let Window::Read(nbytes) = self { *nbytes } else { 0 }
    }

    pub(crate) fn mapped(&self) -> usize {
        if let Window::Mapped(nbytes) = self { *nbytes } else { 0 }
    }
}

/// What a run works with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) demand: Demand,
    pub(crate) workers: usize,
}

impl Plan {
    /// As many workers as `options.threads` and `options.memory` allow and there are chunks for;
    /// `out` is how Δ is stored in files.
    ///
    /// # Errors
    /// Memory in which not even one worker fits.
    pub(crate) fn new(pairs: &[Pair<'_>], out: Option<Storage>, options: &Options) -> Result<Self> {
        let mut demand = Demand::default();
        let mut largest: (usize, &str) = (0, "");
        for pair in pairs {
            let one = Demand::of(pair, out);
            if one.nbytes() > largest.0 {
                largest = (one.nbytes(), &pair.multimodal.tensor.name);
            }
            demand = demand.most(one);
        }
        let threads = options.threads.max(1);
        let chunks = Chunks::new(pairs).take(threads).count().max(1);
        let plan = |workers| Self { demand, workers };
        let fits = |plan: &Self| plan.nbytes() <= options.memory;
        // Workers are at most as many as somebody wants threads, so a walk will do.
        (1..=threads.min(chunks)).rev().map(plan).find(fits).ok_or_else(|| {
            Error::Argument(format!(
                "memory of {} bytes is too small: one thread needs {} for these tensors, of which \
                 {} is the largest; pass memory={} or more",
                options.memory,
                plan(1).nbytes(),
                largest.1,
                plan(1).nbytes(),
            ))
        })
    }

    /// Bytes of all buffers and mapped windows.
    fn nbytes(&self) -> usize {
        // A product that overflows is one that does not fit.
        let buffers = self.demand.nbytes().saturating_mul(self.workers);
        buffers.saturating_add(Order::window_nbytes(self.workers))
    }
}

/// Bytes of buffers that are allocated, and the most that were at a time.
#[derive(Debug, Default)]
pub(crate) struct Account {
    held: AtomicUsize,
    peak: AtomicUsize,
}

impl Account {
    pub(crate) fn add(&self, nbytes: usize) {
        let held = self.held.fetch_add(nbytes, Ordering::Relaxed) + nbytes;
        self.peak.fetch_max(held, Ordering::Relaxed);
    }

    pub(crate) fn remove(&self, nbytes: usize) {
        self.held.fetch_sub(nbytes, Ordering::Relaxed);
    }

    pub(crate) fn peak_nbytes(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }
}
