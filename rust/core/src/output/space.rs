//! Space on disk, checked before anything is written.

use std::path::Path;

use super::naming::Naming;
use crate::error::{Error, Limit, Result};
use crate::platform;

/// The bytes that files of these sizes and their directory take on disk, if so many are free.
pub(super) fn check_space(
    parent: &Path,
    target: &Path,
    naming: Naming,
    sizes: impl Iterator<Item = u64>,
) -> Result<u64> {
    let (available, block) =
        platform::free_nbytes(parent).map_err(Error::io(parent, "ask for the free space"))?;
    let needed = sizes
        .chain([block])
        .try_fold(0u64, |total, size| total.checked_add(size.checked_next_multiple_of(block)?))
        .unwrap_or(u64::MAX);
    if needed > available {
        return Err(Error::NoSpace {
            path: target.to_owned(),
            what: naming.what,
            needed,
            available,
            limit: Limit::FileSystem,
        });
    }
    Ok(needed)
}
