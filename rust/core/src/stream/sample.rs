//! The elements of a chunk from which the rounding in a difference is estimated.
//!
//! Owns which ones they are, by their numbers alone, and the grids that their values are on.

use std::ops::Range;

use super::chunk::CHUNK;
use crate::align::pair::{Pair, Source};
use crate::checkpoint::Operand;
use crate::error::Result;
use crate::kernel::Elements;
use crate::kernel::blend::{self, Environment};
use crate::kernel::rounding::{Grid, RUN, Rounding};

/// Elements of one tensor, and the least and the most of one chunk.
const OF_TENSOR: usize = 6144;
const LEAST: usize = 256;
const MOST: usize = 2048;

/// Sample a chunk of the elements `all` of a pair; `elements` count from the first of those, and both
/// sides hold them.
pub(super) fn sample(
    pair: &Pair<'_>,
    all: &Range<usize>,
    elements: &Range<usize>,
    reasoning: Elements<'_>,
    multimodal: Elements<'_>,
) -> Result<Rounding> {
    let chunks = all.len().div_ceil(CHUNK).max(1);
    let runs = runs(elements, (OF_TENSOR / chunks).clamp(LEAST, MOST) / RUN);
    let (mut left, mut right) = ([0.0; MOST], [0.0; MOST]);
    values(reasoning, elements.start, &runs, &mut left);
    values(multimodal, elements.start, &runs, &mut right);
    let first = match &pair.reasoning {
        Source::Whole(operand) => grids(*operand, reasoning, &left),
        Source::Blocks(_) => Grids::Same(Grid::of(reasoning.dtype).seen_in(&left)),
    };
    let second = grids(pair.multimodal, multimodal, &right);
    let _environment = Environment::enter();
    let mut found = Rounding::of(elements.len());
    for ((run, left), right) in
        runs.iter().zip(left.as_chunks::<RUN>().0).zip(right.as_chunks::<RUN>().0)
    {
        let element = all.start + run.start;
        let grids = (first.at(element)?, second.at(element)?);
        found.sample((left, right), run.len(), grids);
    }
    Ok(found)
}

/// At most so many runs, each somewhere in its part of the elements; all elements if they are few.
fn runs(elements: &Range<usize>, count: usize) -> Vec<Range<usize>> {
    if elements.len() <= count * RUN {
        let starts = elements.clone().step_by(RUN);
        return starts.map(|start| start..elements.end.min(start + RUN)).collect();
    }
    let part = elements.len() / count;
    (0..count)
        .map(|number| {
            let first = elements.start + number * part;
            // Not evenly spaced, since that could be always the same columns.
            let places = (part - RUN) / RUN + 1;
            let start = first + blend::random(0, first as u64) as usize % places * RUN;
            start..start + RUN
        })
        .collect()
}

/// Widen the runs of elements of which number `first` is the first; all but the last are whole.
fn values(elements: Elements<'_>, first: usize, runs: &[Range<usize>], out: &mut [f64; MOST]) {
    for (run, out) in runs.iter().zip(out.as_chunks_mut::<RUN>().0) {
        let run_elements = elements.slice(run.start - first, run.end - first);
        blend::widen(run_elements, &mut out[..run.len()]);
    }
}

/// The grids of one side.
enum Grids<'a> {
    Same(Grid),
    OfCodes(Operand<'a>, Grid),
}

fn grids<'a>(operand: Operand<'a>, elements: Elements<'_>, values: &[f64]) -> Grids<'a> {
    let plain = Grid::of(elements.dtype);
    if operand.scales.is_some() {
        return Grids::OfCodes(operand, plain);
    }
    Grids::Same(plain.seen_in(values))
}

impl Grids<'_> {
    fn at(&self, element: usize) -> Result<Grid> {
        match self {
            Self::Same(grid) => Ok(*grid),
            Self::OfCodes(operand, plain) => {
                operand.scales.as_ref().map_or(Ok(*plain), |scales| scales.grid(element))
            }
        }
    }
}
