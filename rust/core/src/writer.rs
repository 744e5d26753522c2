//! A delta on disk: sharded safetensors and an index, written aside and renamed whole.
//!
//! Everything goes into a hidden directory beside the target, which takes the target's name only
//! once every byte is flushed. So a reader sees a whole delta or none, a mapping of an overwritten
//! one stays intact, and a run that was cut off leaves only the hidden directory, which the next
//! run to the same target removes. Into an empty directory that exists already (where one stands,
//! or a mount point) the files are moved one by one instead, `drift.json` last.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use crate::dtype::Dtype;
use crate::error::{Error, Limit, Result};

/// The file whose presence says that a delta is whole.
pub const DESCRIPTION: &str = "drift.json";
/// The index of a delta's shards.
pub const INDEX: &str = "delta.safetensors.index.json";

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

/// An unfinished delta; dropped without [`Writer::commit`], it leaves nothing.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    staging: Staging,
    dtype: Dtype,
    overwrite: bool,
    parents: Parents,
    files: Vec<(PathBuf, File)>,
    /// File number and byte offset in it, for each slot.
    places: Vec<(usize, u64)>,
    /// Bytes that all files take on the disk.
    needed: u64,
}

/// The hidden directory, locked against another run and removed when dropped.
#[derive(Debug)]
struct Staging {
    path: PathBuf,
    renamed: bool,
    _lock: File,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing can be done about a failure here; the next run tries again.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl Writer {
    /// Reserve the space for `slots` at `target`, which must not exist, be an empty directory, or,
    /// with `overwrite`, hold a delta. A shard takes at most `max_shard_nbytes`, or one tensor;
    /// `description_nbytes` is room for what [`Writer::commit`] adds.
    ///
    /// # Errors
    /// A target that is taken, another run writing to it, or not enough space.
    pub fn create(
        target: &Path,
        slots: &[Slot],
        dtype: Dtype,
        max_shard_nbytes: u64,
        description_nbytes: u64,
        overwrite: bool,
    ) -> Result<Self> {
        check_target(target, overwrite)?;
        let target = std::path::absolute(target).map_err(Error::io(target, "resolve the path"))?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Error::Argument(format!(
                "{} is not a place for a delta",
                target.display()
            )));
        };
        let layout = layout(slots, dtype, max_shard_nbytes)?;
        let parents = Parents::create(parent)?;
        let home = if target.is_dir() && !target.join(DESCRIPTION).exists() {
            target.clone()
        } else {
            parent.to_owned()
        };
        let mut places = Vec::with_capacity(slots.len());
        let mut names = Vec::with_capacity(layout.len());
        let mut weight_map = serde_json::Map::new();
        for (number, shard) in layout.iter().enumerate() {
            let file_name = format!("delta-{:05}-of-{:05}.safetensors", number + 1, layout.len());
            for (offset, slot) in shard.offsets.iter().zip(shard.slots) {
                places.push((number, shard.header.len() as u64 + offset));
                weight_map.insert(slot.name.clone(), json!(file_name));
            }
            names.push(file_name);
        }
        let total: u64 = layout.iter().map(|shard| shard.data_nbytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        let index = format!("{index:#}\n");
        let sizes = layout.iter().map(ShardLayout::nbytes);
        let needed =
            check_space(&home, &target, sizes.chain([index.len() as u64, description_nbytes]))?;
        let staging = Staging::create(&home, &name.to_string_lossy())?;
        let mut files = Vec::with_capacity(layout.len());
        for (name, shard) in names.iter().zip(&layout) {
            let path = staging.path.join(name);
            let file = allocate(&path, shard)
                .map_err(|(action, error)| staging.failed(&path, action, error, &target, needed))?;
            files.push((path, file));
        }
        let path = staging.path.join(INDEX);
        write_new(&path, index.as_bytes())
            .map_err(|error| staging.failed(&path, "write the index", error, &target, needed))?;
        Ok(Self { target, staging, dtype, overwrite, parents, files, places, needed })
    }

    /// The dtype of every slot.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Write `bytes` at `offset` within a slot; slots may be written in any order, by any thread.
    ///
    /// # Errors
    /// A failed write.
    pub fn write_at(&self, slot: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let (file, position) = self.place(slot, offset)?;
        let (path, file) = self.file(file);
        file.write_all_at(bytes, position)
            .map_err(|error| self.failed(path, "write the delta", error))
    }

    /// The number of the file that byte `offset` of a slot lies in, and its position there.
    pub(crate) fn place(&self, slot: usize, offset: usize) -> Result<(usize, u64)> {
        let &(file, start) = self.places.get(slot).ok_or_else(|| {
            Error::Argument(format!("there is no slot {slot} among {}", self.places.len()))
        })?;
        Ok((file, start + offset as u64))
    }

    /// How many files hold tensors.
    pub(crate) fn files(&self) -> usize {
        self.files.len()
    }

    /// One of those files, and the path that it has until [`Writer::commit`].
    pub(crate) fn file(&self, number: usize) -> (&Path, &File) {
        let (path, file) = &self.files[number];
        (path, file)
    }

    /// A failed write, as an error that says what is needed in all where that is what was missing.
    pub(crate) fn failed(&self, path: &Path, action: &'static str, error: io::Error) -> Error {
        self.staging.failed(path, action, error, &self.target, self.needed)
    }

    /// Flush everything, add `drift.json` and give the directory its name.
    ///
    /// # Errors
    /// A failed flush or rename, or a target that was taken meanwhile; nothing is left behind.
    pub fn commit(mut self, description: &str) -> Result<()> {
        for (path, file) in &self.files {
            file.sync_all().map_err(|error| self.failed(path, "flush the delta", error))?;
        }
        let path = self.staging.path.join(DESCRIPTION);
        write_new(&path, description.as_bytes())
            .map_err(|error| self.failed(&path, "write the description", error))?;
        sync_directory(&self.staging.path)?;
        if self.staging.path.parent() == Some(&self.target) {
            self.move_files()?;
        } else {
            check_target(&self.target, self.overwrite)?;
            self.rename()?;
        }
        self.staging.renamed = true;
        self.parents.keep();
        self.target.parent().map_or(Ok(()), sync_directory)
    }

    /// Move the finished files up into the target, an empty directory that existed before.
    fn move_files(&self) -> Result<()> {
        let staging = &self.staging.path;
        let shards = self.files.iter().filter_map(|(path, _)| path.file_name());
        let names = shards.chain([INDEX.as_ref(), DESCRIPTION.as_ref()]);
        let mut moved = Vec::new();
        for name in names {
            let to = self.target.join(name);
            // A hard link, unlike a rename, never replaces a file that came in meanwhile; not every
            // file system has them.
            let from = staging.join(name);
            let result = fs::hard_link(&from, &to)
                .or_else(|error| if to.exists() { Err(error) } else { fs::rename(&from, &to) });
            if let Err(error) = result {
                for path in moved {
                    let _ = fs::remove_file(path);
                }
                return Err(Error::io(&to, "move the finished delta")(error));
            }
            moved.push(to);
        }
        sync_directory(&self.target)?;
        fs::remove_dir_all(staging).map_err(Error::io(staging, "remove the directory"))
    }

    fn rename(&mut self) -> Result<()> {
        let (from, to) = (&self.staging.path, &self.target);
        if !to.join(DESCRIPTION).exists() {
            return fs::rename(from, to).map_err(Error::io(to, "rename the finished delta"));
        }
        // Where the system can, both change names at once, and the old one then goes.
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            // Locked while it goes, since another run would take it for its own hidden directory.
            let old = File::open(to).map_err(Error::io(to, "open the old delta"))?;
            let locked = old.try_lock().is_ok();
            if locked && renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE).is_ok() {
                self.staging.renamed = true;
                // The new delta stands; what cannot be removed now, the next run removes.
                let _ = fs::remove_dir_all(from);
                return Ok(());
            }
        }
        // Elsewhere the old delta steps aside under a hidden name and goes once the new one stands.
        let aside = from.with_extension("replaced");
        let _ = fs::remove_dir_all(&aside);
        fs::rename(to, &aside).map_err(Error::io(to, "move the old delta aside"))?;
        if let Err(error) = fs::rename(from, to) {
            let _ = fs::rename(&aside, to);
            return Err(Error::io(to, "rename the finished delta")(error));
        }
        fs::remove_dir_all(&aside).map_err(Error::io(&aside, "remove the old delta"))
    }
}

impl Staging {
    fn create(parent: &Path, name: &str) -> Result<Self> {
        let path = parent.join(format!(".{name}.incomplete"));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io(&path, "create the directory")(error));
            }
            _ => {}
        }
        // Locking the directory itself leaves no lock file inside the delta. A link in its place,
        // which someone else could have put there, is not followed.
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let lock = rustix::fs::open(&path, flags, Mode::empty())
            .map(File::from)
            .map_err(|error| Error::io(&path, "open the directory")(error.into()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Exists {
                    path,
                    message: "another run is writing this delta; wait for it or choose another \
                              output directory"
                        .to_owned(),
                });
            }
            Err(TryLockError::Error(error)) => {
                return Err(Error::io(&path, "lock the directory")(error));
            }
        }
        // What a run that was cut off left behind; anything else is somebody's and stays.
        let entries = fs::read_dir(&path)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .map_err(Error::io(&path, "list the directory"))?;
        for entry in &entries {
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            if !is_file || !is_ours(&entry.file_name().to_string_lossy()) {
                let message = format!(
                    "holds {}, which no run of drift_fast left there; move it away or choose \
                     another output directory",
                    entry.file_name().display()
                );
                return Err(Error::Exists { path, message });
            }
        }
        let staging = Self { path, renamed: false, _lock: lock };
        for entry in entries {
            fs::remove_file(entry.path()).map_err(Error::io(&entry.path(), "remove"))?;
        }
        Ok(staging)
    }

    /// What a failed write comes to. Of a full disk, a used-up quota and a file that grew too large it
    /// says how much is needed in all; what is free counts what goes when this is dropped.
    fn failed(
        &self,
        path: &Path,
        action: &'static str,
        error: io::Error,
        target: &Path,
        needed: u64,
    ) -> Error {
        let Some(limit) = Limit::of(&error) else { return Error::io(path, action)(error) };
        let held: u64 = fs::read_dir(&self.path)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.and_then(|entry| entry.metadata()).ok())
            // POSIX leaves the unit open; Linux and macOS count in 512 bytes.
            .map(|metadata| metadata.blocks() * 512)
            .sum();
        let available = free_nbytes(&self.path).map_or(0, |(free, _)| free.saturating_add(held));
        Error::NoSpace { path: target.to_owned(), needed, available, limit }
    }
}

/// The directories above the target that had to be made, removed again unless kept.
#[derive(Debug)]
struct Parents {
    made: Vec<PathBuf>,
}

impl Parents {
    fn create(directory: &Path) -> Result<Self> {
        let missing: Vec<PathBuf> =
            directory.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
        fs::create_dir_all(directory).map_err(Error::io(directory, "create the directory"))?;
        Ok(Self { made: missing })
    }

    fn keep(&mut self) {
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

/// One shard's header and the place of its tensors in the data that follows.
struct ShardLayout<'a> {
    slots: &'a [Slot],
    offsets: Vec<u64>,
    data_nbytes: u64,
    header: Vec<u8>,
}

impl ShardLayout<'_> {
    fn nbytes(&self) -> u64 {
        self.header.len() as u64 + self.data_nbytes
    }
}

fn layout(slots: &[Slot], dtype: Dtype, max_nbytes: u64) -> Result<Vec<ShardLayout<'_>>> {
    let nbytes = |slot: &Slot| (slot.shape.iter().product::<usize>() * dtype.nbytes()) as u64;
    let mut shards = Vec::new();
    let mut start = 0;
    while start < slots.len() {
        let mut end = start + 1;
        let mut total = nbytes(&slots[start]);
        while end < slots.len() && total + nbytes(&slots[end]) <= max_nbytes {
            total += nbytes(&slots[end]);
            end += 1;
        }
        shards.push(shard_layout(&slots[start..end], dtype)?);
        start = end;
    }
    if shards.is_empty() {
        return Err(Error::Argument("a delta needs at least one tensor".to_owned()));
    }
    Ok(shards)
}

fn shard_layout(slots: &[Slot], dtype: Dtype) -> Result<ShardLayout<'_>> {
    let header_dtype = match dtype {
        Dtype::BF16 => safetensors::Dtype::BF16,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F64 => safetensors::Dtype::F64,
    };
    let mut offsets = Vec::with_capacity(slots.len());
    let mut entries = Vec::with_capacity(slots.len());
    let mut end = 0;
    for slot in slots {
        let start = end;
        end += slot.shape.iter().product::<usize>() * dtype.nbytes();
        offsets.push(start as u64);
        entries.push((
            slot.name.clone(),
            TensorInfo {
                dtype: header_dtype,
                shape: slot.shape.clone(),
                data_offsets: (start, end),
            },
        ));
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    let header = Metadata::new(Some(metadata), entries)
        .map_err(|error| Error::Argument(format!("cannot lay out the delta: {error}")))?;
    let mut json = serde_json::to_vec(&header)
        .map_err(|error| Error::Argument(format!("cannot write the delta's header: {error}")))?;
    // The format pads the header with spaces so that the data starts on eight bytes.
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(ShardLayout { slots, offsets, data_nbytes: end as u64, header: bytes })
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
    reserve(&file, shard.nbytes()).map_err(|error| ("reserve space for the delta", error))?;
    file.write_all_at(&shard.header, 0).map_err(|error| ("write the header", error))?;
    Ok(file)
}

/// Give the file its blocks now where the file system can, so that a full disk is found here.
fn reserve(file: &File, nbytes: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        match fallocate(file, FallocateFlags::empty(), 0, nbytes) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    file.set_len(nbytes)
}

fn check_target(target: &Path, overwrite: bool) -> Result<()> {
    let refuse =
        |message: &str| Err(Error::Exists { path: target.to_owned(), message: message.to_owned() });
    let Ok(metadata) = fs::symlink_metadata(target) else { return Ok(()) };
    if !metadata.is_dir() {
        return refuse("the output exists and is not a directory; choose another path");
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(target).map_err(Error::io(target, "list the output directory"))? {
        let entry = entry.map_err(Error::io(target, "list the output directory"))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    let staging = format!(".{}.incomplete", target.file_name().unwrap_or_default().display());
    names.retain(|name| *name != staging);
    let is_empty = names.is_empty();
    let is_delta = target.join(DESCRIPTION).is_file() && target.join(INDEX).is_file();
    let stranger = names.iter().find(|name| !is_ours(name));
    if let (true, true, Some(stranger)) = (is_delta, overwrite, stranger) {
        return refuse(&format!(
            "the delta's directory also holds {stranger}, which overwriting would remove; move it \
             away or choose another path"
        ));
    }
    match (is_empty, is_delta, overwrite) {
        (true, _, _) | (_, true, true) => Ok(()),
        (_, true, false) => {
            refuse("a delta is there already; pass overwrite=True (--overwrite) to replace it")
        }
        (_, false, _) => {
            refuse("the output directory exists and is not empty; choose another path")
        }
    }
}

/// Whether a file of that name belongs to a delta.
fn is_ours(name: &str) -> bool {
    let is_count = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let shard = name.strip_prefix("delta-").and_then(|rest| rest.strip_suffix(".safetensors"));
    [DESCRIPTION, INDEX].contains(&name)
        || shard
            .and_then(|middle| middle.split_once("-of-"))
            .is_some_and(|(number, total)| is_count(number) && is_count(total))
}

/// The bytes that files of these sizes and their directory take on the disk, if they are free.
fn check_space(parent: &Path, target: &Path, sizes: impl Iterator<Item = u64>) -> Result<u64> {
    let (available, block) =
        free_nbytes(parent).map_err(Error::io(parent, "ask for the free space"))?;
    let needed = sizes
        .chain([block])
        .try_fold(0u64, |total, size| total.checked_add(size.checked_next_multiple_of(block)?))
        .unwrap_or(u64::MAX);
    if needed > available {
        return Err(Error::NoSpace {
            path: target.to_owned(),
            needed,
            available,
            limit: Limit::FileSystem,
        });
    }
    Ok(needed)
}

/// What is free to this user, and the unit in which it is given out.
fn free_nbytes(directory: &Path) -> io::Result<(u64, u64)> {
    let statistics = rustix::fs::statvfs(directory)?;
    let unit = statistics.f_frsize.max(1);
    Ok((statistics.f_bavail.saturating_mul(unit), unit))
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let mut file = File::create_new(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all())
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io(path, "flush the directory"))
}
