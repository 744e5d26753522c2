//! Every way this crate can fail, as data: which file, which tensor, what was expected and found.

use std::io;
use std::path::{Path, PathBuf};

use crate::platform;

/// The result of anything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure. The message names the file and the tensor, and what to do where that is known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A path that does not exist, or a directory without a checkpoint.
    #[error("{}: {message}", path.display())]
    NotFound {
        /// The path that was asked for.
        path: PathBuf,
        /// What was looked for.
        message: String,
    },
    /// A file or directory that exists but is not a valid checkpoint.
    #[error("{}: {message}", path.display())]
    Checkpoint {
        /// The offending file or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A tensor that is invalid, is missing, or has a dtype that cannot be read.
    #[error("{}: tensor {tensor:?}: {message}", path.display())]
    Tensor {
        /// The file, or the checkpoint's directory if no file has the tensor.
        path: PathBuf,
        /// The tensor's name on disk.
        tensor: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// Names or shapes of two checkpoints that do not match.
    #[error("{0}")]
    Alignment(String),
    /// Two matches between the tensors of two checkpoints that fit equally well.
    #[error("{0}")]
    Ambiguous(String),
    /// An output path that is taken.
    #[error("{}: {message}", path.display())]
    Exists {
        /// The output path.
        path: PathBuf,
        /// Why it cannot be used and what to do.
        message: String,
    },
    /// Not enough space for the output, found before or while it was written.
    #[error("{}: the {what} needs {needed} bytes {}", path.display(), limit.describe(*available, what))]
    NoSpace {
        /// The output path.
        path: PathBuf,
        /// What is being written.
        what: &'static str,
        /// Bytes that the whole output takes.
        needed: u64,
        /// Bytes that are free for this user once the unfinished output is removed.
        available: u64,
        /// What sets the limit.
        limit: Limit,
    },
    /// The operating system refused to read or write.
    #[error("{}: cannot {action}: {source}{}", path.display(), platform::remedy(source))]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What was being done, as a verb phrase.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// An invalid value that the caller passed.
    #[error("{0}")]
    Argument(String),
    /// The caller's tick asked to stop; nothing is left behind.
    #[error("interrupted")]
    Interrupted,
}

/// What prevents an output from being written completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The file system is full.
    FileSystem,
    /// The file system has room for bytes, but not for another file.
    Files,
    /// The user's or the directory's quota is used up.
    Quota,
    /// No file may grow that large.
    FileSize,
}

impl Limit {
    /// The limit that a system error reports, if it reports one; `fits` says that bytes are free.
    pub(crate) fn of(error: &io::Error, fits: bool) -> Option<Self> {
        match error.kind() {
            io::ErrorKind::StorageFull if fits => Some(Limit::Files),
            io::ErrorKind::StorageFull => Some(Limit::FileSystem),
            io::ErrorKind::QuotaExceeded => Some(Limit::Quota),
            io::ErrorKind::FileTooLarge => Some(Limit::FileSize),
            _ => None,
        }
    }

    fn errno(self) -> i32 {
        match self {
            Limit::FileSystem | Limit::Files => platform::ENOSPC,
            Limit::Quota => platform::EDQUOT,
            Limit::FileSize => platform::EFBIG,
        }
    }

    fn describe(self, available: u64, what: &str) -> String {
        // A merged model has all tensors, whichever were selected.
        let narrower = if what == "delta" { ", fewer modules" } else { "" };
        match self {
            Limit::FileSystem => format!(
                "but the file system has {available} free; choose another directory{narrower} or a \
                 narrower dtype"
            ),
            Limit::Files => format!(
                "and the file system has {available} free, but no room for another file (`df -i` \
                 shows its inodes); remove some or choose another directory"
            ),
            Limit::Quota => format!(
                "but the quota there is used up, although the file system has {available} free; \
                 choose another directory{narrower} or a narrower dtype"
            ),
            Limit::FileSize => format!(
                "and the file system has {available} free, but one of its files is larger than the \
                 system allows; choose a smaller max_shard_size (--max-shard-size) or another \
                 directory"
            ),
        }
    }
}

impl Error {
    /// The number that C and Python know a failure of the system by, where it has one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::NoSpace { limit, .. } => Some(limit.errno()),
            Error::Io { source, .. } => platform::errno(source),
            _ => None,
        }
    }

    pub(crate) fn checkpoint(path: &Path, message: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.to_owned(), message: message.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, message: impl Into<String>) -> Self {
        Error::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), message: message.into() }
    }

    /// Attach a path to an operating system error; a missing file becomes [`Error::NotFound`].
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => Error::NotFound { path, message: "no such file".to_owned() },
            _ => Error::Io { path, action, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_a_used_up_quota_and_a_file_too_large_are_told_apart() {
        let limits = [
            (io::ErrorKind::StorageFull, Limit::FileSystem),
            (io::ErrorKind::QuotaExceeded, Limit::Quota),
            (io::ErrorKind::FileTooLarge, Limit::FileSize),
        ];
        for (kind, limit) in limits {
            assert_eq!(Limit::of(&kind.into(), false), Some(limit));
            let path = PathBuf::from("delta");
            let error = Error::NoSpace { path, what: "delta", needed: 12, available: 7, limit };
            let message = error.to_string();
            assert!(
                message.contains("needs 12 bytes") && message.contains("has 7 free"),
                "{message}"
            );
            // The system's own error of this number is of the same kind.
            #[cfg(unix)]
            assert_eq!(error.errno().map(|n| io::Error::from_raw_os_error(n).kind()), Some(kind));
        }
        assert_eq!(Limit::of(&io::ErrorKind::StorageFull.into(), true), Some(Limit::Files));
        assert_eq!(Limit::of(&io::Error::from_raw_os_error(5), true), None);
        assert_eq!(Limit::of(&io::ErrorKind::UnexpectedEof.into(), true), None);
    }
}
