//! The place of an output: whether it is free, and the directories above it.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::naming::Naming;
use crate::error::{Error, Result};
use crate::platform;

/// The target as an absolute path, and the hidden directory in which it is written.
///
/// # Errors
/// A path that names no place for a delta.
pub fn output_paths(target: &Path) -> Result<(PathBuf, PathBuf)> {
    places(target, Naming::DELTA)
}

pub(super) fn places(target: &Path, naming: Naming) -> Result<(PathBuf, PathBuf)> {
    let target = std::path::absolute(target).map_err(Error::io(target, "resolve the path"))?;
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        let message = format!("{} is not a place for a {}", target.display(), naming.what);
        return Err(Error::Argument(message));
    };
    let hidden = format!(".{}.incomplete", name.to_string_lossy());
    let within = found(&target)?.is_some_and(|found| found.is_dir())
        && found(&target.join(naming.description))?.is_none();
    let hidden = if within { target.join(hidden) } else { parent.join(hidden) };
    Ok((target, hidden))
}

/// What is at a path; none where nothing is.
///
/// # Errors
/// Any failure but that: what cannot be looked at is not taken for missing.
pub(super) fn found(path: &Path) -> Result<Option<Metadata>> {
    unless_missing(path, fs::metadata(path))
}

fn unless_missing(path: &Path, found: io::Result<Metadata>) -> Result<Option<Metadata>> {
    match found {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(Error::io(path, "look at the file")(error)),
    }
}

/// Refuse a target that is taken.
///
/// # Errors
/// Anything there but an empty directory or, with `overwrite`, an earlier output and nothing else.
pub(super) fn check_target(target: &Path, naming: Naming, overwrite: bool) -> Result<()> {
    let refuse =
        |message: &str| Err(Error::Exists { path: target.to_owned(), message: message.to_owned() });
    let Some(metadata) = unless_missing(target, fs::symlink_metadata(target))? else {
        return Ok(());
    };
    if !metadata.is_dir() {
        return refuse("the output exists and is not a directory; choose another path");
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(target).map_err(Error::io(target, "list the output directory"))? {
        let entry = entry.map_err(Error::io(target, "list the output directory"))?;
        let kind = entry.file_type().map_err(Error::io(&entry.path(), "look at the file"))?;
        names.push((entry.file_name().to_string_lossy().into_owned(), kind.is_file()));
    }
    let what = naming.what;
    let is_file = |name: &str| {
        found(&target.join(name)).map(|found| found.is_some_and(|found| found.is_file()))
    };
    let is_whole = is_file(naming.description)? && is_file(naming.index)?;
    let (_, hidden) = places(target, naming)?;
    names.retain(|(name, _)| {
        let is_left = !is_whole && platform::is_same_file(&target.join(name), &hidden.join(name));
        Some(OsStr::new(name)) != hidden.file_name() && !is_left
    });
    let is_empty = names.is_empty();
    let side_files = if is_whole { naming.listed_side_files(target)? } else { Vec::new() };
    // A link or a directory is not ours, whatever it is called.
    let stranger =
        names.iter().find(|(name, is_file)| !is_file || !naming.is_ours(name, &side_files));
    if let (true, true, Some((stranger, _))) = (is_whole, overwrite, stranger) {
        return refuse(&format!(
            "the {what}'s directory also holds {stranger}, which overwriting would remove; move it \
             away or choose another path"
        ));
    }
    match (is_empty, is_whole, overwrite) {
        (true, _, _) | (_, true, true) => Ok(()),
        (_, true, false) => refuse(&format!(
            "a {what} is there already; pass overwrite=True (--overwrite) to replace it"
        )),
        (_, false, _) => {
            refuse("the output directory exists and is not empty; choose another path")
        }
    }
}

/// The directories above the target that had to be made, removed again unless kept.
#[derive(Debug, Default)]
pub(super) struct Parents {
    made: Vec<PathBuf>,
}

impl Parents {
    pub(super) fn create(directory: &Path) -> Result<Self> {
        let mut missing = Vec::new();
        for path in directory.ancestors() {
            if found(path)?.is_some() {
                break;
            }
            missing.push(path);
        }
        let mut parents = Self::default();
        for path in missing.into_iter().rev() {
            match fs::create_dir(path) {
                Ok(()) => parents.made.insert(0, path.to_owned()),
                // Another run came between.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(path, "create the directory")(error)),
            }
        }
        Ok(parents)
    }

    pub(super) fn keep(&mut self) {
        self.made.clear();
    }
}

impl Drop for Parents {
    fn drop(&mut self) {
        for path in &self.made {
            // Not empty any more, or gone: either way not ours to remove.
            let _ = fs::remove_dir(path);
        }
    }
}
