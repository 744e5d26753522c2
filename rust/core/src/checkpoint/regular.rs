//! Opening a file that must be a regular one, without ever waiting for it, and reading small ones.
//!
//! Every file of a checkpoint is opened here, each time. A FIFO in its place would make an ordinary open
//! wait for a writer, whether it was there from the start or came later.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};
use crate::platform;

/// Open a regular file; `action` says what for.
///
/// # Errors
/// A file that is not there or cannot be opened, a FIFO, device, socket or directory.
pub(crate) fn open(path: &Path, action: &'static str) -> Result<(File, Metadata)> {
    let refuse = || {
        let message = "expected a regular file, found something else";
        Err(Error::checkpoint(path, message))
    };
    // Asked before opening too, since opening a device may already do something.
    if !std::fs::metadata(path).map_err(Error::io(path, action))?.is_file() {
        return refuse();
    }
    let file = platform::open_at_once(path).map_err(Error::io(path, action))?;
    let metadata = file.metadata().map_err(Error::io(path, action))?;
    if metadata.is_file() { Ok((file, metadata)) } else { refuse() }
}

/// Read a regular file whole; `what` names it in a message and `remedy` ends that.
///
/// # Errors
/// As [`open`], and a file of more than `limit` bytes, of which nothing is then read.
pub(crate) fn read(path: &Path, limit: u64, what: &str, remedy: &str) -> Result<Vec<u8>> {
    let (file, metadata) = open(path, "open the file")?;
    let mut text = Vec::new();
    let mut nbytes = metadata.len();
    if nbytes <= limit {
        file.take(limit + 1).read_to_end(&mut text).map_err(Error::io(path, "read the file"))?;
        nbytes = text.len() as u64;
    }
    if nbytes > limit {
        let message = format!("{what} has {nbytes} bytes, expected at most {limit}; {remedy}");
        return Err(Error::checkpoint(path, message));
    }
    Ok(text)
}
