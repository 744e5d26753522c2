//! Windows. A directory is locked by how it is opened, and the system takes no advice about pages.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::windows::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use memmap2::Mmap;
use winapi_util::file::information;

/// The numbers of Python's errno for a full disk, a quota that is used up and a file that is too large.
pub(crate) const ENOSPC: i32 = 28;
pub(crate) const EDQUOT: i32 = 10069;
pub(crate) const EFBIG: i32 = 27;

// As the system names them.
const FILE_ADD_FILE: u32 = 2;
const FILE_READ_ATTRIBUTES: u32 = 0x80;
const FILE_SHARE_READ: u32 = 1;
const FILE_SHARE_DELETE: u32 = 4;
const FILE_FLAG_BACKUP_SEMANTICS: u32 = 0x0200_0000;
const FILE_FLAG_OPEN_REPARSE_POINT: u32 = 0x0020_0000;
const ERROR_SHARING_VIOLATION: i32 = 32;

/// C's number of an error, which the system does not give.
pub(crate) fn errno(_error: &io::Error) -> Option<i32> {
    None
}

/// What to do about a system error whose own text says little.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "; a file that is open cannot be replaced: close what reads it and run again"
        }
        _ => "",
    }
}

/// Read bytes from a place on; any number of threads may. It moves the cursor, which nothing uses.
pub(crate) fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.seek_read(buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}

/// Write bytes from a place on; any number of threads may. It moves the cursor, which nothing uses.
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.seek_write(bytes, offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
        }
    }
    Ok(())
}

/// Open a file to read. Pipes have names of their own here, so none is in the place of a file.
pub(crate) fn open_at_once(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// The number of an open file on its file system.
pub(crate) fn inode(file: &File, _metadata: &Metadata) -> io::Result<u64> {
    Ok(information(file)?.file_index())
}

/// Whether two names are of one file, and neither is a link.
pub(crate) fn is_same_file(one: &Path, other: &Path) -> bool {
    let of = |path: &Path| {
        let file = OpenOptions::new()
            .access_mode(FILE_READ_ATTRIBUTES)
            .custom_flags(FILE_FLAG_OPEN_REPARSE_POINT)
            .open(path)?;
        let found = information(&file)?;
        let is_file = file.metadata()?.is_file();
        io::Result::Ok((found.volume_serial_number(), found.file_index(), is_file))
    };
    matches!((of(one), of(other)), (Ok(one), Ok(other)) if one == other && one.2)
}

/// Whether a link out of a directory is followed: never, since who owns either is not looked up here.
pub(crate) fn may_link(_home: &Path, _target: &Path) -> bool {
    false
}

/// Open a directory; a link in its place, which someone else could have put there, is not followed.
pub(crate) fn open_directory(path: &Path) -> io::Result<File> {
    directory(OpenOptions::new().access_mode(FILE_READ_ATTRIBUTES), path)
}

/// Lock a directory, which keeps its name free for a rename and needs no file in it, until the result is
/// dropped; none where another process has the lock.
///
/// # Errors
/// What could not be done, as a verb phrase, and why.
pub(crate) fn lock_directory(path: &Path) -> Result<Option<File>, (&'static str, io::Error)> {
    // The system locks no directory. One that was opened to add files, and does not share that, cannot be
    // opened so again; files in it, its list and its name can be used all the same.
    let mut exclusive = OpenOptions::new();
    exclusive.access_mode(FILE_ADD_FILE).share_mode(FILE_SHARE_READ | FILE_SHARE_DELETE);
    match directory(&mut exclusive, path) {
        Ok(directory) => Ok(Some(directory)),
        Err(error) if error.raw_os_error() == Some(ERROR_SHARING_VIOLATION) => Ok(None),
        Err(error) => Err(("open the directory", error)),
    }
}

fn directory(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = FILE_FLAG_BACKUP_SEMANTICS | FILE_FLAG_OPEN_REPARSE_POINT;
    let directory = options.custom_flags(flags).open(path)?;
    if directory.metadata()?.is_dir() {
        Ok(directory)
    } else {
        Err(io::ErrorKind::NotADirectory.into())
    }
}

/// Nothing: the file system keeps a journal of its names, and flushes no directory.
pub(crate) fn sync_directory(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// Have two directories change names at once; false where the system cannot.
pub(crate) fn exchange(_one: &Path, _other: &Path) -> bool {
    false
}

/// The bytes that are free for this user, and the unit of allocation.
pub(crate) fn free_nbytes(directory: &Path) -> io::Result<(u64, u64)> {
    let statistics = fs4::statvfs(directory)?;
    Ok((statistics.available_space(), statistics.allocation_granularity().max(1)))
}

/// The bytes that a file takes on disk.
pub(crate) fn allocated_nbytes(metadata: &Metadata) -> u64 {
    metadata.len()
}

/// Allocate the file's blocks now, so that a full disk is noticed here.
pub(crate) fn reserve(file: &File, nbytes: u64) -> io::Result<()> {
    file.set_len(nbytes)
}

/// Advice about pages: none is taken.
pub(crate) fn start_writing(_file: &File, _position: u64, _nbytes: usize) {}

/// Advice about pages: none is taken.
pub(crate) fn prefetch(_file: &File, _range: Range<u64>) {}

/// Nothing: the system does not shorten a file that is mapped, so touching its pages is safe.
pub(crate) fn populate(_map: &Mmap, _start: usize, _nbytes: usize) -> io::Result<()> {
    Ok(())
}

/// Advice about pages: none is taken.
pub(crate) fn release(_map: &Mmap, _range: Range<usize>) {}
