//! Buffers that a worker of a merge keeps from chunk to chunk.

use super::job::Method;
use super::step::Widened;
use super::trim::{Counts, SAMPLE};
use crate::kernel::blend::{BLOCK, Environment};
use crate::stream::SideBuffer;

/// The buffers of one worker.
pub(super) struct Scratch {
    _environment: Environment,
    pub(super) multimodal: SideBuffer,
    pub(super) reasoning: SideBuffer,
    pub(super) base: SideBuffer,
    pub(super) out: Vec<u8>,
    pub(super) values: Box<Widened>,
    pub(super) counts: [Counts; 2],
    pub(super) sample: [Vec<u64>; 2],
}

impl Scratch {
    /// Make the buffers of the calling thread, and set its rounding mode.
    pub(super) fn new() -> Self {
        let zero = [0.0; BLOCK];
        Self {
            _environment: Environment::enter(),
            multimodal: SideBuffer::default(),
            reasoning: SideBuffer::default(),
            base: SideBuffer::default(),
            out: Vec::new(),
            values: Box::new(Widened { m: zero, r: zero, b: zero, tasks: [zero; 2], out: zero }),
            counts: [Counts::new(), Counts::new()],
            sample: [Vec::new(), Vec::new()],
        }
    }

    /// Bytes in addition to those of chunks.
    pub(super) fn fixed_nbytes(method: Method) -> usize {
        let sample =
            if matches!(method, Method::Ties { .. }) { 2 * SAMPLE * size_of::<u64>() } else { 0 };
        size_of::<Widened>() + 2 * Counts::NBYTES + sample
    }

    /// Bytes that are allocated.
    pub(super) fn held_nbytes(&self) -> usize {
        let sides = [&self.multimodal, &self.reasoning, &self.base];
        size_of::<Widened>()
            + 2 * Counts::NBYTES
            + sides.iter().map(|side| side.held_nbytes()).sum::<usize>()
            + self.out.capacity()
            + self.sample.iter().map(|keys| keys.capacity() * size_of::<u64>()).sum::<usize>()
    }
}
