//! A chunk of one model's side of a merge: read, or gathered from parts, with what has a counterpart.

use std::ops::Range;

use super::budget::Window;
use crate::align::compose::Composed;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::kernel::Elements;
use crate::stream::{COMPOSED_CHUNK, Dequantised, Minuend, Side};

/// Room for a chunk of one side, kept from chunk to chunk.
#[derive(Default)]
pub(crate) struct Room {
    bytes: Vec<u8>,
    packed: Vec<u8>,
    runs: Vec<u8>,
    dequantised: Dequantised,
}

/// The bytes of elements of one side, in their file.
pub(crate) fn part(side: &Side<'_>, elements: &Range<usize>) -> Range<u64> {
    let (start, nbytes) = (side.tensor.range.start, side.element_nbytes() as u64);
    start + elements.start as u64 * nbytes..start + elements.end as u64 * nbytes
}

impl Room {
    pub(crate) fn held_nbytes(&self) -> usize {
        self.bytes.capacity()
            + self.packed.capacity()
            + self.runs.capacity()
            + self.dequantised.held_nbytes()
    }

    /// Bytes that chunks of so many elements take of buffers and mapped windows together.
    pub(crate) fn nbytes_of(minuend: &Minuend<'_>, total: usize, longest: usize) -> usize {
        match minuend {
            Minuend::Whole(side) => {
                let window = Window::of(side, longest);
                window.read() + window.mapped() + side.dequantised_nbytes(longest)
            }
            Minuend::Composed(composed) => {
                let packed = composed.longest(total, COMPOSED_CHUNK).min(longest);
                (longest + packed) * composed.dtype().nbytes()
                    + composed.scratch_nbytes(COMPOSED_CHUNK)
            }
        }
    }

    /// Elements of a stored tensor.
    pub(crate) fn read<'b>(
        &'b mut self,
        side: &Side<'b>,
        elements: &Range<usize>,
    ) -> Result<Elements<'b>> {
        let stored = side.shard.bytes(part(side, elements), &mut self.bytes)?;
        side.values(elements.start, stored, &mut self.dequantised)
    }

    /// Elements of a side, and those of them that have a counterpart there. Of a composed one,
    /// `elements` are whole rows; those without a counterpart come out as zero.
    pub(crate) fn gather<'b>(
        &'b mut self,
        minuend: &Minuend<'b>,
        elements: &Range<usize>,
    ) -> Result<(Elements<'b>, Vec<Range<usize>>)> {
        let composed = match minuend {
            Minuend::Whole(side) => {
                return Ok((self.read(side, elements)?, vec![elements.clone()]));
            }
            Minuend::Composed(composed) => composed,
        };
        let dtype: Dtype = composed.dtype();
        let nbytes = dtype.nbytes();
        self.bytes.clear();
        self.bytes.resize(elements.len() * nbytes, 0);
        for (run, band) in runs(composed, elements) {
            composed.gather(band, &run, &mut self.packed, &mut self.runs)?;
            let at = (run.start - elements.start) * nbytes;
            self.bytes[at..at + self.packed.len()].copy_from_slice(&self.packed);
        }
        Ok((Elements { dtype, bytes: &self.bytes }, present(minuend, elements)))
    }
}

/// The runs of whole rows of a composed tensor that have a counterpart, and the band of each.
fn runs<'c, 'a>(
    composed: &'c Composed<'a>,
    elements: &Range<usize>,
) -> impl Iterator<Item = (Range<usize>, usize)> + use<'c, 'a> {
    let Range { mut start, end } = elements.clone();
    std::iter::from_fn(move || {
        while start < end {
            let (stop, band) = composed.run(start, end, COMPOSED_CHUNK);
            let run = start..stop.min(end);
            start = run.end;
            if let Some(band) = band {
                return Some((run, band));
            }
        }
        None
    })
}

/// Those of some elements that have a counterpart on a side; of a composed one, they are whole rows.
pub(crate) fn present(minuend: &Minuend<'_>, elements: &Range<usize>) -> Vec<Range<usize>> {
    let Minuend::Composed(composed) = minuend else { return vec![elements.clone()] };
    let mut found: Vec<Range<usize>> = Vec::new();
    for (run, _) in runs(composed, elements) {
        match found.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => found.push(run),
        }
    }
    found
}

/// What two lists of rising ranges have in common.
pub(crate) fn common(left: &[Range<usize>], right: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut i, mut j) = (0, 0);
    let mut found = Vec::new();
    while let (Some(a), Some(b)) = (left.get(i), right.get(j)) {
        let (start, end) = (a.start.max(b.start), a.end.min(b.end));
        if start < end {
            found.push(start..end);
        }
        if a.end <= b.end { i += 1 } else { j += 1 }
    }
    found
}

/// What rising ranges leave of some elements.
pub(crate) fn absent(present: &[Range<usize>], elements: &Range<usize>) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = elements.start;
    for run in present.iter().chain(std::iter::once(&(elements.end..elements.end))) {
        if start < run.start {
            found.push(start..run.start);
        }
        start = run.end;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_lists_of_ranges_meet_where_both_have_elements() {
        assert_eq!(common(&[0..4, 6..10], &[2..7, 9..20]), [2..4, 6..7, 9..10]);
        assert_eq!(common(&[0..4, 5..6], &[4..5, 6..9]), []);
    }

    #[test]
    fn what_ranges_leave_is_between_and_around_them() {
        assert_eq!(absent(&[2..4, 4..5, 7..9], &(1..9)), [1..2, 5..7]);
        assert_eq!(absent(&[0..4, 6..7], &(0..9)), [4..6, 7..9]);
        let all = std::slice::from_ref(&(3..9));
        assert_eq!(absent(&[], &(3..9)), all);
        assert_eq!(absent(all, &(3..9)), []);
    }
}
