//! Linux and macOS. What only Linux has is left out elsewhere.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

/// The numbers of a full disk, a quota that is used up and a file that is too large.
pub(crate) const ENOSPC: i32 = Errno::NOSPC.raw_os_error();
pub(crate) const EDQUOT: i32 = Errno::DQUOT.raw_os_error();
pub(crate) const EFBIG: i32 = Errno::FBIG.raw_os_error();

/// The largest unit in which Linux keeps a file's pages together on x86-64 and AArch64.
const FOLIO_NBYTES: usize = 2 << 20;

/// The number that C and Python know an error by.
pub(crate) fn errno(error: &io::Error) -> Option<i32> {
    error.raw_os_error()
}

/// What to do about a system error whose own text says little.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE) => {
            "; a process may open only so many files: raise the limit with `ulimit -n 65536` and run \
             again"
        }
        Some(Errno::NFILE) => "; all processes together may open only so many files: end others",
        Some(Errno::NOLCK | Errno::NOTSUP) => {
            "; the file system has no locks, which keep two runs from writing the same: choose a \
             directory on another one"
        }
        Some(Errno::IO | Errno::STALE) => {
            "; the disk or the network file system fails: copy the files to another one"
        }
        Some(Errno::NOSPC) => {
            "; the file system has no room for another file or directory: free some, or choose \
             another directory"
        }
        _ => "",
    }
}

/// Read bytes from a place on; any number of threads may.
pub(crate) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(buffer, offset)
}

/// Write bytes from a place on; any number of threads may.
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    file.write_all_at(bytes, offset)
}

/// Open a file to read, without waiting for whoever writes to a FIFO.
pub(crate) fn open_at_once(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)
}

/// The number of an open file on its file system.
pub(crate) fn inode(_file: &File, metadata: &Metadata) -> io::Result<u64> {
    Ok(metadata.ino())
}

/// Whether two names are of one file, and neither is a link.
pub(crate) fn is_same_file(one: &Path, other: &Path) -> bool {
    let of =
        |path| fs::symlink_metadata(path).map(|found| (found.dev(), found.ino(), found.is_file()));
    matches!((of(one), of(other)), (Ok(one), Ok(other)) if one == other && one.2)
}

/// Whether a link out of a directory is followed: not where the directory's owner is another user,
/// who could make this process read a file that they may not read.
pub(crate) fn may_link(home: &Path, target: &Path) -> bool {
    let owner = |path: &Path| path.metadata().map(|metadata| metadata.uid());
    let (Ok(linking), Ok(linked)) = (owner(home), owner(target)) else { return false };
    linking == linked || linking == 0 || linking == rustix::process::geteuid().as_raw()
}

/// Open a directory; a link in its place, which someone else could have put there, is not followed.
pub(crate) fn open_directory(path: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())).map(File::from)?)
}

/// Lock a directory, which keeps its name free for a rename and needs no file in it, until the result is
/// dropped; none where another process has the lock.
///
/// # Errors
/// What could not be done, as a verb phrase, and why.
pub(crate) fn lock_directory(path: &Path) -> Result<Option<File>, (&'static str, io::Error)> {
    let directory = open_directory(path).map_err(|error| ("open the directory", error))?;
    match directory.try_lock() {
        Ok(()) => Ok(Some(directory)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(("lock the directory", error)),
    }
}

/// Make the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Have two directories change names at once; false where the system cannot.
pub(crate) fn exchange(one: &Path, other: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (one, other);
        false
    }
}

/// The bytes that are free for this user, and the unit of allocation.
pub(crate) fn free_nbytes(directory: &Path) -> io::Result<(u64, u64)> {
    let statistics = retry_on_intr(|| rustix::fs::statvfs(directory))?;
    let unit = statistics.f_frsize.max(1);
    Ok((statistics.f_bavail.saturating_mul(unit), unit))
}

/// The bytes that a file takes on disk.
pub(crate) fn allocated_nbytes(metadata: &Metadata) -> u64 {
    // POSIX leaves the unit open; Linux and macOS count in 512 bytes.
    metadata.blocks() * 512
}

/// Allocate the file's blocks now, if the file system can, so that a full disk is noticed here.
pub(crate) fn reserve(file: &File, nbytes: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{FallocateFlags, fallocate};
        match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, nbytes)) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    file.set_len(nbytes)
}

/// Have the system start writing a range to disk, so that the flush at the end has little to do.
///
/// Linux does so for pages that are marked as not needed, and keeps those that are not clean. Of all
/// ways measured on two cores, this one took least time (1.2 s for 3.1 GB; 1.6 s without it, 1.4 s
/// with threads that only write, and 2.0 s around the page cache).
pub(crate) fn start_writing(file: &File, position: u64, nbytes: usize) {
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

/// Have the system bring a range into the page cache, unless it seems to be there, and return at once.
pub(crate) fn prefetch(file: &File, range: Range<u64>) {
    #[cfg(target_os = "linux")]
    {
        use rustix::io::{ReadWriteFlags, preadv2};
        let Some(last) = range.end.checked_sub(1).filter(|last| *last >= range.start) else {
            return;
        };
        let mut byte = [0];
        let mut probe = [io::IoSliceMut::new(&mut byte)];
        // Asking for what is there already costs a walk over its pages; a read of one byte that
        // must not wait shows whether it is.
        if !matches!(preadv2(file, &mut probe, last, ReadWriteFlags::NOWAIT), Ok(1)) {
            let nbytes = std::num::NonZeroU64::new(range.end - range.start);
            let _ = rustix::fs::fadvise(file, range.start, nbytes, rustix::fs::Advice::WillNeed);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, range);
}

/// Bring the pages of a mapping in with one call, which answers with an error where touching them
/// would kill the process. Kernels older than Linux 5.14 do not know it.
pub(crate) fn populate(map: &Mmap, start: usize, nbytes: usize) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if nbytes > 0
        && let Err(error) = map.advise_range(memmap2::Advice::PopulateRead, start, nbytes)
        && error.raw_os_error() != Some(Errno::INVAL.raw_os_error())
    {
        return Err(error);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (map, start, nbytes);
    Ok(())
}

/// Give back the pages of a range of a mapping of a file, so that resident memory stays flat.
pub(crate) fn release(map: &Mmap, range: Range<usize>) {
    // Bringing pages in maps the whole of a large page-cache folio, and so earlier pages
    // that were released already; starting at its boundary takes those along.
    let start = range.start / FOLIO_NBYTES * FOLIO_NBYTES;
    // SAFETY: the mapping is shared, read-only and backed by a file, so a page that is
    // dropped is read again when touched; no byte that anyone sees can change.
    #[allow(unsafe_code)]
    // Failing to drop a page costs memory, not correctness.
    let _ =
        unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, range.end - start) };
}
