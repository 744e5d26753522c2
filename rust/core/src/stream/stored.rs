//! The tensors of a delta on disk, whose bytes are compared with their checksums as they are read.
//!
//! Owns which bytes are read with those that are wanted, since a checksum is one of a whole block, and
//! the decoding of int8.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::chunk::CHUNK;
use super::load::{Found, Landed, Memory, Origin, Piece, Run, load};
use crate::checkpoint::{Checkpoint, Reader, Shard, Tensor};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::{INT8_BLOCK, decode_int8};
use crate::output::checksums::{BLOCK_NBYTES, Checksums, block, parse};
use crate::output::format::SCALE;

/// An open delta.
#[derive(Debug)]
pub struct StoredDelta {
    checkpoint: Checkpoint,
    /// Of each tensor; none of a delta that was written without.
    checksums: Option<HashMap<String, Vec<u32>>>,
}

impl StoredDelta {
    /// Open a delta by its index; `checksums` are the texts that its description has, by tensor.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`], or checksums that are not those of its tensors.
    pub fn open(index: &Path, checksums: Option<&HashMap<String, String>>) -> Result<Self> {
        let checkpoint = Checkpoint::open(index, Reader::Auto)?;
        let checksums = checksums.map(|texts| parse_all(&checkpoint, texts)).transpose()?;
        Ok(Self { checkpoint, checksums })
    }

    /// Its tensors.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Fill `out` with elements of a tensor as they are stored, as part of a copy that
    /// [`StoredDelta::compare`] is called for.
    ///
    /// # Errors
    /// A tensor or elements that are not there, `out` of another size, or a failed read.
    pub fn copy(&self, name: &str, elements: Range<usize>, out: &mut [u8]) -> Result<()> {
        let (shard, tensor) = self.checkpoint.tensor(name)?;
        let range = tensor.elements(elements.start, elements.end)?.range;
        if out.len() as u64 != range.end - range.start {
            let expected = range.end - range.start;
            let message =
                format!("the buffer for {name} has {} bytes, expected {expected}", out.len());
            return Err(Error::Argument(message));
        }
        shard.read_exact_at(out, range.start)
    }

    /// Compare the checksums of a copy of a tensor, as [`crate::output::Writer::checksums`] gives them, with
    /// those that it has here.
    ///
    /// # Errors
    /// Bytes that are not those that were written.
    pub fn compare(&self, name: &str, copied: &str) -> Result<()> {
        let (shard, tensor) = self.checkpoint.tensor(name)?;
        let copied = parse(copied, nbytes(tensor)).unwrap_or_default();
        let known = self.known(name).unwrap_or(&copied);
        known.iter().enumerate().try_for_each(|(number, expected)| {
            check(shard, tensor, number, copied.get(number).copied(), Some(*expected))
        })
    }

    /// Load elements of tensors into memory, on up to `threads` threads, and return what was found:
    /// of numbers, as they come into memory, also the squares.
    ///
    /// # Errors
    /// A tensor or elements that are not there, memory of another size, a failed read, bytes that are
    /// not those that were written, or an interruption by `landed`.
    pub fn load(
        &self,
        wanted: &[Wanted],
        memory: Memory<'_>,
        threads: usize,
        landed: Landed<'_>,
    ) -> Result<Vec<Found>> {
        let sources: Vec<Source<'_>> =
            wanted.iter().map(|one| self.source(one)).collect::<Result<_>>()?;
        let cell = sources.iter().map(Source::least_nbytes).max().unwrap_or(0);
        let runs = sources.iter().map(|source| source.run(cell)).collect();
        let files = Files { sources, runs };
        let (found, _) = load(&files, memory, threads, landed)?;
        let read = files.sources.iter().filter(|source| !source.elements.is_empty());
        read.flat_map(Source::stored).try_for_each(Stored::check)?;
        Ok(found)
    }

    fn source(&self, wanted: &Wanted) -> Result<Source<'_>> {
        let Wanted { name, elements, as_stored } = wanted;
        let main = self.stored(name, elements.clone())?;
        let is_plain = *as_stored || main.tensor.dtype != safetensors::Dtype::I8;
        let scales = if is_plain {
            None
        } else {
            let blocks = elements.start / INT8_BLOCK..elements.end.div_ceil(INT8_BLOCK);
            let scales = self.stored(&format!("{name}{SCALE}"), blocks)?;
            check_scales(&scales, main.tensor.numel())?;
            Some(scales)
        };
        let dtype = match scales {
            Some(_) => Some(Dtype::BF16),
            None if *as_stored => None,
            None => Dtype::from_header(main.tensor.dtype),
        };
        let stored = nbytes(main.tensor).checked_div(main.tensor.numel()).unwrap_or(1);
        let nbytes = dtype.map_or(stored, Dtype::nbytes);
        Ok(Source { main, scales, elements: elements.clone(), dtype, nbytes })
    }

    fn stored(&self, name: &str, elements: Range<usize>) -> Result<Stored<'_>> {
        let (shard, tensor) = self.checkpoint.tensor(name)?;
        let range = tensor.elements(elements.start, elements.end)?.range;
        let start = tensor.range.start;
        Ok(Stored {
            shard,
            tensor,
            wanted: (range.start - start) as usize..(range.end - start) as usize,
            sums: self.known(name).map(|known| (known, Checksums::new(nbytes(tensor)))),
        })
    }

    fn known(&self, name: &str) -> Option<&[u32]> {
        self.checksums.as_ref().map(|all| all.get(name).map_or(&[][..], Vec::as_slice))
    }
}

/// Elements of a tensor that are asked for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The tensor's name in the delta's files.
    pub name: String,
    /// Which ones.
    pub elements: Range<usize>,
    /// The codes of an int8 Δ as they are, instead of their values.
    pub as_stored: bool,
}

struct Files<'a> {
    sources: Vec<Source<'a>>,
    runs: Vec<Run>,
}

/// Buffers of one worker: of blocks that share a checksum with what is wanted, of codes and scales.
#[derive(Default)]
struct Scratch {
    aside: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Origin for Files<'_> {
    type Scratch = Scratch;

    fn runs(&self) -> &[Run] {
        &self.runs
    }

    fn scratch(&self) -> Scratch {
        Scratch::default()
    }

    fn held_nbytes(scratch: &Scratch) -> usize {
        scratch.aside.capacity() + scratch.codes.capacity() + scratch.scales.capacity()
    }

    fn read(
        &self,
        run: usize,
        elements: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<Piece> {
        self.sources[run].read(elements, out, scratch)
    }
}

/// What one run is read from.
struct Source<'a> {
    main: Stored<'a>,
    /// If codes are decoded.
    scales: Option<Stored<'a>>,
    elements: Range<usize>,
    /// Of what comes into memory, if it is numbers.
    dtype: Option<Dtype>,
    /// Bytes of one element in memory.
    nbytes: usize,
}

impl<'a> Source<'a> {
    fn stored(&self) -> impl Iterator<Item = &Stored<'a>> {
        std::iter::once(&self.main).chain(&self.scales)
    }

    /// The least bytes of a piece.
    fn least_nbytes(&self) -> usize {
        CHUNK * self.nbytes
    }

    /// Pieces of about so many bytes.
    fn run(&self, nbytes: usize) -> Run {
        Run { numel: self.elements.len(), nbytes: self.nbytes, piece: nbytes / self.nbytes }
    }

    fn read(&self, elements: Range<usize>, out: &mut [u8], scratch: &mut Scratch) -> Result<Piece> {
        let Scratch { aside, codes, scales: stored } = scratch;
        let mut piece = Piece { nbytes: out.len() as u64, ..Piece::default() };
        let first = self.elements.start + elements.start;
        let elements = first..first + elements.len();
        let Some(scales) = &self.scales else {
            let bytes = elements.start * self.nbytes..elements.end * self.nbytes;
            self.main.read(bytes.clone(), bytes, out, aside)?;
            if let Some(dtype) = self.dtype {
                piece.measure(dtype, out);
            }
            return Ok(piece);
        };
        codes.resize(elements.len(), 0);
        self.main.read(elements.clone(), elements.clone(), codes, aside)?;
        let blocks = elements.start / INT8_BLOCK..elements.end.div_ceil(INT8_BLOCK);
        stored.resize(2 * blocks.len(), 0);
        // Two pieces may have elements of one block; the earlier one counts its scale.
        let is_first = elements.start == self.elements.start;
        let counted = if is_first { blocks.start } else { elements.start.div_ceil(INT8_BLOCK) };
        let bytes = 2 * blocks.start..2 * blocks.end;
        scales.read(bytes, 2 * counted..2 * blocks.end, stored, aside)?;
        decode_int8(codes, stored, elements.start % INT8_BLOCK, out);
        piece.measure(Dtype::BF16, out);
        Ok(piece)
    }
}

/// Bytes of one tensor that are wanted.
struct Stored<'a> {
    shard: &'a Shard,
    tensor: &'a Tensor,
    /// Counted from the tensor's first.
    wanted: Range<usize>,
    /// The checksums that are known, and those of what is read.
    sums: Option<(&'a [u32], Checksums)>,
}

impl Stored<'_> {
    /// Read bytes of the tensor, and those around what is wanted that share a checksum with it.
    /// Checksums take in the bytes that are `counted`; of all pieces these are each byte once.
    fn read(
        &self,
        bytes: Range<usize>,
        counted: Range<usize>,
        out: &mut [u8],
        aside: &mut Vec<u8>,
    ) -> Result<()> {
        let at = |start: usize| self.tensor.range.start + start as u64;
        self.shard.read_exact_at(out, at(bytes.start))?;
        let Some((_, sums)) = &self.sums else { return Ok(()) };
        sums.take(counted.start, &out[counted.start - bytes.start..]);
        let around = |start: usize| block(start / BLOCK_NBYTES, nbytes(self.tensor));
        let before = around(counted.start).start..counted.start;
        let after = counted.end..around(counted.end.saturating_sub(1)).end;
        let edges =
            [(before, counted.start == self.wanted.start), (after, counted.end == self.wanted.end)];
        for (rest, is_edge) in edges {
            if is_edge && !rest.is_empty() {
                aside.resize(rest.len(), 0);
                self.shard.read_exact_at(aside, at(rest.start))?;
                sums.take(rest.start, aside);
            }
        }
        Ok(())
    }

    /// Compare the checksums of what was read.
    fn check(&self) -> Result<()> {
        let Some((known, sums)) = &self.sums else { return Ok(()) };
        let blocks = self.wanted.start / BLOCK_NBYTES..self.wanted.end.div_ceil(BLOCK_NBYTES);
        blocks.into_iter().try_for_each(|number| {
            let expected = known.get(number).copied();
            check(self.shard, self.tensor, number, sums.of_block(number), expected)
        })
    }
}

fn check(
    shard: &Shard,
    tensor: &Tensor,
    number: usize,
    found: Option<u32>,
    expected: Option<u32>,
) -> Result<()> {
    if found.is_some() && found == expected {
        return Ok(());
    }
    let Range { start, end } = block(number, nbytes(tensor));
    let shown = |sum: Option<u32>| sum.map_or("none".to_owned(), |sum| format!("{sum:08x}"));
    Err(Error::tensor(
        shard.path(),
        &tensor.name,
        format!(
            "its bytes {start} to {end} are not those that were written (checksum {}, expected \
             {}): the file was damaged or edited; copy the delta again from where it is whole, \
             or compute it again",
            shown(found),
            shown(expected)
        ),
    ))
}

fn nbytes(tensor: &Tensor) -> usize {
    (tensor.range.end - tensor.range.start) as usize
}

fn parse_all(
    checkpoint: &Checkpoint,
    texts: &HashMap<String, String>,
) -> Result<HashMap<String, Vec<u32>>> {
    let of = |shard: &Shard, tensor: &Tensor| {
        let nbytes = (tensor.range.end - tensor.range.start) as usize;
        let sums = texts.get(&tensor.name).and_then(|text| parse(text, nbytes));
        sums.map(|sums| (tensor.name.clone(), sums)).ok_or_else(|| {
            let message = "the delta's description has no valid checksums of it; copy the delta \
                           again from where it is whole, or compute it again";
            Error::tensor(shard.path(), &tensor.name, message)
        })
    };
    checkpoint.tensors().map(|(shard, tensor)| of(shard, tensor)).collect()
}

fn check_scales(scales: &Stored<'_>, numel: usize) -> Result<()> {
    let expected = [numel.div_ceil(INT8_BLOCK)];
    let tensor = scales.tensor;
    if tensor.dtype == safetensors::Dtype::F16 && tensor.shape == expected {
        return Ok(());
    }
    let message = format!(
        "dtype {} and shape {:?}, expected F16 and {expected:?}; compute the delta again",
        tensor.dtype, tensor.shape
    );
    Err(Error::tensor(scales.shard.path(), &tensor.name, message))
}
