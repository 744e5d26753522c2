//! Moments of tensors already in memory: gradients against Δ, weights against Δ.
//!
//! The kernel is that of the stream, so a CPU gradient's norm is as accurate as the delta's own;
//! torch's float32 norm on a CPU drifts by parts in ten thousand on large tensors.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::error::{Error, Result};
use crate::kernel::{Elements, Moments, subtract};
use crate::stream::CHUNK;

/// Below this many elements a second thread costs more than it saves.
const WORTH_A_THREAD: usize = 1 << 16;

/// The moments of each pair, on up to `threads` threads; they do not depend on how many.
///
/// # Errors
/// A pair whose sides differ in their number of elements.
pub fn measure(pairs: &[(Elements<'_>, Elements<'_>)], threads: usize) -> Result<Vec<Moments>> {
    let mut chunks = Vec::new();
    for (pair, (left, right)) in pairs.iter().enumerate() {
        if left.numel() != right.numel() {
            return Err(Error::Argument(format!(
                "pair {pair} has {} elements on one side and {} on the other",
                left.numel(),
                right.numel()
            )));
        }
        let numel = left.numel();
        chunks
            .extend((0..numel).step_by(CHUNK).map(|start| (pair, start, numel.min(start + CHUNK))));
    }
    let results: Vec<OnceLock<Moments>> = chunks.iter().map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(pair, start, end)) = chunks.get(index) else { return };
            let (left, right) = &pairs[pair];
            let moments = subtract(left.slice(start, end), right.slice(start, end), None);
            // Each index is handed out once, so the cell is empty.
            let _ = results[index].set(moments);
        }
    };
    let numel: usize = chunks.iter().map(|(_, start, end)| end - start).sum();
    let threads = threads.min(numel / WORTH_A_THREAD).min(chunks.len());
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let mut moments = vec![Moments::default(); pairs.len()];
    for ((pair, _, _), result) in chunks.iter().zip(results) {
        moments[*pair].add(&result.into_inner().unwrap_or_default());
    }
    Ok(moments)
}
