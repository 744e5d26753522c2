//! A checkpoint: one safetensors file, or a directory of shards with or without an index.
//!
//! Owns which files belong together and where each tensor is; what is inside a file is
//! [`crate::checkpoint::shard`]'s. Every tensor that the index names is in the shard it names, and no shard
//! holds one that the index does not place there.

pub mod block_scales;
mod header;
mod network_fs;
pub(crate) mod operand;
mod partial;
pub(crate) mod shard;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::dtype::Fp8;
use crate::error::{Error, Result};
use block_scales::BlockScales;
pub use header::Tensor;
pub use operand::Operand;
pub use shard::{Reader, Shard};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An open checkpoint; shards are mapped when first read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    places: HashMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Open a `.safetensors` file, an index file (`*.index.json`), or a directory holding either
    /// `model.safetensors` or `model.safetensors.index.json`; as in transformers, the single file
    /// wins where both exist.
    ///
    /// # Errors
    /// A missing file, a directory without safetensors, a `.bin` checkpoint, an index that is not
    /// valid, names a file outside the directory or disagrees with the shards, or an invalid shard.
    pub fn open(path: &Path, reader: Reader) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "open the checkpoint"))?;
        if metadata.is_dir() {
            if path.join(SINGLE).exists() {
                return Self::from_files(path, &[path.join(SINGLE)], None, reader);
            }
            if path.join(INDEX).exists() {
                return Self::from_index(path, &path.join(INDEX), reader);
            }
            return Err(nothing_to_open(path));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".index.json") {
            let directory = path.parent().unwrap_or(Path::new("."));
            return Self::from_index(directory, path, reader);
        }
        if is_pickle(&name) {
            return Err(Error::checkpoint(path, PICKLE));
        }
        if name.ends_with(".json") {
            let message = "not a safetensors file; give the directory that it is in";
            return Err(Error::checkpoint(path, message));
        }
        Self::from_files(path, &[path.to_owned()], None, reader)
    }

    /// The path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files, by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Its tensors in file order, each with the shard that holds it.
    pub fn tensors(&self) -> impl Iterator<Item = (&Shard, &Tensor)> {
        self.shards
            .iter()
            .flat_map(|shard| shard.tensors().iter().map(move |tensor| (shard, tensor)))
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// No such tensor.
    pub fn tensor(&self, name: &str) -> Result<(&Shard, &Tensor)> {
        let &(shard, tensor) = self
            .places
            .get(name)
            .ok_or_else(|| Error::tensor(&self.path, name, "no such tensor in this checkpoint"))?;
        Ok((&self.shards[shard], &self.shards[shard].tensors()[tensor]))
    }

    /// The tensor of that name, with its block scales, of `block` rows and
    /// columns each, where its elements are 8-bit codes.
    ///
    /// # Errors
    /// No such tensor, or codes whose scales are missing or do not fit.
    pub fn operand(&self, name: &str, block: (usize, usize)) -> Result<Operand<'_>> {
        let (shard, tensor) = self.tensor(name)?;
        let scales = match Fp8::from_header(tensor.dtype) {
            None => None,
            Some(format) => {
                let stored =
                    self.places.get(&block_scales::name_of(name)).map(|&(shard, tensor)| {
                        (&self.shards[shard], &self.shards[shard].tensors()[tensor])
                    });
                Some(BlockScales::new(format, (shard, tensor), stored, block)?)
            }
        };
        Ok(Operand { shard, tensor, scales })
    }

    fn from_index(directory: &Path, index: &Path, reader: Reader) -> Result<Self> {
        let metadata = std::fs::metadata(index).map_err(Error::io(index, "open the index"))?;
        if !metadata.is_file() {
            return Err(Error::checkpoint(index, "expected a regular file, found something else"));
        }
        let text = std::fs::read(index).map_err(Error::io(index, "read the index"))?;
        let index_file: Index = serde_json::from_slice(&text).map_err(|error| {
            Error::checkpoint(index, format!("the index is not valid: {error}"))
        })?;
        let weight_map = index_file.weight_map.0;
        let mut files = BTreeMap::new();
        for (tensor, file) in &weight_map {
            if !files.contains_key(file) {
                files.insert(file.clone(), shard_path(directory, index, tensor, file)?);
            }
        }
        if files.is_empty() {
            return Err(Error::checkpoint(index, "the index names no tensor"));
        }
        let paths: Vec<_> = files.values().cloned().collect();
        for (file, path) in &files {
            if !path.exists() {
                return Err(Error::NotFound {
                    path: path.clone(),
                    message: format!(
                        "no such file, although {} names the shard {file:?}; \
                         download or copy the checkpoint again",
                        index.display()
                    ),
                });
            }
        }
        Self::from_files(directory, &paths, Some((index, &files, &weight_map)), reader)
    }

    #[allow(clippy::type_complexity)]
    fn from_files(
        path: &Path,
        files: &[PathBuf],
        index: Option<(&Path, &BTreeMap<String, PathBuf>, &BTreeMap<String, String>)>,
        reader: Reader,
    ) -> Result<Self> {
        let mut shards = Vec::with_capacity(files.len());
        let mut places = HashMap::new();
        for (number, file) in files.iter().enumerate() {
            let shard = Shard::open(file, reader)?;
            for (position, tensor) in shard.tensors().iter().enumerate() {
                if let Some((index, files, weight_map)) = index {
                    let Some(named) = weight_map.get(&tensor.name).and_then(|n| files.get(n))
                    else {
                        let message = format!(
                            "{} holds it, but the index does not name it; save the checkpoint again",
                            file.display()
                        );
                        return Err(Error::tensor(index, &tensor.name, message));
                    };
                    if named != file {
                        let message = format!(
                            "{} holds it too, although the index places it in {}; one of the two \
                             is stale: save the checkpoint again",
                            file.display(),
                            named.display()
                        );
                        return Err(Error::tensor(index, &tensor.name, message));
                    }
                }
                places.insert(tensor.name.clone(), (number, position));
            }
            shards.push(shard);
        }
        if let Some((index, _, weight_map)) = index {
            for (tensor, file) in weight_map {
                if !places.contains_key(tensor) {
                    let message =
                        format!("the index places it in {file:?}, which does not hold it");
                    return Err(Error::tensor(index, tensor, message));
                }
            }
        }
        if places.is_empty() {
            return Err(Error::checkpoint(path, "the checkpoint holds no tensor"));
        }
        Ok(Self { path: path.to_owned(), shards, places })
    }
}

const PICKLE: &str = "a pickled checkpoint is never loaded, since unpickling runs code: \
    convert it to safetensors (load it once where you trust it and call \
    model.save_pretrained(directory, safe_serialization=True))";

fn is_pickle(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".ckpt", ".pkl"].iter().any(|ending| name.ends_with(ending))
        || name.ends_with(".bin.index.json")
}

fn nothing_to_open(directory: &Path) -> Error {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .map(|entries| {
            entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        })
        .unwrap_or_default();
    names.sort();
    if names.iter().any(|name| is_pickle(name)) {
        names.truncate(8);
        let found = names.join(", ");
        return Error::checkpoint(
            directory,
            format!("found no safetensors among {found}: {PICKLE}"),
        );
    }
    if names.iter().any(|name| name == "drift.json") {
        let message = "this is a delta, not a checkpoint; Delta.open reads it";
        return Error::checkpoint(directory, message);
    }
    names.truncate(8);
    let found = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
    Error::NotFound {
        path: directory.to_owned(),
        message: format!("expected {SINGLE} or {INDEX} in the directory, found {found}"),
    }
}

/// Where an index entry points, refused when that is outside the checkpoint's directory.
///
/// An index is untrusted input: `../other` or a link elsewhere would read files that the user did
/// not name. The Hub cache is the exception: its snapshots are links into `blobs` beside them.
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
    let relative = Path::new(file);
    if file.is_empty() || !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return refuse("which leaves the checkpoint's directory");
    }
    let path = directory.join(relative);
    let (Ok(home), Ok(target)) = (directory.canonicalize(), path.canonicalize()) else {
        return Ok(path);
    };
    if target.starts_with(&home) || is_hub_blob(&home, &target) {
        return Ok(path);
    }
    refuse("a link out of the checkpoint's directory")
}

fn is_hub_blob(snapshot: &Path, target: &Path) -> bool {
    let Some(snapshots) = snapshot.parent() else { return false };
    let Some(repository) = snapshots.parent() else { return false };
    snapshots.file_name().is_some_and(|name| name == "snapshots")
        && target.parent() == Some(&repository.join("blobs"))
}

#[derive(serde::Deserialize)]
struct Index {
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
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
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
