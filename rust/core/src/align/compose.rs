//! A tensor that is fused in one checkpoint and split in the other.
//!
//! Owns where its blocks are stored and how runs of rows are gathered from them, chunk by chunk, so
//! that no whole tensor is ever copied. The multimodal tensor is seen as rows × columns; a [`Block`]
//! is a rectangle of it that a tensor of the reasoning checkpoint stores, transposed or not. Blocks
//! do not overlap, and in their rows they cover every column.

use std::ops::Range;

use crate::checkpoint::Operand;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::INT8_BLOCK;

/// Elements of one run of rows: enough to read a transposed block of a real expert in runs of a
/// kilobyte or more.
pub(crate) const RUN: usize = 1 << 20;
/// Elements that are gathered in a buffer at a time: enough for long reads, few enough to stay in a
/// core's cache.
const GROUP: usize = 1 << 17;

/// A rectangle of a tensor, and the elements of a stored one that fill it.
#[derive(Clone, Debug)]
pub struct Block<S> {
    /// The stored tensor.
    pub source: S,
    /// Rows of the tensor that the block is part of.
    pub rows: Range<usize>,
    /// Columns of that tensor.
    pub columns: Range<usize>,
    /// The first element, by its number in the stored tensor.
    pub offset: usize,
    /// Elements from one row to the next in the stored tensor.
    pub row_stride: usize,
    /// Elements from one column to the next in the stored tensor; it or the other one is 1.
    pub column_stride: usize,
}

/// Blocks in ascending order of row and column, grouped into bands of the same rows.
pub struct Blocks<'a> {
    columns: usize,
    dtype: Dtype,
    bands: Vec<Vec<Block<Operand<'a>>>>,
}

impl<'a> Blocks<'a> {
    /// Check that the blocks are inside their tensors, do not overlap and leave no column out.
    ///
    /// Rows that no block covers are not stored: their difference is zero, and no sum includes them.
    ///
    /// # Errors
    /// Blocks that break these rules, that differ in dtype, or whose dtype cannot be subtracted.
    pub fn new(shape: &[usize], mut blocks: Vec<Block<Operand<'a>>>) -> Result<Self> {
        let (rows, columns) = matrix(shape);
        let Some(first) = blocks.first() else {
            return Err(Error::Argument("a tensor needs at least one block".to_owned()));
        };
        let dtype = first.source.dtype()?;
        for block in &blocks {
            check_block(block, rows, columns)?;
            if block.source.dtype()? != dtype {
                return Err(Error::tensor(
                    block.source.shard.path(),
                    &block.source.tensor.name,
                    format!(
                        "dtype {} differs from {} of the other blocks of the same tensor; save \
                         the checkpoint in one dtype",
                        block.source.tensor.dtype,
                        dtype.name()
                    ),
                ));
            }
        }
        blocks.sort_by_key(|block| (block.rows.start, block.rows.end, block.columns.start));
        let mut bands: Vec<Vec<Block<Operand<'a>>>> = Vec::new();
        for block in blocks {
            match bands.last_mut() {
                Some(band) if band[0].rows == block.rows => band.push(block),
                Some(band) if block.rows.start < band[0].rows.end => {
                    return Err(overlapping(&block));
                }
                _ => bands.push(vec![block]),
            }
        }
        for band in &bands {
            let mut next = 0;
            for block in band {
                if block.columns.start != next {
                    return Err(overlapping(block));
                }
                next = block.columns.end;
            }
            if next != columns {
                return Err(overlapping(&band[0]));
            }
        }
        Ok(Self { columns, dtype, bands })
    }

    /// The dtype of every block.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Elements of one row.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// The stored tensors that the blocks are part of, each once for every block.
    pub fn sources(&self) -> impl Iterator<Item = Operand<'a>> + '_ {
        self.bands.iter().flatten().map(|block| block.source)
    }

    /// The end and the band of the run of whole rows, about [`RUN`] elements, that begins at element
    /// `start` of `total`. Rows that are not stored have no band. A run begins where the one before
    /// it ends.
    pub(crate) fn run(&self, start: usize, total: usize) -> (usize, Option<usize>) {
        let step = self.step();
        let row = start / self.columns;
        let at = self.bands.partition_point(|band| band[0].rows.end <= row);
        let (end, band) = match self.bands.get(at).map(|band| &band[0].rows) {
            Some(rows) if rows.start <= row => (rows.end, Some(at)),
            Some(rows) => (rows.start, None),
            None => (total / self.columns, None),
        };
        (end.min(row + step) * self.columns, band)
    }

    /// The stored runs among some whole rows, and the band of each.
    pub(crate) fn runs(
        &self,
        elements: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, usize)> + '_ {
        let Range { mut start, end } = elements.clone();
        std::iter::from_fn(move || {
            while start < end {
                let (stop, band) = self.run(start, end);
                let run = start..stop.min(end);
                start = run.end;
                if let Some(band) = band {
                    return Some((run, band));
                }
            }
            None
        })
    }

    /// The most elements of a run.
    pub(crate) fn longest(&self, total: usize) -> usize {
        total.min(self.step() * self.columns)
    }

    /// The most bytes of buffers that [`Blocks::gather`] needs for such runs.
    pub(crate) fn scratch_nbytes(&self) -> usize {
        let step = self.step();
        let most = self.bands.iter().flatten().map(|block| block.scratch_numel(step, self.columns));
        most.max().unwrap_or(0) * self.dtype.nbytes()
    }

    /// Ask the disk ahead of time for elements that are read later.
    pub(crate) fn prefetch(&self, elements: &Range<usize>) {
        for (run, band) in self.runs(elements) {
            for (source, span) in self.spans(band, &run) {
                source.shard.prefetch(span);
            }
        }
    }

    /// Roughly where the elements `range` of one band are stored: for each block one range of its file,
    /// from the first element to the last.
    fn spans(
        &self,
        band: usize,
        range: &Range<usize>,
    ) -> impl Iterator<Item = (Operand<'a>, Range<u64>)> + '_ {
        let rows = range.start / self.columns..range.end / self.columns;
        let nbytes = self.dtype.nbytes();
        self.bands[band].iter().map(move |block| {
            let first = block.offset + (rows.start - block.rows.start) * block.row_stride;
            let last = first
                + (rows.len() - 1) * block.row_stride
                + (block.columns.len() - 1) * block.column_stride;
            let start = block.source.tensor.range.start;
            let span = start + (first * nbytes) as u64..start + ((last + 1) * nbytes) as u64;
            (block.source, span)
        })
    }

    fn step(&self) -> usize {
        // A whole number of blocks that share a scale, if a run can have one.
        let rows = INT8_BLOCK / gcd(self.columns.max(1), INT8_BLOCK);
        (RUN / self.columns.max(1) / rows).max(1) * rows
    }

    /// Fill `packed` with the elements `range`, which are in one band, and return how many bytes were
    /// read.
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
        for block in &self.bands[band] {
            read += block.gather(&rows, self.columns, nbytes, packed, scratch)?;
        }
        Ok(read)
    }

    /// The bytes of single elements, in the given order, without those that are not stored.
    pub(crate) fn pick(&self, elements: &[usize], out: &mut Vec<Option<[u8; 8]>>) -> Result<()> {
        let nbytes = self.dtype.nbytes();
        for &element in elements {
            let (row, column) = (element / self.columns, element % self.columns);
            let at = self.bands.partition_point(|band| band[0].rows.end <= row);
            let block = self
                .bands
                .get(at)
                .and_then(|band| band.iter().find(|block| block.columns.contains(&column)))
                .filter(|block| block.rows.contains(&row));
            out.push(match block {
                None => None,
                Some(block) => {
                    let index = block.offset
                        + (row - block.rows.start) * block.row_stride
                        + (column - block.columns.start) * block.column_stride;
                    let mut bytes = [0; 8];
                    block.read(index, &mut bytes[..nbytes], nbytes)?;
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

fn overlapping(block: &Block<Operand<'_>>) -> Error {
    Error::Argument(format!(
        "the blocks of a tensor overlap or leave a gap at rows {:?}, columns {:?} from {}",
        block.rows, block.columns, block.source.tensor.name
    ))
}

fn check_block(block: &Block<Operand<'_>>, rows: usize, columns: usize) -> Result<()> {
    let inside = !block.rows.is_empty()
        && !block.columns.is_empty()
        && block.rows.end <= rows
        && block.columns.end <= columns;
    let last = (block.rows.len().wrapping_sub(1)).checked_mul(block.row_stride).and_then(|down| {
        let across = block.columns.len().wrapping_sub(1).checked_mul(block.column_stride)?;
        block.offset.checked_add(down)?.checked_add(across)
    });
    let stored = last.is_some_and(|last| last < block.source.tensor.numel());
    if inside && stored && (block.row_stride == 1 || block.column_stride == 1) {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "a block of rows {:?} and columns {:?} of a tensor of {rows} × {columns} does not fit {}, \
         which has {} elements, at offset {} with strides {} and {}",
        block.rows,
        block.columns,
        block.source.tensor.name,
        block.source.tensor.numel(),
        block.offset,
        block.row_stride,
        block.column_stride
    )))
}

impl Block<Operand<'_>> {
    /// The most elements in buffers while up to `rows` rows are gathered into rows of `width`.
    fn scratch_numel(&self, rows: usize, width: usize) -> usize {
        let (down, across) = (rows.min(self.rows.len()), self.columns.len());
        match (self.column_stride == 1, self.row_stride == across) {
            (true, true) if across == width => 0,
            (true, true) => group(across).min(down) * across,
            (true, false) => 0,
            // A shorter last run is gathered in larger groups, but not of more elements.
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
        let first = self.offset + (rows.start - self.rows.start) * self.row_stride;
        let out = Packed {
            down: rows.len(),
            row_nbytes: width * nbytes,
            column_nbytes: self.columns.start * nbytes,
            nbytes,
            bytes: packed,
        };
        let count = out.down * self.columns.len() * nbytes;
        if self.column_stride == 1 {
            self.gather_rows(first, out, scratch)?;
        } else {
            self.gather_columns(first, out, scratch)?;
        }
        Ok(count as u64)
    }

    /// Gather if a row of the tensor is a run of the stored one.
    fn gather_rows(&self, first: usize, out: Packed<'_>, scratch: &mut Vec<u8>) -> Result<()> {
        let Packed { down, row_nbytes, column_nbytes, nbytes, bytes } = out;
        let across = self.columns.len();
        if self.row_stride != across {
            for row in 0..down {
                let at = row * row_nbytes + column_nbytes;
                let target = &mut bytes[at..at + across * nbytes];
                self.read(first + row * self.row_stride, target, nbytes)?;
            }
            return Ok(());
        }
        if across * nbytes == row_nbytes {
            return self.read(first, &mut bytes[..down * row_nbytes], nbytes);
        }
        let group = group(across).min(down);
        for top in (0..down).step_by(group) {
            scratch.resize(group.min(down - top) * across * nbytes, 0);
            self.read(first + top * across, scratch, nbytes)?;
            for (row, source) in scratch.chunks_exact(across * nbytes).enumerate() {
                let at = (top + row) * row_nbytes + column_nbytes;
                bytes[at..at + source.len()].copy_from_slice(source);
            }
        }
        Ok(())
    }

    /// Gather if a column of the tensor is a run of the stored one.
    fn gather_columns(&self, first: usize, out: Packed<'_>, scratch: &mut Vec<u8>) -> Result<()> {
        let Packed { down, row_nbytes, column_nbytes, nbytes, bytes } = out;
        let across = self.columns.len();
        let group = group(down).min(across);
        for start in (0..across).step_by(group) {
            let columns = group.min(across - start);
            scratch.resize(columns * down * nbytes, 0);
            let first = first + start * self.column_stride;
            if self.column_stride == down {
                self.read(first, scratch, nbytes)?;
            } else {
                for (column, run) in scratch.chunks_exact_mut(down * nbytes).enumerate() {
                    self.read(first + column * self.column_stride, run, nbytes)?;
                }
            }
            let packed = &mut bytes[column_nbytes + start * nbytes..];
            match nbytes {
                2 => transpose::<2>(scratch, down, columns, packed, row_nbytes),
                4 => transpose::<4>(scratch, down, columns, packed, row_nbytes),
                _ => transpose::<8>(scratch, down, columns, packed, row_nbytes),
            }
        }
        Ok(())
    }
}

/// Rows that are being filled, and the place of a block in each.
struct Packed<'b> {
    down: usize,
    row_nbytes: usize,
    column_nbytes: usize,
    /// Of an element.
    nbytes: usize,
    bytes: &'b mut [u8],
}

/// The number of runs of `run` elements that are gathered at a time.
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
    // In tiles, so that neither input nor output touches a new cache line for every element.
    const TILE: usize = 32;
    for top in (0..rows).step_by(TILE) {
        for start in (0..columns).step_by(TILE) {
            for row in top..rows.min(top + TILE) {
                for column in start..columns.min(start + TILE) {
                    let (from, to) = ((column * rows + row) * N, row * row_nbytes + column * N);
                    packed[to..to + N].copy_from_slice(&runs[from..from + N]);
                }
            }
        }
    }
}
