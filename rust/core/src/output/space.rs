//! Space on disk: checked before anything is written, and allocated for each file at once.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::io::retry_on_intr;

use super::naming::Naming;
use crate::error::{Error, Limit, Result};

/// The bytes that files of these sizes and their directory take on disk, if so many are free.
pub(super) fn check_space(
    parent: &Path,
    target: &Path,
    naming: Naming,
    sizes: impl Iterator<Item = u64>,
) -> Result<u64> {
    let (available, block) =
        free_nbytes(parent).map_err(Error::io(parent, "ask for the free space"))?;
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

/// The bytes that are free for this user, and the unit of allocation.
pub(super) fn free_nbytes(directory: &Path) -> io::Result<(u64, u64)> {
    let statistics = retry_on_intr(|| rustix::fs::statvfs(directory))?;
    let unit = statistics.f_frsize.max(1);
    Ok((statistics.f_bavail.saturating_mul(unit), unit))
}

/// Have the system start writing a range to disk, so that the flush at the end has little to do.
///
/// Linux does so for pages that are marked as not needed, and keeps those that are not clean. Of all
/// ways measured on two cores, this one took least time (1.2 s for 3.1 GB; 1.6 s without it, 1.4 s
/// with threads that only write, and 2.0 s around the page cache).
pub(super) fn start_writing(file: &File, position: u64, nbytes: usize) {
    // A call for less than this is not worthwhile.
    const LEAST_NBYTES: usize = 64 << 10;
    #[cfg(target_os = "linux")]
    if nbytes >= LEAST_NBYTES {
        let nbytes = std::num::NonZeroU64::new(nbytes as u64);
        let _ = rustix::fs::fadvise(file, position, nbytes, rustix::fs::Advice::DontNeed);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, position, nbytes, LEAST_NBYTES);
}

/// Allocate the file's blocks now, if the file system can, so that a full disk is noticed here.
pub(super) fn reserve(file: &File, nbytes: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, nbytes)) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    file.set_len(nbytes)
}
