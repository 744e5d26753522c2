//! How much a checkpoint may state: far beyond any model, and little enough to be dealt with at once.
//!
//! Names and headers come from strangers. Within these limits opening and aligning two checkpoints takes
//! seconds and some hundred megabytes; docs/reliability.md has the table.

use std::path::Path;

use crate::error::{Error, Result};

/// The limit that the safetensors format sets for a header.
pub(super) const HEADER_NBYTES: u64 = 100_000_000;
/// An index has less to say of a tensor than a header.
pub(super) const INDEX_NBYTES: u64 = 64 << 20;
/// The list of ranges of a partly downloaded shard; each range holds one tensor or several.
pub(super) const RANGES_NBYTES: u64 = 8 << 20;
/// Tensors of a checkpoint. A mixture of 384 experts in 61 layers with scales and shapes of its
/// packed weights has 210,000.
pub(super) const TENSORS: usize = 1 << 18;
/// Names of all tensors together.
pub(super) const NAMES_NBYTES: usize = 24 << 20;
/// Several times what the longest names of models take.
const NAME_NBYTES: usize = 512;
const NAME_COMPONENTS: usize = 64;
/// Digits of a number in a name, which then has a value in every language.
const NAME_DIGITS: usize = 18;
const DIMENSIONS: usize = 64;

/// What a header or an index has stated so far.
#[derive(Default)]
pub(super) struct Stated {
    tensors: usize,
    names_nbytes: usize,
}

impl Stated {
    /// Take a tensor of this name; what is wrong if it is one too many.
    pub(super) fn take(&mut self, name: &str) -> std::result::Result<(), String> {
        self.tensors += 1;
        self.names_nbytes += name.len();
        if self.tensors > TENSORS {
            return Err(format!("it has more than {TENSORS} tensors, which is the limit"));
        }
        if self.names_nbytes > NAMES_NBYTES {
            return Err(format!(
                "the names of its tensors have more than {NAMES_NBYTES} bytes, which is the limit"
            ));
        }
        Ok(())
    }
}

/// Refuse a name or a shape that no model has.
pub(super) fn check(path: &Path, name: &str, shape: &[usize]) -> Result<()> {
    let refuse = |why: String| {
        let shown: String = name.chars().take(64).collect();
        let more = if shown.len() < name.len() { "…" } else { "" };
        Err(Error::checkpoint(path, format!("tensor {shown:?}{more}: {why}")))
    };
    if name.len() > NAME_NBYTES {
        let nbytes = name.len();
        return refuse(format!("its name has {nbytes} bytes, expected at most {NAME_NBYTES}"));
    }
    let components = name.split('.').count();
    if components > NAME_COMPONENTS {
        return refuse(format!(
            "its name has {components} components, expected at most {NAME_COMPONENTS}"
        ));
    }
    // Digits of other scripts count too, as they do in Python.
    let is_too_long = |part: &&str| part.len() > NAME_DIGITS && part.chars().all(char::is_numeric);
    if let Some(number) = name.split('.').find(is_too_long) {
        let digits = number.chars().count();
        return refuse(format!(
            "a number in its name has {digits} digits, expected at most {NAME_DIGITS}"
        ));
    }
    if shape.len() > DIMENSIONS {
        let dimensions = shape.len();
        return refuse(format!("it has {dimensions} dimensions, expected at most {DIMENSIONS}"));
    }
    Ok(())
}

/// Refuse a checkpoint whose shards state too much together.
pub(super) fn check_all<'a>(
    path: &Path,
    stated: &mut Stated,
    names: impl IntoIterator<Item = &'a String>,
) -> Result<()> {
    names
        .into_iter()
        .try_for_each(|name| stated.take(name))
        .map_err(|why| Error::checkpoint(path, why))
}
