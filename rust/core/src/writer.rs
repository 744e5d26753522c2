//! A delta on disk: sharded safetensors and an index, written aside and renamed whole.
//!
//! Everything goes into a hidden directory beside the target, which takes the target's name only
//! once every byte is flushed. So a reader sees a whole delta or none, a mapping of an overwritten
//! one stays intact, and a run that was cut off leaves only the hidden directory, which the next
//! run to the same target removes. Into an empty directory that exists already (where one stands,
//! or a mount point) the files are moved one by one instead, `drift.json` last.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use crate::error::{Error, Result};
use crate::storage::Storage;

/// The file whose presence says that a delta is whole.
pub const DESCRIPTION: &str = "drift.json";
/// The index of a delta's shards.
pub const INDEX: &str = "delta.safetensors.index.json";
/// Of the header's length, which a file begins with.
const LENGTH_NBYTES: u64 = 8;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// The type of its elements.
    pub dtype: safetensors::Dtype,
}

impl Slot {
    fn nbytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// An unfinished delta; dropped without [`Writer::commit`], it leaves nothing.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    staging: Staging,
    storage: Storage,
    overwrite: bool,
    parents: Parents,
    files: Vec<(PathBuf, File)>,
    /// File number and byte offset in it, for each slot.
    places: Vec<(usize, u64)>,
    /// Of E4M3 codes, the place of each slot's scale in its file's header, and its exponent once it
    /// is known.
    scales: Vec<(u64, OnceLock<i32>)>,
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
    /// with `overwrite`, hold a delta. A shard takes at most `max_shard_nbytes`, or one tensor.
    ///
    /// # Errors
    /// A target that is taken, another run writing to it, or not enough space.
    pub fn create(
        target: &Path,
        slots: &[Slot],
        storage: Storage,
        max_shard_nbytes: u64,
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
        let layout = layout(slots, storage, max_shard_nbytes)?;
        let parents = Parents::create(parent)?;
        let home = if target.is_dir() && !target.join(DESCRIPTION).exists() {
            target.clone()
        } else {
            parent.to_owned()
        };
        check_space(&home, &target, layout.iter().map(|shard| shard.nbytes()).sum())?;
        let staging = Staging::create(&home, &name.to_string_lossy())?;
        let mut places = Vec::with_capacity(slots.len());
        let mut files = Vec::with_capacity(layout.len());
        let mut scales = Vec::new();
        let mut weight_map = serde_json::Map::new();
        for (number, shard) in layout.iter().enumerate() {
            let file_name = format!("delta-{:05}-of-{:05}.safetensors", number + 1, layout.len());
            let path = staging.path.join(&file_name);
            files.push((path.clone(), allocate(&path, shard)?));
            scales.extend(shard.scales.iter().map(|&at| (at, OnceLock::new())));
            for (offset, slot) in shard.offsets.iter().zip(shard.slots) {
                places.push((number, shard.header.len() as u64 + offset));
                weight_map.insert(slot.name.clone(), json!(file_name));
            }
        }
        let total: u64 = layout.iter().map(|shard| shard.data_nbytes).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_new(&staging.path.join(INDEX), format!("{index:#}\n").as_bytes())?;
        Ok(Self { target, staging, storage, overwrite, parents, files, places, scales })
    }

    /// How the slots hold differences.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// The exponent of a slot's scale, where its codes have one and it is known.
    pub fn exponent(&self, slot: usize) -> Option<i32> {
        self.scales.get(slot).and_then(|(_, exponent)| exponent.get()).copied()
    }

    /// Say by which power of two the codes of a slot are to be multiplied.
    ///
    /// # Errors
    /// A slot whose codes have no such scale, or have another one already, or a failed write.
    pub fn set_exponent(&self, slot: usize, exponent: i32) -> Result<()> {
        let Some((at, known)) = self.scales.get(slot) else {
            return Err(Error::Argument(format!("slot {slot} has no scale of its own")));
        };
        if *known.get_or_init(|| exponent) != exponent {
            return Err(Error::Argument(format!("the scale of slot {slot} was set already")));
        }
        let text = scale_text(2f64.powi(exponent));
        let (path, file) = &self.files[self.places[slot].0];
        file.write_all_at(text.as_bytes(), *at).map_err(Error::io(path, "write the header"))
    }

    /// Write `bytes` at `offset` within a slot; slots may be written in any order, by any thread.
    ///
    /// # Errors
    /// A failed write.
    pub fn write_at(&self, slot: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let &(file, start) = self.places.get(slot).ok_or_else(|| {
            Error::Argument(format!("there is no slot {slot} among {}", self.places.len()))
        })?;
        let (path, file) = &self.files[file];
        file.write_all_at(bytes, start + offset as u64).map_err(Error::io(path, "write the delta"))
    }

    /// Flush everything, add `drift.json` and give the directory its name.
    ///
    /// # Errors
    /// A failed flush or rename, or a target that was taken meanwhile; nothing is left behind.
    pub fn commit(mut self, description: &str) -> Result<()> {
        for (path, file) in &self.files {
            file.sync_all().map_err(Error::io(path, "flush the delta"))?;
        }
        write_new(&self.staging.path.join(DESCRIPTION), description.as_bytes())?;
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
    /// Where in the header the scale of each slot is, if it has one.
    scales: Vec<u64>,
}

impl ShardLayout<'_> {
    fn nbytes(&self) -> u64 {
        self.header.len() as u64 + self.data_nbytes
    }
}

fn layout(slots: &[Slot], storage: Storage, max_nbytes: u64) -> Result<Vec<ShardLayout<'_>>> {
    let nbytes = |slot: &Slot| slot.nbytes() as u64;
    let mut shards = Vec::new();
    let mut start = 0;
    while start < slots.len() {
        let mut end = start + 1;
        let mut total = nbytes(&slots[start]);
        while end < slots.len() && total + nbytes(&slots[end]) <= max_nbytes {
            total += nbytes(&slots[end]);
            end += 1;
        }
        shards.push(shard_layout(&slots[start..end], storage)?);
        start = end;
    }
    if shards.is_empty() {
        return Err(Error::Argument("a delta needs at least one tensor".to_owned()));
    }
    Ok(shards)
}

fn shard_layout(slots: &[Slot], storage: Storage) -> Result<ShardLayout<'_>> {
    let mut offsets = Vec::with_capacity(slots.len());
    let mut entries = Vec::with_capacity(slots.len());
    let mut end = 0;
    for slot in slots {
        let start = end;
        end += slot.nbytes();
        offsets.push(start as u64);
        let (dtype, shape) = (slot.dtype, slot.shape.clone());
        entries.push((slot.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
    }
    let tensors = Metadata::new(None, entries)
        .map_err(|error| Error::Argument(format!("cannot lay out the delta: {error}")))?;
    let failed = |error| Error::Argument(format!("cannot write the delta's header: {error}"));
    let tensors = serde_json::to_string(&tensors).map_err(failed)?;
    // Written by hand: the order of a map of several entries would differ from run to run.
    let mut json = r#"{"__metadata__":{"format":"pt""#.to_owned();
    let mut scales = Vec::new();
    if storage == Storage::E4m3 {
        for slot in slots {
            let key = serde_json::to_string(&format!("{}.scale", slot.name)).map_err(failed)?;
            json += &format!(",{key}:\"");
            scales.push(LENGTH_NBYTES + json.len() as u64);
            json += &scale_text(1.0);
            json.push('"');
        }
    }
    json += "},";
    json += tensors.strip_prefix('{').unwrap_or(&tensors);
    let mut json = json.into_bytes();
    // The format pads the header with spaces so that the data starts on eight bytes.
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(ShardLayout { slots, offsets, data_nbytes: end as u64, header: bytes, scales })
}

/// A scale in a width that all of them have, since it is known only after the header was laid out.
fn scale_text(scale: f64) -> String {
    format!("{scale:<24e}")
}

fn allocate(path: &Path, shard: &ShardLayout<'_>) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(Error::io(path, "create the file"))?;
    reserve(&file, shard.nbytes()).map_err(Error::io(path, "reserve space for the delta"))?;
    file.write_all_at(&shard.header, 0).map_err(Error::io(path, "write the header"))?;
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

fn check_space(parent: &Path, target: &Path, needed: u64) -> Result<()> {
    let statistics = rustix::fs::statvfs(parent)
        .map_err(|error| Error::io(parent, "ask for the free space")(error.into()))?;
    let available = statistics.f_bavail.saturating_mul(statistics.f_frsize);
    if needed > available {
        return Err(Error::NoSpace { path: target.to_owned(), needed, available });
    }
    Ok(())
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut file = File::create_new(path).map_err(Error::io(path, "create the file"))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(path, "write the file"))
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io(path, "flush the directory"))
}
