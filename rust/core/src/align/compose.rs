//! A tensor that one checkpoint stores whole and the other in pieces, or the other way round.
//!
//! Owns where the pieces lie and how a run of rows is gathered from them, chunk by chunk, so that
//! no model and no whole tensor is ever copied. The multimodal tensor is seen as rows × columns; a
//! [`Part`] is a rectangle of it that lies in a tensor of the reasoning checkpoint, transposed or
//! not. Parts never overlap, and within their rows they cover every column.

use std::ops::Range;

use crate::checkpoint::shard::subtractable;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::INT8_BLOCK;
use crate::stream::Side;

/// Elements that are gathered aside at a time: enough for long reads, few enough to stay in a core's
/// cache.
const GROUP: usize = 1 << 17;

/// A rectangle of the composed tensor, and the elements of a stored one that fill it.
#[derive(Clone, Debug)]
pub struct Part<S> {
    /// The stored tensor.
    pub source: S,
    /// Rows of the composed tensor.
    pub rows: Range<usize>,
    /// Columns of the composed tensor.
    pub columns: Range<usize>,
    /// The element of the stored tensor that comes first.
    pub offset: usize,
    /// Elements from one row to the next in the stored tensor.
    pub row_stride: usize,
    /// Elements from one column to the next in the stored tensor; it or the other one is 1.
    pub column_stride: usize,
}

/// Parts by rising row and column, grouped into bands that share their rows.
pub struct Composed<'a> {
    columns: usize,
    dtype: Dtype,
    bands: Vec<Vec<Part<Side<'a>>>>,
}

impl<'a> Composed<'a> {
    /// Check that the parts lie inside their tensors, do not overlap and leave no column out.
    ///
    /// Rows that no part covers have no counterpart: their difference is zero and they enter no sum.
    ///
    /// # Errors
    /// Parts that break this, that differ in dtype, or whose dtype cannot be subtracted.
    pub fn new(shape: &[usize], mut parts: Vec<Part<Side<'a>>>) -> Result<Self> {
        let (rows, columns) = matrix(shape);
        let Some(first) = parts.first() else {
            return Err(Error::Argument("a composed tensor needs at least one part".to_owned()));
        };
        let dtype = subtractable(first.source.shard, first.source.tensor)?;
        for part in &parts {
            check_part(part, rows, columns)?;
            if subtractable(part.source.shard, part.source.tensor)? != dtype {
                return Err(Error::tensor(
                    part.source.shard.path(),
                    &part.source.tensor.name,
                    format!(
                        "dtype {} differs from {} of the other parts of one tensor; save the \
                         checkpoint in one dtype",
                        part.source.tensor.dtype,
                        dtype.name()
                    ),
                ));
            }
        }
        parts.sort_by_key(|part| (part.rows.start, part.rows.end, part.columns.start));
        let mut bands: Vec<Vec<Part<Side<'a>>>> = Vec::new();
        for part in parts {
            match bands.last_mut() {
                Some(band) if band[0].rows == part.rows => band.push(part),
                Some(band) if part.rows.start < band[0].rows.end => {
                    return Err(overlapping(&part));
                }
                _ => bands.push(vec![part]),
            }
        }
        for band in &bands {
            let mut next = 0;
            for part in band {
                if part.columns.start != next {
                    return Err(overlapping(part));
                }
                next = part.columns.end;
            }
            if next != columns {
                return Err(overlapping(&band[0]));
            }
        }
        Ok(Self { columns, dtype, bands })
    }

    /// The dtype of every part.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The stored tensors that the parts lie in; one that holds several is named several times.
    pub fn sources(&self) -> impl Iterator<Item = Side<'a>> + '_ {
        self.bands.iter().flatten().map(|part| part.source)
    }

    /// The end of the run of whole rows, of about `numel` elements, that begins at element `start`
    /// of `total`, and its band; rows without a counterpart have none. Each run begins where the one
    /// before it ends.
    pub(crate) fn run(&self, start: usize, total: usize, numel: usize) -> (usize, Option<usize>) {
        let step = self.step(numel);
        let row = start / self.columns;
        let at = self.bands.partition_point(|band| band[0].rows.end <= row);
        let (end, band) = match self.bands.get(at).map(|band| &band[0].rows) {
            Some(rows) if rows.start <= row => (rows.end, Some(at)),
            Some(rows) => (rows.start, None),
            None => (total / self.columns, None),
        };
        (end.min(row + step) * self.columns, band)
    }

    /// The most elements that a run has.
    pub(crate) fn longest(&self, total: usize, numel: usize) -> usize {
        total.min(self.step(numel) * self.columns)
    }

    /// The most bytes that [`Composed::gather`] uses aside for such runs.
    pub(crate) fn scratch_nbytes(&self, numel: usize) -> usize {
        let step = self.step(numel);
        let most = self.bands.iter().flatten().map(|part| part.scratch_numel(step, self.columns));
        most.max().unwrap_or(0) * self.dtype.nbytes()
    }

    /// Where the elements `range` of one band lie, roughly: for each part one range of its file,
    /// from the first element to the last.
    pub(crate) fn spans(
        &self,
        band: usize,
        range: &Range<usize>,
    ) -> impl Iterator<Item = (Side<'a>, Range<u64>)> + '_ {
        let rows = range.start / self.columns..range.end / self.columns;
        let nbytes = self.dtype.nbytes();
        self.bands[band].iter().map(move |part| {
            let first = part.offset + (rows.start - part.rows.start) * part.row_stride;
            let last = first
                + (rows.len() - 1) * part.row_stride
                + (part.columns.len() - 1) * part.column_stride;
            let start = part.source.tensor.range.start;
            let span = start + (first * nbytes) as u64..start + ((last + 1) * nbytes) as u64;
            (part.source, span)
        })
    }

    fn step(&self, numel: usize) -> usize {
        // A whole number of blocks that share a scale, where a run can be one.
        let rows = INT8_BLOCK / gcd(self.columns.max(1), INT8_BLOCK);
        (numel / self.columns.max(1) / rows).max(1) * rows
    }

    /// Fill `packed` with the elements `range` of the composed tensor, which lie in one band, and
    /// return how many bytes were read.
    pub(crate) fn gather(
        &self,
        band: usize,
        range: &Range<usize>,
        packed: &mut Vec<u8>,
        scratch: &mut Vec<u8>,
    ) -> Result<u64> {
        let nbytes = self.dtype.nbytes();
        packed.resize(range.len() * nbytes, 0);
        let rows = range.start / self.columns..range.end / self.columns;
        let mut read = 0;
        for part in &self.bands[band] {
            read += part.gather(&rows, self.columns, nbytes, packed, scratch)?;
        }
        Ok(read)
    }

    /// The bytes of single elements, in the order asked for; those without a counterpart are absent.
    pub(crate) fn pick(&self, elements: &[usize], out: &mut Vec<Option<[u8; 8]>>) -> Result<()> {
        let nbytes = self.dtype.nbytes();
        for &element in elements {
            let (row, column) = (element / self.columns, element % self.columns);
            let at = self.bands.partition_point(|band| band[0].rows.end <= row);
            let part = self
                .bands
                .get(at)
                .and_then(|band| band.iter().find(|part| part.columns.contains(&column)))
                .filter(|part| part.rows.contains(&row));
            out.push(match part {
                None => None,
                Some(part) => {
                    let index = part.offset
                        + (row - part.rows.start) * part.row_stride
                        + (column - part.columns.start) * part.column_stride;
                    let mut bytes = [0; 8];
                    part.read(index, &mut bytes[..nbytes], nbytes)?;
                    Some(bytes)
                }
            });
        }
        Ok(())
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A shape as rows × columns: the last dimension, and all others together.
pub(crate) fn matrix(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [numel] => (*numel, 1),
        [outer @ .., columns] => (outer.iter().product(), *columns),
    }
}

fn overlapping(part: &Part<Side<'_>>) -> Error {
    Error::Argument(format!(
        "the parts of a composed tensor overlap or leave a gap at rows {:?}, columns {:?} from {}",
        part.rows, part.columns, part.source.tensor.name
    ))
}

fn check_part(part: &Part<Side<'_>>, rows: usize, columns: usize) -> Result<()> {
    let inside = !part.rows.is_empty()
        && !part.columns.is_empty()
        && part.rows.end <= rows
        && part.columns.end <= columns;
    let last = (part.rows.len().wrapping_sub(1)).checked_mul(part.row_stride).and_then(|down| {
        let across = part.columns.len().wrapping_sub(1).checked_mul(part.column_stride)?;
        part.offset.checked_add(down)?.checked_add(across)
    });
    let stored = last.is_some_and(|last| last < part.source.tensor.numel());
    if inside && stored && (part.row_stride == 1 || part.column_stride == 1) {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "a part of rows {:?} and columns {:?} of a tensor of {rows} × {columns} does not fit {}, \
         which has {} elements, at offset {} with strides {} and {}",
        part.rows,
        part.columns,
        part.source.tensor.name,
        part.source.tensor.numel(),
        part.offset,
        part.row_stride,
        part.column_stride
    )))
}

impl Part<Side<'_>> {
    /// The most elements that gathering up to `rows` rows into rows of `width` takes aside.
    fn scratch_numel(&self, rows: usize, width: usize) -> usize {
        let (down, across) = (rows.min(self.rows.len()), self.columns.len());
        match (self.column_stride == 1, self.row_stride == across) {
            (true, true) if across == width => 0,
            (true, true) => group(across).min(down) * across,
            (true, false) => 0,
            // A last run of fewer rows is gathered in larger groups, but of no more elements.
            (false, _) => down.max(GROUP).min(down * across),
        }
    }

    fn read(&self, element: usize, buffer: &mut [u8], nbytes: usize) -> Result<()> {
        let start = self.source.tensor.range.start + (element * nbytes) as u64;
        self.source.shard.read_exact_at(buffer, start)
    }

    fn gather(
        &self,
        rows: &Range<usize>,
        width: usize,
        nbytes: usize,
        packed: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<u64> {
        let (down, across) = (rows.len(), self.columns.len());
        let first = self.offset + (rows.start - self.rows.start) * self.row_stride;
        let row_nbytes = width * nbytes;
        let column_nbytes = self.columns.start * nbytes;
        let count = down * across * nbytes;
        if self.column_stride == 1 {
            if self.row_stride == across && across == width {
                self.read(first, &mut packed[..count], nbytes)?;
                return Ok(count as u64);
            }
            if self.row_stride == across {
                let group = group(across).min(down);
                for top in (0..down).step_by(group) {
                    scratch.resize(group.min(down - top) * across * nbytes, 0);
                    self.read(first + top * across, scratch, nbytes)?;
                    for (row, source) in scratch.chunks_exact(across * nbytes).enumerate() {
                        let at = (top + row) * row_nbytes + column_nbytes;
                        packed[at..at + source.len()].copy_from_slice(source);
                    }
                }
                return Ok(count as u64);
            }
            for row in 0..down {
                let at = row * row_nbytes + column_nbytes;
                let target = &mut packed[at..at + across * nbytes];
                self.read(first + row * self.row_stride, target, nbytes)?;
            }
            return Ok(count as u64);
        }
        // Transposed: a column of the composed tensor is a run of the stored one.
        let group = group(down).min(across);
        for left in (0..across).step_by(group) {
            let columns = group.min(across - left);
            scratch.resize(columns * down * nbytes, 0);
            let first = first + left * self.column_stride;
            if self.column_stride == down {
                self.read(first, scratch, nbytes)?;
            } else {
                for (column, run) in scratch.chunks_exact_mut(down * nbytes).enumerate() {
                    self.read(first + column * self.column_stride, run, nbytes)?;
                }
            }
            let packed = &mut packed[column_nbytes + left * nbytes..];
            match nbytes {
                2 => transpose::<2>(scratch, down, columns, packed, row_nbytes),
                4 => transpose::<4>(scratch, down, columns, packed, row_nbytes),
                _ => transpose::<8>(scratch, down, columns, packed, row_nbytes),
            }
        }
        Ok(count as u64)
    }
}

/// How many runs of so many elements are gathered at a time.
fn group(run: usize) -> usize {
    (GROUP / run.max(1)).max(1)
}

/// Copy `columns` runs of `rows` elements of N bytes into rows of `row_nbytes`.
fn transpose<const N: usize>(
    runs: &[u8],
    rows: usize,
    columns: usize,
    packed: &mut [u8],
    row_nbytes: usize,
) {
    // Tiles, so that neither side walks through memory a cache line an element.
    const TILE: usize = 32;
    for top in (0..rows).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for row in top..rows.min(top + TILE) {
                for column in left..columns.min(left + TILE) {
                    let (from, to) = ((column * rows + row) * N, row * row_nbytes + column * N);
                    packed[to..to + N].copy_from_slice(&runs[from..from + N]);
                }
            }
        }
    }
}
