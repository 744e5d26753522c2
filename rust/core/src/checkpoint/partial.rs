//! Which byte ranges of a file are really there, where only parts of it were downloaded.
//!
//! Such a file has the length of the whole and holes in between, and beside it
//! `<name>.ranges.json`. Owns the reading of that sidecar; without one a file is whole.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::limits::RANGES_NBYTES;
use super::regular;
use crate::error::{Error, Result};

const REMEDY: &str = "download it again";

#[derive(serde::Deserialize)]
struct Sidecar {
    format_version: u32,
    nbytes: u64,
    ranges: Vec<(u64, u64)>,
}

/// The sidecar's path of a shard.
fn sidecar(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".ranges.json");
    path.with_file_name(name)
}

/// The ranges of `path` that are there, sorted and merged; none where all of it is.
///
/// # Errors
/// A sidecar that is not valid or belongs to a file of another length.
pub(crate) fn read(path: &Path, nbytes: u64) -> Result<Option<Vec<Range<u64>>>> {
    let place = sidecar(path);
    let text = match regular::read(&place, RANGES_NBYTES, "the list of ranges", REMEDY) {
        Err(Error::NotFound { .. }) => return Ok(None),
        text => text?,
    };
    let refuse = |why: String| Err(Error::checkpoint(&place, format!("{why}; {REMEDY}")));
    let sidecar: Sidecar = match serde_json::from_slice(&text) {
        Ok(sidecar) => sidecar,
        Err(error) => return refuse(format!("the list of ranges is not valid: {error}")),
    };
    if sidecar.format_version != 1 {
        return refuse(format!("format version {}, expected 1", sidecar.format_version));
    }
    if sidecar.nbytes != nbytes {
        return refuse(format!("it is of a file of {} bytes, found {nbytes}", sidecar.nbytes));
    }
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(sidecar.ranges.len());
    for (start, end) in sidecar.ranges {
        match ranges.last_mut() {
            _ if start > end || end > nbytes => {
                return refuse(format!("the range {start} to {end} is outside the file"));
            }
            Some(last) if start < last.start => {
                return refuse(format!("the range {start} to {end} is out of order"));
            }
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => ranges.push(start..end),
        }
    }
    Ok(Some(ranges))
}
