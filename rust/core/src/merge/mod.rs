//! Merge two checkpoints, or two that come from a base, tensor by tensor into a third.
//!
//! Owns what is done with a tensor and in how many passes; the formulas are
//! [`crate::kernel::blend`]'s. Every element is computed in float64 and rounded once. A tensor that
//! needs more than one pass (a norm, the k-th largest magnitude) is done with its neighbours, so that
//! later passes find it in the page cache. Nothing here depends on how many threads there are, on the
//! memory or on the reader: counts are whole numbers, and sums are added in element order.

mod known;
mod passes;
mod present;
mod scratch;
mod step;
mod trim;
mod turns;
mod work;

use sha2::{Digest, Sha256};

use crate::align::pair::Source;
use crate::checkpoint::Operand;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::blend::RANDOM_NBITS;
use crate::output::Writer;
use crate::stream::{Account, Options, Tick, check_unchanged, run_workers};
use passes::Batches;
use turns::Turns;
use work::Merging;

/// A cosine beyond this is taken for parallel, where a great circle is a straight line or undefined.
pub const PARALLEL: f64 = 0.9995;

/// What is done with the tensors that are merged; m, r and b are the multimodal model's, the
/// reasoning model's and the base's values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// r.
    Take,
    /// (1 − w)·m + w·r.
    Linear,
    /// b + w·(r − b) + v·(m − b), which with v = 1 or without a base is m + w·(r − b or m).
    TaskArithmetic,
    /// Trim each task vector to its largest magnitudes, elect a sign, take the mean of what has it.
    Ties {
        /// The share that is kept.
        density: f64,
    },
    /// Drop elements of each task vector at random, rescale the rest, add them up.
    DareLinear {
        /// The share that is kept.
        density: f64,
        /// Of the random numbers.
        seed: u64,
    },
    /// Drop and rescale likewise, then elect a sign as [`Method::Ties`] does.
    DareTies {
        /// The share that is kept.
        density: f64,
        /// Of the random numbers.
        seed: u64,
    },
    /// From m to r along the great circle through both, at w.
    Slerp,
}

/// A tensor that is merged into the multimodal one.
pub struct Blend<'a> {
    /// The reasoning model's.
    pub reasoning: Source<'a>,
    /// The base's, where there is one.
    pub base: Option<Source<'a>>,
    /// Of the result.
    pub dtype: Dtype,
    /// Of the reasoning model.
    pub weight: f64,
    /// Of the multimodal model's own task vector.
    pub multimodal_weight: f64,
}

/// A tensor of the output, in the order of the writer's slots.
pub struct Job<'a> {
    /// The tensor of that name in the multimodal checkpoint.
    pub multimodal: Operand<'a>,
    /// What is merged into it; without, its bytes are copied.
    pub blend: Option<Blend<'a>>,
}

/// What was found of a merged tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Found {
    /// Elements with a counterpart.
    pub merged: u64,
    /// NaN and infinities among those of the reasoning model.
    pub nonfinite_reasoning: u64,
    /// NaN and infinities among those of the multimodal model.
    pub nonfinite_multimodal: u64,
    /// NaN and infinities among those of the base.
    pub nonfinite_base: u64,
    /// Results that are infinite or NaN although what they are made of is finite.
    pub overflow: u64,
    /// Elements of the reasoning model's task vector that were kept.
    pub kept_reasoning: Option<u64>,
    /// Elements of the multimodal model's task vector that were kept.
    pub kept_multimodal: Option<u64>,
    /// The cosine between both tensors.
    pub cosine: Option<f64>,
}

/// What a run found.
#[derive(Debug)]
pub struct Outcome {
    /// Of each job; nothing of those that were copied.
    pub found: Vec<Option<Found>>,
    /// The most bytes that buffers took at a time; windows of mapped files are not among them.
    pub peak_nbytes: usize,
}

/// The key of a model's random numbers in a tensor: SHA-256 of the seed, the model and the name, of
/// which the first eight bytes are taken.
pub(crate) fn key(seed: u64, model: &str, name: &str) -> u64 {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(model.as_bytes());
    hash.update([0]);
    hash.update(name.as_bytes());
    let digest = hash.finalize();
    digest.iter().take(8).rev().fold(0, |key, &byte| key << 8 | u64::from(byte))
}

/// Random numbers below this are kept.
pub(crate) fn limit(density: f64) -> u64 {
    (density * (1u64 << RANDOM_NBITS) as f64).ceil() as u64
}

impl Method {
    /// Whether other passes read a tensor before the one that writes it.
    fn reads_before_writing(self) -> bool {
        matches!(self, Method::Ties { .. } | Method::Slerp)
    }

    fn check(self) -> Result<()> {
        match self {
            Method::Ties { density }
            | Method::DareLinear { density, .. }
            | Method::DareTies { density, .. }
                if !(density > 0.0 && density <= 1.0) =>
            {
                Err(Error::Argument(format!(
                    "density must be above 0 and at most 1, got {density}"
                )))
            }
            _ => Ok(()),
        }
    }
}

impl<'a> Blend<'a> {
    /// What is merged into the multimodal model's tensor.
    fn sources(&self) -> impl Iterator<Item = &Source<'a>> {
        std::iter::once(&self.reasoning).chain(&self.base)
    }

    fn has_blocks(&self) -> bool {
        self.sources().any(|source| matches!(source, Source::Blocks(_)))
    }
}

impl<'a> Job<'a> {
    fn operands(&self) -> impl Iterator<Item = Operand<'a>> + '_ {
        let blended = self.blend.iter().flat_map(Blend::sources).flat_map(Source::operands);
        std::iter::once(self.multimodal).chain(blended)
    }

    fn check(&self, method: Method) -> Result<()> {
        let Some(blend) = &self.blend else { return Ok(()) };
        self.multimodal.check()?;
        for source in blend.sources() {
            source.check(&self.multimodal)?;
        }
        let weights = [blend.weight, blend.multimodal_weight];
        if weights.iter().any(|weight| !weight.is_finite()) {
            let name = &self.multimodal.tensor.name;
            return Err(Error::Argument(format!("{name}: weights {weights:?} are not finite")));
        }
        method.check()
    }
}

/// Merge every job into its slot of the writer.
///
/// `tick` is called on the calling thread; when it breaks, the workers stop within a chunk and
/// [`Error::Interrupted`] is returned.
///
/// # Errors
/// Shapes that differ, a dtype without values, arguments without meaning, memory that one worker does
/// not fit in, a failed read or write, a source that changed meanwhile, or an interruption.
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
