//! Which chunk of which tensor comes next, in which pass, and how many workers there may be.
//!
//! Tensors are done in batches of neighbours. All chunks of a pass are handed out before the next
//! pass of the batch begins, since that needs what all of them found. How a tensor is cut follows
//! from its shape alone.

use std::ops::Range;

use super::trim::{Counts, Interval, SAMPLE};
use super::work::Scratch;
use super::{Blend, Job, Method};
use crate::align::compose::matrix;
use crate::error::{Error, Result};
use crate::stream::read::Room;
use crate::stream::{CHUNK, COMPOSED_CHUNK, Minuend, Options};

/// Bytes of one chunk of a tensor that is copied.
pub(super) const COPIED: usize = 1 << 20;
/// Tensors of a batch that needs several passes, at most, and elements of all of them together
/// unless it is one: few enough to stay in the page cache.
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

/// A piece of work.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub(super) job: usize,
    /// Its place among the chunks of its tensor.
    pub(super) index: usize,
    /// Elements, or bytes of a tensor that is copied.
    pub(super) range: Range<usize>,
    pub(super) pass: Pass,
    /// Intervals of the reasoning model's task vector and the multimodal model's, or, when writing,
    /// the k-th largest magnitudes.
    pub(super) intervals: [Interval; 2],
    /// What slerp multiplies both sides by.
    pub(super) factors: [f64; 2],
}

/// Elements, or bytes where a tensor is copied.
pub(super) fn length(job: &Job<'_>) -> usize {
    match job.blend {
        Some(_) => job.multimodal.tensor.numel(),
        None => (job.multimodal.tensor.range.end - job.multimodal.tensor.range.start) as usize,
    }
}

/// Whether a side is put together from parts.
fn is_composed(blend: &Blend<'_>) -> bool {
    std::iter::once(&blend.reasoning)
        .chain(&blend.base)
        .any(|minuend| matches!(minuend, Minuend::Composed(_)))
}

/// How long the chunks of a tensor are, all but the last.
pub(super) fn step(job: &Job<'_>) -> usize {
    match &job.blend {
        None => COPIED,
        // Parts are gathered row by row.
        Some(blend) if is_composed(blend) => {
            let columns = matrix(&job.multimodal.tensor.shape).1.max(1);
            (COMPOSED_CHUNK / columns).max(1) * columns
        }
        Some(_) => CHUNK,
    }
}

/// The batches, and what may be held while they are worked through.
pub(super) struct Schedule {
    pub(super) batches: Vec<Range<usize>>,
    workers: usize,
    state_nbytes: usize,
}

impl Schedule {
    /// # Errors
    /// Memory in which not even one worker fits.
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
        let chunks: usize = jobs.iter().map(|job| length(job).div_ceil(step(job))).sum();
        let most = options.threads.max(1).min(chunks.max(1));
        let needed = |workers: usize| worker.0.saturating_mul(workers).saturating_add(state_nbytes);
        let workers = (1..=most).rev().find(|&workers| needed(workers) <= options.memory);
        let workers = workers.ok_or_else(|| {
            Error::Argument(format!(
                "memory of {} bytes is too small: one thread needs {} for these tensors, of which \
                 {} is the largest; pass memory={} or more",
                options.memory,
                needed(1),
                worker.1,
                needed(1),
            ))
        })?;
        Ok(Self { batches, workers, state_nbytes })
    }

    pub(super) fn workers(&self) -> usize {
        self.workers
    }

    pub(super) fn state_nbytes(&self) -> usize {
        self.state_nbytes
    }
}

fn batches(jobs: &[Job<'_>], method: Method) -> Vec<Range<usize>> {
    if !matches!(method, Method::Ties { .. } | Method::Slerp) {
        return std::iter::once(0..jobs.len()).collect();
    }
    let mut batches = Vec::new();
    let (mut start, mut tensors, mut numel) = (0, 0, 0);
    for (index, job) in jobs.iter().enumerate() {
        // What is copied waits for nothing.
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

/// Bytes that a worker takes for one tensor, mapped windows included.
fn worker_nbytes(job: &Job<'_>, method: Method) -> usize {
    let total = length(job);
    let longest = total.min(step(job));
    let Some(blend) = &job.blend else { return longest };
    let multimodal = Room::nbytes_of(&Minuend::Whole(job.multimodal), total, longest);
    let sides = std::iter::once(&blend.reasoning).chain(&blend.base);
    let sides: usize = sides.map(|side| Room::nbytes_of(side, total, longest)).sum();
    multimodal + sides + longest * blend.dtype.nbytes() + Scratch::fixed_nbytes(method)
}

/// Bytes that are kept of a tensor from pass to pass.
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
