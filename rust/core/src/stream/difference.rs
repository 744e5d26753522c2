//! Differences of pairs, or runs of their elements, subtracted into memory.
//!
//! Owns how a piece of a pair is cut where the reasoning tensor is made of blocks; [`super::load`] has
//! the pieces and the memory.

use std::ops::Range;

use super::budget::{Demand, workers_within};
use super::check_unchanged;
use super::chunk::CHUNK;
use super::load::{Found, Landed, Memory, Origin, Piece, Run, load};
use super::options::Options;
use super::read::SideBuffer;
use super::sample::sample;
use crate::align::compose::{Blocks, RUN};
use crate::align::pair::{Pair, Source};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::{Elements, Moments, subtract, subtract_plainly};

/// What is found of differences, besides their squares in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// Moments of the pieces where something is not finite or may be lost to a narrower range. Those of
    /// other pieces are zero.
    Faults,
    /// All moments.
    Moments,
    /// All moments, and the share of them that is rounding.
    Rounding,
}

/// Elements of a pair that are wanted: all of a tensor, or a run of them.
pub struct Difference<'a> {
    /// The pair.
    pub pair: Pair<'a>,
    /// Which elements.
    pub elements: Range<usize>,
}

/// Subtract into memory, in elements of `dtype`.
///
/// # Errors
/// Those of [`super::run`], elements that a pair does not have, or memory of another size.
pub fn load_differences(
    wanted: &[Difference<'_>],
    dtype: Dtype,
    memory: Memory<'_>,
    options: &Options,
    detail: Detail,
    landed: Landed<'_>,
) -> Result<Vec<Found>> {
    let mut demand = Demand::default();
    let mut largest: (usize, &str) = (0, "");
    for Difference { pair, elements } in wanted {
        pair.multimodal.check()?;
        pair.reasoning.check(&pair.multimodal)?;
        let (name, numel) = (&pair.multimodal.tensor.name, pair.multimodal.tensor.numel());
        if elements.start > elements.end || elements.end > numel {
            let message = format!("{name} has {numel} elements, not {elements:?}");
            return Err(Error::Argument(message));
        }
        let one = Demand::of_length(pair, longest(pair).min(numel), None);
        if one.nbytes() > largest.0 {
            largest = (one.nbytes(), name);
        }
        demand = demand.most(one);
    }
    let runs = wanted.iter().map(|one| one.run(dtype)).collect();
    let needed = |workers| demand.nbytes().saturating_mul(workers);
    let workers = workers_within(options, usize::MAX, largest.1, needed)?;
    let differences = Differences { wanted, runs, dtype, detail, demand };
    let (found, _) = load(&differences, memory, workers, landed)?;
    check_unchanged(wanted.iter().flat_map(|one| one.pair.operands()))?;
    Ok(found)
}

/// Elements of a piece. Blocks are read in long runs of rows, since they may be transposed.
fn piece(source: &Source<'_>) -> usize {
    match source {
        Source::Whole(_) => CHUNK,
        Source::Blocks(_) => RUN,
    }
}

/// The most elements that are read for a piece.
fn longest(pair: &Pair<'_>) -> usize {
    match &pair.reasoning {
        Source::Whole(_) => CHUNK,
        // The rows that a piece begins and ends in.
        Source::Blocks(blocks) => RUN + 2 * blocks.columns(),
    }
}

impl Difference<'_> {
    fn run(&self, dtype: Dtype) -> Run {
        let piece = piece(&self.pair.reasoning);
        Run { numel: self.elements.len(), nbytes: dtype.nbytes(), piece }
    }
}

struct Differences<'a> {
    wanted: &'a [Difference<'a>],
    runs: Vec<Run>,
    dtype: Dtype,
    detail: Detail,
    demand: Demand,
}

struct Scratch {
    reasoning: SideBuffer,
    multimodal: SideBuffer,
}

impl Origin for Differences<'_> {
    type Scratch = Scratch;

    fn runs(&self) -> &[Run] {
        &self.runs
    }

    fn scratch(&self) -> Scratch {
        Scratch {
            reasoning: SideBuffer::with_room(&self.demand.reasoning),
            multimodal: SideBuffer::with_room(&self.demand.multimodal),
        }
    }

    fn held_nbytes(scratch: &Scratch) -> usize {
        scratch.reasoning.held_nbytes() + scratch.multimodal.held_nbytes()
    }

    fn read(
        &self,
        run: usize,
        elements: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<Piece> {
        let (found, plainly) = self.read_piece(run, elements.clone(), out, scratch, self.detail)?;
        // Where a side is not finite, neither is the difference, nor its square.
        if plainly && found.squares.iter().any(|square| !square.is_finite()) {
            return Ok(self.read_piece(run, elements, out, scratch, Detail::Moments)?.0);
        }
        Ok(found)
    }
}

impl Differences<'_> {
    /// Read a piece, and say whether some of it has no moments.
    fn read_piece(
        &self,
        run: usize,
        elements: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
        detail: Detail,
    ) -> Result<(Piece, bool)> {
        let Difference { pair, elements: all } = &self.wanted[run];
        let numbers = elements.clone();
        let elements = all.start + elements.start..all.start + elements.end;
        let mut found = Piece::default();
        let plainly;
        match &pair.reasoning {
            Source::Whole(operand) => {
                let (reasoning, first) = scratch.reasoning.read_operand(operand, &elements)?;
                let (multimodal, second) =
                    scratch.multimodal.read_operand(&pair.multimodal, &elements)?;
                let moments = self.subtract(reasoning, multimodal, out, detail);
                plainly = moments.is_none();
                found.moments = moments.unwrap_or_default();
                found.nbytes = first + second;
                if detail == Detail::Rounding {
                    found.rounding = sample(pair, all, &numbers, reasoning, multimodal)?;
                }
                pair.reasoning.release(&elements);
                pair.multimodal.release(&elements);
            }
            Source::Blocks(blocks) => {
                (found.moments, found.nbytes, plainly) =
                    self.read_blocks((pair, blocks), &elements, out, scratch, detail)?;
            }
        }
        found.measure(self.dtype, out);
        Ok((found, plainly))
    }

    /// Subtract into `out`; None if no moments were taken.
    fn subtract(
        &self,
        reasoning: Elements<'_>,
        multimodal: Elements<'_>,
        out: &mut [u8],
        detail: Detail,
    ) -> Option<Moments> {
        let into = (self.dtype, &mut *out);
        if detail == Detail::Faults && subtract_plainly(reasoning, multimodal, into) {
            return None;
        }
        Some(subtract(reasoning, multimodal, Some((self.dtype, out))))
    }

    fn read_blocks(
        &self,
        (pair, blocks): (&Pair<'_>, &Blocks<'_>),
        elements: &Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
        detail: Detail,
    ) -> Result<(Moments, u64, bool)> {
        let (mut moments, mut nbytes, mut plainly) = (Moments::default(), 0, false);
        let columns = blocks.columns();
        let rows = elements.start / columns * columns..elements.end.div_ceil(columns) * columns;
        // Rows that the reasoning model does not store: Δ is zero there.
        out.fill(0);
        for (run, _) in blocks.runs(&rows) {
            let part = run.start.max(elements.start)..run.end.min(elements.end);
            let (gathered, first) = scratch.reasoning.read(&pair.reasoning, &run)?;
            let reasoning = gathered.slice(part.start - run.start, part.end - run.start);
            let (multimodal, second) = scratch.multimodal.read_operand(&pair.multimodal, &part)?;
            let place = (part.start - elements.start) * self.dtype.nbytes();
            let out = &mut out[place..place + part.len() * self.dtype.nbytes()];
            match self.subtract(reasoning, multimodal, out, detail) {
                Some(part) => moments.add(&part),
                None => plainly = true,
            }
            pair.multimodal.release(&part);
            nbytes += first + second;
        }
        Ok((moments, nbytes, plainly))
    }
}
