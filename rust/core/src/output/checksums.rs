//! CRC-32 of a tensor's bytes, one for every block of them, taken as they are written.
//!
//! Owns the sum of pieces that come in any order from any thread, and the text that `drift.json`
//! has of the sums. The CRC is that of zlib, so any language can check it. docs/format.md describes
//! it for others.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use crc32fast::Hasher;

/// Bytes of a tensor that share a checksum; the last block may be shorter.
pub const BLOCK_NBYTES: usize = 1 << 20;

/// Hexadecimal digits of one checksum.
const DIGITS: usize = 8;

/// The checksum of a block.
pub fn checksum(block: &[u8]) -> u32 {
    crc32fast::hash(block)
}

/// Where block number `number` of a tensor of `nbytes` is in it.
pub fn block(number: usize, nbytes: usize) -> Range<usize> {
    let start = number * BLOCK_NBYTES;
    start..nbytes.min(start.saturating_add(BLOCK_NBYTES))
}

/// The checksums that a text of [`Checksums::text`] has; none where it is not one of a tensor of
/// `nbytes`.
pub fn parse(text: &str, nbytes: usize) -> Option<Vec<u32>> {
    let digits = text.as_bytes();
    let whole = digits.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !whole || digits.len() != nbytes.div_ceil(BLOCK_NBYTES).checked_mul(DIGITS)? {
        return None;
    }
    let one = |digits| u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
    digits.chunks(DIGITS).map(one).collect()
}

/// The checksums of a tensor that is being written.
#[derive(Debug)]
pub(crate) struct Checksums {
    nbytes: usize,
    blocks: Vec<AtomicU32>,
}

impl Checksums {
    pub(crate) fn new(nbytes: usize) -> Self {
        let blocks = (0..nbytes.div_ceil(BLOCK_NBYTES)).map(|_| AtomicU32::new(0)).collect();
        Self { nbytes, blocks }
    }

    /// Take in bytes that begin at `offset`. Each byte of the tensor is to be taken once, in any
    /// order: the CRC of a block is the exclusive or of those of its pieces, each moved past the
    /// bytes that follow it.
    pub(crate) fn take(&self, mut offset: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let number = offset / BLOCK_NBYTES;
            let end = block(number, self.nbytes).end;
            let Some(sum) = self.blocks.get(number).filter(|_| offset < end) else { return };
            let (piece, rest) = bytes.split_at(bytes.len().min(end - offset));
            (offset, bytes) = (offset + piece.len(), rest);
            sum.fetch_xor(followed(checksum(piece), end - offset), Ordering::Relaxed);
        }
    }

    /// The checksum of block number `number`.
    pub(crate) fn of_block(&self, number: usize) -> Option<u32> {
        self.blocks.get(number).map(|sum| sum.load(Ordering::Relaxed))
    }

    /// Eight hexadecimal digits for each block, in order.
    pub(super) fn text(&self) -> String {
        let sums = self.blocks.iter().map(|sum| sum.load(Ordering::Relaxed));
        sums.map(|sum| format!("{sum:08x}")).collect()
    }
}

/// What a piece of this checksum adds to that of a whole in which `nbytes` follow it.
fn followed(checksum: u32, nbytes: usize) -> u32 {
    let mut moved = Hasher::new_with_initial_len(checksum, 0);
    moved.combine(&Hasher::new_with_initial_len(0, nbytes as u64));
    moved.finalize()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn pieces_in_any_order_make_the_checksums_of_the_blocks() {
        let bytes = bytes(2 * BLOCK_NBYTES + 12_345);
        let expected: Vec<u32> = bytes.chunks(BLOCK_NBYTES).map(crc32fast::hash).collect();
        for length in [1_000_003, 5 << 18, 4096, bytes.len()] {
            let sums = Checksums::new(bytes.len());
            let mut pieces: Vec<usize> = (0..bytes.len()).step_by(length).collect();
            pieces.rotate_left(1);
            for start in pieces.into_iter().rev() {
                sums.take(start, &bytes[start..bytes.len().min(start + length)]);
            }
            assert_eq!(parse(&sums.text(), bytes.len()).unwrap(), expected, "{length}");
        }
    }

    #[test]
    fn it_is_the_crc_of_zlib_and_nothing_has_none() {
        let sums = Checksums::new(9);
        sums.take(0, b"123456789");
        assert_eq!(sums.text(), "cbf43926");
        assert_eq!(Checksums::new(0).text(), "");
        assert_eq!(parse("", 0), Some(vec![]));
    }

    #[test]
    fn a_text_of_another_length_or_of_other_digits_is_refused() {
        for text in
            ["", "cbf4392", "cbf43926a", "cbf4392g", "CBF43926", "+bf43926", "cbf43926cbf43926"]
        {
            assert_eq!(parse(text, 9), None, "{text}");
        }
    }
}
