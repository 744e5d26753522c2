//! Values that Python passes as text, tuples or lists, and the core's types for them.

use drift_fast_core::Dtype;
use drift_fast_core::align::compose::{Block, Blocks};
use drift_fast_core::align::pair::{Pair, Source};
use drift_fast_core::checkpoint::Operand;
use drift_fast_core::output::Storage;
use drift_fast_core::stream::Options;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::errors::to_py;

pub(crate) fn parse_dtype(name: &str) -> PyResult<Dtype> {
    match name {
        "bfloat16" => Ok(Dtype::BF16),
        "float16" => Ok(Dtype::F16),
        "float32" => Ok(Dtype::F32),
        "float64" => Ok(Dtype::F64),
        other => Err(PyValueError::new_err(format!(
            "dtype must be 'bfloat16', 'float16', 'float32' or 'float64', got {other:?}"
        ))),
    }
}

pub(crate) fn parse_storage(name: &str) -> PyResult<Storage> {
    match name {
        "int8" => Ok(Storage::Int8),
        plain => parse_dtype(plain).map(Storage::Plain),
    }
}

/// How much a call may use: worker threads, bytes of buffers and mapped windows, and bytes that a
/// disk is asked for ahead of time.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Limits {
    threads: usize,
    #[pyo3(default)]
    memory: Option<usize>,
    #[pyo3(default)]
    prefetch: Option<u64>,
}

impl From<Limits> for Options {
    fn from(limits: Limits) -> Self {
        let unlimited = Self::new(limits.threads);
        Self {
            memory: limits.memory.unwrap_or(unlimited.memory),
            prefetch_nbytes: limits.prefetch.unwrap_or(unlimited.prefetch_nbytes),
            ..unlimited
        }
    }
}

/// A buffer with the bytes of a tensor, and its dtype.
pub(crate) type Tensor<'py> = (Bound<'py, PyAny>, String);

/// What a multimodal tensor pairs with: the name of a tensor, or rectangles of several.
#[derive(FromPyObject)]
pub(crate) enum SourceNames {
    Whole(String),
    Rectangles(Vec<Rectangle>),
}

/// `drift_fast.alignment.layout.Rectangle`, a named tuple.
#[derive(FromPyObject)]
pub(crate) struct Rectangle {
    #[pyo3(item(0))]
    source: String,
    #[pyo3(item(1))]
    first_row: usize,
    #[pyo3(item(2))]
    end_row: usize,
    #[pyo3(item(3))]
    first_column: usize,
    #[pyo3(item(4))]
    end_column: usize,
    #[pyo3(item(5))]
    offset: usize,
    #[pyo3(item(6))]
    row_stride: usize,
    #[pyo3(item(7))]
    column_stride: usize,
}

impl Rectangle {
    fn block<'a>(&self, checkpoint: &'a Checkpoint) -> PyResult<Block<Operand<'a>>> {
        Ok(Block {
            source: checkpoint.operand(&self.source)?,
            rows: self.first_row..self.end_row,
            columns: self.first_column..self.end_column,
            offset: self.offset,
            row_stride: self.row_stride,
            column_stride: self.column_stride,
        })
    }
}

impl SourceNames {
    /// The tensors of a checkpoint that pair with a tensor of that shape.
    pub(crate) fn resolve<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        shape: &[usize],
    ) -> PyResult<Source<'a>> {
        match self {
            Self::Whole(name) => Ok(Source::Whole(checkpoint.operand(name)?)),
            Self::Rectangles(rectangles) => {
                let blocks = rectangles.iter().map(|one| one.block(checkpoint));
                let blocks = Blocks::new(shape, blocks.collect::<PyResult<_>>()?);
                Ok(Source::Blocks(blocks.map_err(to_py)?))
            }
        }
    }
}

/// Find the tensors of (source, multimodal name) in their checkpoints.
pub(crate) fn resolve<'a>(
    reasoning: &'a Checkpoint,
    multimodal: &'a Checkpoint,
    pairs: &[(SourceNames, String)],
) -> PyResult<Vec<Pair<'a>>> {
    pairs
        .iter()
        .map(|(source, name)| {
            let multimodal = multimodal.operand(name)?;
            let reasoning = source.resolve(reasoning, &multimodal.tensor.shape)?;
            Ok(Pair { reasoning, multimodal })
        })
        .collect()
}

/// A struct that becomes a Python dictionary, made from a struct of the core with the same fields.
macro_rules! dictionary {
    ($(#[$doc:meta])* $name:ident from $core:ty { $($field:ident: $type:ty),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(IntoPyObject)]
        pub(crate) struct $name {
            $($field: $type),+
        }

        impl From<&$core> for $name {
            fn from(core: &$core) -> Self {
                Self { $($field: core.$field),+ }
            }
        }
    };
}

pub(crate) use dictionary;
