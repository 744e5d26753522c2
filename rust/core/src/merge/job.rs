//! What is merged: each tensor of the output, what it is made from, and what was found about it.

use sha2::{Digest, Sha256};

use crate::align::pair::Source;
use crate::checkpoint::Operand;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::blend::RANDOM_NBITS;

/// How tensors are merged; m, r and b are the values of the multimodal model, the reasoning model
/// and the base.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// r.
    Take,
    /// (1 − w)·m + w·r.
    Linear,
    /// b + w·(r − b) + v·(m − b), which with v = 1 or without a base is m + w·(r − b or m).
    TaskArithmetic,
    /// Trim each task vector to its largest magnitudes, elect a sign, average the values that have it.
    Ties {
        /// The share that is kept.
        density: f64,
    },
    /// Drop elements of each task vector at random, rescale the rest, add them up.
    DareLinear {
        /// The share that is kept.
        density: f64,
        /// The seed of the random numbers.
        seed: u64,
    },
    /// Drop and rescale as [`Method::DareLinear`] does, then elect a sign as [`Method::Ties`] does.
    DareTies {
        /// The share that is kept.
        density: f64,
        /// The seed of the random numbers.
        seed: u64,
    },
    /// The point at w on the great circle from m to r.
    Slerp,
}

/// A tensor that is merged into the multimodal one.
pub struct Blend<'a> {
    /// The tensor of the reasoning model.
    pub reasoning: Source<'a>,
    /// Whether that tensor holds r − m, to which m is added in float64.
    pub is_delta: bool,
    /// The tensor of the base, if there is one.
    pub base: Option<Source<'a>>,
    /// The dtype of the result.
    pub dtype: Dtype,
    /// The weight of the reasoning model.
    pub weight: f64,
    /// The weight of the multimodal model's own task vector.
    pub multimodal_weight: f64,
}

/// A tensor of the output, in the order of the writer's slots.
pub struct Job<'a> {
    /// The tensor of that name in the multimodal checkpoint.
    pub multimodal: Operand<'a>,
    /// What is merged into it; if nothing is, its bytes are copied.
    pub blend: Option<Blend<'a>>,
}

/// What was found about a merged tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Found {
    /// Elements that every model stores.
    pub merged: u64,
    /// NaN and infinities in the reasoning model's.
    pub nonfinite_reasoning: u64,
    /// NaN and infinities in the multimodal model's.
    pub nonfinite_multimodal: u64,
    /// NaN and infinities in the base's.
    pub nonfinite_base: u64,
    /// Results that are infinite or NaN although all their inputs are finite.
    pub overflow: u64,
    /// Elements of the reasoning model's task vector that were kept.
    pub kept_reasoning: Option<u64>,
    /// Elements of the multimodal model's task vector that were kept.
    pub kept_multimodal: Option<u64>,
    /// The cosine between the two models' tensors.
    pub cosine: Option<f64>,
    /// Σ of the squared differences between the results, before they are rounded, and the multimodal
    /// model's values, over every eighth block.
    pub shift_sq: f64,
    /// Σ of the squares of what rounding to the result's dtype adds, over the same blocks.
    pub rounding_sq: f64,
}

/// The key of a model's random numbers in a tensor: the first eight bytes of the SHA-256 of the seed,
/// the model and the name.
pub(super) fn key(seed: u64, model: &str, name: &str) -> u64 {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(model.as_bytes());
    hash.update([0]);
    hash.update(name.as_bytes());
    let digest = hash.finalize();
    digest.iter().take(8).rev().fold(0, |key, &byte| key << 8 | u64::from(byte))
}

/// An element is kept if its random number is below this.
pub(super) fn limit(density: f64) -> u64 {
    (density * (1u64 << RANDOM_NBITS) as f64).ceil() as u64
}

impl Method {
    /// Whether a tensor is read in earlier passes than the one that writes it.
    pub(super) fn reads_before_writing(self) -> bool {
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
    pub(super) fn sources(&self) -> impl Iterator<Item = &Source<'a>> {
        std::iter::once(&self.reasoning).chain(&self.base)
    }

    pub(super) fn has_blocks(&self) -> bool {
        self.sources().any(|source| matches!(source, Source::Blocks(_)))
    }
}

impl<'a> Job<'a> {
    pub(super) fn operands(&self) -> impl Iterator<Item = Operand<'a>> + '_ {
        let blended = self.blend.iter().flat_map(Blend::sources).flat_map(Source::operands);
        std::iter::once(self.multimodal).chain(blended)
    }

    pub(super) fn check(&self, method: Method) -> Result<()> {
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

impl Found {
    pub(super) fn add(&mut self, other: &Found) {
        let sum = |own: Option<u64>, other: Option<u64>| match (own, other) {
            (None, None) => None,
            (own, other) => Some(own.unwrap_or(0) + other.unwrap_or(0)),
        };
        self.merged += other.merged;
        self.nonfinite_reasoning += other.nonfinite_reasoning;
        self.nonfinite_multimodal += other.nonfinite_multimodal;
        self.nonfinite_base += other.nonfinite_base;
        self.overflow += other.overflow;
        self.kept_reasoning = sum(self.kept_reasoning, other.kept_reasoning);
        self.kept_multimodal = sum(self.kept_multimodal, other.kept_multimodal);
        self.shift_sq += other.shift_sq;
        self.rounding_sq += other.rounding_sq;
    }
}
