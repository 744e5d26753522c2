//! Tensors in host memory: sums over them, and subtracting a multiple of Δ in place.

use drift_fast_core::in_memory::{Step, dots as dots_core, measure as measure_core, subtract_all};
use drift_fast_core::kernel::Elements;
use drift_fast_core::{Dtype, Result};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{Readable, Writable};
use crate::convert::{Tensor, parse_dtype};
use crate::detach::detached;

/// Sums over pairs of tensors in memory: (‖first‖², ‖second‖², first · second).
///
/// Each tensor is a contiguous buffer of bytes and its dtype. If either contains NaN or infinity, all
/// three numbers are NaN.
#[pyfunction]
#[pyo3(signature = (first, second, *, threads))]
pub(crate) fn measure(
    py: Python<'_>,
    first: Vec<Tensor<'_>>,
    second: Vec<Tensor<'_>>,
    threads: usize,
) -> PyResult<Vec<(f64, f64, f64)>> {
    let found = of_pairs(py, &first, &second, |pairs| measure_core(pairs, threads))?;
    // So that no caller takes a partial sum for a complete one.
    let complete =
        |sums: [f64; 3]| if sums.iter().any(|sum| sum.is_nan()) { [f64::NAN; 3] } else { sums };
    Ok(found.into_iter().map(|sums| complete(sums).into()).collect())
}

/// first · second of pairs of tensors in memory, in float64; NaN where it is not finite, as where either
/// side is not.
#[pyfunction]
#[pyo3(signature = (first, second, *, threads))]
pub(crate) fn dots(
    py: Python<'_>,
    first: Vec<Tensor<'_>>,
    second: Vec<Tensor<'_>>,
    threads: usize,
) -> PyResult<Vec<f64>> {
    let found = of_pairs(py, &first, &second, |pairs| dots_core(pairs, threads))?;
    Ok(found.into_iter().map(|dot| if dot.is_finite() { dot } else { f64::NAN }).collect())
}

fn of_pairs<T: Send>(
    py: Python<'_>,
    first: &[Tensor<'_>],
    second: &[Tensor<'_>],
    find: impl Fn(&[(Elements<'_>, Elements<'_>)]) -> Result<Vec<T>> + Sync,
) -> PyResult<Vec<T>> {
    if first.len() != second.len() {
        return Err(PyValueError::new_err("both sides need the same number of tensors"));
    }
    let (first, second) = (readable(first)?, readable(second)?);
    detached(py, || {
        let pairs = first
            .iter()
            .zip(&second)
            .map(|(first, second)| Ok((elements(first)?, elements(second)?)))
            .collect::<Result<Vec<_>>>()?;
        find(&pairs)
    })
}

/// Subtract c·Δ from every tensor in place: tensors and deltas as (bytes, dtype), one c each.
#[pyfunction]
#[pyo3(signature = (tensors, deltas, coefficients, *, threads))]
pub(crate) fn subtract_scaled(
    py: Python<'_>,
    tensors: Vec<Tensor<'_>>,
    deltas: Vec<Tensor<'_>>,
    coefficients: Vec<f64>,
    threads: usize,
) -> PyResult<()> {
    if tensors.len() != deltas.len() || tensors.len() != coefficients.len() {
        return Err(PyValueError::new_err("each tensor needs one delta and one coefficient"));
    }
    let mut tensors = tensors
        .iter()
        .map(|(object, dtype)| Ok((Writable::new(object)?, parse_dtype(dtype)?)))
        .collect::<PyResult<Vec<_>>>()?;
    let deltas = readable(&deltas)?;
    detached(py, || {
        let steps = tensors
            .iter_mut()
            .zip(&deltas)
            .zip(&coefficients)
            .map(|(((tensor, dtype), delta), &c)| {
                Ok(Step { dtype: *dtype, tensor: tensor.bytes(), delta: elements(delta)?, c })
            })
            .collect::<Result<Vec<_>>>()?;
        subtract_all(steps, threads)
    })
}

fn readable(tensors: &[Tensor<'_>]) -> PyResult<Vec<(Readable, Dtype)>> {
    tensors
        .iter()
        .map(|(object, dtype)| Ok((Readable::new(object)?, parse_dtype(dtype)?)))
        .collect()
}

fn elements((buffer, dtype): &(Readable, Dtype)) -> Result<Elements<'_>> {
    Elements::new(*dtype, buffer.bytes())
}
