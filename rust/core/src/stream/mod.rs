//! Subtract pairs of tensors chunk by chunk, on several threads, and take their moments.
//!
//! Owns what a worker does with a chunk; [`crate::kernel`] has the arithmetic. How a tensor is cut
//! depends on its shape alone, and moments are added in element order, so neither threads nor memory
//! nor timing change a bit.

mod account;
mod budget;
mod chunk;
mod difference;
mod encode;
mod engine;
mod load;
mod options;
mod order;
mod read;
mod sample;
pub mod stored;

pub(crate) use account::Account;
pub(crate) use budget::workers_within;
pub use chunk::CHUNK;
pub use difference::{Detail, Difference, load_differences};
pub use engine::Tick;
pub(crate) use engine::{Work, check_unchanged, run as run_workers};
pub use load::{Found, Landed, Memory, Part};
pub use options::{Options, Progress};
pub(crate) use read::{ReadDemand, SideBuffer};

use crate::align::pair::{Pair, Source};
use crate::error::{Error, Result};
use crate::kernel::rounding::Rounding;
use crate::kernel::{self, Moments};
use crate::output::Writer;
use budget::{Demand, WorkerBudget};
use chunk::Chunk;
use encode::Encoded;
use order::{Order, Taken};
use sample::sample;

/// Where the differences go.
pub enum Sink<'a> {
    /// Nowhere: statistics only.
    None,
    /// The files of a delta, whose differences are those of the pairs, in order.
    Files(&'a Writer),
}

/// What a run found.
#[derive(Debug)]
pub struct Outcome {
    /// The moments of each pair.
    pub moments: Vec<Moments>,
    /// The most bytes that buffers took at any time, without windows of mapped files.
    pub peak_nbytes: usize,
}

/// Stream every pair through the kernel and return the moments of each.
///
/// `tick` is called on the calling thread; when it breaks, the workers stop within a chunk and
/// [`Error::Interrupted`] is returned.
///
/// # Errors
/// Shapes that differ, a dtype that cannot be subtracted, less memory than one worker needs, a failed
/// read or write, a source that changed meanwhile, or an interruption.
pub fn run(
    pairs: &[Pair<'_>],
    sink: Sink<'_>,
    options: &Options,
    tick: Tick<'_>,
) -> Result<Outcome> {
    for pair in pairs {
        check(pair, &sink)?;
    }
    let out = if let Sink::Files(writer) = &sink { Some(writer.storage()) } else { None };
    let budget = WorkerBudget::new(pairs, out, options)?;
    let account = Account::default();
    account.add(Order::window_nbytes(budget.workers));
    let work = Subtraction {
        pairs,
        sink,
        order: Order::new(pairs, budget.workers, options.prefetch_nbytes),
        demand: budget.demand,
    };
    run_workers(&work, budget.workers, &account, tick)?;
    check_unchanged(pairs.iter().flat_map(Pair::operands))?;
    let moments = work.order.finish().ok_or(Error::Interrupted)?;
    Ok(Outcome { moments, peak_nbytes: account.peak_nbytes() })
}

fn check(pair: &Pair<'_>, sink: &Sink<'_>) -> Result<()> {
    pair.multimodal.check()?;
    pair.reasoning.check(&pair.multimodal)?;
    let (Source::Blocks(blocks), Sink::Files(writer)) = (&pair.reasoning, sink) else {
        return Ok(());
    };
    let granularity = writer.storage().granularity();
    let numel = pair.multimodal.tensor.numel();
    let mut start = 0;
    while start < numel && start.is_multiple_of(granularity) {
        (start, _) = blocks.run(start, numel);
    }
    if start >= numel {
        return Ok(());
    }
    Err(Error::tensor(
        pair.multimodal.shard.path(),
        &pair.multimodal.tensor.name,
        format!(
            "its part from element {start} on begins in the middle of a block of {granularity} \
             elements that share a scale; choose another dtype than int8"
        ),
    ))
}

struct Subtraction<'a> {
    pairs: &'a [Pair<'a>],
    sink: Sink<'a>,
    order: Order<'a>,
    demand: Demand,
}

struct Scratch {
    reasoning: SideBuffer,
    multimodal: SideBuffer,
    out: Encoded,
}

impl Work for Subtraction<'_> {
    type Chunk = Taken;
    type Scratch = Scratch;

    fn scratch(&self) -> Scratch {
        Scratch {
            reasoning: SideBuffer::with_room(&self.demand.reasoning),
            multimodal: SideBuffer::with_room(&self.demand.multimodal),
            out: match self.sink {
                Sink::Files(writer) => Encoded::with_room(writer.storage(), self.demand.longest),
                Sink::None => Encoded::default(),
            },
        }
    }

    fn held_nbytes(scratch: &Scratch) -> usize {
        scratch.reasoning.held_nbytes()
            + scratch.multimodal.held_nbytes()
            + scratch.out.held_nbytes()
    }

    fn take(&self) -> Option<Taken> {
        let taken = self.order.take()?;
        while let Some(chunk) = self.order.ahead() {
            self.prefetch(&chunk);
        }
        Some(taken)
    }

    fn place(taken: &Taken) -> usize {
        taken.index
    }

    fn work(&self, taken: &mut Taken, scratch: &mut Scratch) -> Result<u64> {
        let (moments, rounding, nbytes) = if taken.chunk.is_stored {
            self.subtract(taken, scratch)?
        } else {
            let nbytes = self.fill_with_zeros(taken, &mut scratch.out)?;
            (Moments::default(), Rounding::default(), nbytes)
        };
        self.order.fold(taken, moments, rounding);
        Ok(nbytes)
    }

    fn stop(&self) {
        self.order.stop();
    }

    fn tensors(&self) -> usize {
        self.order.tensors()
    }
}

impl Subtraction<'_> {
    fn prefetch(&self, chunk: &Chunk) {
        // Rows that only one model stores are not read.
        if chunk.is_stored {
            let pair = &self.pairs[chunk.pair];
            pair.reasoning.prefetch(&chunk.elements);
            pair.multimodal.prefetch(&chunk.elements);
        }
    }

    fn subtract(&self, taken: &Taken, scratch: &mut Scratch) -> Result<(Moments, Rounding, u64)> {
        let Chunk { pair: index, ref elements, .. } = taken.chunk;
        let pair = &self.pairs[index];
        let (reasoning, first) = scratch.reasoning.read(&pair.reasoning, elements)?;
        let (multimodal, second) = scratch.multimodal.read_operand(&pair.multimodal, elements)?;
        let moments = match self.sink {
            Sink::None => kernel::subtract(reasoning, multimodal, None),
            Sink::Files(writer) => {
                let out = &mut scratch.out;
                let moments = out.subtract(writer.storage(), reasoning, multimodal);
                out.write(writer, index, elements.start)?;
                moments
            }
        };
        let all = 0..pair.multimodal.tensor.numel();
        let rounding = sample(pair, &all, elements, reasoning, multimodal)?;
        pair.reasoning.release(elements);
        pair.multimodal.release(elements);
        Ok((moments, rounding, first + second))
    }

    /// Rows that the reasoning model does not store: Δ is zero there.
    fn fill_with_zeros(&self, taken: &Taken, out: &mut Encoded) -> Result<u64> {
        let Chunk { pair, ref elements, .. } = taken.chunk;
        match self.sink {
            Sink::None => {}
            Sink::Files(writer) => {
                out.clear(writer.storage(), elements.len());
                out.write(writer, pair, elements.start)?;
            }
        }
        let range = self.pairs[pair].multimodal.byte_range(elements);
        Ok(range.end - range.start)
    }
}
