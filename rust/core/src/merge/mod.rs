//! Merge two checkpoints, with or without their common base, tensor by tensor into a third.
//!
//! Owns what is done with a tensor and in how many passes; the formulas are in
//! [`crate::kernel::blend`]. Every element is computed in float64 and rounded once. A tensor that
//! needs more than one pass (for a norm or the k-th largest magnitude) is done together with its
//! neighbors, so later passes find it in the page cache. Neither threads nor memory nor reader change
//! a bit: counts are whole numbers, and sums are added in element order.

mod job;
mod known;
mod passes;
mod present;
mod scratch;
mod step;
mod trim;
mod turns;
mod work;

pub use job::{Blend, Found, Job, Method};

use crate::error::{Error, Result};
use crate::output::Writer;
use crate::stream::{Account, Options, Tick, check_unchanged, run_workers};
use passes::Batches;
use turns::Turns;
use work::Merging;

/// What a run found.
#[derive(Debug)]
pub struct Outcome {
    /// What was found about each job; nothing for those that were copied.
    pub found: Vec<Option<Found>>,
    /// The most bytes that buffers took at any time, without windows of mapped files.
    pub peak_nbytes: usize,
}

/// Merge every job into its slot of the writer.
///
/// `tick` is called on the calling thread; when it breaks, the workers stop within a chunk and
/// [`Error::Interrupted`] is returned.
///
/// # Errors
/// Shapes that differ, a dtype that has no values, invalid arguments, less memory than one worker
/// needs, a failed read or write, a source that changed meanwhile, or an interruption.
pub fn run(
    jobs: &[Job<'_>],
    method: Method,
    writer: &Writer,
    options: &Options,
    tick: Tick<'_>,
) -> Result<Outcome> {
    for job in jobs {
        job.check(method)?;
    }
    let batches = Batches::new(jobs, method, options)?;
    let account = Account::default();
    account.add(batches.state_nbytes);
    let work = Merging {
        jobs,
        method,
        writer,
        turns: Turns::new(jobs, method, batches.jobs),
        prefetch_nbytes: options.prefetch_nbytes,
    };
    run_workers(&work, batches.workers, &account, tick)?;
    check_unchanged(jobs.iter().flat_map(Job::operands))?;
    let found = work.turns.finish().ok_or(Error::Interrupted)?;
    Ok(Outcome { found, peak_nbytes: account.peak_nbytes() })
}
