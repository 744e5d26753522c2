//! The loop that the workers of a stream or a merge run: take a chunk, work on it, give it back.
//!
//! Owns progress, the account of buffers and which failure is reported; the [`Work`] says what a chunk
//! is and which comes next.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::account::Account;
use super::options::Progress;
use crate::checkpoint::{Operand, Shard};
use crate::error::{Error, Result};
use crate::workers::{self, Waker};

/// How often the calling thread wakes up while it waits.
const TICK: Duration = Duration::from_millis(50);

/// A function called about 20 times a second and once at the end; a break stops the workers.
pub type Tick<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Work that is done chunk by chunk, by several threads.
pub(crate) trait Work: Sync {
    /// What a worker takes at a time.
    type Chunk;
    /// Buffers that a worker keeps from chunk to chunk.
    type Scratch;

    fn scratch(&self) -> Self::Scratch;

    /// Bytes that are allocated in the buffers.
    fn held_nbytes(scratch: &Self::Scratch) -> usize;

    /// Wait for the next chunk; none when all are taken or the run was stopped.
    fn take(&self) -> Option<Self::Chunk>;

    /// The chunk's place in the order in which failures are reported.
    fn place(chunk: &Self::Chunk) -> usize;

    /// Work on a chunk, give back what was found, and return how many bytes were read.
    fn work(&self, chunk: &mut Self::Chunk, scratch: &mut Self::Scratch) -> Result<u64>;

    /// Whether the calling thread is to tick now that a chunk is done, and not only in its time.
    fn is_awaited(_chunk: &Self::Chunk) -> bool {
        false
    }

    /// Hand out no more chunks, and release the workers that wait.
    fn stop(&self);

    /// Tensors that are done.
    fn tensors(&self) -> usize;
}

/// Run `work` on `workers` threads until all of it is done.
///
/// # Errors
/// The error of the earliest chunk that failed, so that which one is reported depends little on
/// timing; where none did, an interruption by `tick`.
pub(crate) fn run<W: Work>(
    work: &W,
    workers: usize,
    account: &Account,
    tick: Tick<'_>,
) -> Result<()> {
    let engine = Engine { work, account, nbytes: AtomicU64::new(0), failure: Mutex::new(None) };
    let progress =
        || Progress { tensors: work.tensors(), nbytes: engine.nbytes.load(Ordering::Relaxed) };
    let stopped = workers::run(workers, TICK, &|waker| engine.run(waker), &|| work.stop(), || {
        tick(progress())
    });
    match engine.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None if stopped => Err(Error::Interrupted),
        None => Ok(()),
    }
}

struct Engine<'a, W> {
    work: &'a W,
    account: &'a Account,
    nbytes: AtomicU64,
    failure: Mutex<Option<(usize, Error)>>,
}

impl<W: Work> Engine<'_, W> {
    fn run(&self, waker: &Waker) {
        let mut scratch = self.work.scratch();
        let mut held = W::held_nbytes(&scratch);
        self.account.add(held);
        while let Some(mut chunk) = self.work.take() {
            match self.work.work(&mut chunk, &mut scratch) {
                Ok(nbytes) => {
                    self.nbytes.fetch_add(nbytes, Ordering::Relaxed);
                    if W::is_awaited(&chunk) {
                        waker.wake();
                    }
                }
                Err(error) => self.fail(W::place(&chunk), error),
            }
            // They grow only if the budget was wrong, and the peak must show that.
            let now = W::held_nbytes(&scratch).max(held);
            self.account.add(now - held);
            held = now;
        }
        self.account.remove(held);
    }

    fn fail(&self, place: usize, error: Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.as_ref().is_none_or(|(earliest, _)| place < *earliest) {
            *failure = Some((place, error));
        }
        drop(failure);
        self.work.stop();
    }
}

/// Check that no file that was read has changed since it was opened.
///
/// # Errors
/// The first file that has.
pub(crate) fn check_unchanged<'a>(operands: impl Iterator<Item = Operand<'a>>) -> Result<()> {
    let mut seen: HashSet<*const Shard> = HashSet::new();
    for operand in operands {
        for shard in operand.shards() {
            if seen.insert(std::ptr::from_ref(shard)) {
                shard.check_unchanged()?;
            }
        }
    }
    Ok(())
}
