//! Sketches of the differences that go by in a stream.
//!
//! Owns which worker feeds which sketch when: each takes the rows that begin in its chunk, and the
//! rows of one pair are taken in ascending order, so that no thread changes a bit. A sketch lives
//! from the first rows of its pair to the last.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::budget::Account;
use crate::error::{Error, Result};
use crate::order::Chunk;
use crate::sketch::{SingularValues, Sketch};
use crate::stream::Pair;

/// Of every sketch; any other would do.
const SEED: u64 = 0x0005_eed0_f000_0de1;

/// One sketch for each pair that is a matrix.
pub(crate) struct Spectra<'a> {
    singular: usize,
    account: &'a Account,
    of_pair: Vec<Turns>,
    stopped: AtomicBool,
}

#[derive(Default)]
struct Turns {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    sketch: Option<Sketch>,
    next_row: usize,
    found: Option<SingularValues>,
}

/// Rows and columns of a pair, none where it is no matrix or has no element.
pub(crate) fn matrix(pair: &Pair<'_>) -> Option<(usize, usize)> {
    let &[rows, columns] = pair.multimodal.tensor.shape.as_slice() else { return None };
    (rows > 0 && columns > 0).then_some((rows, columns))
}

/// The rows of a matrix that begin in a chunk.
pub(crate) fn rows_in(chunk: &Chunk, columns: usize) -> Range<usize> {
    chunk.start.div_ceil(columns)..chunk.end.div_ceil(columns)
}

impl<'a> Spectra<'a> {
    pub(crate) fn new(singular: usize, pairs: usize, account: &'a Account) -> Self {
        Self {
            singular,
            account,
            of_pair: (0..pairs).map(|_| Turns::default()).collect(),
            stopped: AtomicBool::new(false),
        }
    }

    /// Take in the rows `first` and later of one pair; None stands for rows of zeros. Waits for the
    /// rows before them, which whoever holds them does not.
    ///
    /// # Errors
    /// A matrix that has no sketch, or rows that are not whole.
    pub(crate) fn add(
        &self,
        pair: usize,
        (rows, columns): (usize, usize),
        run: Range<usize>,
        values: Option<&[f32]>,
    ) -> Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        // What takes the time does not wait.
        let own = Sketch::shape_only(rows, columns, self.singular, SEED)?;
        let range = values.map(|values| own.rows_of_range(values)).transpose()?;
        let turns = &self.of_pair[pair];
        let mut state = turns.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.next_row != run.start {
            if self.stopped.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            state = turns.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.sketch.is_none() {
            let sketch = Sketch::new(rows, columns, self.singular, SEED)?;
            self.account.add(sketch.nbytes());
            state.sketch = Some(sketch);
        }
        if let Some(sketch) = &mut state.sketch {
            match (values, &range) {
                (Some(values), Some(range)) => sketch.add(run.start, values, range)?,
                _ => sketch.skip(&run)?,
            }
        }
        state.next_row = run.end;
        turns.moved.notify_all();
        if run.end == rows
            && let Some(sketch) = state.sketch.take()
        {
            let solving = Sketch::solving_nbytes(rows, columns, self.singular);
            self.account.add(solving);
            // Of differences that are not finite there are none, and the moments say so.
            state.found = sketch.singular_values().ok();
            self.account.remove(solving + sketch.nbytes());
        }
        Ok(())
    }

    /// Let nobody wait any longer.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        for turns in &self.of_pair {
            // With the lock held, or a waiter that has just looked would sleep through it.
            drop(turns.state.lock().unwrap_or_else(PoisonError::into_inner));
            turns.moved.notify_all();
        }
    }

    /// What was found of every pair, none where it is no matrix or not finite.
    pub(crate) fn finish(self) -> Vec<Option<SingularValues>> {
        let found =
            |turns: Turns| turns.state.into_inner().unwrap_or_else(PoisonError::into_inner).found;
        self.of_pair.into_iter().map(found).collect()
    }
}
