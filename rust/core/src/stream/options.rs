//! How much of the machine a run uses, and how far it has come.

/// Bytes of both models that the disk is asked for ahead of the workers. They go to the page cache,
/// which [`Options::memory`] does not bound.
const PREFETCH_NBYTES: u64 = 32 << 20;

/// How much of the machine a run uses; no option changes a bit of the result.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The most workers.
    pub threads: usize,
    /// The most bytes of all buffers and windows of mapped files; it bounds the workers.
    pub memory: usize,
    /// Bytes that the disk is asked for ahead of the workers.
    pub prefetch_nbytes: u64,
}

impl Options {
    /// Up to `threads` workers, with as much memory as they need.
    pub fn new(threads: usize) -> Self {
        Self { threads, memory: usize::MAX, prefetch_nbytes: PREFETCH_NBYTES }
    }
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Tensors that are done.
    pub tensors: usize,
    /// Bytes read from both models.
    pub nbytes: u64,
}
