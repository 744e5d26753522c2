//! How a run uses the machine, and how far it has come.

/// How far ahead of the workers the disk is kept busy, both sides together. It fills the page cache,
/// which is not part of the memory that [`Options::memory`] bounds.
const PREFETCH_NBYTES: u64 = 32 << 20;

/// How a run uses the machine; no option changes a bit of the result.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Workers at most.
    pub threads: usize,
    /// Bytes of all buffers, and of windows of mapped files, at most; it bounds the workers.
    pub memory: usize,
    /// Bytes that the disk is asked for ahead of the workers.
    pub prefetch_nbytes: u64,
}

impl Options {
    /// Up to `threads` workers, in as much memory as they take.
    pub fn new(threads: usize) -> Self {
        Self { threads, memory: usize::MAX, prefetch_nbytes: PREFETCH_NBYTES }
    }
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Tensors done.
    pub tensors: usize,
    /// Bytes read from both sides.
    pub nbytes: u64,
}
