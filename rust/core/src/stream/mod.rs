//! Run the kernel over many pairs of tensors: threads, read-ahead and page release.
//!
//! Owns what a worker does with a chunk, neither the arithmetic nor the order. How a tensor is cut
//! follows from its shape alone and moments are added in element order, so neither the thread count
//! nor the memory or timing changes a bit.

mod budget;
mod order;
pub(crate) mod read;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::align::compose::Composed;
use crate::checkpoint::block_scales::{DEQUANTISED, Scales};
use crate::checkpoint::shard::{Shard, Tensor, subtractable};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::{self, Elements, Moments};
use crate::output::format::Encoded;
use crate::output::writer::Writer;
use crate::workers;
pub(crate) use budget::Account;
use budget::{Demand, Plan};
use order::{Chunk, Order, Origin, Taken};

/// Elements of one chunk: half a mebibyte of bfloat16 from either side, which stays in a core's cache.
pub const CHUNK: usize = 1 << 18;

/// Elements of one chunk of a composed tensor: long enough that a transposed part is read in runs of
/// a kilobyte or more at the widths of real experts.
pub(crate) const COMPOSED_CHUNK: usize = 1 << 20;

/// How far ahead of the workers a disk is kept busy, both sides together. It fills the page cache,
/// which is not the memory that [`Options::memory`] bounds.
const PREFETCH_NBYTES: u64 = 32 << 20;

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

/// What a multimodal tensor is subtracted from.
pub enum Minuend<'a> {
    /// A tensor of its shape.
    Whole(Side<'a>),
    /// Parts of tensors that together have its shape.
    Composed(Composed<'a>),
}

impl<'a> Side<'a> {
    /// The files that its values come from.
    pub(crate) fn shards(&self) -> impl Iterator<Item = &'a Shard> + use<'a> {
        std::iter::once(self.shard).chain(self.scales.map(|scales| scales.shard()))
    }

    /// Bytes of one element as it is stored.
    pub(crate) fn element_nbytes(&self) -> usize {
        let nbytes = (self.tensor.range.end - self.tensor.range.start) as usize;
        nbytes.checked_div(self.tensor.numel()).unwrap_or(0)
    }

    /// The most bytes that the values of `numel` codes take, none where there are no codes.
    pub(crate) fn dequantised_nbytes(&self, numel: usize) -> usize {
        self.scales.map_or(0, |scales| {
            let (values, scales) = scales.scratch_nbytes(numel);
            values + scales
        })
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

impl Dequantised {
    pub(crate) fn held_nbytes(&self) -> usize {
        self.scales.capacity() + self.values.capacity()
    }
}

impl<'a> Minuend<'a> {
    /// Bytes of one element as it is stored.
    pub(crate) fn element_nbytes(&self) -> usize {
        match self {
            Minuend::Whole(side) => side.element_nbytes(),
            Minuend::Composed(composed) => composed.dtype().nbytes(),
        }
    }

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
    /// The files of a delta; pair by pair its differences.
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

/// How a run goes about it; nothing here changes a bit of the result.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Workers at most.
    pub threads: usize,
    /// Bytes of all buffers, and of windows of mapped files, at most; it bounds the workers.
    pub memory: usize,
    /// Bytes that a disk is asked for ahead of the workers.
    pub prefetch_nbytes: u64,
}

impl Options {
    /// So many threads, in as much memory as they take.
    pub fn new(threads: usize) -> Self {
        Self { threads, memory: usize::MAX, prefetch_nbytes: PREFETCH_NBYTES }
    }
}

/// What a run found.
#[derive(Debug)]
pub struct Outcome {
    /// The moments of each pair.
    pub moments: Vec<Moments>,
    /// The most bytes that buffers took at a time; windows of mapped files are not among them.
    pub peak_nbytes: usize,
}

/// Stream every pair through the kernel and return the moments of each.
///
/// `tick` is called on the calling thread about twenty times a second and once at the end; when it
/// breaks, the workers stop within a chunk and [`Error::Interrupted`] is returned.
///
/// # Errors
/// Shapes that differ, a dtype that cannot be subtracted, memory that one worker does not fit in, a
/// failed read or write, a source that changed meanwhile, or an interruption.
pub fn run(
    pairs: &[Pair<'_>],
    sink: Sink<'_>,
    options: &Options,
    tick: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Outcome> {
    for pair in pairs {
        check(pair, &sink)?;
    }
    let out = if let Sink::Files(writer) = &sink { Some(writer.storage()) } else { None };
    let plan = Plan::new(pairs, out, options)?;
    let account = Account::default();
    account.add(Order::window_nbytes(plan.workers));
    let (output, memory): (_, (&mut [u8], usize)) = match sink {
        Sink::None => (Output::None, (&mut [], 0)),
        Sink::Files(writer) => (Output::Files(writer), (&mut [], 0)),
        Sink::Memory(dtype, buffer) => {
            check_buffer(pairs, dtype, buffer)?;
            (Output::Memory(dtype), (buffer, dtype.nbytes()))
        }
    };
    let work = Work {
        pairs,
        output,
        order: Order::new(pairs, memory, plan.workers, options.prefetch_nbytes),
        demand: plan.demand,
        account: &account,
        stop: AtomicBool::new(false),
        nbytes: AtomicU64::new(0),
        failure: Mutex::new(None),
    };
    let interrupted =
        workers::run(plan.workers, TICK, &|| work.run(), &|| work.stop(), || tick(work.progress()));
    if interrupted {
        return Err(Error::Interrupted);
    }
    let failure = work.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, error)) = failure {
        return Err(error);
    }
    check_unchanged(pairs)?;
    let moments = work.order.finish().ok_or(Error::Interrupted)?;
    Ok(Outcome { moments, peak_nbytes: account.peak_nbytes() })
}

fn check(pair: &Pair<'_>, sink: &Sink<'_>) -> Result<()> {
    let b = pair.multimodal;
    check_side(b)?;
    let a = match &pair.reasoning {
        Minuend::Whole(side) => *side,
        // A composed tensor was checked when it was put together.
        Minuend::Composed(composed) => {
            let Sink::Files(writer) = sink else { return Ok(()) };
            let granularity = writer.storage().granularity();
            let numel = b.tensor.numel();
            let mut start = 0;
            while start < numel && start.is_multiple_of(granularity) {
                (start, _) = composed.run(start, numel, COMPOSED_CHUNK);
            }
            if start >= numel {
                return Ok(());
            }
            return Err(Error::tensor(
                b.shard.path(),
                &b.tensor.name,
                format!(
                    "it is put together from parts of which one begins at element {}, in the \
                     middle of a block of {granularity} that would share a scale; choose another \
                     dtype than int8",
                    start
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

pub(crate) fn check_side(side: Side<'_>) -> Result<()> {
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

fn check_buffer(pairs: &[Pair<'_>], dtype: Dtype, buffer: &[u8]) -> Result<()> {
    let numel: usize = pairs.iter().map(|pair| pair.multimodal.tensor.numel()).sum();
    if pairs.len() == 1 && buffer.len() == numel * dtype.nbytes() {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "the buffer has {} bytes, expected {} for {numel} elements of {}",
        buffer.len(),
        numel * dtype.nbytes(),
        dtype.name()
    )))
}

/// Where Δ goes.
#[derive(Clone, Copy)]
enum Output<'a> {
    None,
    Files(&'a Writer),
    /// Into each chunk's own part of it.
    Memory(Dtype),
}

struct Work<'a> {
    pairs: &'a [Pair<'a>],
    output: Output<'a>,
    order: Order<'a>,
    demand: Demand,
    account: &'a Account,
    stop: AtomicBool,
    nbytes: AtomicU64,
    /// The failure of the earliest chunk, so that which of several is reported depends little on timing.
    failure: Mutex<Option<(usize, Error)>>,
}

/// Buffers that a worker keeps from chunk to chunk.
struct Scratch {
    reasoning: Vec<u8>,
    runs: Vec<u8>,
    multimodal: Vec<u8>,
    dequantised: [Dequantised; 2],
    out: Encoded,
}

impl Scratch {
    fn new(demand: &Demand, output: &Output<'_>) -> Self {
        // Of their full size at once: a vector that grows takes up to twice what it holds.
        Self {
            reasoning: Vec::with_capacity(demand.reasoning),
            runs: Vec::with_capacity(demand.runs),
            multimodal: Vec::with_capacity(demand.multimodal),
            dequantised: <[Dequantised; 2]>::default(),
            out: match output {
                Output::Files(writer) => Encoded::with_room(writer.storage(), demand.longest),
                _ => Encoded::default(),
            },
        }
    }

    fn nbytes(&self) -> usize {
        self.reasoning.capacity()
            + self.runs.capacity()
            + self.multimodal.capacity()
            + self.dequantised.iter().map(Dequantised::held_nbytes).sum::<usize>()
            + self.out.held_nbytes()
    }
}

impl<'a> Work<'a> {
    fn run(&self) {
        let mut scratch = Scratch::new(&self.demand, &self.output);
        let mut held = scratch.nbytes();
        self.account.add(held);
        while let Some(mut taken) = self.order.take() {
            while let Some(chunk) = self.order.ahead() {
                self.prefetch(&chunk);
            }
            match self.chunk(&mut taken, &mut scratch) {
                Ok(moments) => self.order.fold(&taken, moments),
                Err(error) => self.fail(taken.index, error),
            }
            // Grown only where the plan was wrong, which the peak must show.
            let now = scratch.nbytes();
            self.account.add(now - held);
            held = now;
        }
        self.account.remove(held);
    }

    fn fail(&self, index: usize, error: Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.as_ref().is_none_or(|(earliest, _)| index < *earliest) {
            *failure = Some((index, error));
        }
        drop(failure);
        self.stop();
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.order.stop();
    }

    fn prefetch(&self, chunk: &Chunk) {
        let pair = &self.pairs[chunk.pair];
        let ask = |side: Side<'_>| {
            side.shard.prefetch(part(side, chunk));
        };
        match (&pair.reasoning, chunk.origin) {
            (Minuend::Whole(side), _) => ask(*side),
            (Minuend::Composed(composed), Origin::Band(band)) => {
                for (side, range) in composed.spans(band, &(chunk.start..chunk.end)) {
                    side.shard.prefetch(range);
                }
            }
            // Of these rows nothing is read.
            (Minuend::Composed(_), _) => return,
        }
        ask(pair.multimodal);
    }

    fn chunk(&self, taken: &mut Taken<'_>, scratch: &mut Scratch) -> Result<Moments> {
        let chunk = &taken.chunk;
        let pair = &self.pairs[chunk.pair];
        let range = part(pair.multimodal, chunk);
        let mut nbytes = range.end - range.start;
        let mut release = None;
        let [left, right] = &mut scratch.dequantised;
        let reasoning = match (&pair.reasoning, chunk.origin) {
            (Minuend::Whole(side), _) => {
                let range = part(*side, chunk);
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
                self.nothing(taken, &mut scratch.out)?;
                self.nbytes.fetch_add(nbytes, Ordering::Relaxed);
                return Ok(Moments::default());
            }
        };
        let stored = pair.multimodal.shard.bytes(range.clone(), &mut scratch.multimodal)?;
        let multimodal = pair.multimodal.values(chunk.start, stored, right)?;
        let moments = match self.output {
            Output::None => kernel::subtract(reasoning, multimodal, None),
            Output::Files(writer) => {
                let out = &mut scratch.out;
                let moments = out.subtract(writer.storage(), reasoning, multimodal);
                out.write(writer, chunk.pair, chunk.start)?;
                moments
            }
            Output::Memory(dtype) => {
                kernel::subtract(reasoning, multimodal, Some((dtype, &mut *taken.memory)))
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
    fn nothing(&self, taken: &mut Taken<'_>, out: &mut Encoded) -> Result<()> {
        let Chunk { pair, start, end, .. } = taken.chunk;
        match self.output {
            Output::None => {}
            Output::Files(writer) => {
                out.clear(writer.storage(), end - start);
                out.write(writer, pair, start)?;
            }
            Output::Memory(_) => taken.memory.fill(0),
        }
        Ok(())
    }

    fn progress(&self) -> Progress {
        Progress { tensors: self.order.tensors(), nbytes: self.nbytes.load(Ordering::Relaxed) }
    }
}

/// The bytes of a chunk in its file.
fn part(side: Side<'_>, chunk: &Chunk) -> std::ops::Range<u64> {
    let (start, nbytes) = (side.tensor.range.start, side.element_nbytes());
    start + (chunk.start * nbytes) as u64..start + (chunk.end * nbytes) as u64
}
