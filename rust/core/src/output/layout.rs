//! Which tensors go into which shard, and at which place.

use std::collections::HashSet;

use safetensors::tensor::{Metadata, TensorInfo};

use super::format::{Slot, Storage};
use crate::error::{Error, Result};

/// The most bytes of a header that the format allows.
const MAX_HEADER_NBYTES: usize = 100_000_000;

/// One file of a delta: the differences in it and its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// The differences in it, by their place in the list.
    pub tensors: std::ops::Range<usize>,
    /// Its size, header included.
    pub nbytes: u64,
}

/// The files of a delta with these slots, in order. Writes nothing.
///
/// # Errors
/// No slots, or slots that cannot be laid out.
pub fn shards(slots: &[Slot], storage: Storage, max_shard_nbytes: u64) -> Result<Vec<ShardPlan>> {
    let mut start = 0;
    let plan = |shard: &ShardLayout<'_>| {
        let tensors = start..start + shard.slots.len() / storage.slot(1);
        start = tensors.end;
        ShardPlan { tensors, nbytes: shard.nbytes() }
    };
    Ok(layout(slots, storage, max_shard_nbytes)?.iter().map(plan).collect())
}

/// A shard's header, and the places of its tensors in the data after it.
pub(super) struct ShardLayout<'a> {
    pub(super) slots: &'a [Slot],
    pub(super) offsets: Vec<u64>,
    pub(super) data_nbytes: u64,
    pub(super) header: Vec<u8>,
}

impl ShardLayout<'_> {
    pub(super) fn nbytes(&self) -> u64 {
        self.header.len() as u64 + self.data_nbytes
    }
}

/// The shards of an output.
///
/// # Errors
/// No slots, two slots of the same name, or slots that cannot be laid out.
pub(super) fn layout(
    slots: &[Slot],
    storage: Storage,
    max_nbytes: u64,
) -> Result<Vec<ShardLayout<'_>>> {
    let mut names = HashSet::new();
    if let Some(twice) = slots.iter().find(|slot| !names.insert(slot.name.as_str())) {
        return Err(Error::Argument(format!(
            "two tensors would be named {:?}: one has that name, and the other has the scales of a third; \
             choose another dtype or leave one out",
            twice.name
        )));
    }
    // The slots of one Δ stay together, so that different processes can write the shards.
    let each = storage.slot(1);
    let mut shards = Vec::new();
    let (mut start, mut total) = (0, 0);
    for (index, tensor) in slots.chunks(each).enumerate() {
        let nbytes: u64 = tensor.iter().map(|slot| slot.nbytes() as u64).sum();
        let at = index * each;
        if at > start && total + nbytes > max_nbytes {
            shards.push(shard_layout(&slots[start..at])?);
            (start, total) = (at, 0);
        }
        total += nbytes;
    }
    if start < slots.len() {
        shards.push(shard_layout(&slots[start..])?);
    }
    if shards.is_empty() {
        return Err(Error::Argument("an output needs at least one tensor".to_owned()));
    }
    Ok(shards)
}

fn shard_layout(slots: &[Slot]) -> Result<ShardLayout<'_>> {
    let mut offsets = Vec::with_capacity(slots.len());
    let mut entries = Vec::with_capacity(slots.len());
    let mut end = 0;
    for slot in slots {
        let start = end;
        end += slot.nbytes();
        offsets.push(start as u64);
        let (dtype, shape) = (slot.dtype, slot.shape.clone());
        entries.push((slot.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
    }
    let tensors = Metadata::new(None, entries)
        .map_err(|error| Error::Argument(format!("cannot lay out the output: {error}")))?;
    let failed = |error| Error::Argument(format!("cannot write the output's header: {error}"));
    let tensors = serde_json::to_string(&tensors).map_err(failed)?;
    // Written by hand, since the order of a map's entries differs from run to run.
    let mut json = r#"{"__metadata__":{"format":"pt"},"#.to_owned();
    json += tensors.strip_prefix('{').unwrap_or(&tensors);
    let mut json = json.into_bytes();
    if json.len() > MAX_HEADER_NBYTES {
        return Err(Error::Argument(format!(
            "the header of a file of {} tensors would take {} bytes, and the format allows \
             {MAX_HEADER_NBYTES}; pass a smaller max_shard_size",
            slots.len(),
            json.len()
        )));
    }
    // As the format asks, spaces pad the header, so that data starts at a multiple of eight bytes.
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(ShardLayout { slots, offsets, data_nbytes: end as u64, header: bytes })
}
