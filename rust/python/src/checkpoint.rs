//! An open checkpoint: what it contains, and reading its tensors.

use std::ffi::OsString;
use std::path::PathBuf;

use drift_fast_core::checkpoint::{self, Operand, block_scales};
use drift_fast_core::{Error, Reader, Result, dtype};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::Writable;
use crate::detach::detached;
use crate::errors::to_py;

/// Name, dtype and shape of a tensor.
pub(crate) type TensorEntry<'a> = (&'a str, String, &'a [usize]);

pub(crate) fn entries(checkpoint: &checkpoint::Checkpoint) -> Vec<TensorEntry<'_>> {
    checkpoint
        .tensors()
        .map(|(_, tensor)| (&*tensor.name, tensor.dtype.to_string(), &*tensor.shape))
        .collect()
}

/// An open checkpoint.
#[pyclass(frozen, module = "drift_fast._core")]
pub(crate) struct Checkpoint {
    pub(crate) inner: checkpoint::Checkpoint,
    /// Rows and columns of 8-bit codes that share a scale.
    block: (usize, usize),
}

impl Checkpoint {
    /// A tensor with the block scales that belong to it.
    pub(crate) fn operand(&self, name: &str) -> PyResult<Operand<'_>> {
        self.inner.operand(name, self.block).map_err(to_py)
    }
}

#[pymethods]
impl Checkpoint {
    #[new]
    #[pyo3(signature = (path, *, reader = "auto", block = None))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        reader: &str,
        block: Option<(usize, usize)>,
    ) -> PyResult<Self> {
        let reader = parse_reader(reader)?;
        let inner = detached(py, || checkpoint::Checkpoint::open(&path, reader))?;
        Ok(Self { inner, block: block.unwrap_or((128, 128)) })
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path().to_owned()
    }

    /// What other loaders may read differently, as sentences.
    fn notes(&self) -> Vec<String> {
        self.inner.notes().to_vec()
    }

    /// Tensors that the index places in a file which does not hold them, with its name.
    fn absent(&self) -> Vec<(String, String)> {
        self.inner.absent().to_vec()
    }

    /// Name, dtype and shape of each tensor.
    fn tensors(&self) -> Vec<TensorEntry<'_>> {
        entries(&self.inner)
    }

    /// The files of the checkpoint, in the order of their tensors.
    fn files(&self) -> Vec<PathBuf> {
        self.inner.shards().iter().map(|shard| shard.path().to_owned()).collect()
    }

    /// Each tensor of 8-bit codes, the name of the tensor for its block scales, and what is wrong with
    /// that one, if it is missing or its dtype or shape does not fit.
    fn scales(&self) -> Vec<(String, String, String)> {
        self.inner
            .tensors()
            .filter(|(_, tensor)| dtype::Fp8::from_header(tensor.dtype).is_some())
            .map(|(_, tensor)| {
                let fits = self.inner.operand(&tensor.name, self.block);
                let problem = fits.err().map_or(String::new(), |error| error.to_string());
                (tensor.name.clone(), block_scales::name_of(&tensor.name), problem)
            })
            .collect()
    }

    /// The file that a tensor is in, and where its bytes begin and end there.
    fn place(&self, name: &str) -> PyResult<(OsString, u64, u64)> {
        let (shard, tensor) = self.inner.tensor(name).map_err(to_py)?;
        Ok((shard.path().as_os_str().to_owned(), tensor.range.start, tensor.range.end))
    }

    /// Name, bytes and digest of each shard.
    fn fingerprint(&self, py: Python<'_>) -> PyResult<Vec<(String, u64, String)>> {
        detached(py, || {
            self.inner
                .shards()
                .iter()
                .map(|shard| {
                    let name = shard.path().file_name().unwrap_or_default();
                    let name = name.to_string_lossy().into_owned();
                    Ok((name, shard.nbytes(), shard.fingerprint()?))
                })
                .collect::<Result<_>>()
        })
    }

    /// Fill a buffer with all of a tensor, or with elements [start, stop) of it.
    #[pyo3(signature = (name, buffer, *, elements = None))]
    fn read_into(
        &self,
        py: Python<'_>,
        name: &str,
        buffer: &Bound<'_, PyAny>,
        elements: Option<(usize, usize)>,
    ) -> PyResult<()> {
        let mut buffer = Writable::new(buffer)?;
        detached(py, || {
            let (shard, tensor) = self.inner.tensor(name)?;
            let bytes = buffer.bytes();
            let range = match elements {
                None => tensor.range.clone(),
                Some((start, stop)) => tensor.elements(start, stop)?.range,
            };
            let expected = (range.end - range.start) as usize;
            if bytes.len() != expected {
                return Err(Error::Argument(format!(
                    "the buffer for {name} has {} bytes, expected {expected}",
                    bytes.len()
                )));
            }
            shard.read_exact_at(bytes, range.start)
        })
    }
}

fn parse_reader(name: &str) -> PyResult<Reader> {
    match name {
        "auto" => Ok(Reader::Auto),
        "mmap" => Ok(Reader::Mmap),
        "pread" => Ok(Reader::Pread),
        other => Err(PyValueError::new_err(format!(
            "reader must be 'auto', 'mmap' or 'pread', got {other:?}"
        ))),
    }
}
