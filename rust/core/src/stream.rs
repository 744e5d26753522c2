//! Run the kernel over many pairs of tensors: chunks, threads, read-ahead and page release.
//!
//! Owns the order of work, not the arithmetic. How a tensor is cut into chunks follows from its shape
//! alone and moments are added in element order, so neither the thread count nor timing changes a
//! bit.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use crate::compose::Composed;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::{self, Elements, Moments};
use crate::scales::{DEQUANTISED, Scales};
use crate::shard::{Shard, Tensor, subtractable};
use crate::storage::Encoded;
use crate::writer::Writer;

/// Elements of one chunk: half a mebibyte of bfloat16 from either side, which stays in a core's cache.
pub const CHUNK: usize = 1 << 18;

/// Elements of one chunk of a composed tensor: long enough that a transposed part is read in runs of
/// a kilobyte or more at the widths of real experts.
const COMPOSED_CHUNK: usize = 1 << 20;

/// How often the calling thread looks up from waiting.
const TICK: Duration = Duration::from_millis(50);

/// One side of a pair.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// The file.
    pub shard: &'a Shard,
    /// The tensor in it.
    pub tensor: &'a Tensor,
    /// What its elements are multiplied by, where they are 8-bit codes.
    pub scales: Option<Scales<'a>>,
}

impl<'a> Side<'a> {
    /// The files that its values come from.
    fn shards(&self) -> impl Iterator<Item = &'a Shard> + use<'a> {
        std::iter::once(self.shard).chain(self.scales.map(|scales| scales.shard()))
    }

    /// Bytes of one stored element.
    ///
    /// # Errors
    /// A dtype that cannot be subtracted.
    pub(crate) fn element_nbytes(&self) -> Result<usize> {
        match self.scales {
            Some(_) => Ok(1),
            None => Ok(subtractable(self.shard, self.tensor)?.nbytes()),
        }
    }

    /// The values of stored elements, of which the first is number `start`.
    pub(crate) fn values<'b>(
        &self,
        start: usize,
        stored: &'b [u8],
        scratch: &'b mut Dequantised,
    ) -> Result<Elements<'b>> {
        let Some(scales) = &self.scales else {
            let dtype = subtractable(self.shard, self.tensor)?;
            return Ok(Elements { dtype, bytes: stored });
        };
        scales.dequantise(stored, start, &mut scratch.scales, &mut scratch.values)?;
        Ok(Elements { dtype: DEQUANTISED, bytes: &scratch.values })
    }
}

/// Room for the values of codes, kept from chunk to chunk.
#[derive(Default)]
pub(crate) struct Dequantised {
    scales: Vec<u8>,
    values: Vec<u8>,
}

/// What a multimodal tensor is subtracted from.
pub enum Minuend<'a> {
    /// A tensor of its shape.
    Whole(Side<'a>),
    /// Parts of tensors that together have its shape.
    Composed(Composed<'a>),
}

impl<'a> Minuend<'a> {
    pub(crate) fn sides(&self) -> Box<dyn Iterator<Item = Side<'a>> + '_> {
        match self {
            Minuend::Whole(side) => Box::new(std::iter::once(*side)),
            Minuend::Composed(composed) => Box::new(composed.sources()),
        }
    }
}

/// The minuend and the tensor that is subtracted from it, whose name and shape the result has.
pub struct Pair<'a> {
    /// W_reason.
    pub reasoning: Minuend<'a>,
    /// W_multimodal.
    pub multimodal: Side<'a>,
}

/// Where the differences go.
pub enum Sink<'a> {
    /// Nowhere: statistics only.
    None,
    /// The files of a delta; its differences are the pairs in order, the first having this number.
    Files(&'a Writer, usize),
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
    origin: Origin,
}

/// Where a chunk's minuend lies.
#[derive(Clone, Copy)]
enum Origin {
    Whole,
    /// In this band of a composed tensor.
    Band(usize),
    /// Nowhere: rows without a counterpart.
    Nothing,
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
        check(pair, &sink)?;
    }
    let chunks: Vec<Chunk> =
        pairs.iter().enumerate().flat_map(|(index, pair)| cut(index, pair)).collect();
    let output = Output::new(sink, pairs, &chunks)?;
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
        let mut spawned = 0;
        for _ in 0..threads {
            let done = done.clone();
            let work = &work;
            let worker = move || {
                work.run();
                drop(done);
            };
            // Where the system allows no more threads, those that there are do all of it.
            match thread::Builder::new().spawn_scoped(scope, worker) {
                Ok(_) => spawned += 1,
                Err(_) => break,
            }
        }
        if spawned == 0 {
            work.run();
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

fn cut(index: usize, pair: &Pair<'_>) -> Vec<Chunk> {
    let numel = pair.multimodal.tensor.numel();
    let chunk = |start, end, origin| Chunk { pair: index, start, end, origin };
    match &pair.reasoning {
        Minuend::Whole(_) => (0..numel)
            .step_by(CHUNK)
            .map(|start| chunk(start, numel.min(start + CHUNK), Origin::Whole))
            .collect(),
        Minuend::Composed(composed) => composed
            .runs(numel, COMPOSED_CHUNK)
            .into_iter()
            .map(|(run, band)| {
                chunk(run.start, run.end, band.map_or(Origin::Nothing, Origin::Band))
            })
            .collect(),
    }
}

fn check(pair: &Pair<'_>, sink: &Sink<'_>) -> Result<()> {
    let b = pair.multimodal;
    check_side(b)?;
    let a = match &pair.reasoning {
        Minuend::Whole(side) => *side,
        // A composed tensor was checked when it was put together.
        Minuend::Composed(composed) => {
            let Sink::Files(writer, _) = sink else { return Ok(()) };
            let granularity = writer.storage().granularity();
            let runs = composed.runs(b.tensor.numel(), COMPOSED_CHUNK);
            let Some((run, _)) = runs.iter().find(|(run, _)| run.start % granularity != 0) else {
                return Ok(());
            };
            return Err(Error::tensor(
                b.shard.path(),
                &b.tensor.name,
                format!(
                    "it is put together from parts of which one begins at element {}, in the \
                     middle of a block of {granularity} that would share a scale; choose another \
                     dtype than int8",
                    run.start
                ),
            ));
        }
    };
    check_side(a)?;
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

fn check_side(side: Side<'_>) -> Result<()> {
    match side.scales {
        Some(scales) => scales.check(),
        None => subtractable(side.shard, side.tensor).map(|_| ()),
    }
}

fn check_unchanged(pairs: &[Pair<'_>]) -> Result<()> {
    let mut seen: HashSet<*const Shard> = HashSet::new();
    for pair in pairs {
        for side in pair.reasoning.sides().chain([pair.multimodal]) {
            for shard in side.shards() {
                if seen.insert(std::ptr::from_ref(shard)) {
                    shard.check_unchanged()?;
                }
            }
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
    Files(&'a Writer, usize),
    Memory(Dtype, Vec<Mutex<&'a mut [u8]>>),
}

impl<'a> Output<'a> {
    fn new(sink: Sink<'a>, pairs: &[Pair<'_>], chunks: &[Chunk]) -> Result<Self> {
        match sink {
            Sink::None => Ok(Output::None),
            Sink::Files(writer, first) => Ok(Output::Files(writer, first)),
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
                let mut parts = Vec::with_capacity(chunks.len());
                let mut rest = buffer;
                for chunk in chunks {
                    let (part, later) =
                        rest.split_at_mut((chunk.end - chunk.start) * dtype.nbytes());
                    parts.push(Mutex::new(part));
                    rest = later;
                }
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
    runs: Vec<u8>,
    multimodal: Vec<u8>,
    dequantised: [Dequantised; 2],
    out: Encoded,
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
        let range = part(pair.multimodal, chunk)?;
        let mut nbytes = range.end - range.start;
        let mut release = None;
        let [left, right] = &mut scratch.dequantised;
        let reasoning = match (&pair.reasoning, chunk.origin) {
            (Minuend::Whole(side), _) => {
                let range = part(*side, chunk)?;
                nbytes += range.end - range.start;
                release = Some((side.shard, range.clone()));
                let stored = side.shard.bytes(range, &mut scratch.reasoning)?;
                side.values(chunk.start, stored, left)?
            }
            (Minuend::Composed(composed), Origin::Band(band)) => {
                let elements = chunk.start..chunk.end;
                nbytes +=
                    composed.gather(band, &elements, &mut scratch.reasoning, &mut scratch.runs)?;
                Elements { dtype: composed.dtype(), bytes: &scratch.reasoning }
            }
            (Minuend::Composed(_), _) => {
                self.nothing(index, chunk, &mut scratch.out)?;
                self.nbytes.fetch_add(nbytes, Ordering::Relaxed);
                return Ok(Moments::default());
            }
        };
        let stored = pair.multimodal.shard.bytes(range.clone(), &mut scratch.multimodal)?;
        let multimodal = pair.multimodal.values(chunk.start, stored, right)?;
        let moments = match self.output {
            Output::None => kernel::subtract(reasoning, multimodal, None),
            Output::Files(writer, first) => {
                let difference = first + chunk.pair;
                let out = &mut scratch.out;
                let moments = out.subtract(writer, difference, reasoning, multimodal)?;
                out.write(writer, difference, chunk.start)?;
                moments
            }
            Output::Memory(dtype, parts) => {
                // One pair, so the chunk's index is its place in the buffer; nobody else locks it.
                let mut out = parts[index].lock().unwrap_or_else(PoisonError::into_inner);
                kernel::subtract(reasoning, multimodal, Some((*dtype, &mut out)))
            }
        };
        self.nbytes.fetch_add(nbytes, Ordering::Relaxed);
        if let Some((shard, range)) = release {
            shard.release(range);
        }
        pair.multimodal.shard.release(range);
        Ok(moments)
    }

    /// Rows without a counterpart: Δ is zero there.
    fn nothing(&self, index: usize, chunk: &Chunk, out: &mut Encoded) -> Result<()> {
        match self.output {
            Output::None => Ok(()),
            Output::Files(writer, first) => {
                out.clear(writer.storage(), chunk.end - chunk.start);
                out.write(writer, first + chunk.pair, chunk.start)
            }
            Output::Memory(_, parts) => {
                parts[index].lock().unwrap_or_else(PoisonError::into_inner).fill(0);
                Ok(())
            }
        }
    }

    fn progress(&self) -> Progress {
        Progress {
            tensors: self.tensors.load(Ordering::Relaxed),
            nbytes: self.nbytes.load(Ordering::Relaxed),
        }
    }
}

/// The bytes of a chunk in its file.
fn part(side: Side<'_>, chunk: &Chunk) -> Result<std::ops::Range<u64>> {
    let (start, nbytes) = (side.tensor.range.start, side.element_nbytes()?);
    Ok(start + (chunk.start * nbytes) as u64..start + (chunk.end * nbytes) as u64)
}
