//! Directories of deltas and merged models while they are written, and what they will contain.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, TryLockError};

use drift_fast_core::Result;
use drift_fast_core::output::{
    OutputSpec, RankShare, Slot, Storage, Writer, layout, output_paths as find_paths, side_files,
};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::buffers::Readable;
use crate::checkpoint::Checkpoint;
use crate::convert::{parse_dtype, parse_storage};
use crate::detach::detached;
use crate::errors::to_py;

/// A writer for one call at a time, until it is committed or aborted.
pub(crate) struct Output(Mutex<Option<Writer>>);

impl Output {
    fn create(py: Python<'_>, create: impl FnOnce() -> Result<Writer> + Send) -> PyResult<Self> {
        detached(py, create).map(|writer| Self(Mutex::new(Some(writer))))
    }

    /// Call a function with the writer; no other call uses it meanwhile.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&Writer) -> PyResult<T>) -> PyResult<T> {
        work(self.hold()?.as_ref().ok_or_else(finished)?)
    }

    fn commit(&self, py: Python<'_>, description: &[u8]) -> PyResult<()> {
        let writer = self.hold()?.take().ok_or_else(finished)?;
        detached(py, || writer.commit(description))
    }

    fn abort(&self) -> PyResult<()> {
        drop(self.hold()?.take());
        Ok(())
    }

    /// Waiting could deadlock: the call that has the writer may be waiting for the interpreter.
    fn hold(&self) -> PyResult<MutexGuard<'_, Option<Writer>>> {
        match self.0.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(PyRuntimeError::new_err("this output is being written by another call"))
            }
        }
    }
}

fn finished() -> PyErr {
    PyRuntimeError::new_err("this output has already been committed or aborted")
}

/// Where and how an output is written; `description_nbytes` is for `drift.json` or `merge.json`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct OutputFields {
    target: PathBuf,
    overwrite: bool,
    max_shard_nbytes: u64,
    description_nbytes: u64,
}

impl OutputFields {
    fn spec<'a>(&'a self, slots: &'a [Slot]) -> OutputSpec<'a> {
        OutputSpec {
            target: &self.target,
            slots,
            max_shard_nbytes: self.max_shard_nbytes,
            description_nbytes: self.description_nbytes,
            overwrite: self.overwrite,
        }
    }
}

/// The files that one of several processes writes; all but the first join an existing directory.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ShareFields {
    shards: Vec<usize>,
    join: bool,
}

/// A delta directory while it is written; it gets its name at `commit`.
#[pyclass(frozen, module = "drift_fast._core")]
pub(crate) struct DeltaWriter {
    pub(crate) output: Output,
}

#[pymethods]
impl DeltaWriter {
    #[new]
    #[pyo3(signature = (output, tensors, dtype, *, share = None))]
    fn new(
        py: Python<'_>,
        output: OutputFields,
        tensors: Vec<(String, Vec<usize>)>,
        dtype: &str,
        share: Option<ShareFields>,
    ) -> PyResult<Self> {
        let storage = parse_storage(dtype)?;
        let slots = slots(storage, tensors);
        let spec = output.spec(&slots);
        let output = Output::create(py, || match &share {
            None => Writer::create(&spec, storage),
            Some(ShareFields { shards, join }) => {
                Writer::create_share(&spec, storage, RankShare { shards, join: *join })
            }
        })?;
        Ok(Self { output })
    }

    /// Write bytes of one tensor, from `offset` on. `slot` is its place in the list that this writer
    /// writes; as integers, its codes have twice that number and its scales the next one.
    #[pyo3(signature = (slot, buffer, *, offset = 0))]
    fn write(
        &self,
        py: Python<'_>,
        slot: usize,
        buffer: &Bound<'_, PyAny>,
        offset: usize,
    ) -> PyResult<()> {
        let buffer = Readable::new(buffer)?;
        self.output.with(|files| detached(py, || files.write_at(slot, offset, buffer.bytes())))
    }

    /// The checksums of what was written of each tensor of the files, as text: those of codes and
    /// of scales apart.
    fn checksums(&self) -> PyResult<Vec<String>> {
        self.output.with(|files| Ok(files.checksums()))
    }

    /// Flush this writer's files to disk.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.output.with(|files| detached(py, || files.flush()))
    }

    /// Flush, add `drift.json` with this text, and give the directory its name.
    fn commit(&self, py: Python<'_>, description: &[u8]) -> PyResult<()> {
        self.output.commit(py, description)
    }

    /// Remove what was written, unless it was committed.
    fn abort(&self) -> PyResult<()> {
        self.output.abort()
    }
}

/// A merged model's directory while it is written; it gets its name at `commit`.
#[pyclass(frozen, module = "drift_fast._core")]
pub(crate) struct ModelWriter {
    pub(crate) output: Output,
}

#[pymethods]
impl ModelWriter {
    /// Reserve space for tensors of the multimodal checkpoint, each in the given dtype or its own, and
    /// for files of the given sizes.
    #[new]
    fn new(
        py: Python<'_>,
        output: OutputFields,
        multimodal: &Checkpoint,
        tensors: Vec<(String, Option<String>)>,
        files: Vec<(String, u64)>,
    ) -> PyResult<Self> {
        let slots = tensors
            .into_iter()
            .map(|(name, dtype)| {
                let tensor = multimodal.inner.tensor(&name).map_err(to_py)?.1;
                let dtype = match dtype {
                    None => tensor.dtype,
                    Some(dtype) => parse_dtype(&dtype)?.to_header(),
                };
                Ok(Slot { name, shape: tensor.shape.clone(), dtype })
            })
            .collect::<PyResult<Vec<_>>>()?;
        let spec = output.spec(&slots);
        let output = Output::create(py, || Writer::create_model(&spec, &files))?;
        Ok(Self { output })
    }

    /// Write one of the announced files.
    fn add(&self, py: Python<'_>, name: &str, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
        let buffer = Readable::new(buffer)?;
        self.output.with(|files| detached(py, || files.add(name, buffer.bytes())))
    }

    /// Flush, add `merge.json` with this text, and give the directory its name.
    fn commit(&self, py: Python<'_>, description: &[u8]) -> PyResult<()> {
        self.output.commit(py, description)
    }

    /// Remove what was written, unless it was committed.
    fn abort(&self) -> PyResult<()> {
        self.output.abort()
    }
}

fn slots(storage: Storage, tensors: Vec<(String, Vec<usize>)>) -> Vec<Slot> {
    tensors.into_iter().flat_map(|(name, shape)| storage.slots(name, shape)).collect()
}

/// The files of a delta of these tensors: first tensor, end tensor, bytes.
#[pyfunction]
#[pyo3(signature = (tensors, dtype, *, max_shard_nbytes))]
pub(crate) fn shards(
    tensors: Vec<(String, Vec<usize>)>,
    dtype: &str,
    max_shard_nbytes: u64,
) -> PyResult<Vec<(usize, usize, u64)>> {
    let storage = parse_storage(dtype)?;
    let shards = layout::shards(&slots(storage, tensors), storage, max_shard_nbytes);
    let shards = shards.map_err(to_py)?;
    Ok(shards.into_iter().map(|s| (s.tensors.start, s.tensors.end, s.nbytes)).collect())
}

/// The absolute path of a delta, and the hidden directory that it is written to.
#[pyfunction]
pub(crate) fn output_paths(target: PathBuf) -> PyResult<(PathBuf, PathBuf)> {
    find_paths(&target).map_err(to_py)
}

/// Names of files that a merge copies, besides licenses.
#[pyfunction]
pub(crate) fn side_file_names() -> Vec<&'static str> {
    side_files::NAMES.to_vec()
}

/// Whether a merge copies a file with that name.
#[pyfunction]
pub(crate) fn is_side_file(name: &str) -> bool {
    side_files::is_side_file(name)
}
