//! How much memory a JSON text will take, asked before it is parsed.

use drift_fast_core::json::memory;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Return the most bytes that a JSON text and the objects made of it take.
///
/// Raises ValueError for nesting that is too deep and, with `unique`, a key that occurs twice in one
/// object.
#[pyfunction]
#[pyo3(signature = (text, *, unique = false))]
pub(crate) fn json_memory(py: Python<'_>, text: &[u8], unique: bool) -> PyResult<u64> {
    py.detach(|| memory(text, unique)).map_err(PyValueError::new_err)
}
