//! How many bytes of buffers are allocated, and the most that were at any time.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The buffers of one run.
#[derive(Debug, Default)]
pub(crate) struct Account {
    held: AtomicUsize,
    peak: AtomicUsize,
}

impl Account {
    pub(crate) fn add(&self, nbytes: usize) {
        let held = self.held.fetch_add(nbytes, Ordering::Relaxed) + nbytes;
        self.peak.fetch_max(held, Ordering::Relaxed);
    }

    pub(crate) fn remove(&self, nbytes: usize) {
        self.held.fetch_sub(nbytes, Ordering::Relaxed);
    }

    pub(crate) fn peak_nbytes(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }
}
