//! Which tensors on disk store one Δ.
//!
//! Owns their names, dtypes and order. docs/format.md describes them for readers who have nothing but
//! safetensors.

use crate::dtype::Dtype;
use crate::kernel::INT8_BLOCK;

/// The suffix that turns a tensor's name into that of its scales.
pub(crate) const SCALE: &str = ".scale";
/// A tensor to write.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// The dtype of its elements.
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
    /// As a value of this dtype.
    Plain(Dtype),
    /// As 8-bit integers, with a binary16 scale for every [`INT8_BLOCK`] of them.
    Int8,
}

impl Storage {
    /// The tensors that store a Δ with this name and shape.
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

    /// The first of the slots that store difference number `index`.
    pub(crate) fn slot(self, index: usize) -> usize {
        if self == Storage::Int8 { 2 * index } else { index }
    }

    /// A chunk must begin at a multiple of this many elements.
    pub(crate) fn granularity(self) -> usize {
        if self == Storage::Int8 { INT8_BLOCK } else { 1 }
    }
}
