//! One safetensors file: its header, validated, and its bytes, mapped or read.
//!
//! Owns the only `mmap` of the project. A shard that opened has a header whose tensors lie inside
//! the file, do not overlap, and cover it. The file must not shrink while it is mapped: touching a
//! page past its end kills the process with SIGBUS, which [`Reader::Pread`] turns into an error.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::{Advice, Mmap, UncheckedAdvice};
use safetensors::tensor::{Metadata, TensorInfo as HeaderEntry};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use sha2::{Digest, Sha256};

use super::partial;
use crate::dtype::{Dtype, Fp8};
use crate::error::{Error, Result};

/// The limit that the safetensors format sets for a header.
const MAX_HEADER_NBYTES: u64 = 100_000_000;
const LENGTH_NBYTES: u64 = 8;
/// Several times what the longest names of models take.
const MAX_NAME_NBYTES: usize = 8192;
/// The largest unit in which Linux keeps a file's pages together on x86-64 and AArch64.
const FOLIO_NBYTES: usize = 2 << 20;

/// How a shard's bytes reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reader {
    /// [`Reader::Pread`] on network file systems, where a mapping turns a lost connection into a
    /// killed process, and elsewhere what measured better: so far [`Reader::Pread`] too.
    #[default]
    Auto,
    /// Read into a buffer that stays in a core's cache. Where both were measured it was at least as
    /// fast as mapping, warm and cold, holds fewer pages, and cannot be killed by a file that
    /// shrinks. Reads say where they begin, so all threads share one descriptor of a file.
    Pread,
    /// Map the file and release its pages behind the reader.
    Mmap,
}

/// One tensor as its header describes it.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// The name on disk.
    pub name: String,
    /// Any dtype that safetensors knows.
    pub dtype: safetensors::Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub range: Range<u64>,
}

impl Tensor {
    /// Count of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements `start` to `stop` of this tensor, in row-major order, as a tensor of one dimension.
    ///
    /// # Errors
    /// A range that this tensor does not have, or a dtype whose elements are not whole bytes.
    pub fn elements(&self, start: usize, stop: usize) -> Result<Self> {
        let numel = self.numel();
        let nbytes = self.range.end - self.range.start;
        if start > stop || stop > numel {
            return Err(Error::Argument(format!(
                "{} has {numel} elements, not {start} to {stop}",
                self.name
            )));
        }
        if numel > 0 && !nbytes.is_multiple_of(numel as u64) {
            return Err(Error::Argument(format!("{} cannot be read in part", self.name)));
        }
        let size = nbytes.checked_div(numel as u64).unwrap_or(0);
        let range = self.range.start + start as u64 * size..self.range.start + stop as u64 * size;
        Ok(Self { shape: vec![stop - start], range, ..self.clone() })
    }
}

/// An open safetensors file.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    file: File,
    identity: Identity,
    header_nbytes: u64,
    tensors: Vec<Tensor>,
    /// What of a file is there, where only parts of it were downloaded.
    present: Option<Vec<Range<u64>>>,
    reader: Reader,
    map: OnceLock<Mmap>,
}

/// What must not change while a file is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    nbytes: u64,
    modified: (i64, i64),
    inode: u64,
}

/// What [`Reader::Auto`] takes on a local disk.
const LOCAL: Reader = Reader::Pread;

impl Reader {
    fn resolve(self, file: &File) -> Self {
        match self {
            Reader::Auto if on_network(file) => Reader::Pread,
            Reader::Auto => LOCAL,
            chosen => chosen,
        }
    }
}

/// Whether a file lies on a file system whose data is elsewhere, as far as the system says.
fn on_network(file: &File) -> bool {
    #[cfg(target_os = "linux")]
    {
        // The low 32 bits are what every architecture has.
        rustix::fs::fstatfs(file).is_ok_and(|found| is_network(found.f_type as u32))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file;
        false
    }
}

/// Whether `statfs` gives this number to a file system whose data is elsewhere: linux/magic.h, and
/// the sources of those that the kernel does not hold.
#[cfg(target_os = "linux")]
fn is_network(magic: u32) -> bool {
    const NETWORK: [u32; 17] = [
        0x6969,      // NFS
        0x517B,      // SMB
        0xFF53_4D42, // CIFS
        0xFE53_4D42, // SMB2
        0x0BD0_0BD0, // Lustre
        0x6573_5546, // FUSE: sshfs, s3fs, GlusterFS, JuiceFS, …
        0x0102_1997, // 9p
        0x4750_4653, // GPFS
        0x1983_0326, // BeeGFS
        0x00C3_6400, // Ceph
        0xAAD7_AAEA, // PanFS
        0x2003_0528, // OrangeFS
        0x5346_414F, // AFS
        0x6B41_4653, // kAFS
        0x7375_7245, // Coda
        0x564C,      // NCP
        0x0161_1970, // GFS2
    ];
    NETWORK.contains(&magic)
}

impl Identity {
    fn of(file: &File, path: &Path) -> Result<Self> {
        let metadata = file.metadata().map_err(Error::io(path, "read the size of the file"))?;
        Ok(Self {
            nbytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            inode: metadata.ino(),
        })
    }

    /// Of the file that has this path now.
    fn of_path(path: &Path) -> Result<Self> {
        let now = File::open(path).map_err(Error::io(path, "open the file again"))?;
        Self::of(&now, path)
    }
}

impl Shard {
    /// Open `path` and validate its header; nothing of the data is read.
    ///
    /// # Errors
    /// A path that is no regular file, a file shorter or longer than its header says, a header that
    /// is not JSON or names a tensor twice, or offsets that overlap or leave the file.
    pub fn open(path: &Path, reader: Reader) -> Result<Self> {
        // Asked before opening: opening a FIFO would wait for a writer.
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "open the file"))?;
        if !metadata.is_file() {
            return Err(Error::checkpoint(path, "expected a regular file, found something else"));
        }
        let file = File::open(path).map_err(Error::io(path, "open the file"))?;
        let reader = reader.resolve(&file);
        let identity = Identity::of(&file, path)?;
        let header = read_header(&file, path, identity.nbytes)?;
        let header_nbytes = LENGTH_NBYTES + header.len() as u64;
        let tensors = parse_header(path, &header, header_nbytes, identity.nbytes)?;
        let present = partial::read(path, identity.nbytes)?;
        if present.is_some() && Identity::of_path(path)? != identity {
            // The list may be that of the file which has taken the place of the one that is open.
            return Err(Error::checkpoint(
                path,
                "the file was replaced while it was being opened; run again once nothing writes to it",
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            identity,
            header_nbytes,
            tensors,
            present,
            reader,
            map: OnceLock::new(),
        })
    }

    /// Whether only parts of the file were downloaded.
    pub fn is_partial(&self) -> bool {
        self.present.is_some()
    }

    /// Refuse a range that was not downloaded: its bytes would read as zeros.
    fn check_present(&self, range: &Range<u64>) -> Result<()> {
        let Some(present) = &self.present else { return Ok(()) };
        // Ranges are sorted and merged, so one that does not hold all of it leaves a hole.
        let at = present.partition_point(|held| held.end < range.end);
        if range.is_empty() || present.get(at).is_some_and(|held| held.start <= range.start) {
            return Ok(());
        }
        Err(Error::checkpoint(
            &self.path,
            format!(
                "bytes {} to {} were not downloaded; open the checkpoint by its URL or Hub id, which \
                 fetches what is needed",
                range.start, range.end
            ),
        ))
    }

    /// The path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes.
    pub fn nbytes(&self) -> u64 {
        self.identity.nbytes
    }

    /// Its tensors, by rising offset.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Lend the bytes of `range`: a window of the mapping, or `scratch` filled from the file.
    ///
    /// # Errors
    /// A read that fails, or a file that has become shorter.
    pub fn bytes<'a>(&'a self, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        self.check_present(&range)?;
        let (start, nbytes) = (range.start, (range.end - range.start) as usize);
        match self.reader {
            Reader::Mmap => {
                let map = self.map()?;
                // Brings the pages in with one call, and answers with an error where touching them
                // would kill the process. Kernels older than Linux 5.14 do not know it.
                #[cfg(target_os = "linux")]
                if nbytes > 0
                    && let Err(error) =
                        map.advise_range(Advice::PopulateRead, start as usize, nbytes)
                    && error.raw_os_error() != Some(rustix::io::Errno::INVAL.raw_os_error())
                {
                    return Err(Error::io(&self.path, "read the file (did it shrink?)")(error));
                }
                Ok(&map[start as usize..range.end as usize])
            }
            Reader::Auto | Reader::Pread => {
                scratch.resize(nbytes, 0);
                self.read_exact_at(scratch, start)?;
                Ok(scratch)
            }
        }
    }

    /// How its bytes are read, never [`Reader::Auto`].
    pub(crate) fn reader(&self) -> Reader {
        self.reader
    }

    /// Have the system bring a range into the page cache, unless it seems to be there, and return at
    /// once. It is advice: what fails costs time alone.
    pub(crate) fn prefetch(&self, range: Range<u64>) {
        #[cfg(target_os = "linux")]
        {
            use rustix::io::{ReadWriteFlags, preadv2};
            let Some(last) = range.end.checked_sub(1).filter(|last| *last >= range.start) else {
                return;
            };
            let mut byte = [0];
            let mut probe = [std::io::IoSliceMut::new(&mut byte)];
            // Asking for what is there already costs a walk over its pages, which a read of one byte
            // that must not wait tells in advance.
            if !matches!(preadv2(&self.file, &mut probe, last, ReadWriteFlags::NOWAIT), Ok(1)) {
                let nbytes = std::num::NonZeroU64::new(range.end - range.start);
                let advice = rustix::fs::Advice::WillNeed;
                let _ = rustix::fs::fadvise(&self.file, range.start, nbytes, advice);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Give back the pages of a range that [`Shard::bytes`] lent, so that resident memory stays flat.
    pub fn release(&self, range: Range<u64>) {
        if let (Reader::Mmap, Some(map)) = (self.reader, self.map.get())
            && range.end > range.start
        {
            // Bringing pages in maps the whole of a large page-cache folio, and so earlier pages
            // that were released already; starting at its boundary takes those along.
            let start = range.start as usize / FOLIO_NBYTES * FOLIO_NBYTES;
            let nbytes = range.end as usize - start;
            // SAFETY: the mapping is shared, read-only and backed by a file, so a page that is
            // dropped is read again when touched; no byte that anyone sees can change.
            #[allow(unsafe_code)]
            // Failing to drop a page costs memory, not correctness.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, nbytes) };
        }
    }

    /// Copy the bytes at `offset` into `buffer`, whichever reader is in use.
    ///
    /// # Errors
    /// A read that fails, or a file that has become shorter.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_present(&(offset..offset.saturating_add(buffer.len() as u64)))?;
        self.file
            .read_exact_at(buffer, offset)
            .map_err(Error::io(&self.path, "read the file (did it shrink?)"))
    }

    /// Fail if the file has changed since it was opened.
    ///
    /// # Errors
    /// Another length, modification time or inode than at opening.
    pub fn check_unchanged(&self) -> Result<()> {
        if Identity::of_path(&self.path)? == self.identity {
            return Ok(());
        }
        Err(Error::checkpoint(
            &self.path,
            "the file changed while it was being read; run again once nothing writes to it",
        ))
    }

    /// SHA-256 of the length, the header and 64 samples of 4 KiB spread evenly over the data; of a
    /// file that is partly there, the samples are left out.
    ///
    /// It tells checkpoints apart at a cost independent of their size; it is no proof of integrity.
    ///
    /// # Errors
    /// A read that fails.
    pub fn fingerprint(&self) -> Result<String> {
        const SAMPLES: u64 = 64;
        const SAMPLE_NBYTES: u64 = 4096;
        let mut hash = Sha256::new();
        hash.update(self.nbytes().to_le_bytes());
        let mut hash_range = |range: Range<u64>| -> Result<()> {
            let mut buffer = vec![0; (range.end - range.start) as usize];
            self.read_exact_at(&mut buffer, range.start)?;
            hash.update(&buffer);
            Ok(())
        };
        hash_range(0..self.header_nbytes)?;
        let data_nbytes = self.nbytes() - self.header_nbytes;
        if self.is_partial() {
            // What was downloaded differs from run to run, and must not alter the answer.
        } else if data_nbytes <= SAMPLES * SAMPLE_NBYTES {
            hash_range(self.header_nbytes..self.nbytes())?;
        } else {
            let stride = (data_nbytes - SAMPLE_NBYTES) / (SAMPLES - 1);
            for sample in 0..SAMPLES {
                let start = self.header_nbytes + sample * stride;
                hash_range(start..start + SAMPLE_NBYTES)?;
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn map(&self) -> Result<&Mmap> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let nbytes = Identity::of(&self.file, &self.path)?.nbytes;
        if nbytes != self.nbytes() {
            return Err(self.length_changed(nbytes));
        }
        // SAFETY: the mapping is private to this type and read-only. The file's owner promises not
        // to write to it meanwhile, as the module's documentation asks; bytes that change all the
        // same give wrong numbers, which `check_unchanged` reports, and never an invalid value.
        #[allow(unsafe_code)]
        let map =
            unsafe { Mmap::map(&self.file) }.map_err(Error::io(&self.path, "map the file"))?;
        Ok(self.map.get_or_init(|| map))
    }

    fn length_changed(&self, nbytes: u64) -> Error {
        let message = format!(
            "the file had {} bytes when it was opened and has {nbytes} now; \
             run again once nothing writes to it",
            self.nbytes()
        );
        Error::checkpoint(&self.path, message)
    }
}

fn read_header(file: &File, path: &Path, file_nbytes: u64) -> Result<Vec<u8>> {
    if file_nbytes < LENGTH_NBYTES {
        return Err(Error::checkpoint(
            path,
            format!(
                "expected at least {LENGTH_NBYTES} bytes, found {file_nbytes}: not a safetensors file"
            ),
        ));
    }
    let mut length = [0; LENGTH_NBYTES as usize];
    file.read_exact_at(&mut length, 0).map_err(Error::io(path, "read the header"))?;
    let header_nbytes = u64::from_le_bytes(length);
    let available = file_nbytes - LENGTH_NBYTES;
    if header_nbytes > available || header_nbytes > MAX_HEADER_NBYTES {
        let looks_pickled = length.starts_with(b"PK\x03\x04") || length[0] == 0x80;
        let hint = if looks_pickled {
            "this looks like a PyTorch pickle, which is never loaded: convert it to safetensors"
        } else {
            "the file is truncated or no safetensors file"
        };
        return Err(Error::checkpoint(
            path,
            format!(
                "the header's length is given as {header_nbytes} bytes, but the file has {available} \
                 after it and the format allows {MAX_HEADER_NBYTES}; {hint}"
            ),
        ));
    }
    let mut header = vec![0; header_nbytes as usize];
    file.read_exact_at(&mut header, LENGTH_NBYTES).map_err(Error::io(path, "read the header"))?;
    Ok(header)
}

fn parse_header(
    path: &Path,
    bytes: &[u8],
    data_start: u64,
    file_nbytes: u64,
) -> Result<Vec<Tensor>> {
    let header: Header = serde_json::from_slice(bytes)
        .map_err(|error| Error::checkpoint(path, format!("the header is not valid: {error}")))?;
    let mut entries = header.0;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut expected_start = 0;
    for (name, entry) in &entries {
        check_entry(path, name, entry, expected_start)?;
        expected_start = entry.data_offsets.1;
    }
    let expected_nbytes = data_start + expected_start as u64;
    if file_nbytes != expected_nbytes {
        let what = if file_nbytes < expected_nbytes { "truncated" } else { "too long" };
        return Err(Error::checkpoint(
            path,
            format!(
                "the file is {what}: its header describes {expected_nbytes} bytes, \
                 found {file_nbytes}; copy or download it again"
            ),
        ));
    }
    // The format's own library has the last word on what is valid.
    Metadata::new(None, entries.clone())
        .map_err(|error| Error::checkpoint(path, format!("the header is not valid: {error}")))?;
    let tensors = entries.into_iter().map(|(name, entry)| Tensor {
        name,
        dtype: entry.dtype,
        shape: entry.shape,
        range: data_start + entry.data_offsets.0 as u64..data_start + entry.data_offsets.1 as u64,
    });
    Ok(tensors.collect())
}

fn check_entry(path: &Path, name: &str, entry: &HeaderEntry, expected_start: usize) -> Result<()> {
    let (start, end) = entry.data_offsets;
    // Aligning names takes time that grows with the square of their components.
    if name.len() > MAX_NAME_NBYTES {
        return Err(Error::checkpoint(
            path,
            format!(
                "a tensor's name has {} bytes, expected at most {MAX_NAME_NBYTES}: {:?}…",
                name.len(),
                name.chars().take(64).collect::<String>()
            ),
        ));
    }
    if end < start {
        return Err(Error::tensor(
            path,
            name,
            format!("its offsets run backwards: {start} to {end}"),
        ));
    }
    if start != expected_start {
        let what = if start < expected_start { "overlap the tensor before" } else { "leave a gap" };
        return Err(Error::tensor(
            path,
            name,
            format!("its offsets {start} to {end} {what}: expected to start at {expected_start}"),
        ));
    }
    let nbits = entry
        .shape
        .iter()
        .try_fold(entry.dtype.bitsize(), |product, &dimension| product.checked_mul(dimension));
    match nbits {
        Some(nbits) if nbits.is_multiple_of(8) && nbits / 8 == end - start => Ok(()),
        _ => Err(Error::tensor(
            path,
            name,
            format!(
                "shape {:?} of dtype {} takes {}, but its offsets {start} to {end} hold {} bytes",
                entry.shape,
                entry.dtype,
                nbits.map_or("more than can be addressed".to_owned(), |n| format!(
                    "{} bytes",
                    n.div_ceil(8)
                )),
                end - start
            ),
        )),
    }
}

/// The header's entries in file order. A JSON reader that keeps the last of two equal names would
/// hide a tensor, so a second one is refused.
struct Header(Vec<(String, HeaderEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(
                self,
                mut map: M,
            ) -> std::result::Result<Header, M::Error> {
                let mut seen = HashMap::new();
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if seen.insert(name.clone(), ()).is_some() {
                        return Err(M::Error::custom(format!("tensor {name:?} is named twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<HashMap<String, String>>()?;
                        continue;
                    }
                    let entry = map
                        .next_value::<HeaderEntry>()
                        .map_err(|error| M::Error::custom(format!("tensor {name:?}: {error}")))?;
                    entries.push((name, entry));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// The dtype of a tensor whose elements are values.
///
/// # Errors
/// A dtype other than those of [`Dtype`], with what to do about it.
pub fn subtractable(shard: &Shard, tensor: &Tensor) -> Result<Dtype> {
    Dtype::from_header(tensor.dtype).ok_or_else(|| {
        if Fp8::from_header(tensor.dtype).is_some() {
            return Error::tensor(
                shard.path(),
                &tensor.name,
                format!(
                    "its {} codes under block scales cannot be put together with parts of other \
                     tensors; save the checkpoint in BF16, or take one that stores this tensor as \
                     the other checkpoint does",
                    tensor.dtype
                ),
            );
        }
        Error::tensor(
            shard.path(),
            &tensor.name,
            format!(
                "dtype {} is not supported (supported: {}); \
                 a quantised checkpoint must be replaced by the unquantised one",
                tensor.dtype,
                Dtype::SUPPORTED
            ),
        )
    })
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_memory_are_local_and_what_a_server_holds_is_not() {
        // ext4, XFS, Btrfs, tmpfs, overlayfs, ZFS.
        for magic in [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0x794C_7630, 0x2FC1_2FC1] {
            assert!(!is_network(magic), "{magic:#x}");
        }
        for magic in [0x6969, 0xFF53_4D42, 0x0BD0_0BD0, 0x6573_5546, 0x4750_4653] {
            assert!(is_network(magic), "{magic:#x}");
        }
        let file = tempfile::tempfile().unwrap();
        assert_eq!(Reader::Mmap.resolve(&file), Reader::Mmap);
        assert_ne!(Reader::Auto.resolve(&file), Reader::Auto);
    }
}
