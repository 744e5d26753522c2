//! Writes a delta or a merged model: sharded safetensors and an index, in a directory that gets its
//! name at the end.
//!
//! Everything is written into a hidden directory beside the target, which gets the target's name once
//! every byte is flushed. So a reader sees the complete output or none, a mapping of an overwritten
//! output stays intact, and an interrupted run leaves only the hidden directory, which the next run
//! to the same target removes. If the target is an existing empty directory (the working directory or
//! a mount point, for example), the files are moved there one by one, and the description last.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::checksums::Checksums;
use super::format::{Slot, Storage};
use super::layout::{ShardLayout, layout};
use super::naming::Naming;
use super::space::check_space;
use super::staging::{RANKS, Staging, sync_directory, write_new};
use super::target::{Parents, check_target, places};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::platform;

/// What to write, and where.
#[derive(Debug, Clone, Copy)]
pub struct OutputSpec<'a> {
    /// The directory. It must not exist, be empty or, with `overwrite`, contain an earlier output.
    pub target: &'a Path,
    /// The tensors.
    pub slots: &'a [Slot],
    /// The most bytes of a shard; one with a single tensor may be larger.
    pub max_shard_nbytes: u64,
    /// Space for the description that [`Writer::commit`] adds.
    pub description_nbytes: u64,
    /// Replace an earlier output.
    pub overwrite: bool,
}

/// One process's share of a delta that several processes write.
#[derive(Debug, Clone, Copy)]
pub struct RankShare<'a> {
    /// The shards whose slots this process writes, by their place in [`super::layout::shards`].
    pub shards: &'a [usize],
    /// Open the files that another process created instead of creating them. Such a writer does not
    /// commit or remove anything.
    pub join: bool,
}

/// An unfinished output. If it is dropped without [`Writer::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    naming: Naming,
    /// Before the directory, as some systems neither remove nor rename one in which a file is open.
    files: Vec<(PathBuf, File)>,
    staging: Staging,
    storage: Storage,
    overwrite: bool,
    parents: Parents,
    /// Names of the side files.
    side_files: Vec<String>,
    /// The file number and the byte offset of each slot.
    places: Vec<(usize, u64)>,
    /// Of each slot of a delta; a merged model has none.
    checksums: Vec<Checksums>,
    /// Bytes that all files take on disk.
    needed: u64,
}

impl Writer {
    /// Reserve space for a delta.
    ///
    /// # Errors
    /// A target that already exists, another run that writes to it, or not enough space.
    pub fn create(spec: &OutputSpec<'_>, storage: Storage) -> Result<Self> {
        Self::open(spec, Naming::DELTA, storage, &[], None)
    }

    /// Reserve space for a merged model, and for side files with these names and sizes, which
    /// [`Writer::add`] writes.
    ///
    /// # Errors
    /// Those of [`Writer::create`].
    pub fn create_model(spec: &OutputSpec<'_>, side_files: &[(String, u64)]) -> Result<Self> {
        Self::open(spec, Naming::MODEL, Storage::Plain(Dtype::F32), side_files, None)
    }

    /// Reserve space for a delta as one of several processes. This writer has only the slots of its
    /// own shards, numbered from zero in their order. The process that does not join commits once the
    /// others have flushed their files; until then [`RANKS`] stays in the hidden directory.
    ///
    /// # Errors
    /// Those of [`Writer::create`] or, when joining, files that are missing or have another size.
    pub fn create_share(
        spec: &OutputSpec<'_>,
        storage: Storage,
        share: RankShare<'_>,
    ) -> Result<Self> {
        Self::open(spec, Naming::DELTA, storage, &[], Some(share))
    }

    fn open(
        spec: &OutputSpec<'_>,
        naming: Naming,
        storage: Storage,
        side_files: &[(String, u64)],
        share: Option<RankShare<'_>>,
    ) -> Result<Self> {
        let join = share.is_some_and(|share| share.join);
        if !join {
            check_target(spec.target, naming, spec.overwrite)?;
        }
        let (target, hidden) = places(spec.target, naming)?;
        let shards = layout(spec.slots, storage, spec.max_shard_nbytes)?;
        let names: Vec<_> = (0..shards.len()).map(|n| naming.shard(n, shards.len())).collect();
        let index = index(&shards, &names);
        let sizes = shards.iter().map(ShardLayout::nbytes);
        let sizes = sizes.chain([index.len() as u64, spec.description_nbytes]);
        let sizes = sizes.chain(side_files.iter().map(|(_, nbytes)| *nbytes));
        let own = |&number: &usize| share.is_none_or(|share| share.shards.contains(&number));
        let own: Vec<usize> = (0..shards.len()).filter(own).collect();
        let (staging, parents, needed) = if join {
            (Staging::join(hidden)?, Parents::default(), sizes.sum())
        } else {
            let parents = Parents::create(target.parent().unwrap_or(&target))?;
            let needed = check_space(hidden.parent().unwrap_or(&target), &target, naming, sizes)?;
            (Staging::create(hidden, naming, share.is_some())?, parents, needed)
        };
        let mut writer = Self {
            target,
            naming,
            files: Vec::with_capacity(shards.len()),
            staging,
            storage,
            overwrite: spec.overwrite,
            parents,
            side_files: side_files.iter().map(|(name, _)| name.clone()).collect(),
            // A process that joins has only its own files open.
            places: slot_places(&shards, &own, join),
            checksums: if naming == Naming::DELTA { slot_checksums(&shards, &own) } else { vec![] },
            needed,
        };
        if join {
            for &number in &own {
                let path = writer.staging.path.join(&names[number]);
                let file = rejoin(&path, &shards[number])?;
                writer.files.push((path, file));
            }
        } else {
            writer.allocate(&shards, &names, &index)?;
        }
        Ok(writer)
    }

    /// Create the files of all shards at their full size, and the index.
    fn allocate(
        &mut self,
        shards: &[ShardLayout<'_>],
        names: &[String],
        index: &str,
    ) -> Result<()> {
        for (name, shard) in names.iter().zip(shards) {
            let path = self.staging.path.join(name);
            let file = allocate(&path, shard)
                .map_err(|(action, error)| self.failed(&path, action, error))?;
            self.files.push((path, file));
        }
        let path = self.staging.path.join(self.naming.index);
        write_new(&path, index.as_bytes())
            .map_err(|error| self.failed(&path, "write the index", error))
    }

    /// Write one of the side files that were announced to [`Writer::create_model`].
    ///
    /// # Errors
    /// A name that was not announced, or a failed write.
    pub fn add(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if !self.side_files.iter().any(|announced| announced == name) {
            return Err(Error::Argument(format!("{name:?} was not announced as a file to add")));
        }
        let path = self.staging.path.join(name);
        write_new(&path, bytes).map_err(|error| self.failed(&path, "write the file", error))
    }

    /// How the slots store differences.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Write `bytes` at `offset` within a slot. Each byte of a slot is written once, in any order, by
    /// any thread.
    ///
    /// # Errors
    /// A failed write.
    pub fn write_at(&self, slot: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let &(file, start) = self.places.get(slot).ok_or_else(|| {
            Error::Argument(format!("there is no slot {slot} among {}", self.places.len()))
        })?;
        let (path, file) = &self.files[file];
        let position = start + offset as u64;
        platform::write_all_at(file, bytes, position)
            .map_err(|error| self.failed(path, "write the output", error))?;
        platform::start_writing(file, position, bytes.len());
        if let Some(checksums) = self.checksums.get(slot) {
            checksums.take(offset, bytes);
        }
        Ok(())
    }

    /// The checksums of what was written of each slot of a delta, as [`checksums::parse`] reads them.
    ///
    /// [`checksums::parse`]: super::checksums::parse
    pub fn checksums(&self) -> Vec<String> {
        self.checksums.iter().map(Checksums::text).collect()
    }

    /// Flush the files to disk.
    ///
    /// # Errors
    /// A failed flush.
    pub fn flush(&self) -> Result<()> {
        for (path, file) in &self.files {
            file.sync_all().map_err(|error| self.failed(path, "flush the output", error))?;
        }
        Ok(())
    }

    /// Flush everything, add the description and give the directory its name.
    ///
    /// # Errors
    /// A failed flush or rename, or a target that was created meanwhile; nothing is left behind.
    pub fn commit(mut self, description: impl AsRef<[u8]>) -> Result<()> {
        if self.staging.is_joined() {
            let message = "only the process that created a delta can commit it".to_owned();
            return Err(Error::Argument(message));
        }
        self.flush()?;
        // The rename would move it too.
        let ranks = self.staging.path.join(RANKS);
        match fs::remove_dir_all(&ranks) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(&ranks, "remove the directory")(error));
            }
            _ => {}
        }
        let Naming { index, description: description_name, .. } = self.naming;
        let path = self.staging.path.join(description_name);
        write_new(&path, description.as_ref())
            .map_err(|error| self.failed(&path, "write the description", error))?;
        sync_directory(&self.staging.path)?;
        let shards: Vec<PathBuf> =
            mem::take(&mut self.files).into_iter().map(|(path, _)| path).collect();
        let shards = shards.iter().filter_map(|path| path.file_name());
        let side_files = self.side_files.iter().map(OsStr::new);
        let last = [index.as_ref(), description_name.as_ref()];
        let names: Vec<&OsStr> = shards.chain(side_files).chain(last).collect();
        self.staging.publish(&self.target, &names, self.overwrite)?;
        self.parents.keep();
        self.target.parent().map_or(Ok(()), sync_directory)
    }

    /// A failed write as an error, which says how much space is needed in all if it ran out.
    fn failed(&self, path: &Path, action: &'static str, error: io::Error) -> Error {
        self.staging.failed(path, action, error, &self.target, self.needed)
    }
}

/// The text of the index: which tensor is in which shard.
fn index(shards: &[ShardLayout<'_>], names: &[String]) -> String {
    let mut weight_map = serde_json::Map::new();
    for (shard, name) in shards.iter().zip(names) {
        for slot in shard.slots {
            weight_map.insert(slot.name.clone(), json!(name));
        }
    }
    let total: u64 = shards.iter().map(|shard| shard.data_nbytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    format!("{index:#}\n")
}

/// File number and byte offset of every slot of some shards; `renumbered` counts only those files.
fn slot_places(shards: &[ShardLayout<'_>], own: &[usize], renumbered: bool) -> Vec<(usize, u64)> {
    let mut places = Vec::new();
    for (place, &number) in own.iter().enumerate() {
        let shard = &shards[number];
        let file = if renumbered { place } else { number };
        let start = shard.header.len() as u64;
        places.extend(shard.offsets.iter().map(|offset| (file, start + offset)));
    }
    places
}

/// Checksums for every slot of some shards.
fn slot_checksums(shards: &[ShardLayout<'_>], own: &[usize]) -> Vec<Checksums> {
    let slots = own.iter().flat_map(|&number| shards[number].slots);
    slots.map(|slot| Checksums::new(slot.nbytes())).collect()
}

fn allocate(
    path: &Path,
    shard: &ShardLayout<'_>,
) -> std::result::Result<File, (&'static str, io::Error)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|error| ("create the file", error))?;
    platform::reserve(&file, shard.nbytes())
        .map_err(|error| ("reserve space for the output", error))?;
    platform::write_all_at(&file, &shard.header, 0).map_err(|error| ("write the header", error))?;
    Ok(file)
}

/// Open a file that another process allocated for the same shard.
fn rejoin(path: &Path, shard: &ShardLayout<'_>) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(Error::io(path, "open the file"))?;
    let found = file.metadata().map_err(Error::io(path, "read the file's size"))?.len();
    if found != shard.nbytes() {
        return Err(Error::Argument(format!(
            "{}: has {found} bytes, expected {}; all processes need the same arguments",
            path.display(),
            shard.nbytes()
        )));
    }
    Ok(file)
}
