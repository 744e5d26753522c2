//! What a worker of a merge does with a chunk: copy it, look at it, or compute and write it.

use std::ops::Range;

use super::job::{Blend, Found, Job, Method, key};
use super::known::Gave;
use super::passes::{Pass, PassChunk, length};
use super::present::{absent, common};
use super::scratch::Scratch;
use super::step::{Sides, Step, Widened};
use super::trim::{Counts, Interval, SAMPLE, SAMPLE_RUNS};
use super::turns::Turns;
use crate::align::pair::Source;
use crate::error::Result;
use crate::kernel::blend::{self, BLOCK};
use crate::output::Writer;
use crate::stream::Work;

/// The merge of one run.
pub(super) struct Merging<'a> {
    pub(super) jobs: &'a [Job<'a>],
    pub(super) method: Method,
    pub(super) writer: &'a Writer,
    pub(super) turns: Turns<'a>,
    pub(super) prefetch_nbytes: u64,
}

impl Work for Merging<'_> {
    type Chunk = PassChunk;
    type Scratch = Scratch;

    fn scratch(&self) -> Scratch {
        Scratch::new()
    }

    fn held_nbytes(scratch: &Scratch) -> usize {
        scratch.held_nbytes()
    }

    fn take(&self) -> Option<PassChunk> {
        self.turns.take()
    }

    fn place(chunk: &PassChunk) -> usize {
        chunk.job
    }

    fn work(&self, chunk: &mut PassChunk, scratch: &mut Scratch) -> Result<u64> {
        self.prefetch(chunk);
        let job = &self.jobs[chunk.job];
        let (gave, nbytes) = match (&job.blend, chunk.pass) {
            (None, Pass::Write) => (Gave::Nothing, self.copy(job, chunk, scratch)?),
            (None, _) => (Gave::Nothing, 0),
            (Some(blend), Pass::Sample) => (self.sample(chunk, blend, scratch)?, 0),
            (Some(blend), _) => self.blend(job, blend, chunk, scratch)?,
        };
        self.turns.give(chunk, gave, &scratch.counts);
        Ok(nbytes)
    }

    fn stop(&self) {
        self.turns.stop();
    }

    fn tensors(&self) -> usize {
        self.turns.tensors()
    }
}

impl Merging<'_> {
    /// Ask the disk ahead of time, in the pass that reads a tensor first.
    fn prefetch(&self, chunk: &PassChunk) {
        let job = &self.jobs[chunk.job];
        let Some(blend) = &job.blend else {
            let range = &job.multimodal.tensor.range;
            let start = range.start + chunk.range.end as u64;
            let end = range.end.min(start + self.prefetch_nbytes);
            job.multimodal.shard.prefetch(start.min(end)..end);
            return;
        };
        let was_read = chunk.pass == Pass::Write && self.method.reads_before_writing();
        if chunk.pass == Pass::Sample || (chunk.index > 0 && was_read) {
            return;
        }
        let total = length(job);
        let nbytes = job.multimodal.element_nbytes().max(1) as u64;
        let ahead = (self.prefetch_nbytes / 2 / nbytes) as usize;
        // One chunk's length at that distance; earlier chunks have asked for what is nearer.
        let first = if chunk.index == 0 { chunk.range.end } else { chunk.range.end + ahead };
        let range = first.min(total)..total.min(chunk.range.end + ahead + chunk.range.len());
        if range.is_empty() {
            return;
        }
        for source in blend.sources() {
            // Blocks are read in whole rows, which these ranges are not.
            if let Source::Whole(operand) = source {
                operand.prefetch(&range);
            }
        }
        job.multimodal.prefetch(&range);
    }

    fn copy(&self, job: &Job<'_>, chunk: &PassChunk, scratch: &mut Scratch) -> Result<u64> {
        let operand = &job.multimodal;
        let start = operand.tensor.range.start;
        let range = start + chunk.range.start as u64..start + chunk.range.end as u64;
        let bytes = operand.shard.bytes(range.clone(), &mut scratch.out)?;
        self.writer.write_at(chunk.job, chunk.range.start, bytes)?;
        operand.shard.release(range);
        Ok(chunk.range.len() as u64)
    }

    /// What a pass finds in a chunk, and the bytes that count as read.
    fn blend(
        &self,
        job: &Job<'_>,
        blend: &Blend<'_>,
        chunk: &PassChunk,
        scratch: &mut Scratch,
    ) -> Result<(Gave, u64)> {
        let Scratch { multimodal, reasoning, base, out, values, counts, .. } = scratch;
        let m = multimodal.read_operand(&job.multimodal, &chunk.range)?.0;
        let r = reasoning.read(&blend.reasoning, &chunk.range)?.0;
        let mut present = blend.reasoning.present(&chunk.range);
        let b = match &blend.base {
            None => None,
            Some(source) => {
                present = common(&present, &source.present(&chunk.range));
                Some(base.read(source, &chunk.range)?.0)
            }
        };
        let is_delta = blend.is_delta;
        let sides = Sides { m, r, b, is_delta, start: chunk.range.start };
        let mut nbytes = 0;
        let gave = match chunk.pass {
            Pass::Narrow => {
                count(counts, &chunk.intervals, &sides, &present, values);
                Gave::Counts
            }
            Pass::Measure => Gave::Products(sides.products(&present, values)),
            Pass::Sample | Pass::Write => {
                out.clear();
                out.resize(chunk.range.len() * blend.dtype.nbytes(), 0);
                let step = self.step(job, blend, chunk);
                let found = merge(&step, &sides, &present, &chunk.range, values, out);
                self.writer.write_at(chunk.job, chunk.range.start * blend.dtype.nbytes(), out)?;
                let count = 2 + usize::from(sides.b.is_some());
                nbytes = (chunk.range.len() * job.multimodal.element_nbytes() * count) as u64;
                Gave::Found(found)
            }
        };
        job.multimodal.release(&chunk.range);
        blend.sources().for_each(|source| source.release(&chunk.range));
        Ok((gave, nbytes))
    }

    /// Where the k-th largest magnitudes probably are, judging by runs spread evenly over the tensor.
    fn sample(&self, chunk: &PassChunk, blend: &Blend<'_>, scratch: &mut Scratch) -> Result<Gave> {
        const RUN: usize = SAMPLE / SAMPLE_RUNS;
        let Method::Ties { density } = self.method else { return Ok(Gave::Nothing) };
        if blend.has_blocks() {
            return Ok(Gave::Nothing);
        }
        let total = chunk.range.len();
        let has_base = blend.base.is_some();
        let Scratch { multimodal, reasoning, base, values, sample, .. } = scratch;
        let job = &self.jobs[chunk.job];
        for magnitudes in sample.iter_mut() {
            magnitudes.clear();
            magnitudes.reserve_exact(SAMPLE);
        }
        for run in 0..SAMPLE_RUNS {
            let start = (total - RUN) / (SAMPLE_RUNS - 1) * run;
            let range = start..start + RUN;
            let m = multimodal.read_operand(&job.multimodal, &range)?.0;
            let r = reasoning.read(&blend.reasoning, &range)?.0;
            let b = match &blend.base {
                None => None,
                Some(source) => Some(base.read(source, &range)?.0),
            };
            let sides = Sides { m, r, b, is_delta: blend.is_delta, start };
            sides.each(std::slice::from_ref(&range), values, |values, _, len| {
                let tasks = sample.iter_mut().enumerate().take(1 + usize::from(has_base));
                for (task, magnitudes) in tasks {
                    values.task(task, len, has_base);
                    let vector = &values.tasks[task][..len];
                    magnitudes.extend(vector.iter().map(|&value| blend::magnitude(value)));
                }
            });
        }
        let [first, second] = sample;
        let guess = |magnitudes: &mut Vec<u64>| Interval::guess(magnitudes, density);
        Ok(Gave::Sample([guess(first), guess(second)]))
    }

    /// How the blocks of a chunk are merged.
    fn step<'a, 'b>(&self, job: &Job<'_>, blend: &'b Blend<'a>, chunk: &PassChunk) -> Step<'a, 'b> {
        let name = &job.multimodal.tensor.name;
        Step {
            method: self.method,
            blend,
            thresholds: chunk.intervals.map(|one| f64::from_bits(one.only().unwrap_or(0))),
            factors: chunk.factors,
            keys: match self.method {
                Method::DareLinear { seed, .. } | Method::DareTies { seed, .. } => {
                    [key(seed, "reasoning", name), key(seed, "multimodal", name)]
                }
                _ => [0; 2],
            },
        }
    }
}

/// Count the magnitudes of the task vectors whose interval is still to be narrowed.
fn count(
    counts: &mut [Counts; 2],
    intervals: &[Interval; 2],
    sides: &Sides<'_>,
    present: &[Range<usize>],
    values: &mut Widened,
) {
    let has_base = sides.b.is_some();
    for (task, (counts, interval)) in counts.iter_mut().zip(intervals).enumerate() {
        counts.clear();
        if task > usize::from(has_base) || interval.only().is_some() {
            continue;
        }
        sides.each(present, values, |values, _, len| {
            values.task(task, len, has_base);
            counts.count(*interval, &values.tasks[task][..len]);
        });
    }
}

/// Merge a chunk into `out`; rows that not every model stores stay the multimodal model's.
fn merge(
    step: &Step<'_, '_>,
    sides: &Sides<'_>,
    present: &[Range<usize>],
    elements: &Range<usize>,
    values: &mut Widened,
    out: &mut [u8],
) -> Found {
    let dtype = step.blend.dtype;
    let nbytes = dtype.nbytes();
    let mut found = Found::default();
    for run in absent(present, elements) {
        for element in run.clone().step_by(BLOCK) {
            let len = BLOCK.min(run.end - element);
            let at = element - sides.start;
            let bytes = &mut out[at * nbytes..(at + len) * nbytes];
            found.overflow += values.stay(sides.m.slice(at, at + len), bytes, dtype);
        }
    }
    sides.each(present, values, |values, element, len| {
        let at = element - sides.start;
        let bytes = &mut out[at * nbytes..(at + len) * nbytes];
        let of_block = step.block(values, element, len, sides.b.is_some(), bytes, dtype);
        found.add(&of_block);
    });
    found
}
