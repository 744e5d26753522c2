//! The passes of a merge, how tensors are cut and batched for them, and how much workers may hold.
//!
//! How a tensor is cut depends on its shape alone. A tensor that needs several passes is done in a
//! batch with its neighbors, so later passes find it in the page cache.

use std::ops::Range;

use super::job::{Job, Method};
use super::scratch::Scratch;
use super::trim::{Counts, Interval, SAMPLE};
use crate::align::compose::{RUN, matrix};
use crate::align::pair::Source;
use crate::error::Result;
use crate::stream::{CHUNK, Options, ReadDemand, workers_within};

/// Bytes of one chunk of a tensor that is copied.
pub(super) const COPIED: usize = 1 << 20;
/// The most tensors of a batch that needs several passes, and the most elements of all of them
/// together (a single tensor may have more): few enough to stay in the page cache.
const BATCH_TENSORS: usize = 8;
const BATCH_NUMEL: usize = 1 << 24;

/// What is done with the chunks of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// Look at some magnitudes of each task vector; the chunk is a whole tensor.
    Sample,
    /// Count magnitudes.
    Narrow,
    /// Sum squares and products.
    Measure,
    /// Compute and write.
    Write,
}

/// A chunk of a tensor in one pass.
#[derive(Debug, Clone)]
pub(super) struct PassChunk {
    pub(super) job: usize,
    /// Its place among the chunks of its tensor.
    pub(super) index: usize,
    /// Elements, or bytes of a tensor that is copied.
    pub(super) range: Range<usize>,
    pub(super) pass: Pass,
    /// Intervals of the reasoning and the multimodal model's task vectors or, in the pass that writes,
    /// their k-th largest magnitudes.
    pub(super) intervals: [Interval; 2],
    /// The factors of slerp for both models.
    pub(super) factors: [f64; 2],
}

/// Elements, or bytes of a tensor that is copied.
pub(super) fn length(job: &Job<'_>) -> usize {
    match job.blend {
        Some(_) => job.multimodal.tensor.numel(),
        None => (job.multimodal.tensor.range.end - job.multimodal.tensor.range.start) as usize,
    }
}

/// The length of a tensor's chunks; the last may be shorter.
pub(super) fn step(job: &Job<'_>) -> usize {
    match &job.blend {
        None => COPIED,
        // Blocks are gathered row by row.
        Some(blend) if blend.has_blocks() => {
            let columns = matrix(&job.multimodal.tensor.shape).1.max(1);
            (RUN / columns).max(1) * columns
        }
        Some(_) => CHUNK,
    }
}

/// The batches, and how much may be held while they are worked on.
pub(super) struct Batches {
    /// The jobs of each.
    pub(super) jobs: Vec<Range<usize>>,
    pub(super) workers: usize,
    pub(super) state_nbytes: usize,
}

impl Batches {
    /// # Errors
    /// The memory is less than one worker needs.
    pub(super) fn new(jobs: &[Job<'_>], method: Method, options: &Options) -> Result<Self> {
        let batches = batches(jobs, method);
        let mut worker = (0, "");
        for job in jobs {
            let nbytes = worker_nbytes(job, method);
            if nbytes > worker.0 {
                worker = (nbytes, &job.multimodal.tensor.name);
            }
        }
        let of_batch = |batch: &Range<usize>| {
            jobs[batch.clone()].iter().map(|job| state_nbytes(job, method)).sum::<usize>()
        };
        let state_nbytes = batches.iter().map(of_batch).max().unwrap_or(0);
        let chunks = jobs.iter().map(|job| length(job).div_ceil(step(job))).sum();
        let needed = |workers: usize| worker.0.saturating_mul(workers).saturating_add(state_nbytes);
        let workers = workers_within(options, chunks, worker.1, needed)?;
        Ok(Self { jobs: batches, workers, state_nbytes })
    }
}

fn batches(jobs: &[Job<'_>], method: Method) -> Vec<Range<usize>> {
    if !method.reads_before_writing() {
        return std::iter::once(0..jobs.len()).collect();
    }
    let mut batches = Vec::new();
    let (mut start, mut tensors, mut numel) = (0, 0, 0);
    for (index, job) in jobs.iter().enumerate() {
        // A tensor that is copied waits for nothing.
        let own = if job.blend.is_some() { length(job) } else { 0 };
        if tensors == BATCH_TENSORS || (tensors > 0 && numel + own > BATCH_NUMEL) {
            batches.push(start..index);
            (start, tensors, numel) = (index, 0, 0);
        }
        tensors += usize::from(job.blend.is_some());
        numel += own;
    }
    batches.push(start..jobs.len());
    batches
}

/// Bytes that a worker needs for one tensor, mapped windows included.
fn worker_nbytes(job: &Job<'_>, method: Method) -> usize {
    let total = length(job);
    let longest = total.min(step(job));
    let Some(blend) = &job.blend else { return longest };
    let sources: usize = blend.sources().map(|source| source_nbytes(source, total, longest)).sum();
    ReadDemand::of_operand(&job.multimodal, longest).nbytes()
        + sources
        + longest * blend.dtype.nbytes()
        + Scratch::fixed_nbytes(method)
}

fn source_nbytes(source: &Source<'_>, total: usize, longest: usize) -> usize {
    let run = match source {
        Source::Whole(_) => 0,
        Source::Blocks(blocks) => blocks.longest(total).min(longest),
    };
    ReadDemand::of(source, longest, run).nbytes()
}

/// Bytes that are kept about a tensor from pass to pass.
fn state_nbytes(job: &Job<'_>, method: Method) -> usize {
    match (&job.blend, method) {
        (Some(blend), Method::Ties { .. }) => {
            let vectors = if blend.base.is_some() { 2 } else { 1 };
            vectors * (Counts::NBYTES + SAMPLE * size_of::<u64>())
        }
        (Some(_), Method::Slerp) => length(job).div_ceil(step(job)) * size_of::<[f64; 3]>(),
        _ => 0,
    }
}
