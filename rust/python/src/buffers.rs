//! Python buffers that Rust reads and fills: the only unsafe code of this crate.

use drift_fast_core::stream::Memory;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// A Python buffer that remains exported, and so alive and in place, while Rust fills it.
pub(crate) struct Writable {
    buffer: PyBuffer<u8>,
}

impl Writable {
    pub(crate) fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyBuffer::<u8>::get(object)?;
        if buffer.readonly() || !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err("the buffer must be writable and contiguous"));
        }
        Ok(Self { buffer })
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        if self.buffer.len_bytes() == 0 {
            return &mut [];
        }
        // SAFETY: the export keeps the memory alive, in place and of this length; it is writable,
        // contiguous and of unsigned bytes, for which every bit pattern is valid. The callers
        // guarantee that no Python thread touches it meanwhile and that no two buffers of a call
        // overlap: drift_fast.delta passes tensors that nobody else has seen, drift_fast.inject the
        // gradients of distinct parameters between backward and the optimizer's step. What Δ is
        // loaded into are whole tensors of their own that no other code has yet, or a ring that is
        // made for one load; of the ring, the core fills only cells whose copies are over, as the
        // callback says, and copies from the others only read.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(
                self.buffer.buf_ptr().cast::<u8>(),
                self.buffer.len_bytes(),
            )
        }
    }
}

/// Memory that runs of elements are loaded into: a buffer for each, or one as a ring for all; and
/// whether it is a ring.
pub(crate) type LoadInto<'py> = (Vec<Bound<'py, PyAny>>, bool);

/// The same, with buffers that remain exported.
pub(crate) enum Exported {
    Each(Vec<Writable>),
    Ring(Writable),
}

impl Exported {
    pub(crate) fn new((buffers, is_ring): &LoadInto<'_>) -> PyResult<Self> {
        let mut buffers: Vec<_> = buffers.iter().map(Writable::new).collect::<PyResult<_>>()?;
        match (is_ring, buffers.len()) {
            (false, _) => Ok(Self::Each(buffers)),
            (true, 1) => Ok(Self::Ring(buffers.remove(0))),
            (true, count) => {
                Err(PyValueError::new_err(format!("a ring is one buffer, not {count}")))
            }
        }
    }

    pub(crate) fn memory(&mut self) -> Memory<'_> {
        match self {
            Self::Each(each) => Memory::Each(each.iter_mut().map(Writable::bytes).collect()),
            Self::Ring(ring) => Memory::Ring(ring.bytes()),
        }
    }
}

/// A Python buffer that remains exported, and so alive and in place, while Rust reads it.
pub(crate) struct Readable {
    buffer: PyBuffer<u8>,
}

impl Readable {
    pub(crate) fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyBuffer::<u8>::get(object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err("the buffer must be contiguous"));
        }
        Ok(Self { buffer })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        if self.buffer.len_bytes() == 0 {
            return &[];
        }
        // SAFETY: the export keeps the memory alive, in place and of this length; it is contiguous
        // and of unsigned bytes. The callers guarantee that nobody writes to it meanwhile:
        // drift_fast.inject measures between backward and the optimizer's step, when no thread
        // touches a gradient, and drift_fast.delta writes tensors that nobody else has seen.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.buffer.buf_ptr().cast::<u8>(), self.buffer.len_bytes())
        }
    }
}
