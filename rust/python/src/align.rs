//! Matching names and shapes of two models, and comparing the matched weights.

use drift_fast_core::align::similarity::correlate_samples as correlate;
use drift_fast_core::align::{Alignment, Named, Ties, align as align_core};
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::convert::{SourceNames, resolve};
use crate::detach::detached;

type NamesAndShapes = Vec<(String, Vec<usize>)>;

/// The reasoning and the multimodal name of each pair, and a reason for each name without a match.
#[pyclass(frozen, get_all, module = "drift_fast._core")]
pub(crate) struct Aligned {
    prefixes: (String, String),
    pairs: Vec<(String, String)>,
    unmatched_reasoning: Vec<(String, String)>,
    unmatched_multimodal: Vec<(String, String)>,
    layer_conflict: String,
    alternatives: Vec<(String, String, usize)>,
}

impl Aligned {
    fn new(alignment: Alignment, reasoning: &[Named], multimodal: &[Named]) -> Self {
        let reasons = |list: Vec<(usize, String)>, model: &[Named]| {
            list.into_iter().map(|(at, reason)| (model[at].name.clone(), reason)).collect()
        };
        let names = |(source, name): (usize, usize)| {
            (reasoning[source].name.clone(), multimodal[name].name.clone())
        };
        Self {
            prefixes: alignment.prefixes,
            pairs: alignment.pairs.into_iter().map(names).collect(),
            unmatched_reasoning: reasons(alignment.unmatched_reasoning, reasoning),
            unmatched_multimodal: reasons(alignment.unmatched_multimodal, multimodal),
            layer_conflict: alignment.layer_conflict,
            alternatives: alignment.alternatives,
        }
    }
}

fn named(tensors: NamesAndShapes) -> Vec<Named> {
    tensors.into_iter().map(|(name, shape)| Named { name, shape }).collect()
}

/// Match two lists of (name, shape).
#[pyfunction]
#[pyo3(signature = (reasoning, multimodal, *, prefer_equal_names = false))]
pub(crate) fn align(
    py: Python<'_>,
    reasoning: NamesAndShapes,
    multimodal: NamesAndShapes,
    prefer_equal_names: bool,
) -> PyResult<Aligned> {
    let (reasoning, multimodal) = (named(reasoning), named(multimodal));
    let ties = if prefer_equal_names { Ties::PreferEqualNames } else { Ties::Refuse };
    let alignment = detached(py, || align_core(&reasoning, &multimodal, ties))?;
    Ok(Aligned::new(alignment, &reasoning, &multimodal))
}

/// Correlate samples of each pair's reasoning tensor with those of every multimodal one.
///
/// The pairs are of one module, one for each layer. Returns the correlations row by row, and the
/// number of elements that each was computed from.
#[pyfunction]
pub(crate) fn correlate_samples(
    py: Python<'_>,
    reasoning: &Checkpoint,
    multimodal: &Checkpoint,
    pairs: Vec<(SourceNames, String)>,
) -> PyResult<(Vec<f64>, usize)> {
    let pairs = resolve(reasoning, multimodal, &pairs)?;
    detached(py, || correlate(&pairs))
}
