//! Subtracting two checkpoints, tensor by tensor: into a delta's files, into memory, or nowhere.

use drift_fast_core::Moments;
use drift_fast_core::align::pair::{Pair, Source};
use drift_fast_core::checkpoint::Operand;
use drift_fast_core::stream::{Sink, run};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::Writable;
use crate::checkpoint::Checkpoint;
use crate::convert::{Limits, SourceNames, Tensor, dictionary, parse_dtype, resolve};
use crate::detach::{Callback, interruptible};
use crate::errors::to_py;
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

/// Fill a writable tensor with one difference or with its elements [start, stop), and return their
/// moments. A tensor made of blocks can only be subtracted as a whole.
#[pyfunction]
#[pyo3(signature = (reasoning, multimodal, pair, out, limits, *, elements = None))]
pub(crate) fn subtract_into(
    py: Python<'_>,
    reasoning: &Checkpoint,
    multimodal: &Checkpoint,
    pair: (SourceNames, String),
    out: Tensor<'_>,
    limits: Limits,
    elements: Option<(usize, usize)>,
) -> PyResult<MomentsRow> {
    let (mut buffer, dtype) = (Writable::new(&out.0)?, parse_dtype(&out.1)?);
    let mut pairs = resolve(reasoning, multimodal, &[pair])?;
    let tensors;
    if let Some((start, stop)) = elements {
        let (reasoning, multimodal) = whole_tensors(&pairs[0])?;
        let slice = |operand: &Operand<'_>| operand.tensor.elements(start, stop).map_err(to_py);
        tensors = (slice(&reasoning)?, slice(&multimodal)?);
        pairs[0] = Pair {
            reasoning: Source::Whole(Operand {
                tensor: &tensors.0,
                scales: reasoning.scales.map(|scales| scales.from_element(start)),
                ..reasoning
            }),
            multimodal: Operand {
                tensor: &tensors.1,
                scales: multimodal.scales.map(|scales| scales.from_element(start)),
                ..multimodal
            },
        };
    }
    let sink = Sink::Memory(dtype, buffer.bytes());
    let options = limits.into();
    let outcome = interruptible(py, None, |tick| run(&pairs, sink, &options, tick))?;
    Ok(MomentsRow::from(&outcome.moments[0]))
}

/// Both tensors of a pair whose elements can be subtracted by range.
fn whole_tensors<'a>(pair: &Pair<'a>) -> PyResult<(Operand<'a>, Operand<'a>)> {
    let Source::Whole(reasoning) = pair.reasoning else {
        return Err(PyValueError::new_err(
            "a tensor made of blocks can only be subtracted as a whole",
        ));
    };
    if reasoning.tensor.shape != pair.multimodal.tensor.shape {
        return Err(PyValueError::new_err(
            "elements of tensors with different shapes cannot be subtracted by range",
        ));
    }
    Ok((reasoning, pair.multimodal))
}
