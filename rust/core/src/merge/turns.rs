//! Which chunk comes next, in which pass.
//!
//! The next pass of a batch begins when all chunks of this one are given back, since it needs what
//! was found in all of them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::job::{Found, Job, Method};
use super::known::{Gave, Known};
use super::passes::{Pass, PassChunk, length, step};
use super::trim::{Counts, Interval};
use crate::stream::CHUNK;

/// Hands out the chunks of a merge.
pub(super) struct Turns<'a> {
    jobs: &'a [Job<'a>],
    method: Method,
    batches: Vec<Range<usize>>,
    state: Mutex<State>,
    moved: Condvar,
    tensors: AtomicUsize,
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
    stopped: bool,
}

impl<'a> Turns<'a> {
    pub(super) fn new(jobs: &'a [Job<'a>], method: Method, batches: Vec<Range<usize>>) -> Self {
        let state = State {
            batch: 0,
            pass: Pass::Write,
            job: 0,
            index: 0,
            in_flight: 0,
            known: Vec::new(),
            found: vec![None; jobs.len()],
            finished: false,
            stopped: false,
        };
        let (state, moved) = (Mutex::new(state), Condvar::new());
        let turns = Self { jobs, method, batches, state, moved, tensors: AtomicUsize::new(0) };
        turns.begin(&mut turns.state());
        turns
    }

    /// Tensors that are done.
    pub(super) fn tensors(&self) -> usize {
        self.tensors.load(Ordering::Relaxed)
    }

    /// Hand out no more chunks, and release the workers that wait.
    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.moved.notify_all();
    }

    /// What was found about each job; nothing if a chunk is missing.
    pub(super) fn finish(self) -> Option<Vec<Option<Found>>> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.finished.then_some(state.found)
    }

    /// The next chunk, as soon as its pass has begun.
    pub(super) fn take(&self) -> Option<PassChunk> {
        let mut state = self.state();
        loop {
            if state.finished || state.stopped {
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

    /// Give back what was found in a chunk; `counts` are of both task vectors.
    pub(super) fn give(&self, chunk: &PassChunk, gave: Gave, counts: &[Counts; 2]) {
        let mut state = self.state();
        let first = self.batch(&state).start;
        state.known[chunk.job - first].add(chunk.index, gave, counts);
        state.in_flight -= 1;
        if state.in_flight == 0 {
            drop(state);
            self.moved.notify_all();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn batch(&self, state: &State) -> Range<usize> {
        self.batches[state.batch].clone()
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

    fn next(&self, state: &mut State) -> Option<PassChunk> {
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
            let chunk = PassChunk {
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

    /// Begin a batch: what is known about its tensors, and the first pass.
    fn begin(&self, state: &mut State) {
        let batch = self.batch(state);
        let known = |job| Known::new(job, self.method);
        state.known = self.jobs[batch.clone()].iter().map(known).collect();
        state.pass = match self.method {
            Method::Ties { .. } => Pass::Sample,
            Method::Slerp => Pass::Measure,
            _ => Pass::Write,
        };
        (state.job, state.index) = (batch.start, 0);
    }

    /// Go on to the next pass or batch once all chunks of this one are given back.
    fn advance(&self, state: &mut State) {
        let batch = self.batch(state);
        match state.pass {
            Pass::Sample => state.pass = Pass::Narrow,
            Pass::Narrow => {
                state.known.iter_mut().for_each(Known::narrow);
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
                if state.batch == self.batches.len() {
                    state.finished = true;
                } else {
                    self.begin(state);
                }
                return;
            }
        }
        (state.job, state.index) = (batch.start, 0);
    }
}
