//! Merging tensors of two or three checkpoints into a model's files.

use drift_fast_core::checkpoint::Operand;
use drift_fast_core::merge::{Blend, Found, Job, Method, run};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::convert::{SourceNames, dictionary, options, parse_dtype};
use crate::detach::{Callback, interruptible};
use crate::errors::to_py;
use crate::writers::ModelWriter;

/// What is merged into a tensor: the sources in the reasoning checkpoint and in the base, the dtype
/// of the result, and both weights.
#[derive(FromPyObject)]
pub(crate) struct BlendNames {
    #[pyo3(item(0))]
    reasoning: SourceNames,
    #[pyo3(item(1))]
    base: Option<SourceNames>,
    #[pyo3(item(2))]
    dtype: String,
    #[pyo3(item(3))]
    weight: f64,
    #[pyo3(item(4))]
    multimodal_weight: f64,
}

impl BlendNames {
    fn resolve<'a>(
        &self,
        reasoning: &'a Checkpoint,
        base: Option<&'a Checkpoint>,
        shape: &[usize],
    ) -> PyResult<Blend<'a>> {
        let base = match (base, &self.base) {
            (Some(base), Some(source)) => Some(source.resolve(base, shape)?),
            (None, None) => None,
            _ => return Err(PyValueError::new_err("a base and a tensor of it go together")),
        };
        Ok(Blend {
            reasoning: self.reasoning.resolve(reasoning, shape)?,
            base,
            dtype: parse_dtype(&self.dtype)?,
            weight: self.weight,
            multimodal_weight: self.multimodal_weight,
        })
    }
}

dictionary! {
    /// What was found of one tensor while it was merged.
    FoundRow from Found {
        merged: u64,
        nonfinite_reasoning: u64,
        nonfinite_multimodal: u64,
        nonfinite_base: u64,
        overflow: u64,
        kept_reasoning: Option<u64>,
        kept_multimodal: Option<u64>,
        cosine: Option<f64>,
    }
}

/// Merge tensors into a writer's slots, in their order, or copy those that nothing is given for;
/// return what was found of each merged one, and the most bytes that buffers took at a time.
#[pyfunction]
#[pyo3(signature = (
    reasoning, multimodal, base, tensors, writer, *, method, density = None, seed = 0, threads,
    memory = None, progress = None
))]
#[expect(clippy::too_many_arguments, reason = "they are the keywords of a Python function")]
pub(crate) fn merge(
    py: Python<'_>,
    reasoning: &Checkpoint,
    multimodal: &Checkpoint,
    base: Option<&Checkpoint>,
    tensors: Vec<(String, Option<BlendNames>)>,
    writer: &ModelWriter,
    method: &str,
    density: Option<f64>,
    seed: u64,
    threads: usize,
    memory: Option<usize>,
    progress: Option<Callback>,
) -> PyResult<(Vec<Option<FoundRow>>, usize)> {
    let method = parse_method(method, density, seed)?;
    let jobs = tensors
        .iter()
        .map(|(name, blend)| {
            let Some(blend) = blend else {
                let (shard, tensor) = multimodal.inner.tensor(name).map_err(to_py)?;
                let multimodal = Operand { shard, tensor, scales: None };
                return Ok(Job { multimodal, blend: None });
            };
            let multimodal = multimodal.operand(name)?;
            let blend = blend.resolve(reasoning, base, &multimodal.tensor.shape)?;
            Ok(Job { multimodal, blend: Some(blend) })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let options = options(threads, memory);
    let outcome = writer.output.with(|files| {
        interruptible(py, progress, |tick| run(&jobs, method, files, &options, tick))
    })?;
    let rows = outcome.found.iter().map(|found| found.as_ref().map(FoundRow::from)).collect();
    Ok((rows, outcome.peak_nbytes))
}

fn parse_method(name: &str, density: Option<f64>, seed: u64) -> PyResult<Method> {
    let needed = || density.ok_or_else(|| PyValueError::new_err(format!("{name} needs a density")));
    Ok(match name {
        "layer_swap" => Method::Take,
        "linear" => Method::Linear,
        "task_arithmetic" => Method::TaskArithmetic,
        "slerp" => Method::Slerp,
        "ties" => Method::Ties { density: needed()? },
        "dare_linear" => Method::DareLinear { density: needed()?, seed },
        "dare_ties" => Method::DareTies { density: needed()?, seed },
        other => return Err(PyValueError::new_err(format!("unknown method {other:?}"))),
    })
}
