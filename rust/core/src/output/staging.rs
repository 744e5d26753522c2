//! The hidden directory in which an output is written, until it takes the target's name.
//!
//! Owns its lock and what happens to its files: they become the output, whole, or are removed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::naming::Naming;
use super::target::{check_target, found};
use crate::error::{Error, Limit, Result};
use crate::platform;

/// The directory within the hidden one through which several processes agree.
pub const RANKS: &str = "ranks";

/// The hidden directory, locked against another run and removed when dropped.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) path: PathBuf,
    naming: Naming,
    renamed: bool,
    /// None where another process has it.
    lock: Option<File>,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.renamed && self.lock.is_some() {
            // Nothing can be done about a failure here; the next run tries again.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl Staging {
    /// Open what another process created, without its lock.
    pub(super) fn join(path: PathBuf) -> Result<Self> {
        platform::open_directory(&path).map_err(Error::io(&path, "open the directory"))?;
        Ok(Self { path, naming: Naming::DELTA, renamed: false, lock: None })
    }

    /// Create and lock it; what a run that was cut off left there is removed.
    ///
    /// # Errors
    /// Another run that holds the lock, or files that no run left.
    pub(super) fn create(path: PathBuf, naming: Naming, keep_ranks: bool) -> Result<Self> {
        let is_new = match fs::create_dir(&path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(Error::io(&path, "create the directory")(error)),
        };
        let claimed = Self::claim(path.clone(), naming, keep_ranks);
        if let Err(error) = &claimed
            && is_new
            // Another run may have come between and have it.
            && !matches!(error, Error::Exists { .. })
        {
            let _ = fs::remove_dir(&path);
        }
        claimed
    }

    /// Lock it, and remove what is in it.
    fn claim(path: PathBuf, naming: Naming, keep_ranks: bool) -> Result<Self> {
        // Locking the directory itself leaves no lock file inside the delta.
        let Some(lock) = lock(&path)? else {
            return Err(Error::Exists {
                path,
                message: format!(
                    "another run is writing this {}; wait for it or choose another output directory",
                    naming.what
                ),
            });
        };
        // What a run that was cut off left behind is removed; anything else is not ours and stays.
        let mut entries = fs::read_dir(&path)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .map_err(Error::io(&path, "list the directory"))?;
        if let Some(at) = entries.iter().position(|entry| entry.file_name() == RANKS) {
            let ranks = entries.swap_remove(at).path();
            if !keep_ranks {
                leave_no_ranks(&ranks)?;
            }
        }
        for entry in &entries {
            let kind = entry.file_type().map_err(Error::io(&entry.path(), "look at the file"))?;
            if !kind.is_file() || !naming.may_be_left(&entry.file_name().to_string_lossy()) {
                let message = format!(
                    "holds {}, which no run of drift_fast left there; move it away or choose \
                     another output directory",
                    entry.file_name().display()
                );
                return Err(Error::Exists { path, message });
            }
        }
        let staging = Self { path, naming, renamed: false, lock: Some(lock) };
        for entry in entries {
            // Where the hidden directory is in the target, some files may have been moved already.
            let moved = staging.path.with_file_name(entry.file_name());
            if platform::is_same_file(&moved, &entry.path()) {
                fs::remove_file(&moved).map_err(Error::io(&moved, "remove"))?;
            }
            fs::remove_file(entry.path()).map_err(Error::io(&entry.path(), "remove"))?;
        }
        Ok(staging)
    }

    /// The error of a failed write. Where the disk is full, a quota is used up or a file grew too
    /// large, it says how much is needed in all; what is removed with this counts as free.
    pub(super) fn failed(
        &self,
        path: &Path,
        action: &'static str,
        error: io::Error,
        target: &Path,
        needed: u64,
    ) -> Error {
        let held: u64 = fs::read_dir(&self.path)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.and_then(|entry| entry.metadata()).ok())
            .map(|metadata| platform::allocated_nbytes(&metadata))
            .sum();
        let available =
            platform::free_nbytes(&self.path).map_or(0, |(free, _)| free.saturating_add(held));
        let what = self.naming.what;
        let Some(limit) = Limit::of(&error, needed <= available) else {
            return Error::io(path, action)(error);
        };
        Error::NoSpace { path: target.to_owned(), what, needed, available, limit }
    }

    /// Whether another process created it.
    pub(super) fn is_joined(&self) -> bool {
        self.lock.is_none()
    }

    /// Give the finished files, of these names, their place at the target.
    pub(super) fn publish(
        &mut self,
        target: &Path,
        names: &[&OsStr],
        overwrite: bool,
    ) -> Result<()> {
        if self.path.parent() == Some(target) {
            self.move_files(target, names)?;
        } else {
            check_target(target, self.naming, overwrite)?;
            self.rename(target)?;
        }
        self.renamed = true;
        Ok(())
    }

    /// Move the finished files up into the target, an empty directory that existed before.
    fn move_files(&self, target: &Path, names: &[&OsStr]) -> Result<()> {
        let staging = &self.path;
        let mut moved = Vec::new();
        for name in names {
            let to = target.join(name);
            // A hard link, unlike a rename, never replaces a file that came in meanwhile; not every
            // file system has them.
            let from = staging.join(name);
            let result = fs::hard_link(&from, &to)
                .or_else(|error| if to.exists() { Err(error) } else { fs::rename(&from, &to) });
            if let Err(error) = result {
                for path in moved {
                    let _ = fs::remove_file(path);
                }
                return Err(Error::io(&to, "move the finished output")(error));
            }
            moved.push(to);
        }
        sync_directory(target)?;
        remove_all(staging).map_err(Error::io(staging, "remove the directory"))
    }

    fn rename(&mut self, to: &Path) -> Result<()> {
        let from = &self.path;
        if found(&to.join(self.naming.description))?.is_none() {
            return fs::rename(from, to).map_err(Error::io(to, "rename the finished output"));
        }
        // Where the system can, both change names at once, and the old one is then removed.
        // Locked while it is removed, since another run would take it for its own hidden directory.
        let old = lock(to)?;
        if old.is_some() && platform::exchange(from, to) {
            self.renamed = true;
            // The new output is in place; what cannot be removed now, the next run removes.
            let _ = remove_all(from);
            return Ok(());
        }
        drop(old);
        // Elsewhere the old output moves aside under a hidden name until the new one is in place.
        let aside = from.with_extension("replaced");
        let _ = fs::remove_dir_all(&aside);
        fs::rename(to, &aside).map_err(Error::io(to, "move the old output aside"))?;
        if let Err(error) = fs::rename(from, to) {
            let _ = fs::rename(&aside, to);
            return Err(Error::io(to, "rename the finished output")(error));
        }
        fs::remove_dir_all(&aside).map_err(Error::io(&aside, "remove the old output"))
    }
}

/// Remove a directory with what is in it. A second time where the first one fails: a call that was
/// interrupted, or found too many files open, does not fail again.
fn remove_all(path: &Path) -> io::Result<()> {
    fs::remove_dir_all(path).or_else(|_| fs::remove_dir_all(path))
}

/// Lock a directory; none where another process has the lock.
fn lock(path: &Path) -> Result<Option<File>> {
    platform::lock_directory(path).map_err(|(action, error)| Error::io(path, action)(error))
}

/// Remove what several processes that were cut off left; the first of them holds its lock.
fn leave_no_ranks(ranks: &Path) -> Result<()> {
    if lock(ranks)?.is_none() {
        return Err(Error::Exists {
            path: ranks.to_owned(),
            message: "several processes are writing this delta; wait for them or choose another \
                      output directory"
                .to_owned(),
        });
    }
    fs::remove_dir_all(ranks).map_err(Error::io(ranks, "remove the directory"))
}

/// Write a file that is not there yet.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let mut file = File::create_new(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all())
}

pub(super) fn sync_directory(path: &Path) -> Result<()> {
    platform::sync_directory(path).map_err(Error::io(path, "flush the directory"))
}
