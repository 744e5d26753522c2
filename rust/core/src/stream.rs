//! Run the kernel over many pairs of tensors: chunks, threads, read-ahead and page release.
//!
//! Owns the order of work, not the arithmetic. Chunks have a fixed number of elements and their
//! moments are added in element order, so neither the thread count nor timing changes a bit.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::{self, Elements, Moments};
use crate::shard::{Shard, Tensor, subtractable};
use crate::writer::Writer;

/// Elements of one chunk: half a mebibyte of bfloat16 from either side, which stays in a core's cache.
pub const CHUNK: usize = 1 << 18;

/// How often the calling thread looks up from waiting.
const TICK: Duration = Duration::from_millis(50);

/// One side of a pair.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// The file.
    pub shard: &'a Shard,
    /// The tensor in it.
    pub tensor: &'a Tensor,
}

/// Two tensors of equal shape, the minuend first.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// W_reason.
    pub reasoning: Side<'a>,
    /// W_multimodal.
    pub multimodal: Side<'a>,
}

/// Where the differences go.
pub enum Sink<'a> {
    /// Nowhere: statistics only.
    None,
    /// The files of a delta; its slots are the pairs in order.
    Files(&'a Writer),
    /// One pair's difference into memory of exactly its size.
    Memory(Dtype, &'a mut [u8]),
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Tensors done.
    pub tensors: usize,
    /// Bytes read from both sides.
    pub nbytes: u64,
}

struct Chunk {
    pair: usize,
    start: usize,
    end: usize,
}

/// Stream every pair through the kernel on `threads` threads and return the moments of each.
///
/// `tick` is called on the calling thread about twenty times a second and once at the end; when it
/// breaks, the workers stop within a chunk and [`Error::Interrupted`] is returned.
///
/// # Errors
/// Shapes that differ, a dtype that cannot be subtracted, a failed read or write, a source that
/// changed meanwhile, or an interruption.
pub fn run(
    pairs: &[Pair<'_>],
    sink: Sink<'_>,
    threads: usize,
    tick: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Vec<Moments>> {
    for pair in pairs {
        check(pair)?;
    }
    let chunks: Vec<Chunk> = pairs
        .iter()
        .enumerate()
        .flat_map(|(pair, sides)| {
            let numel = sides.multimodal.tensor.numel();
            (0..numel).step_by(CHUNK).map(move |start| Chunk {
                pair,
                start,
                end: numel.min(start + CHUNK),
            })
        })
        .collect();
    let output = Output::new(sink, pairs)?;
    let work = Work {
        pairs,
        chunks: &chunks,
        output: &output,
        results: chunks.iter().map(|_| OnceLock::new()).collect(),
        remaining: remaining_per_pair(pairs.len(), &chunks),
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        nbytes: AtomicU64::new(0),
        tensors: AtomicUsize::new(
            pairs.iter().filter(|p| p.multimodal.tensor.numel() == 0).count(),
        ),
        failure: Mutex::new(None),
    };
    let threads = threads.clamp(1, chunks.len().max(1));
    let interrupted = thread::scope(|scope| {
        let (done, finished) = mpsc::channel::<()>();
        for _ in 0..threads {
            let done = done.clone();
            let work = &work;
            scope.spawn(move || {
                work.run();
                drop(done);
            });
        }
        drop(done);
        // The channel closes when the last worker has gone, even if one panicked.
        loop {
            let ended = matches!(finished.recv_timeout(TICK), Err(RecvTimeoutError::Disconnected));
            if tick(work.progress()).is_break() {
                work.stop.store(true, Ordering::Relaxed);
                return true;
            }
            if ended {
                return false;
            }
        }
    });
    if interrupted {
        return Err(Error::Interrupted);
    }
    let failure = work.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, error)) = failure {
        return Err(error);
    }
    check_unchanged(pairs)?;
    let mut moments = vec![Moments::default(); pairs.len()];
    for (chunk, result) in chunks.iter().zip(&work.results) {
        let Some(result) = result.get() else { return Err(Error::Interrupted) };
        moments[chunk.pair].add(result);
    }
    Ok(moments)
}

fn check(pair: &Pair<'_>) -> Result<()> {
    let (a, b) = (pair.reasoning, pair.multimodal);
    subtractable(a.shard, a.tensor)?;
    subtractable(b.shard, b.tensor)?;
    if a.tensor.shape != b.tensor.shape {
        return Err(Error::Alignment(format!(
            "shapes differ: {} {:?} in {} and {} {:?} in {}",
            a.tensor.name,
            a.tensor.shape,
            a.shard.path().display(),
            b.tensor.name,
            b.tensor.shape,
            b.shard.path().display(),
        )));
    }
    Ok(())
}

fn check_unchanged(pairs: &[Pair<'_>]) -> Result<()> {
    let mut seen: Vec<*const Shard> = Vec::new();
    for shard in pairs.iter().flat_map(|pair| [pair.reasoning.shard, pair.multimodal.shard]) {
        if !seen.contains(&std::ptr::from_ref(shard)) {
            seen.push(std::ptr::from_ref(shard));
            shard.check_unchanged()?;
        }
    }
    Ok(())
}

fn remaining_per_pair(pairs: usize, chunks: &[Chunk]) -> Vec<AtomicUsize> {
    let mut counts = vec![0; pairs];
    for chunk in chunks {
        counts[chunk.pair] += 1;
    }
    counts.into_iter().map(AtomicUsize::new).collect()
}

/// The sink, cut so that each chunk has its own part.
enum Output<'a> {
    None,
    Files(&'a Writer),
    Memory(Dtype, Vec<Mutex<&'a mut [u8]>>),
}

impl<'a> Output<'a> {
    fn new(sink: Sink<'a>, pairs: &[Pair<'_>]) -> Result<Self> {
        match sink {
            Sink::None => Ok(Output::None),
            Sink::Files(writer) => Ok(Output::Files(writer)),
            Sink::Memory(dtype, buffer) => {
                let numel: usize = pairs.iter().map(|pair| pair.multimodal.tensor.numel()).sum();
                if pairs.len() != 1 || buffer.len() != numel * dtype.nbytes() {
                    return Err(Error::Argument(format!(
                        "the buffer has {} bytes, expected {} for {numel} elements of {}",
                        buffer.len(),
                        numel * dtype.nbytes(),
                        dtype.name()
                    )));
                }
                let parts = buffer.chunks_mut(CHUNK * dtype.nbytes()).map(Mutex::new).collect();
                Ok(Output::Memory(dtype, parts))
            }
        }
    }
}

struct Work<'a> {
    pairs: &'a [Pair<'a>],
    chunks: &'a [Chunk],
    output: &'a Output<'a>,
    results: Vec<OnceLock<Moments>>,
    remaining: Vec<AtomicUsize>,
    next: AtomicUsize,
    stop: AtomicBool,
    nbytes: AtomicU64,
    tensors: AtomicUsize,
    /// The failure of the earliest chunk, so that which of several is reported depends little on timing.
    failure: Mutex<Option<(usize, Error)>>,
}

/// Buffers that a worker keeps from chunk to chunk.
#[derive(Default)]
struct Scratch {
    reasoning: Vec<u8>,
    multimodal: Vec<u8>,
    out: Vec<u8>,
}

impl Work<'_> {
    fn run(&self) {
        let mut scratch = Scratch::default();
        while !self.stop.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = self.chunks.get(index) else { return };
            match self.chunk(index, chunk, &mut scratch) {
                Ok(moments) => {
                    // Each index is handed out once, so the cell is empty.
                    let _ = self.results[index].set(moments);
                    if self.remaining[chunk.pair].fetch_sub(1, Ordering::Relaxed) == 1 {
                        self.tensors.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(error) => {
                    let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                    if failure.as_ref().is_none_or(|(earliest, _)| index < *earliest) {
                        *failure = Some((index, error));
                    }
                    self.stop.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    fn chunk(&self, index: usize, chunk: &Chunk, scratch: &mut Scratch) -> Result<Moments> {
        let pair = &self.pairs[chunk.pair];
        let (a, a_range) = part(pair.reasoning, chunk)?;
        let (b, b_range) = part(pair.multimodal, chunk)?;
        let reasoning = Elements {
            dtype: a,
            bytes: pair.reasoning.shard.bytes(a_range.clone(), &mut scratch.reasoning)?,
        };
        let multimodal = Elements {
            dtype: b,
            bytes: pair.multimodal.shard.bytes(b_range.clone(), &mut scratch.multimodal)?,
        };
        let numel = chunk.end - chunk.start;
        let moments = match self.output {
            Output::None => kernel::subtract(reasoning, multimodal, None),
            Output::Files(writer) => {
                let dtype = writer.dtype();
                scratch.out.resize(numel * dtype.nbytes(), 0);
                let moments =
                    kernel::subtract(reasoning, multimodal, Some((dtype, &mut scratch.out)));
                writer.write_at(chunk.pair, chunk.start * dtype.nbytes(), &scratch.out)?;
                moments
            }
            Output::Memory(dtype, parts) => {
                // One pair, so the chunk's index is its place in the buffer; nobody else locks it.
                let mut out = parts[index].lock().unwrap_or_else(PoisonError::into_inner);
                kernel::subtract(reasoning, multimodal, Some((*dtype, &mut out)))
            }
        };
        self.nbytes.fetch_add(
            (a_range.end - a_range.start) + (b_range.end - b_range.start),
            Ordering::Relaxed,
        );
        pair.reasoning.shard.release(a_range);
        pair.multimodal.shard.release(b_range);
        Ok(moments)
    }

    fn progress(&self) -> Progress {
        Progress {
            tensors: self.tensors.load(Ordering::Relaxed),
            nbytes: self.nbytes.load(Ordering::Relaxed),
        }
    }
}

/// The bytes of a chunk in its file.
fn part(side: Side<'_>, chunk: &Chunk) -> Result<(Dtype, std::ops::Range<u64>)> {
    let dtype = subtractable(side.shard, side.tensor)?;
    let (start, nbytes) = (side.tensor.range.start, dtype.nbytes());
    Ok((dtype, start + (chunk.start * nbytes) as u64..start + (chunk.end * nbytes) as u64))
}
