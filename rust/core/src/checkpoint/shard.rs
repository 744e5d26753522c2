//! One open safetensors file and its bytes, mapped or read.
//!
//! Owns the only `mmap` of the project; the header is [`super::header`]'s. The file must not shrink
//! while it is mapped: touching a page past its end kills the process with SIGBUS, which
//! [`Reader::Pread`] turns into an error.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::header::{self, Tensor};
use super::partial;
use super::regular;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::platform;

/// What is read at a time where the reader may be asked to stop.
const INTERRUPTIBLE_NBYTES: usize = 16 << 20;
const LOOK: &str = "read the size of the file";

/// How a shard's bytes reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reader {
    /// [`Reader::Pread`], everywhere: on a network file system a mapping turns a lost connection into a
    /// killed process, and on a disk a file that its owner cuts short.
    #[default]
    Auto,
    /// Read into a buffer that stays in a core's cache. Where the page cache holds small units it is
    /// faster than mapping. Reads say where they begin, so all threads share one descriptor of a file.
    Pread,
    /// Map the file and release its pages behind the reader: faster where the page cache holds units of
    /// 2 MiB.
    Mmap,
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
    modified: SystemTime,
    inode: u64,
}

impl Identity {
    fn of(file: &File, metadata: &Metadata) -> io::Result<Self> {
        Ok(Self {
            nbytes: metadata.len(),
            modified: metadata.modified()?,
            inode: platform::inode(file, metadata)?,
        })
    }

    /// Whether the file that has this path now is still this one.
    ///
    /// What is there of a file that was downloaded in part never changes while it is this file, but
    /// other processes add to it.
    fn holds(&self, path: &Path, is_partial: bool) -> Result<bool> {
        let (file, metadata) = regular::open(path, "open the file again")?;
        let now = Self::of(&file, &metadata).map_err(Error::io(path, LOOK))?;
        let modified = if is_partial { now.modified } else { self.modified };
        Ok(now == Self { modified, ..*self })
    }
}

impl Shard {
    /// Open `path` and validate its header; nothing of the data is read.
    ///
    /// # Errors
    /// A path that is not a regular file, a file shorter or longer than its header says, a header that
    /// is not JSON or names a tensor twice, or offsets that overlap or leave the file.
    pub fn open(path: &Path, reader: Reader) -> Result<Self> {
        let (file, metadata) = regular::open(path, "open the file")?;
        let identity = Identity::of(&file, &metadata).map_err(Error::io(path, LOOK))?;
        let (tensors, header_nbytes) = header::read(&file, path, identity.nbytes)?;
        let present = partial::read(path, identity.nbytes)?;
        if present.is_some() && !identity.holds(path, true)? {
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
                platform::populate(map, start as usize, nbytes)
                    .map_err(Error::io(&self.path, "read the file (did it shrink?)"))?;
                Ok(&map[start as usize..range.end as usize])
            }
            Reader::Auto | Reader::Pread => {
                scratch.resize(nbytes, 0);
                self.read_exact_at(scratch, start)?;
                Ok(scratch)
            }
        }
    }

    /// How its bytes are read.
    pub(crate) fn reader(&self) -> Reader {
        self.reader
    }

    /// Have the system bring a range into the page cache, unless it seems to be there, and return at
    /// once. It is advice: what fails costs time alone.
    pub(crate) fn prefetch(&self, range: Range<u64>) {
        platform::prefetch(&self.file, range);
    }

    /// Give back the pages of a range that [`Shard::bytes`] lent, so that resident memory stays flat.
    pub fn release(&self, range: Range<u64>) {
        if let (Reader::Mmap, Some(map)) = (self.reader, self.map.get())
            && range.end > range.start
        {
            platform::release(map, range.start as usize..range.end as usize);
        }
    }

    /// Copy the bytes at `offset` into `buffer`, whichever reader is in use.
    ///
    /// # Errors
    /// A read that fails, or a file that has become shorter.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_present(&(offset..offset.saturating_add(buffer.len() as u64)))?;
        for (index, part) in buffer.chunks_mut(INTERRUPTIBLE_NBYTES).enumerate() {
            interrupt::poll()?;
            platform::read_exact_at(
                &self.file,
                part,
                offset + (index * INTERRUPTIBLE_NBYTES) as u64,
            )
            .map_err(Error::io(&self.path, "read the file (did it shrink?)"))?;
        }
        Ok(())
    }

    /// Fail if the file has changed since it was opened.
    ///
    /// # Errors
    /// Another length, modification time or inode than at opening.
    pub fn check_unchanged(&self) -> Result<()> {
        if self.identity.holds(&self.path, self.is_partial())? {
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
    /// It tells checkpoints apart at a cost independent of their size; it does not prove integrity.
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
        let metadata = self.file.metadata().map_err(Error::io(&self.path, LOOK))?;
        let nbytes = metadata.len();
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
