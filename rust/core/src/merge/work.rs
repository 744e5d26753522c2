//! Hand out chunks pass by pass, read them, and keep what is known of the tensors of a batch.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::passes::{Chunk, Pass, Schedule, length, step};
use super::step::{Blocks, Sides, Step};
use super::trim::{Counts, Interval, SAMPLE, SAMPLE_RUNS};
use super::{Blend, Found, Job, Method, PARALLEL, key};
use crate::error::{Error, Result};
use crate::kernel::blend::BLOCK;
use crate::kernel::blend::{self, Environment};
use crate::output::writer::Writer;
use crate::stream::Account;
use crate::stream::read::{Room, absent, common, part, present};
use crate::stream::{CHUNK, Minuend, Progress};

/// Buffers that a worker keeps from chunk to chunk.
pub(super) struct Scratch {
    multimodal: Room,
    reasoning: Room,
    base: Room,
    out: Vec<u8>,
    values: Box<Blocks>,
    counts: [Counts; 2],
    sample: [Vec<u64>; 2],
}

impl Scratch {
    fn new() -> Self {
        let zero = [0.0; BLOCK];
        Self {
            multimodal: Room::default(),
            reasoning: Room::default(),
            base: Room::default(),
            out: Vec::new(),
            values: Box::new(Blocks { m: zero, r: zero, b: zero, tasks: [zero; 2], out: zero }),
            counts: [Counts::new(), Counts::new()],
            sample: [Vec::new(), Vec::new()],
        }
    }

    /// Bytes beside those of chunks.
    pub(super) fn fixed_nbytes(method: Method) -> usize {
        let sample =
            if matches!(method, Method::Ties { .. }) { 2 * SAMPLE * size_of::<u64>() } else { 0 };
        size_of::<Blocks>() + 2 * Counts::NBYTES + sample
    }

    fn nbytes(&self) -> usize {
        let rooms = [&self.multimodal, &self.reasoning, &self.base];
        size_of::<Blocks>()
            + 2 * Counts::NBYTES
            + rooms.iter().map(|room| room.held_nbytes()).sum::<usize>()
            + self.out.capacity()
            + self.sample.iter().map(|keys| keys.capacity() * size_of::<u64>()).sum::<usize>()
    }
}

/// What is known of one tensor of the batch.
#[derive(Default)]
struct Known {
    found: Found,
    /// For each task vector that is trimmed: the share that is kept, where the least of it lies, and
    /// what this pass counted.
    trims: Vec<Trim>,
    /// Σr², Σm², Σrm of each chunk.
    products: Vec<[f64; 3]>,
    factors: [f64; 2],
}

struct Trim {
    density: f64,
    interval: Interval,
    counts: Counts,
}

/// What a chunk gave.
enum Gave {
    Nothing,
    Sample([Interval; 2]),
    Counts,
    Products([f64; 3]),
    Found(Found),
}

struct State {
    batch: usize,
    pass: Pass,
    /// The next chunk of the pass: job, and where in it.
    job: usize,
    index: usize,
    in_flight: usize,
    known: Vec<Known>,
    found: Vec<Option<Found>>,
    finished: bool,
}

pub(super) struct Work<'a> {
    jobs: &'a [Job<'a>],
    method: Method,
    writer: &'a Writer,
    schedule: Schedule,
    account: &'a Account,
    prefetch_nbytes: u64,
    state: Mutex<State>,
    moved: Condvar,
    stopped: AtomicBool,
    tensors: AtomicUsize,
    nbytes: AtomicU64,
    /// The failure of the earliest tensor, so that which of several is reported depends little on
    /// timing.
    failure: Mutex<Option<(usize, Error)>>,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        jobs: &'a [Job<'a>],
        method: Method,
        writer: &'a Writer,
        schedule: Schedule,
        account: &'a Account,
        prefetch_nbytes: u64,
    ) -> Self {
        let state = State {
            batch: 0,
            pass: Pass::Write,
            job: 0,
            index: 0,
            in_flight: 0,
            known: Vec::new(),
            found: vec![None; jobs.len()],
            finished: false,
        };
        let work = Self {
            jobs,
            method,
            writer,
            schedule,
            account,
            prefetch_nbytes,
            state: Mutex::new(state),
            moved: Condvar::new(),
            stopped: AtomicBool::new(false),
            tensors: AtomicUsize::new(0),
            nbytes: AtomicU64::new(0),
            failure: Mutex::new(None),
        };
        work.begin(&mut work.state());
        work
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            tensors: self.tensors.load(Ordering::Relaxed),
            nbytes: self.nbytes.load(Ordering::Relaxed),
        }
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        // Taken, so that nobody is between looking and waiting.
        drop(self.state());
        self.moved.notify_all();
    }

    /// What was found, or the failure.
    pub(super) fn finish(self) -> Result<Vec<Option<Found>>> {
        if let Some((_, error)) = self.failure.into_inner().unwrap_or_else(PoisonError::into_inner)
        {
            return Err(error);
        }
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if state.finished { Ok(state.found) } else { Err(Error::Interrupted) }
    }

    pub(super) fn run(&self) {
        let _environment = Environment::enter();
        let mut scratch = Scratch::new();
        let mut held = scratch.nbytes();
        self.account.add(held);
        while let Some(chunk) = self.take() {
            self.prefetch(&chunk);
            match self.chunk(&chunk, &mut scratch) {
                Ok(gave) => self.give(&chunk, gave, &scratch),
                Err(error) => self.fail(chunk.job, error),
            }
            let now = scratch.nbytes();
            self.account.add(now.saturating_sub(held));
            held = held.max(now);
        }
        self.account.remove(held);
    }

    fn fail(&self, job: usize, error: Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.as_ref().is_none_or(|(earliest, _)| job < *earliest) {
            *failure = Some((job, error));
        }
        drop(failure);
        self.stop();
    }

    // ---------------------------------------------------------------- order

    fn take(&self) -> Option<Chunk> {
        let mut state = self.state();
        loop {
            if state.finished || self.stopped.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(chunk) = self.next(&mut state) {
                state.in_flight += 1;
                return Some(chunk);
            }
            if state.in_flight > 0 {
                state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            self.advance(&mut state);
            self.moved.notify_all();
        }
    }

    fn batch(&self, state: &State) -> Range<usize> {
        self.schedule.batches[state.batch].clone()
    }

    /// Whether a tensor has anything to do in a pass.
    fn concerns(&self, state: &State, job: usize) -> bool {
        let known = &state.known[job - self.batch(state).start];
        match state.pass {
            Pass::Write => true,
            Pass::Measure => self.jobs[job].blend.is_some(),
            Pass::Sample => !known.trims.is_empty() && length(&self.jobs[job]) > CHUNK,
            Pass::Narrow => known.trims.iter().any(|trim| trim.interval.only().is_none()),
        }
    }

    fn next(&self, state: &mut State) -> Option<Chunk> {
        let batch = self.batch(state);
        while state.job < batch.end {
            let total = length(&self.jobs[state.job]);
            let step = if state.pass == Pass::Sample { total } else { step(&self.jobs[state.job]) };
            let start = state.index * step.max(1);
            if start >= total || !self.concerns(state, state.job) {
                (state.job, state.index) = (state.job + 1, 0);
                continue;
            }
            let known = &state.known[state.job - batch.start];
            let mut intervals = [Interval::ALL; 2];
            for (interval, trim) in intervals.iter_mut().zip(&known.trims) {
                *interval = trim.interval;
            }
            let chunk = Chunk {
                job: state.job,
                index: state.index,
                range: start..total.min(start + step),
                pass: state.pass,
                intervals,
                factors: known.factors,
            };
            state.index += 1;
            return Some(chunk);
        }
        None
    }

    /// Begin a batch: what is to be known of its tensors, and the first pass.
    fn begin(&self, state: &mut State) {
        let batch = self.batch(state);
        let known = |job: &Job<'_>| {
            let Some(blend) = &job.blend else { return Known::default() };
            let total = length(job);
            let merged: usize = blend.present(&(0..total)).iter().map(Range::len).sum();
            let mut known = Known::default();
            known.found.merged = merged as u64;
            match self.method {
                Method::Ties { density } if merged > 0 => {
                    let vectors = if blend.base.is_some() { 2 } else { 1 };
                    known.trims.extend((0..vectors).map(|_| Trim {
                        density,
                        interval: Interval::ALL,
                        counts: Counts::new(),
                    }));
                }
                Method::Slerp => known.products = vec![[0.0; 3]; total.div_ceil(step(job))],
                _ => {}
            }
            known
        };
        state.known = self.jobs[batch.clone()].iter().map(known).collect();
        state.pass = match self.method {
            Method::Ties { .. } => Pass::Sample,
            Method::Slerp => Pass::Measure,
            _ => Pass::Write,
        };
        (state.job, state.index) = (batch.start, 0);
    }

    /// Go on to the next pass, or batch, when all chunks of this one are given back.
    fn advance(&self, state: &mut State) {
        let batch = self.batch(state);
        match state.pass {
            Pass::Sample => state.pass = Pass::Narrow,
            Pass::Narrow => {
                for trim in state.known.iter_mut().flat_map(|known| &mut known.trims) {
                    if trim.interval.only().is_none() {
                        trim.interval = trim.interval.narrowed(&trim.counts, trim.density);
                        trim.counts.clear();
                    }
                }
                if batch.clone().all(|job| !self.concerns(state, job)) {
                    state.pass = Pass::Write;
                }
            }
            Pass::Measure => {
                for (known, job) in state.known.iter_mut().zip(&self.jobs[batch.clone()]) {
                    if let Some(blend) = &job.blend {
                        known.conclude(blend);
                    }
                }
                state.pass = Pass::Write;
            }
            Pass::Write => {
                for (known, job) in std::mem::take(&mut state.known).into_iter().zip(batch.clone())
                {
                    state.found[job] = self.jobs[job].blend.as_ref().map(|_| known.found);
                }
                self.tensors.store(batch.end, Ordering::Relaxed);
                state.batch += 1;
                if state.batch == self.schedule.batches.len() {
                    state.finished = true;
                } else {
                    self.begin(state);
                }
                return;
            }
        }
        (state.job, state.index) = (batch.start, 0);
    }

    fn give(&self, chunk: &Chunk, gave: Gave, scratch: &Scratch) {
        let mut state = self.state();
        let first = self.batch(&state).start;
        let known = &mut state.known[chunk.job - first];
        match gave {
            Gave::Nothing => {}
            Gave::Sample(intervals) => {
                for (trim, interval) in known.trims.iter_mut().zip(intervals) {
                    trim.interval = interval;
                }
            }
            Gave::Counts => {
                for (trim, counts) in known.trims.iter_mut().zip(&scratch.counts) {
                    if trim.interval.only().is_none() {
                        trim.counts.add(counts);
                    }
                }
            }
            Gave::Products(products) => known.products[chunk.index] = products,
            Gave::Found(found) => known.found.add(&found),
        }
        state.in_flight -= 1;
        if state.in_flight == 0 {
            drop(state);
            self.moved.notify_all();
        }
    }

    /// Ask the disk for what comes a little later, in the pass that reads a tensor first.
    fn prefetch(&self, chunk: &Chunk) {
        let job = &self.jobs[chunk.job];
        let Some(blend) = &job.blend else {
            let range = &job.multimodal.tensor.range;
            let start = range.start + chunk.range.end as u64;
            let end = range.end.min(start + self.prefetch_nbytes);
            job.multimodal.shard.prefetch(start.min(end)..end);
            return;
        };
        if chunk.index > 0 && matches!(chunk.pass, Pass::Write) && !reads_once(self.method) {
            return;
        }
        let total = length(job);
        let nbytes = job.multimodal.element_nbytes().max(1) as u64;
        let ahead = (self.prefetch_nbytes / 2 / nbytes) as usize;
        // One chunk's worth at that distance: those before it were asked for by earlier chunks.
        let first = if chunk.index == 0 { chunk.range.end } else { chunk.range.end + ahead };
        let range = first.min(total)..total.min(chunk.range.end + ahead + chunk.range.len());
        if range.is_empty() || chunk.pass == Pass::Sample {
            return;
        }
        let whole = std::iter::once(&blend.reasoning)
            .chain(&blend.base)
            .filter_map(|side| if let Minuend::Whole(side) = side { Some(side) } else { None });
        for side in whole.chain(std::iter::once(&job.multimodal)) {
            side.shard.prefetch(part(side, &range));
        }
    }

    // ---------------------------------------------------------------- chunks

    fn chunk(&self, chunk: &Chunk, scratch: &mut Scratch) -> Result<Gave> {
        let job = &self.jobs[chunk.job];
        let Some(blend) = &job.blend else {
            if chunk.pass == Pass::Write {
                self.copy(job, chunk, scratch)?;
            }
            return Ok(Gave::Nothing);
        };
        if chunk.pass == Pass::Sample {
            return self.sample(chunk, blend, scratch);
        }
        let Scratch { multimodal, reasoning, base, out, values, counts, .. } = scratch;
        let m = multimodal.read(&job.multimodal, &chunk.range)?;
        let (r, mut present) = reasoning.gather(&blend.reasoning, &chunk.range)?;
        let b = match &blend.base {
            None => None,
            Some(side) => {
                let (b, there) = base.gather(side, &chunk.range)?;
                present = common(&present, &there);
                Some(b)
            }
        };
        let sides = Sides { m, r, b, start: chunk.range.start };
        let gave = match chunk.pass {
            Pass::Narrow => {
                for ((counts, interval), task) in counts.iter_mut().zip(chunk.intervals).zip(0..) {
                    counts.clear();
                    if task > usize::from(sides.b.is_some()) || interval.only().is_some() {
                        continue;
                    }
                    sides.each(&present, values, |values, _, len| {
                        values.task(task, len, sides.b.is_some());
                        let vector = &values.tasks[task][..len];
                        counts.count(interval, vector.iter().map(|&value| blend::magnitude(value)));
                    });
                }
                Gave::Counts
            }
            Pass::Measure => Gave::Products(sides.products(&present, values)),
            Pass::Sample | Pass::Write => {
                out.clear();
                out.resize(chunk.range.len() * blend.dtype.nbytes(), 0);
                let found = self.merge(job, chunk, blend, &sides, &present, values, out);
                self.writer.write_at(chunk.job, chunk.range.start * blend.dtype.nbytes(), out)?;
                let count = 2 + usize::from(sides.b.is_some());
                let read = chunk.range.len() * job.multimodal.element_nbytes() * count;
                self.nbytes.fetch_add(read as u64, Ordering::Relaxed);
                Gave::Found(found)
            }
        };
        job.multimodal.shard.release(part(&job.multimodal, &chunk.range));
        for side in std::iter::once(&blend.reasoning).chain(&blend.base) {
            if let Minuend::Whole(side) = side {
                side.shard.release(part(side, &chunk.range));
            }
        }
        Ok(gave)
    }

    fn copy(&self, job: &Job<'_>, chunk: &Chunk, scratch: &mut Scratch) -> Result<()> {
        let side = &job.multimodal;
        let start = side.tensor.range.start;
        let range = start + chunk.range.start as u64..start + chunk.range.end as u64;
        let bytes = side.shard.bytes(range.clone(), &mut scratch.out)?;
        self.writer.write_at(chunk.job, chunk.range.start, bytes)?;
        side.shard.release(range);
        self.nbytes.fetch_add(chunk.range.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Where the k-th largest magnitudes probably lie, by runs spread evenly over the tensor.
    fn sample(&self, chunk: &Chunk, blend: &Blend<'_>, scratch: &mut Scratch) -> Result<Gave> {
        const RUN: usize = SAMPLE / SAMPLE_RUNS;
        let total = chunk.range.len();
        let has_base = blend.base.is_some();
        let Scratch { multimodal, reasoning, base, values, sample, .. } = scratch;
        let whole = |side: &Minuend<'_>| matches!(side, Minuend::Whole(_));
        if !whole(&blend.reasoning) || blend.base.as_ref().is_some_and(|side| !whole(side)) {
            return Ok(Gave::Nothing);
        }
        let job = &self.jobs[chunk.job];
        sample.iter_mut().for_each(|magnitudes| {
            magnitudes.clear();
            magnitudes.reserve_exact(SAMPLE);
        });
        for run in 0..SAMPLE_RUNS {
            let start = (total - RUN) / (SAMPLE_RUNS - 1) * run;
            let range = start..start + RUN;
            let m = multimodal.read(&job.multimodal, &range)?;
            let r = reasoning.gather(&blend.reasoning, &range)?.0;
            let b = match &blend.base {
                None => None,
                Some(side) => Some(base.gather(side, &range)?.0),
            };
            let sides = Sides { m, r, b, start };
            sides.each(std::slice::from_ref(&range), values, |values, _, len| {
                for (task, magnitudes) in
                    sample.iter_mut().enumerate().take(1 + usize::from(has_base))
                {
                    values.task(task, len, has_base);
                    magnitudes
                        .extend(values.tasks[task][..len].iter().map(|&v| blend::magnitude(v)));
                }
            });
        }
        let Method::Ties { density } = self.method else { return Ok(Gave::Nothing) };
        let [first, second] = sample;
        let guess = |magnitudes: &mut Vec<u64>| Interval::guess(magnitudes, density);
        Ok(Gave::Sample([guess(first), guess(second)]))
    }

    #[expect(clippy::too_many_arguments, reason = "they are what a chunk consists of")]
    fn merge(
        &self,
        job: &Job<'_>,
        chunk: &Chunk,
        blend: &Blend<'_>,
        sides: &Sides<'_>,
        present: &[Range<usize>],
        values: &mut Blocks,
        out: &mut [u8],
    ) -> Found {
        let name = &job.multimodal.tensor.name;
        let step = Step {
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
        };
        let dtype = blend.dtype;
        let nbytes = dtype.nbytes();
        let mut found = Found::default();
        // Rows without a counterpart stay the multimodal model's.
        for run in absent(present, &chunk.range) {
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
}

/// Whether the pass that writes is the one that reads a tensor first.
fn reads_once(method: Method) -> bool {
    !matches!(method, Method::Ties { .. } | Method::Slerp)
}

impl Blend<'_> {
    /// What of some elements has a counterpart on every side.
    fn present(&self, elements: &Range<usize>) -> Vec<Range<usize>> {
        let reasoning = present(&self.reasoning, elements);
        match &self.base {
            None => reasoning,
            Some(base) => common(&reasoning, &present(base, elements)),
        }
    }
}

impl Known {
    /// What slerp multiplies both sides by.
    fn conclude(&mut self, blend: &Blend<'_>) {
        let mut sums = [0.0; 3];
        for products in &self.products {
            for (sum, product) in sums.iter_mut().zip(products) {
                *sum += product;
            }
        }
        let [r_sq, m_sq, dot] = sums;
        let w = blend.weight;
        let cosine = dot / (r_sq.sqrt() * m_sq.sqrt());
        self.found.cosine = cosine.is_finite().then_some(cosine);
        self.factors = if cosine.abs() <= PARALLEL {
            let angle = cosine.acos();
            [((1.0 - w) * angle).sin() / angle.sin(), (w * angle).sin() / angle.sin()]
        } else {
            // Also where one of them is zero and the cosine has no value.
            [1.0 - w, w]
        };
    }
}
