//! The names of an output's files.

use std::fs;
use std::path::Path;

use super::side_files::is_side_file;
use crate::error::{Error, Result};

/// The names of one kind of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Naming {
    /// Its name in messages.
    pub(super) what: &'static str,
    stem: &'static str,
    pub(super) index: &'static str,
    /// The file that is written last and marks the output as complete.
    pub(super) description: &'static str,
}

impl Naming {
    /// The names of a delta's files.
    pub const DELTA: Naming = Naming {
        what: "delta",
        stem: "delta",
        index: "delta.safetensors.index.json",
        description: "drift.json",
    };
    /// The names that transformers looks for, and `merge.json`; other files may be added.
    pub const MODEL: Naming = Naming {
        what: "merged model",
        stem: "model",
        index: "model.safetensors.index.json",
        description: "merge.json",
    };

    /// The name of shard number `number`, from zero, of `total`.
    pub(super) fn shard(&self, number: usize, total: usize) -> String {
        format!("{}-{:05}-of-{total:05}.safetensors", self.stem, number + 1)
    }

    /// Whether a file with this name belongs to an output to which `side_files` were added.
    pub(super) fn is_ours(&self, name: &str, side_files: &[String]) -> bool {
        let is_count =
            |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        let shard = name
            .strip_prefix(self.stem)
            .and_then(|rest| rest.strip_prefix('-'))
            .and_then(|rest| rest.strip_suffix(".safetensors"));
        [self.description, self.index].contains(&name)
            || side_files.iter().any(|one| one == name)
            || shard
                .and_then(|middle| middle.split_once("-of-"))
                .is_some_and(|(number, total)| is_count(number) && is_count(total))
    }

    /// Whether an interrupted run, whatever it merged, can have left a file with this name.
    pub(super) fn may_be_left(&self, name: &str) -> bool {
        self.is_ours(name, &[]) || (*self == Naming::MODEL && is_side_file(name))
    }

    /// The files that were added to a finished output: those that its description lists under `files`
    /// and that a merge can have added, since anybody may have written that list.
    ///
    /// # Errors
    /// A description that cannot be read.
    pub(super) fn listed_side_files(&self, target: &Path) -> Result<Vec<String>> {
        #[derive(serde::Deserialize)]
        struct Description {
            files: Vec<String>,
        }
        if *self != Naming::MODEL {
            return Ok(Vec::new());
        }
        let path = target.join(self.description);
        let text = fs::read(&path).map_err(Error::io(&path, "read the description"))?;
        let files =
            serde_json::from_slice(&text).map_or_else(|_| vec![], |found: Description| found.files);
        Ok(files.into_iter().filter(|name| is_side_file(name)).collect())
    }
}
