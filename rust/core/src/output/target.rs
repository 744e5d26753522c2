//! The place of an output: whether it is free, and the directories above it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::naming::Naming;
use super::staging::list;
use crate::error::{Error, Result};

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
    let within = target.is_dir() && !target.join(naming.description).exists();
    let hidden = if within { target.join(hidden) } else { parent.join(hidden) };
    Ok((target, hidden))
}

/// Refuse a target that is taken.
///
/// # Errors
/// Anything there but an empty directory or, with `overwrite`, an earlier output and nothing else.
pub(super) fn check_target(target: &Path, naming: Naming, overwrite: bool) -> Result<()> {
    let refuse =
        |message: &str| Err(Error::Exists { path: target.to_owned(), message: message.to_owned() });
    let Ok(metadata) = fs::symlink_metadata(target) else { return Ok(()) };
    if !metadata.is_dir() {
        return refuse("the output exists and is not a directory; choose another path");
    }
    let entries = list(target).map_err(Error::io(target, "list the output directory"))?;
    let shown = |(name, is_file): (OsString, bool)| (name.to_string_lossy().into_owned(), is_file);
    let mut names: Vec<_> = entries.into_iter().map(shown).collect();
    let staging = format!(".{}.incomplete", target.file_name().unwrap_or_default().display());
    names.retain(|(name, _)| *name != staging);
    let is_empty = names.is_empty();
    let what = naming.what;
    let is_whole = target.join(naming.description).is_file() && target.join(naming.index).is_file();
    let side_files = if is_whole { naming.listed_side_files(target) } else { Vec::new() };
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
        let missing: Vec<PathBuf> =
            directory.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
        fs::create_dir_all(directory).map_err(Error::io(directory, "create the directory"))?;
        Ok(Self { made: missing })
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
