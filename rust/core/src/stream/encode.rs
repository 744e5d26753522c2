//! A chunk of differences, between the kernel and the files of a delta.
//!
//! Owns its bytes; [`crate::output::format`] says which tensors they belong to.

use crate::error::Result;
use crate::kernel::{Elements, INT8_BLOCK, Moments, subtract, subtract_int8};
use crate::output::{Storage, Writer};

/// A chunk's bytes, in buffers that are kept from chunk to chunk.
#[derive(Default)]
pub(crate) struct Encoded {
    main: Vec<u8>,
    scales: Vec<u8>,
}

impl Encoded {
    /// Buffers for `numel` elements at a time.
    pub(crate) fn with_room(storage: Storage, numel: usize) -> Self {
        let (main, scales) = Self::sizes(storage, numel);
        Self { main: Vec::with_capacity(main), scales: Vec::with_capacity(scales) }
    }

    /// Bytes that `numel` elements take.
    pub(crate) fn nbytes_of(storage: Storage, numel: usize) -> usize {
        let (main, scales) = Self::sizes(storage, numel);
        main + scales
    }

    /// Bytes that are allocated.
    pub(crate) fn held_nbytes(&self) -> usize {
        self.main.capacity() + self.scales.capacity()
    }

    /// Subtract a chunk into the bytes that [`Encoded::write`] takes.
    pub(crate) fn subtract(
        &mut self,
        storage: Storage,
        reasoning: Elements<'_>,
        multimodal: Elements<'_>,
    ) -> Moments {
        self.clear(storage, reasoning.numel());
        match storage {
            Storage::Plain(dtype) => subtract(reasoning, multimodal, Some((dtype, &mut self.main))),
            Storage::Int8 => subtract_int8(reasoning, multimodal, &mut self.main, &mut self.scales),
        }
    }

    /// Zeros for `numel` elements, in any storage.
    pub(crate) fn clear(&mut self, storage: Storage, numel: usize) {
        let (main, scales) = Self::sizes(storage, numel);
        self.main.clear();
        self.main.resize(main, 0);
        self.scales.clear();
        self.scales.resize(scales, 0);
    }

    /// Write the chunk that begins at element `start` of difference number `index`.
    pub(crate) fn write(&self, writer: &Writer, index: usize, start: usize) -> Result<()> {
        let storage = writer.storage();
        let slot = storage.slot(index);
        match storage {
            Storage::Plain(dtype) => writer.write_at(slot, start * dtype.nbytes(), &self.main),
            Storage::Int8 => {
                writer.write_at(slot, start, &self.main)?;
                writer.write_at(slot + 1, start / INT8_BLOCK * 2, &self.scales)
            }
        }
    }

    fn sizes(storage: Storage, numel: usize) -> (usize, usize) {
        match storage {
            Storage::Plain(dtype) => (numel * dtype.nbytes(), 0),
            Storage::Int8 => (numel, 2 * numel.div_ceil(INT8_BLOCK)),
        }
    }
}
