//! Which chunk comes next, and the moments in element order.
//!
//! Chunks are handed out in order and come back in any order; their moments are added in order. A
//! chunk is handed out only if it is at most [`Order::window`] chunks ahead of the sums, so only one
//! sum for each pair grows with a model.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::chunk::{Chunk, Chunks};
use crate::align::pair::Pair;
use crate::kernel::Moments;
use crate::kernel::rounding::Rounding;

/// How many chunks per worker may be done before an earlier one is.
const WINDOW_PER_WORKER: usize = 16;

/// A chunk that a worker has.
pub(crate) struct Taken {
    /// Its place in the order.
    pub(crate) index: usize,
    pub(crate) chunk: Chunk,
}

/// The order of one run.
pub(crate) struct Order<'a> {
    pairs: &'a [Pair<'a>],
    window: usize,
    prefetch_nbytes: u64,
    state: Mutex<State<'a>>,
    moved: Condvar,
}

/// What is known about a chunk that is done.
#[derive(Clone, Copy)]
struct Done {
    pair: usize,
    moments: Moments,
    rounding: Rounding,
    /// Whether it is the last of its pair.
    last: bool,
}

struct State<'a> {
    chunks: Chunks<'a>,
    taken: usize,
    /// The chunks to ask the disk for, ahead of `chunks`, so that they are in the page cache in time.
    scout: Chunks<'a>,
    scouted: usize,
    /// Bytes between the two.
    ahead_nbytes: u64,
    /// How many chunks' moments are added up, and the moments of later chunks that are done.
    folded: usize,
    pending: VecDeque<Option<Done>>,
    moments: Vec<Moments>,
    /// The sample of the pair whose moments are being added up.
    rounding: Rounding,
    /// Pairs whose moments are complete.
    tensors: usize,
    stopped: bool,
}

impl<'a> Order<'a> {
    /// The order of `pairs` for `workers` workers; `prefetch_nbytes` says how far ahead of them
    /// [`Order::ahead`] is.
    pub(crate) fn new(pairs: &'a [Pair<'a>], workers: usize, prefetch_nbytes: u64) -> Self {
        let window = workers * WINDOW_PER_WORKER;
        let empty = |pair: &&Pair<'_>| pair.multimodal.tensor.numel() == 0;
        Self {
            pairs,
            window,
            prefetch_nbytes,
            state: Mutex::new(State {
                chunks: Chunks::new(pairs),
                taken: 0,
                scout: Chunks::new(pairs),
                scouted: 0,
                ahead_nbytes: 0,
                folded: 0,
                pending: VecDeque::with_capacity(window),
                moments: vec![Moments::default(); pairs.len()],
                rounding: Rounding::default(),
                tensors: pairs.iter().filter(empty).count(),
                stopped: false,
            }),
            moved: Condvar::new(),
        }
    }

    /// Bytes that the window takes.
    pub(crate) fn window_nbytes(workers: usize) -> usize {
        workers * WINDOW_PER_WORKER * size_of::<Option<Done>>()
    }

    /// The next chunk; none once all are taken or the run was stopped.
    pub(crate) fn take(&self) -> Option<Taken> {
        let mut state = self.state();
        while !state.stopped && state.taken - state.folded >= self.window {
            // The worker that has the earliest chunk comes here only once that chunk is folded.
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped {
            return None;
        }
        let chunk = state.chunks.next()?;
        let index = state.taken;
        state.taken += 1;
        state.ahead_nbytes = state.ahead_nbytes.saturating_sub(self.nbytes(&chunk));
        Some(Taken { index, chunk })
    }

    /// The next chunk to ask the disk for; none while enough of them are.
    pub(crate) fn ahead(&self) -> Option<Chunk> {
        let mut state = self.state();
        while state.scouted < state.taken {
            state.scout.next()?;
            state.scouted += 1;
            state.ahead_nbytes = 0;
        }
        if state.ahead_nbytes >= self.prefetch_nbytes {
            return None;
        }
        let chunk = state.scout.next()?;
        state.scouted += 1;
        state.ahead_nbytes += self.nbytes(&chunk);
        Some(chunk)
    }

    /// Give back the moments of a chunk and its part of the sample.
    pub(crate) fn fold(&self, taken: &Taken, moments: Moments, rounding: Rounding) {
        let Chunk { pair, ref elements, .. } = taken.chunk;
        let last = elements.end == self.pairs[pair].multimodal.tensor.numel();
        let mut state = self.state();
        // Chunks before `folded` have been given back, and each is given back once.
        let place = taken.index - state.folded;
        while state.pending.len() <= place {
            state.pending.push_back(None);
        }
        state.pending[place] = Some(Done { pair, moments, rounding, last });
        while let Some(&Some(done)) = state.pending.front() {
            state.pending.pop_front();
            state.moments[done.pair].add(&done.moments);
            state.rounding.add(&done.rounding);
            if done.last {
                let rounding = std::mem::take(&mut state.rounding);
                let sum = &mut state.moments[done.pair];
                sum.rounding_sq = rounding.part_of(sum);
            }
            state.tensors += usize::from(done.last);
            state.folded += 1;
        }
        self.moved.notify_all();
    }

    /// How many pairs are done.
    pub(crate) fn tensors(&self) -> usize {
        self.state().tensors
    }

    /// Hand out no more chunks, and release the workers that wait.
    pub(crate) fn stop(&self) {
        self.state().stopped = true;
        self.moved.notify_all();
    }

    /// The moments of every pair; none if a chunk is missing.
    pub(crate) fn finish(self) -> Option<Vec<Moments>> {
        let mut state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let complete = state.chunks.next().is_none() && state.folded == state.taken;
        complete.then_some(state.moments)
    }

    fn nbytes(&self, chunk: &Chunk) -> u64 {
        let pair = &self.pairs[chunk.pair];
        let element = pair.reasoning.element_nbytes() + pair.multimodal.element_nbytes();
        (chunk.elements.len() * element) as u64
    }

    fn state(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::align::pair::Source;
    use crate::checkpoint::{Checkpoint, Operand, Reader};
    use crate::stream::CHUNK;

    /// A file of holes with one bfloat16 tensor of each size.
    fn sparse(directory: &Path, sizes: &[usize]) -> PathBuf {
        let mut end = 0;
        let entries: Vec<String> = sizes
            .iter()
            .enumerate()
            .map(|(number, numel)| {
                let start = end;
                end += 2 * numel;
                format!(
                    "\"{number}\":{{\"dtype\":\"BF16\",\"shape\":[{numel}],\"data_offsets\":[{start},{end}]}}"
                )
            })
            .collect();
        let header = format!("{{{}}}", entries.join(","));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        let path = directory.join("a.safetensors");
        std::fs::write(&path, &bytes).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len((bytes.len() + end) as u64).unwrap();
        path
    }

    fn pairs<'a>(checkpoint: &'a Checkpoint, sizes: &[usize]) -> Vec<Pair<'a>> {
        (0..sizes.len())
            .map(|number| {
                let (shard, tensor) = checkpoint.tensor(&number.to_string()).unwrap();
                let operand = Operand { shard, tensor, scales: None };
                Pair { reasoning: Source::Whole(operand), multimodal: operand }
            })
            .collect()
    }

    const SIZES: [usize; 5] = [0, 3, 40 * CHUNK + 1, 0, CHUNK];

    fn with_order<T>(prefetch_nbytes: u64, then: impl FnOnce(&Order<'_>) -> T) -> T {
        let directory = tempfile::tempdir().unwrap();
        let path = sparse(directory.path(), &SIZES);
        let checkpoint = Checkpoint::open(&path, Reader::Pread).unwrap();
        let pairs = pairs(&checkpoint, &SIZES);
        then(&Order::new(&pairs, 1, prefetch_nbytes))
    }

    fn sum(value: f64) -> Moments {
        Moments { delta_sq: value, ..Moments::default() }
    }

    #[test]
    fn sums_are_taken_in_element_order_in_whatever_order_chunks_come_back() {
        // Not associative: the small values survive only if they are added first.
        let value = |index: usize| if index == 41 { 1e16 } else { 1.0 };
        let total = with_order(0, |order| {
            let mut taken = Vec::new();
            for _ in 0..WINDOW_PER_WORKER {
                taken.push(order.take().unwrap());
            }
            while let Some(chunk) = taken.pop() {
                order.fold(&chunk, sum(value(chunk.index)), Rounding::default());
                if taken.is_empty() {
                    taken.extend((0..WINDOW_PER_WORKER).map_while(|_| order.take()));
                }
                let state = order.state();
                assert!(state.pending.len() <= WINDOW_PER_WORKER);
                assert!(state.pending.capacity() <= 2 * WINDOW_PER_WORKER);
            }
            assert_eq!(order.tensors(), SIZES.len());
            order.state().moments.iter().map(|m| m.delta_sq).collect::<Vec<_>>()
        });
        let mut long = 0.0;
        (1..=41).for_each(|index| long += value(index));
        assert_eq!(total, [0.0, 1.0, long, 0.0, 1.0]);
        assert_ne!(long, 1e16);
    }

    #[test]
    fn nothing_is_handed_out_that_lies_too_far_ahead_of_the_sums() {
        with_order(0, |order| {
            let first = order.take().unwrap();
            while order.state().taken < WINDOW_PER_WORKER {
                let chunk = order.take().unwrap();
                order.fold(&chunk, sum(1.0), Rounding::default());
            }
            std::thread::scope(|scope| {
                let next = scope.spawn(|| order.take().map(|taken| taken.index));
                order.fold(&first, sum(1.0), Rounding::default());
                assert_eq!(next.join().unwrap(), Some(WINDOW_PER_WORKER));
            });
            order.stop();
            assert!(order.take().is_none());
        });
    }

    #[test]
    fn a_worker_that_waits_for_the_sums_is_let_go_when_the_run_stops() {
        with_order(0, |order| {
            let held: Vec<_> = (0..WINDOW_PER_WORKER).map_while(|_| order.take()).collect();
            assert_eq!(held.len(), WINDOW_PER_WORKER);
            std::thread::scope(|scope| {
                let next = scope.spawn(|| order.take().is_none());
                order.stop();
                assert!(next.join().unwrap());
            });
        });
    }

    #[test]
    fn what_is_asked_of_the_disk_runs_ahead_by_as_many_bytes_as_it_may() {
        let chunk = 4 * CHUNK as u64;
        with_order(3 * chunk, |order| {
            let places = || {
                let mut found = Vec::new();
                while let Some(chunk) = order.ahead() {
                    found.push((chunk.pair, chunk.elements.start / CHUNK));
                }
                found
            };
            let first = order.take().unwrap();
            assert_eq!((first.chunk.pair, first.chunk.elements.end), (1, 3));
            assert_eq!(places(), [(2, 0), (2, 1), (2, 2)]);
            assert_eq!(places(), []);
            order.fold(&first, sum(0.0), Rounding::default());
            for next in 3..=5 {
                order.fold(&order.take().unwrap(), sum(0.0), Rounding::default());
                assert_eq!(places(), [(2, next)]);
            }
            // If it has fallen behind, it skips what has been read already.
            for _ in 0..5 {
                order.fold(&order.take().unwrap(), sum(0.0), Rounding::default());
            }
            assert_eq!(places(), [(2, 8), (2, 9), (2, 10)]);
        });
        with_order(0, |order| {
            order.take().unwrap();
            assert!(order.ahead().is_none());
        });
    }
}
