//! Which tensors on disk hold one Δ.
//!
//! Owns their names, dtypes and order. docs/format.md describes the same for a reader who has
//! safetensors and nothing else.

use crate::dtype::Dtype;
use crate::kernel::INT8_BLOCK;

/// What is appended to a tensor's name to name its scales.
pub(crate) const SCALE: &str = ".scale";
/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// The type of its elements.
    pub dtype: safetensors::Dtype,
}

impl Slot {
    pub(crate) fn nbytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// How each difference is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As a value of that type.
    Plain(Dtype),
    /// As integers of eight bits and a binary16 scale for every [`INT8_BLOCK`] of them.
    Int8,
}

impl Storage {
    /// The tensors that hold one Δ of this name and shape.
    pub fn slots(self, name: String, shape: Vec<usize>) -> Vec<Slot> {
        let dtype = match self {
            Storage::Plain(dtype) => dtype.to_header(),
            Storage::Int8 => safetensors::Dtype::I8,
        };
        let numel: usize = shape.iter().product();
        let scales = (self == Storage::Int8).then(|| Slot {
            name: format!("{name}{SCALE}"),
            shape: vec![numel.div_ceil(INT8_BLOCK)],
            dtype: safetensors::Dtype::F16,
        });
        std::iter::once(Slot { name, shape, dtype }).chain(scales).collect()
    }

    /// The first of the slots that hold difference number `index`.
    pub(crate) fn slot(self, index: usize) -> usize {
        if self == Storage::Int8 { 2 * index } else { index }
    }

    /// Elements that a chunk must begin at a multiple of.
    pub(crate) fn granularity(self) -> usize {
        if self == Storage::Int8 { INT8_BLOCK } else { 1 }
    }
}
