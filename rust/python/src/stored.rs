//! An open delta: what is in it, and reading it with its bytes compared with their checksums.

use std::collections::HashMap;
use std::path::PathBuf;

use drift_fast_core::stream::stored::{self, Wanted};
use pyo3::prelude::*;

use crate::buffers::{Exported, LoadInto, Writable};
use crate::checkpoint::{TensorEntry, entries};
use crate::detach::{Callback, detached, landing};
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

    /// Load runs into memory and return their squares: (name, first element, end element, whether
    /// codes of int8 are wanted as they are instead of their values). `landed` is called with what
    /// came into memory as (run, first element, end element, offset in the ring), and answers how many
    /// of its calls concern memory that is free again.
    #[pyo3(signature = (runs, into, *, threads, landed = None))]
    fn load(
        &self,
        py: Python<'_>,
        runs: Vec<(String, usize, usize, bool)>,
        into: LoadInto<'_>,
        threads: usize,
        landed: Option<Callback>,
    ) -> PyResult<Vec<f64>> {
        let wanted =
            |(name, start, stop, as_stored)| Wanted { name, elements: start..stop, as_stored };
        let wanted: Vec<Wanted> = runs.into_iter().map(wanted).collect();
        let mut into = Exported::new(&into)?;
        let found =
            landing(py, landed, |landed| self.inner.load(&wanted, into.memory(), threads, landed))?;
        Ok(found.iter().map(|one| one.square).collect())
    }

    /// Fill a buffer with elements [start, stop) of a tensor as they are stored, as part of a copy for
    /// which `compare` is called.
    fn copy_into(
        &self,
        py: Python<'_>,
        name: &str,
        buffer: &Bound<'_, PyAny>,
        elements: (usize, usize),
    ) -> PyResult<()> {
        let mut buffer = Writable::new(buffer)?;
        let (start, stop) = elements;
        detached(py, || self.inner.copy(name, start..stop, buffer.bytes()))
    }

    /// Compare the checksums of a copy of a tensor, as `DeltaWriter.checksums` gives them, with
    /// those that it has here.
    fn compare(&self, name: &str, checksums: &str) -> PyResult<()> {
        self.inner.compare(name, checksums).map_err(to_py)
    }
}
