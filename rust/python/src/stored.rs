//! An open delta: what is in it, and reading it with its bytes compared with their checksums.

use std::collections::HashMap;
use std::path::PathBuf;

use drift_fast_core::stream::stored;
use pyo3::prelude::*;

use crate::buffers::Writable;
use crate::checkpoint::{TensorEntry, entries};
use crate::detach::detached;
use crate::errors::to_py;

/// An open delta.
#[pyclass(frozen, module = "drift_fast._core")]
pub(crate) struct StoredDelta {
    inner: stored::StoredDelta,
}

#[pymethods]
impl StoredDelta {
    /// Open a delta by its index, with the checksums of each tensor, as `DeltaWriter.checksums` gave
    /// them; without any, what is read is not compared.
    #[new]
    fn new(
        py: Python<'_>,
        index: PathBuf,
        checksums: Option<HashMap<String, String>>,
    ) -> PyResult<Self> {
        let inner = detached(py, || stored::StoredDelta::open(&index, checksums.as_ref()))?;
        Ok(Self { inner })
    }

    /// Name, dtype and shape of each tensor.
    fn tensors(&self) -> Vec<TensorEntry<'_>> {
        entries(self.inner.checkpoint())
    }

    /// Fill a buffer with all of a tensor, or with elements [start, stop) of it, as they are stored;
    /// compared with its checksums, or as part of a copy for which `compare` is called.
    #[pyo3(signature = (name, buffer, *, elements = None, compared = true))]
    fn read_into(
        &self,
        py: Python<'_>,
        name: &str,
        buffer: &Bound<'_, PyAny>,
        elements: Option<(usize, usize)>,
        compared: bool,
    ) -> PyResult<()> {
        let mut buffer = Writable::new(buffer)?;
        let elements = elements.map(|(start, stop)| start..stop);
        detached(py, || self.inner.read(name, elements, buffer.bytes(), compared))
    }

    /// Compare the checksums of a copy of a tensor, as `DeltaWriter.checksums` gives them, with
    /// those that it has here.
    fn compare(&self, name: &str, checksums: &str) -> PyResult<()> {
        self.inner.compare(name, checksums).map_err(to_py)
    }

    /// Fill a buffer with elements [start, stop) of an int8 Δ as bfloat16.
    #[pyo3(signature = (name, buffer, *, elements))]
    fn decode_into(
        &self,
        py: Python<'_>,
        name: &str,
        buffer: &Bound<'_, PyAny>,
        elements: (usize, usize),
    ) -> PyResult<()> {
        let mut buffer = Writable::new(buffer)?;
        let (start, stop) = elements;
        detached(py, || self.inner.decode(name, start..stop, buffer.bytes()))
    }
}
