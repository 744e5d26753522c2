//! Which files make up a checkpoint: one file, those that an index names, or numbered shards.
//!
//! An index is untrusted input: its entries stay below the checkpoint's directory.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::limits::{INDEX_NBYTES, Stated};
use super::{magic, regular};
use crate::error::{Error, Result};
use crate::platform;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
pub(super) const PICKLE: &str = "a pickled checkpoint is never loaded, since unpickling runs code: \
    convert it to safetensors (load it once where you trust it and call \
    model.save_pretrained(directory, safe_serialization=True))";

/// The files of a checkpoint, in the order in which they are read.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub(super) paths: Vec<PathBuf>,
    pub(super) index: Option<Index>,
    /// What other loaders would have read differently.
    pub(super) notes: Vec<String>,
}

/// An index: the position among the files of each tensor that it names.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) path: PathBuf,
    pub(super) places: BTreeMap<String, usize>,
}

impl Files {
    /// Find the files of what is at `path`; nothing of a shard is read.
    ///
    /// # Errors
    /// Nothing there, a directory without safetensors, a pickled checkpoint, or an index that is not
    /// valid or names a file that is missing or outside the directory.
    pub(super) fn find(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "open the checkpoint"))?;
        if metadata.is_dir() {
            return Self::in_directory(path);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".index.json") {
            return Self::indexed(path.parent().unwrap_or(Path::new(".")), path);
        }
        if is_pickle(&name) {
            return Err(Error::checkpoint(path, PICKLE));
        }
        if name.ends_with(".json") {
            let message = "not a safetensors file; give the directory that it is in";
            return Err(Error::checkpoint(path, message));
        }
        Ok(Self { paths: vec![path.to_owned()], ..Self::default() })
    }

    /// As in transformers, a single file wins where there is an index too, unless that names it.
    fn in_directory(directory: &Path) -> Result<Self> {
        let (single, index) = (directory.join(SINGLE), directory.join(INDEX));
        let mut notes = Vec::new();
        if exists(&single)? {
            let indexed = exists(&index)?;
            if indexed && read_index(&index).is_ok_and(|map| names_single(&map)) {
                return Self::indexed(directory, &index);
            }
            if indexed {
                notes.push(format!(
                    "{} holds {SINGLE} and {INDEX}: the single file is read, as transformers does. \
                     Remove the one that is stale, or give the index itself to read its shards",
                    directory.display()
                ));
            }
            return Ok(Self { paths: vec![single], notes, ..Self::default() });
        }
        if exists(&index)? {
            return Self::indexed(directory, &index);
        }
        Self::numbered(directory)
    }

    fn indexed(directory: &Path, index: &Path) -> Result<Self> {
        let weight_map = read_index(index)?;
        let mut files = BTreeMap::new();
        for (tensor, file) in &weight_map {
            if let Entry::Vacant(entry) = files.entry(plain(file)) {
                entry.insert(shard_path(directory, index, tensor, file)?);
            }
        }
        if files.is_empty() {
            return Err(Error::checkpoint(index, "the index names no tensor"));
        }
        for (file, path) in &files {
            if !exists(path)? {
                return Err(missing(index, file, path));
            }
        }
        let positions: BTreeMap<_, _> = files.keys().zip(0..).collect();
        let places = weight_map
            .into_iter()
            .filter_map(|(tensor, file)| Some((tensor, *positions.get(&plain(&file))?)))
            .collect();
        Ok(Self {
            index: Some(Index { path: index.to_owned(), places }),
            paths: files.into_values().collect(),
            notes: Vec::new(),
        })
    }

    /// Shards without an index, whose numbering says that none is missing.
    fn numbered(directory: &Path) -> Result<Self> {
        let mut series: BTreeMap<(String, usize), BTreeMap<usize, PathBuf>> = BTreeMap::new();
        let read = Error::io(directory, "list the directory");
        for entry in std::fs::read_dir(directory).map_err(read)? {
            let entry = entry.map_err(Error::io(directory, "list the directory"))?;
            let name = entry.file_name();
            // macOS writes its own notes on a file beside it, where a disk has no place for them.
            if name.as_encoded_bytes().starts_with(b"._") {
                continue;
            }
            if let Some((stem, number, count)) = numbering(&name.to_string_lossy()) {
                series.entry((stem.to_owned(), count)).or_default().insert(number, entry.path());
            }
        }
        let whole = |count: usize, shards: &BTreeMap<usize, PathBuf>| {
            // Some tools count from zero.
            let numbers = || shards.keys().copied();
            count > 0
                && shards.len() == count
                && (numbers().eq(1..=count) || numbers().eq(0..count))
        };
        match series.pop_first() {
            Some(((_, count), shards)) if series.is_empty() && whole(count, &shards) => Ok(Self {
                paths: shards.into_values().collect(),
                index: None,
                notes: vec![format!(
                    "{}: {INDEX} is missing; all {count} shards are there by their numbers and \
                     are read. Other loaders need the index: download it",
                    directory.display()
                )],
            }),
            _ => Err(Error::NotFound {
                path: directory.to_owned(),
                message: format!("expected {SINGLE} or {INDEX} in the directory"),
            }),
        }
    }
}

/// The error for a shard that an index names and that is not there, or is a link to nothing.
fn missing(index: &Path, file: &Path, path: &Path) -> Error {
    let (index, file) = (index.display(), file.to_string_lossy());
    let message = match path.read_link() {
        Ok(target) => format!(
            "a link to {}, which is not there; copy the directory again with `cp -rL`, which copies \
             what links lead to, or download it",
            target.display()
        ),
        Err(_) => format!(
            "no such file, although {index} names the shard {file:?}; download or copy the \
             checkpoint again, or remove the index where it is older than the shards"
        ),
    };
    Error::NotFound { path: path.to_owned(), message }
}

/// Whether a file is there; a link that leads nowhere is not.
fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(Error::io(path, "look for the file"))
}

/// The stem, number and count of a name such as `model-00001-of-00003.safetensors`.
fn numbering(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
    };
    Some((stem, digits(number)?, digits(count)?))
}

fn is_pickle(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".ckpt", ".pkl"].iter().any(|ending| name.ends_with(ending))
        || name.ends_with(".bin.index.json")
}

/// A file name of an index without the `./` that some tools write.
fn plain(file: &str) -> PathBuf {
    let mut path = PathBuf::new();
    path.extend(Path::new(file).components().filter(|part| *part != Component::CurDir));
    path
}

fn names_single(weight_map: &BTreeMap<String, String>) -> bool {
    weight_map.values().any(|file| plain(file) == Path::new(SINGLE))
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = regular::read(path, INDEX_NBYTES, "the index", "save the checkpoint again")?;
    let json = text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&text);
    let index: IndexFile = serde_json::from_slice(json).map_err(|error| {
        let reason = magic::describe(&text).map_or_else(|| error.to_string(), str::to_owned);
        Error::checkpoint(path, format!("the index is not valid: {reason}"))
    })?;
    Ok(index.weight_map.0)
}

/// Where an index entry points, refused when that is outside the checkpoint's directory.
fn shard_path(directory: &Path, index: &Path, tensor: &str, file: &str) -> Result<PathBuf> {
    let refuse = |why: &str| {
        Err(Error::tensor(
            index,
            tensor,
            format!("the index places it in {file:?}, {why}; entries must stay in the directory"),
        ))
    };
    if is_pickle(file) {
        return Err(Error::tensor(
            index,
            tensor,
            format!("the index places it in {file:?}: {PICKLE}"),
        ));
    }
    let relative = plain(file);
    let stays = relative.components().all(|part| matches!(part, Component::Normal(_)));
    if relative.as_os_str().is_empty() || !stays {
        return refuse("which leaves the checkpoint's directory");
    }
    let path = directory.join(relative);
    let (Ok(home), Ok(target)) = (directory.canonicalize(), path.canonicalize()) else {
        return Ok(path);
    };
    if target.starts_with(&home)
        || is_hub_blob(&home, &target)
        || platform::may_link(&home, &target)
    {
        return Ok(path);
    }
    refuse("a link of another user to a file that is not theirs")
}

/// The Hub cache consists of links from snapshots into `blobs` beside them.
fn is_hub_blob(snapshot: &Path, target: &Path) -> bool {
    let Some(snapshots) = snapshot.parent() else { return false };
    let Some(repository) = snapshots.parent() else { return false };
    snapshots.file_name().is_some_and(|name| name == "snapshots")
        && target.parent() == Some(&repository.join("blobs"))
}

#[derive(serde::Deserialize)]
struct IndexFile {
    weight_map: WeightMap,
}

/// Tensor name to file name; a name given twice is refused, as it would hide a tensor.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct WeightMapVisitor;
        impl<'de> Visitor<'de> for WeightMapVisitor {
            type Value = WeightMap;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object of tensor name to file name")
            }

            fn visit_map<M: MapAccess<'de>>(
                self,
                mut map: M,
            ) -> std::result::Result<WeightMap, M::Error> {
                let mut entries = BTreeMap::new();
                let mut stated = Stated::default();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    stated.take(&tensor).map_err(M::Error::custom)?;
                    if entries.contains_key(&tensor) {
                        return Err(M::Error::custom(format!("tensor {tensor:?} is named twice")));
                    }
                    entries.insert(tensor, file);
                }
                Ok(WeightMap(entries))
            }
        }
        deserializer.deserialize_map(WeightMapVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_with_a_number_and_a_count_are_numbered() {
        assert_eq!(numbering("model-00002-of-00003.safetensors"), Some(("model", 2, 3)));
        assert_eq!(
            numbering("a-1.safetensors-1-of-1.safetensors"),
            Some(("a-1.safetensors", 1, 1))
        );
        for other in [
            "model.safetensors",
            "model-1-of-.safetensors",
            "model-+1-of-2.safetensors",
            "1-of-2.safetensors",
            "model-00001-of-00002.bin",
        ] {
            assert_eq!(numbering(other), None, "{other}");
        }
    }

    #[test]
    fn only_a_leading_or_repeated_dot_is_dropped_from_an_entry() {
        assert_eq!(plain("./a.safetensors"), Path::new("a.safetensors"));
        assert_eq!(plain("b/./a.safetensors"), Path::new("b/a.safetensors"));
        for kept in ["../a", "/a", "b/../a"] {
            assert_eq!(plain(kept), Path::new(kept));
        }
    }
}
