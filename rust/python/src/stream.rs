//! Subtracting two checkpoints, tensor by tensor: into a delta's files, into memory, or nowhere.

use drift_fast_core::Moments;
use drift_fast_core::stream::{Detail, Difference, Sink, load_differences as core_load, run};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{Exported, LoadInto};
use crate::checkpoint::Checkpoint;
use crate::convert::{Limits, SourceNames, dictionary, parse_dtype, resolve};
use crate::detach::{Callback, interruptible, landing};
use crate::writers::DeltaWriter;

dictionary! {
    /// What was measured about one pair while it was subtracted.
    MomentsRow from Moments {
        delta_sq: f64,
        written_sq: f64,
        reasoning_sq: f64,
        multimodal_sq: f64,
        dot: f64,
        max_abs: f64,
        zeros: u64,
        agreeing: u64,
        stored_dot: f64,
        flushed: u64,
        nonfinite_reasoning: u64,
        nonfinite_multimodal: u64,
        overflow: u64,
        rounding_sq: f64,
    }
}

/// Stream pairs of tensors; return one dictionary of moments for each, and the most bytes that
/// buffers took at any time.
#[pyfunction]
#[pyo3(signature = (
    reasoning, multimodal, pairs, limits, *, writer = None, progress = None
))]
pub(crate) fn stream(
    py: Python<'_>,
    reasoning: &Checkpoint,
    multimodal: &Checkpoint,
    pairs: Vec<(SourceNames, String)>,
    limits: Limits,
    writer: Option<&DeltaWriter>,
    progress: Option<Callback>,
) -> PyResult<(Vec<MomentsRow>, usize)> {
    let pairs = resolve(reasoning, multimodal, &pairs)?;
    let options = limits.into();
    let into =
        |sink: Sink<'_>| interruptible(py, progress, |tick| run(&pairs, sink, &options, tick));
    let outcome = match writer {
        None => into(Sink::None),
        Some(writer) => writer.output.with(|files| into(Sink::Files(files))),
    }?;
    Ok((outcome.moments.iter().map(MomentsRow::from).collect(), outcome.peak_nbytes))
}

/// A pair, and elements [start, stop) of it if not all are wanted.
type Run = (SourceNames, String, Option<(usize, usize)>);

/// Load differences of pairs, or of runs of their elements, into memory in a dtype, and return their
/// squares there and their moments: those of faults alone, all, or with the part that is rounding.
/// `landed` is that of `StoredDelta.load`.
#[pyfunction]
#[pyo3(signature = (
    reasoning, multimodal, runs, dtype, into, limits, *, detail, landed = None
))]
// Python's keywords are what a struct of options would be.
#[allow(clippy::too_many_arguments)]
pub(crate) fn load_differences(
    py: Python<'_>,
    reasoning: &Checkpoint,
    multimodal: &Checkpoint,
    runs: Vec<Run>,
    dtype: &str,
    into: LoadInto<'_>,
    limits: Limits,
    detail: &str,
    landed: Option<Callback>,
) -> PyResult<Vec<(f64, MomentsRow)>> {
    let (dtype, detail, options) = (parse_dtype(dtype)?, parse_detail(detail)?, limits.into());
    let (pairs, elements): (Vec<_>, Vec<_>) =
        runs.into_iter().map(|(source, name, elements)| ((source, name), elements)).unzip();
    let pairs = resolve(reasoning, multimodal, &pairs)?.into_iter().zip(elements);
    let wanted: Vec<Difference<'_>> = pairs
        .map(|(pair, elements)| {
            let (start, stop) = elements.unwrap_or((0, pair.multimodal.tensor.numel()));
            Difference { pair, elements: start..stop }
        })
        .collect();
    let mut into = Exported::new(&into)?;
    let found = landing(py, landed, |landed| {
        core_load(&wanted, dtype, into.memory(), &options, detail, landed)
    })?;
    Ok(found.iter().map(|one| (one.square, MomentsRow::from(&one.moments))).collect())
}

fn parse_detail(name: &str) -> PyResult<Detail> {
    match name {
        "faults" => Ok(Detail::Faults),
        "moments" => Ok(Detail::Moments),
        "rounding" => Ok(Detail::Rounding),
        other => Err(PyValueError::new_err(format!(
            "detail must be 'faults', 'moments' or 'rounding', got {other:?}"
        ))),
    }
}
