//! The header of a safetensors file: read and validated.
//!
//! Invariant: the tensors of a header that was read are inside the file, do not overlap, and cover it.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo as HeaderEntry};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::limits::{self, HEADER_NBYTES, Stated};
use super::magic;
use crate::error::{Error, Result};
use crate::platform;

const LENGTH_NBYTES: u64 = 8;
const REMEDY: &str = "download the file again, or save it again with the safetensors library";

/// One tensor as its header describes it.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// The name on disk.
    pub name: String,
    /// Any dtype that safetensors knows.
    pub dtype: safetensors::Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes are in the file.
    pub range: Range<u64>,
}

impl Tensor {
    /// Count of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements `start` to `stop` of this tensor, in row-major order, as a tensor of one dimension.
    ///
    /// # Errors
    /// A range that this tensor does not have, or a dtype whose elements are not whole bytes.
    pub fn elements(&self, start: usize, stop: usize) -> Result<Self> {
        let numel = self.numel();
        let nbytes = self.range.end - self.range.start;
        if start > stop || stop > numel {
            return Err(Error::Argument(format!(
                "{} has {numel} elements, not {start} to {stop}",
                self.name
            )));
        }
        if numel > 0 && !nbytes.is_multiple_of(numel as u64) {
            return Err(Error::Argument(format!("{} cannot be read in part", self.name)));
        }
        let size = nbytes.checked_div(numel as u64).unwrap_or(0);
        let range = self.range.start + start as u64 * size..self.range.start + stop as u64 * size;
        Ok(Self { shape: vec![stop - start], range, ..self.clone() })
    }
}

/// The tensors of a file, by rising offset, and the bytes that the header takes with its length.
///
/// # Errors
/// A file shorter or longer than its header says, a header that is not JSON or names a tensor twice,
/// or offsets that overlap or leave the file.
pub(super) fn read(file: &File, path: &Path, file_nbytes: u64) -> Result<(Vec<Tensor>, u64)> {
    let header = read_bytes(file, path, file_nbytes)?;
    let nbytes = LENGTH_NBYTES + header.len() as u64;
    Ok((parse(path, header, nbytes, file_nbytes)?, nbytes))
}

fn read_bytes(file: &File, path: &Path, file_nbytes: u64) -> Result<Vec<u8>> {
    if file_nbytes < LENGTH_NBYTES {
        return Err(Error::checkpoint(
            path,
            format!(
                "expected at least {LENGTH_NBYTES} bytes, found {file_nbytes}: a download or a copy \
                 was cut off, or a disk was full; {REMEDY}"
            ),
        ));
    }
    let mut length = [0; LENGTH_NBYTES as usize];
    platform::read_exact_at(file, &mut length, 0).map_err(Error::io(path, "read the header"))?;
    let header_nbytes = u64::from_le_bytes(length);
    let available = file_nbytes - LENGTH_NBYTES;
    if header_nbytes > available || header_nbytes > HEADER_NBYTES {
        let hint = if header_nbytes > available {
            "the file is truncated or is not a safetensors file: download or copy it again"
        } else {
            "save the tensors in several files"
        };
        let message = magic::describe_length(&length).map_or_else(
            || {
                format!(
                    "the header's length is given as {header_nbytes} bytes, but the file has \
                     {available} after it and the format allows {HEADER_NBYTES}; {hint}"
                )
            },
            str::to_owned,
        );
        return Err(Error::checkpoint(path, message));
    }
    let mut header = vec![0; header_nbytes as usize];
    platform::read_exact_at(file, &mut header, LENGTH_NBYTES)
        .map_err(Error::io(path, "read the header"))?;
    Ok(header)
}

fn parse(path: &Path, bytes: Vec<u8>, data_start: u64, file_nbytes: u64) -> Result<Vec<Tensor>> {
    // A parser does not look into texts that it skips, the format's own library does.
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        Error::checkpoint(path, format!("the header is not valid: {error}; {REMEDY}"))
    })?;
    let header: Header = serde_json::from_str(text).map_err(|error| {
        let hint = if bytes.is_empty() { magic::describe(&[0; 8]) } else { None };
        let reason = match hint {
            Some(hint) => hint.to_owned(),
            // Another download does not help against a limit or an unknown type.
            None if error.is_data() => error.to_string(),
            None => format!("{error}; {REMEDY}"),
        };
        Error::checkpoint(path, format!("the header is not valid: {reason}"))
    })?;
    drop(bytes);
    let mut entries = header.0;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut expected_start = 0;
    for (name, entry) in &entries {
        check_entry(path, name, entry, expected_start)?;
        expected_start = entry.data_offsets.1;
    }
    let expected_nbytes = data_start + expected_start as u64;
    if file_nbytes != expected_nbytes {
        let what = if file_nbytes < expected_nbytes { "truncated" } else { "too long" };
        return Err(Error::checkpoint(
            path,
            format!(
                "the file is {what}: its header describes {expected_nbytes} bytes, \
                 found {file_nbytes}; copy or download it again"
            ),
        ));
    }
    // The format's own library has the last word on what is valid.
    Metadata::new(None, entries.clone())
        .map_err(|error| Error::checkpoint(path, format!("the header is not valid: {error}")))?;
    let tensors = entries.into_iter().map(|(name, entry)| Tensor {
        name,
        dtype: entry.dtype,
        shape: entry.shape,
        range: data_start + entry.data_offsets.0 as u64..data_start + entry.data_offsets.1 as u64,
    });
    Ok(tensors.collect())
}

fn check_entry(path: &Path, name: &str, entry: &HeaderEntry, expected_start: usize) -> Result<()> {
    let (start, end) = entry.data_offsets;
    limits::check(path, name, &entry.shape)?;
    if end < start {
        return Err(Error::tensor(
            path,
            name,
            format!("its offsets run backwards: {start} to {end}; {REMEDY}"),
        ));
    }
    if start != expected_start {
        let what = if start < expected_start { "overlap the tensor before" } else { "leave a gap" };
        return Err(Error::tensor(
            path,
            name,
            format!(
                "its offsets {start} to {end} {what}: expected to start at {expected_start}; {REMEDY}"
            ),
        ));
    }
    let nbits = entry
        .shape
        .iter()
        .try_fold(entry.dtype.bitsize(), |product, &dimension| product.checked_mul(dimension));
    match nbits {
        Some(nbits) if nbits.is_multiple_of(8) && nbits / 8 == end - start => Ok(()),
        _ => Err(Error::tensor(
            path,
            name,
            format!(
                "shape {:?} of dtype {} takes {}, but its offsets {start} to {end} hold {} bytes; \
                 {REMEDY}",
                entry.shape,
                entry.dtype,
                nbits.map_or("more than can be addressed".to_owned(), |n| format!(
                    "{} bytes",
                    n.div_ceil(8)
                )),
                end - start
            ),
        )),
    }
}

/// The header's entries in file order. A JSON reader that keeps the last of two equal names would
/// hide a tensor, so a second one is refused.
struct Header(Vec<(String, HeaderEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(
                self,
                mut map: M,
            ) -> std::result::Result<Header, M::Error> {
                let mut stated = Stated::default();
                let mut has_metadata = false;
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(M::Error::custom("__metadata__ is there twice"));
                        }
                        map.next_value::<Option<Notes>>().map_err(|error| {
                            M::Error::custom(format!("__metadata__: {error}; {REMEDY}"))
                        })?;
                        continue;
                    }
                    stated.take(&name).map_err(M::Error::custom)?;
                    let entry = map
                        .next_value::<HeaderEntry>()
                        .map_err(|error| M::Error::custom(format!("tensor {name:?}: {error}")))?;
                    entries.push((name, entry));
                }
                let mut seen = HashSet::with_capacity(entries.len());
                if let Some((name, _)) = entries.iter().find(|(name, _)| !seen.insert(name)) {
                    return Err(M::Error::custom(format!(
                        "tensor {name:?} is named twice; {REMEDY}"
                    )));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// The texts of `__metadata__`, which are checked to be texts and not kept.
struct Notes;

impl<'de> Deserialize<'de> for Notes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct NotesVisitor;
        impl<'de> Visitor<'de> for NotesVisitor {
            type Value = Notes;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object of texts")
            }

            fn visit_map<M: MapAccess<'de>>(
                self,
                mut map: M,
            ) -> std::result::Result<Notes, M::Error> {
                while map.next_entry::<Text, Text>()?.is_some() {}
                Ok(Notes)
            }
        }
        deserializer.deserialize_map(NotesVisitor)
    }
}

/// A text that is not kept.
struct Text;

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct TextVisitor;
        impl Visitor<'_> for TextVisitor {
            type Value = Text;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text")
            }

            fn visit_str<E>(self, _: &str) -> std::result::Result<Text, E> {
                Ok(Text)
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}
