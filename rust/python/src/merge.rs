//! Merging tensors of two or three checkpoints into a model's files.

use drift_fast_core::checkpoint::Operand;
use drift_fast_core::merge::{Blend, Found, Job, Method, run};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::convert::{Limits, SourceNames, dictionary, parse_dtype};
use crate::detach::{Callback, interruptible};
use crate::errors::to_py;
use crate::writers::ModelWriter;

/// What is merged into a tensor: its sources in the reasoning checkpoint and in the base, the dtype
/// of the result, both weights, and whether the reasoning checkpoint holds a difference.
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
    #[pyo3(item(5))]
    is_delta: bool,
}

impl BlendNames {
    fn resolve<'a>(&self, models: &'a Models, shape: &[usize]) -> PyResult<Blend<'a>> {
        let base = match (&models.base, &self.base) {
            (Some(base), Some(source)) => Some(source.resolve(base.get(), shape)?),
            (None, None) => None,
            _ => {
                return Err(PyValueError::new_err(
                    "give both a base and a tensor of it, or neither",
                ));
            }
        };
        Ok(Blend {
            reasoning: self.reasoning.resolve(models.reasoning.get(), shape)?,
            is_delta: self.is_delta,
            base,
            dtype: parse_dtype(&self.dtype)?,
            weight: self.weight,
            multimodal_weight: self.multimodal_weight,
        })
    }
}

/// The checkpoints that are merged; the base is None if the method needs none.
#[derive(FromPyObject)]
pub(crate) struct Models {
    #[pyo3(item(0))]
    reasoning: Py<Checkpoint>,
    #[pyo3(item(1))]
    multimodal: Py<Checkpoint>,
    #[pyo3(item(2))]
    base: Option<Py<Checkpoint>>,
}

/// A method by its name, with density and seed for those that drop elements.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct MethodFields {
    name: String,
    density: Option<f64>,
    seed: u64,
}

impl MethodFields {
    fn parse(&self) -> PyResult<Method> {
        let Self { name, density, seed } = self;
        let seed = *seed;
        let needed =
            || density.ok_or_else(|| PyValueError::new_err(format!("{name} needs a density")));
        Ok(match name.as_str() {
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
}

dictionary! {
    /// What was found about one tensor while it was merged.
    FoundRow from Found {
        merged: u64,
        nonfinite_reasoning: u64,
        nonfinite_multimodal: u64,
        nonfinite_base: u64,
        overflow: u64,
        kept_reasoning: Option<u64>,
        kept_multimodal: Option<u64>,
        cosine: Option<f64>,
        shift_sq: f64,
        rounding_sq: f64,
    }
}

/// Merge tensors into a writer's slots, in their order, and copy those for which nothing is given.
/// Returns what was found about each merged one, and the most bytes that buffers took at any time.
#[pyfunction]
#[pyo3(signature = (models, tensors, writer, method, limits, *, progress = None))]
pub(crate) fn merge(
    py: Python<'_>,
    models: Models,
    tensors: Vec<(String, Option<BlendNames>)>,
    writer: &ModelWriter,
    method: MethodFields,
    limits: Limits,
    progress: Option<Callback>,
) -> PyResult<(Vec<Option<FoundRow>>, usize)> {
    let method = method.parse()?;
    let multimodal = models.multimodal.get();
    let jobs = tensors
        .iter()
        .map(|(name, blend)| {
            let Some(blend) = blend else {
                let (shard, tensor) = multimodal.inner.tensor(name).map_err(to_py)?;
                let multimodal = Operand { shard, tensor, scales: None };
                return Ok(Job { multimodal, blend: None });
            };
            let multimodal = multimodal.operand(name)?;
            let blend = blend.resolve(&models, &multimodal.tensor.shape)?;
            Ok(Job { multimodal, blend: Some(blend) })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let options = limits.into();
    let outcome = writer.output.with(|files| {
        interruptible(py, progress, |tick| run(&jobs, method, files, &options, tick))
    })?;
    let rows = outcome.found.iter().map(|found| found.as_ref().map(FoundRow::from)).collect();
    Ok((rows, outcome.peak_nbytes))
}
