//! Fill memory with runs of elements, piece by piece and on several threads, and take their squares.
//!
//! Owns which piece a worker fills next and when, and adds up what was found in element order, so that
//! neither threads nor memory nor timing change a bit. Memory is cut into cells, one for each piece
//! that may be under way. A cell is behind a lock, so no two workers ever have the same one, and the
//! caller has lent all of it for as long as the call takes. Where there are fewer cells than pieces, a
//! cell is filled again only after the caller has said that it is done with what was in it.

use std::collections::VecDeque;
use std::ops::{ControlFlow, Range};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::account::Account;
use super::chunk::CHUNK;
use super::engine::{Work, run as run_workers};
use super::options::Progress;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::rounding::Rounding;
use crate::kernel::{Elements, Moments, square};

/// A ring of cells has this many parts. The caller is handed one after the other, while workers fill
/// the rest.
const PARTS: usize = 4;

/// Elements of one tensor that are loaded in order.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// How many they are.
    pub numel: usize,
    /// Bytes of one of them in memory.
    pub nbytes: usize,
    /// Elements of a piece, a multiple of [`CHUNK`].
    pub piece: usize,
}

/// What was found in a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Found {
    /// ‖x‖² of what memory has, over chunks of [`CHUNK`] elements from the first one on; NaN where one
    /// is not finite.
    pub square: f64,
    /// The moments of the difference, if it is one and as far as they are wanted.
    pub moments: Moments,
}

/// What was found in a piece.
#[derive(Default)]
pub(super) struct Piece {
    pub(super) squares: Vec<f64>,
    pub(super) moments: Moments,
    pub(super) rounding: Rounding,
    /// Bytes that were read.
    pub(super) nbytes: u64,
}

impl Piece {
    /// Take the squares of what memory has of the piece.
    pub(super) fn measure(&mut self, dtype: Dtype, bytes: &[u8]) {
        let chunks = bytes.chunks(CHUNK * dtype.nbytes());
        self.squares = chunks.map(|bytes| square(Elements { dtype, bytes })).collect();
    }
}

/// Where runs come from.
pub(super) trait Origin: Sync {
    /// Buffers that a worker keeps from piece to piece.
    type Scratch;

    fn runs(&self) -> &[Run];

    fn scratch(&self) -> Self::Scratch;

    /// Bytes that are allocated in the buffers.
    fn held_nbytes(scratch: &Self::Scratch) -> usize;

    /// Fill `out` with elements of a run, which are one of its pieces.
    fn read(
        &self,
        run: usize,
        elements: Range<usize>,
        out: &mut [u8],
        scratch: &mut Self::Scratch,
    ) -> Result<Piece>;
}

/// Memory that runs are loaded into.
pub enum Memory<'a> {
    /// Of each run its own, of exactly its size.
    Each(Vec<&'a mut [u8]>),
    /// One ring, through which all of them pass.
    Ring(&'a mut [u8]),
}

/// Elements of a run that are in memory now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The number of the run.
    pub run: usize,
    /// Which of its elements.
    pub elements: Range<usize>,
    /// Where they begin in the ring, in bytes; zero where a run has its own memory.
    pub offset: usize,
}

/// A function that takes what has come into memory, in order, and answers how many of its calls so far
/// concern memory that may be filled again. It runs on the calling thread, at least about 20 times a
/// second and once at the end; a break stops the workers.
pub type Landed<'a> = &'a mut dyn FnMut(&[Part]) -> ControlFlow<(), usize>;

/// The least bytes of a ring for these runs.
pub(super) fn cell_nbytes(runs: &[Run]) -> usize {
    runs.iter().map(|run| run.piece * run.nbytes).max().unwrap_or(0)
}

/// Load all runs of `origin` into memory, on up to `workers` threads.
///
/// # Errors
/// Memory of another size, a failed read, or an interruption by `landed`.
pub(super) fn load<O: Origin>(
    origin: &O,
    memory: Memory<'_>,
    workers: usize,
    landed: Landed<'_>,
) -> Result<(Vec<Found>, usize)> {
    let is_ring = matches!(memory, Memory::Ring(_));
    let (cells, cell_nbytes) = cut(origin.runs(), memory)?;
    let part = if is_ring { (cells.len() / PARTS).max(1) } else { usize::MAX };
    let work = Loading {
        origin,
        part,
        state: Mutex::new(State {
            next: Cursor::default(),
            opened: if is_ring { cells.len() } else { usize::MAX },
            folded: 0,
            pending: VecDeque::new(),
            found: vec![Found::default(); origin.runs().len()],
            rounding: Rounding::default(),
            stopped: false,
        }),
        cells,
        moved: Condvar::new(),
    };
    let mut told = Cursor::default();
    let mut ends = VecDeque::new();
    let mut freed = 0;
    let mut tick = |_: Progress| {
        let mut last = false;
        while !last {
            let folded = work.state().folded;
            let end = folded.min(told.count.saturating_add(part));
            last = end == folded;
            let parts = work.parts(&mut told, end, if is_ring { cell_nbytes } else { 0 });
            ends.push_back(end);
            match landed(&parts) {
                ControlFlow::Break(()) => return ControlFlow::Break(()),
                ControlFlow::Continue(done) => {
                    let count = done.saturating_sub(freed).min(ends.len());
                    freed += count;
                    if let Some(end) = ends.drain(..count).next_back() {
                        work.free(end);
                    }
                }
            }
        }
        ControlFlow::Continue(())
    };
    let account = Account::default();
    let pieces: usize = origin.runs().iter().map(|run| run.numel.div_ceil(run.piece)).sum();
    // A single piece is over before a thread would have begun.
    let workers = if pieces < 2 { 0 } else { workers.min(pieces) };
    run_workers(&work, workers, &account, &mut tick)?;
    let state = work.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    if state.folded < pieces {
        return Err(Error::Interrupted);
    }
    Ok((state.found, account.peak_nbytes()))
}

type Cells<'a> = Vec<Mutex<&'a mut [u8]>>;

/// Cut memory into cells, and return how many bytes those of a ring have.
fn cut<'a>(runs: &[Run], memory: Memory<'a>) -> Result<(Cells<'a>, usize)> {
    let refused = |found: usize, expected: usize| {
        let message = format!("the memory to load into has {found} bytes, expected {expected}");
        Err(Error::Argument(message))
    };
    match memory {
        Memory::Ring(ring) => {
            let cell = cell_nbytes(runs);
            if ring.len() < cell {
                return refused(ring.len(), cell);
            }
            Ok((ring.chunks_exact_mut(cell.max(1)).map(Mutex::new).collect(), cell))
        }
        Memory::Each(each) => {
            let expected: Vec<usize> = runs.iter().map(|run| run.numel * run.nbytes).collect();
            if !each.iter().map(|one| one.len()).eq(expected.iter().copied()) {
                return refused(each.iter().map(|one| one.len()).sum(), expected.iter().sum());
            }
            let cut = |(run, one): (&Run, &'a mut [u8])| one.chunks_mut(run.piece * run.nbytes);
            Ok((runs.iter().zip(each).flat_map(cut).map(Mutex::new).collect(), 0))
        }
    }
}

/// A place among the pieces of all runs.
#[derive(Default)]
struct Cursor {
    run: usize,
    start: usize,
    /// Pieces before it.
    count: usize,
}

impl Cursor {
    /// The run and the elements of the next piece.
    fn next(&mut self, runs: &[Run]) -> Option<(usize, Range<usize>)> {
        while let Some(run) = runs.get(self.run) {
            if self.start < run.numel {
                let elements = self.start..run.numel.min(self.start + run.piece);
                (self.start, self.count) = (elements.end, self.count + 1);
                return Some((self.run, elements));
            }
            (self.run, self.start) = (self.run + 1, 0);
        }
        None
    }
}

struct Loading<'a, O> {
    origin: &'a O,
    cells: Cells<'a>,
    /// Pieces that the caller is handed at a time.
    part: usize,
    state: Mutex<State>,
    moved: Condvar,
}

struct State {
    next: Cursor,
    /// Pieces that may be taken: their cells are free.
    opened: usize,
    /// Pieces that are in memory, and so are all before them; what was found in later ones.
    folded: usize,
    pending: VecDeque<Option<Done>>,
    found: Vec<Found>,
    /// The sample of the run that is being added up.
    rounding: Rounding,
    stopped: bool,
}

struct Done {
    run: usize,
    piece: Piece,
    is_last: bool,
}

/// A piece that a worker has.
struct Taken {
    index: usize,
    run: usize,
    elements: Range<usize>,
    is_awaited: bool,
}

impl<O: Origin> Work for Loading<'_, O> {
    type Chunk = Taken;
    type Scratch = O::Scratch;

    fn scratch(&self) -> O::Scratch {
        self.origin.scratch()
    }

    fn held_nbytes(scratch: &O::Scratch) -> usize {
        O::held_nbytes(scratch)
    }

    fn take(&self) -> Option<Taken> {
        let mut state = self.state();
        while !state.stopped && state.next.count >= state.opened {
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped {
            return None;
        }
        let index = state.next.count;
        let (run, elements) = state.next.next(self.origin.runs())?;
        Some(Taken { index, run, elements, is_awaited: false })
    }

    fn place(taken: &Taken) -> usize {
        taken.index
    }

    fn work(&self, taken: &mut Taken, scratch: &mut O::Scratch) -> Result<u64> {
        let Taken { index, run, ref elements, .. } = *taken;
        let nbytes = elements.len() * self.origin.runs()[run].nbytes;
        let mut cell =
            self.cells[index % self.cells.len()].lock().unwrap_or_else(PoisonError::into_inner);
        let piece = self.origin.read(run, elements.clone(), &mut cell[..nbytes], scratch)?;
        drop(cell);
        let read = piece.nbytes;
        taken.is_awaited = self.fold(taken, piece);
        Ok(read)
    }

    fn is_awaited(taken: &Taken) -> bool {
        taken.is_awaited
    }

    fn stop(&self) {
        self.state().stopped = true;
        self.moved.notify_all();
    }

    fn tensors(&self) -> usize {
        self.state().next.run
    }
}

impl<O: Origin> Loading<'_, O> {
    /// Give back what was found in a piece; say whether enough are in memory for the caller to hear
    /// of them at once.
    fn fold(&self, taken: &Taken, piece: Piece) -> bool {
        let is_last = taken.elements.end == self.origin.runs()[taken.run].numel;
        let mut guard = self.state();
        let state = &mut *guard;
        // Pieces before `folded` have been given back, and each is given back once.
        let place = taken.index - state.folded;
        while state.pending.len() <= place {
            state.pending.push_back(None);
        }
        state.pending[place] = Some(Done { run: taken.run, piece, is_last });
        let before = state.folded;
        while let Some(Some(_)) = state.pending.front() {
            let Some(Some(Done { run, piece, is_last })) = state.pending.pop_front() else { break };
            let found = &mut state.found[run];
            piece.squares.iter().for_each(|square| found.square += square);
            found.moments.add(&piece.moments);
            state.rounding.add(&piece.rounding);
            if is_last {
                let rounding = std::mem::take(&mut state.rounding);
                found.moments.rounding_sq = rounding.part_of(&found.moments);
            }
            state.folded += 1;
        }
        let half = (self.part / 2).max(1);
        before / half < state.folded / half
    }

    /// What came into memory from `told` up to piece number `end`, joined where it can be.
    fn parts(&self, told: &mut Cursor, end: usize, cell_nbytes: usize) -> Vec<Part> {
        let runs = self.origin.runs();
        let mut parts: Vec<Part> = Vec::new();
        while told.count < end {
            let offset = told.count % self.cells.len() * cell_nbytes;
            let Some((run, elements)) = told.next(runs) else { break };
            match parts.last_mut() {
                Some(last)
                    if last.run == run
                        && (cell_nbytes == 0
                            || last.offset + last.elements.len() * runs[run].nbytes == offset) =>
                {
                    last.elements.end = elements.end;
                }
                _ => parts.push(Part { run, elements, offset }),
            }
        }
        parts
    }

    /// Let the cells of all pieces before number `end` be filled again.
    fn free(&self, end: usize) {
        let mut state = self.state();
        state.opened = state.opened.max(end.saturating_add(self.cells.len()));
        drop(state);
        self.moved.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
