//! How the chunks of Δ reach the files of a delta.
//!
//! Owns the buffers that carry them and the threads that write them; where a chunk belongs is
//! [`Writer`]'s. There are no more buffers than the plan says: a worker that is ahead of the disk
//! waits for one to come back. What a way of writing changes is time, never a byte.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

use crate::budget::{Account, Plan};
use crate::error::{Error, Result};
use crate::writer::Writer;

/// A page, and no less than a disk's block: then no page holds both what went through the page cache
/// and what went past it. AArch64 has pages of up to 64 KiB.
const ALIGNMENT: usize = if cfg!(target_arch = "x86_64") { 4 << 10 } else { 64 << 10 };

/// What is worth a write past the page cache: shorter ones wait for the disk too often.
const DIRECT_NBYTES: usize = 64 << 10;

/// Who writes Δ, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Write {
    /// Each worker writes what it computed.
    #[default]
    Worker,
    /// So many threads write what workers hand over.
    Queue {
        /// Threads that write.
        writers: usize,
        /// What they ask of the system.
        how: How,
    },
}

/// What whoever writes asks of the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// To keep it in the page cache until it is flushed.
    Cached,
    /// To start writing it to the disk at once, so that the flush at the end has little to do.
    Early,
    /// To take it past the page cache (`O_DIRECT`) where the file system can.
    Direct,
}

impl Write {
    pub(crate) fn writers(self) -> usize {
        match self {
            Write::Worker => 0,
            Write::Queue { writers, .. } => writers.max(1),
        }
    }
}

/// Δ of one chunk, aligned in memory as it is in its file.
#[derive(Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    nbytes: usize,
}

impl Buffer {
    /// What a buffer for `nbytes` takes.
    pub(crate) fn held_nbytes(nbytes: usize) -> usize {
        nbytes.saturating_add(2 * ALIGNMENT)
    }

    fn new(nbytes: usize) -> Self {
        Self { bytes: vec![0; Self::held_nbytes(nbytes)], start: 0, nbytes: 0 }
    }

    fn room(&mut self, nbytes: usize, position: u64) -> &mut [u8] {
        let to_boundary = self.bytes.as_ptr().addr().wrapping_neg() % ALIGNMENT;
        self.start = to_boundary + (position % ALIGNMENT as u64) as usize;
        self.nbytes = nbytes;
        &mut self.bytes[self.start..self.start + nbytes]
    }
}

/// A buffer in someone's hands, for one place of one file; dropped, it is free again.
pub(crate) struct Lent<'a> {
    files: &'a Files<'a>,
    file: usize,
    position: u64,
    buffer: Buffer,
}

impl Lent<'_> {
    /// The bytes to be written; what they hold at first is left over.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let Buffer { bytes, start, nbytes } = &mut self.buffer;
        &mut bytes[*start..*start + *nbytes]
    }

    fn filled(&self) -> &[u8] {
        let Buffer { bytes, start, nbytes } = &self.buffer;
        &bytes[*start..*start + *nbytes]
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        self.files.free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        self.files.returned.notify_one();
    }
}

/// Δ of a chunk on its way to a writing thread, with the chunk's place in the order.
pub(crate) type Job<'a> = (usize, Lent<'a>);

/// The files of a delta, and the buffers on their way there.
pub(crate) struct Files<'a> {
    writer: &'a Writer,
    how: How,
    free: Mutex<Vec<Buffer>>,
    returned: Condvar,
    /// The files once more, past the page cache; none where the file system refuses.
    direct: Vec<OnceLock<Option<File>>>,
    refused: AtomicBool,
}

impl<'a> Files<'a> {
    pub(crate) fn new(writer: &'a Writer, write: Write, plan: &Plan, account: &Account) -> Self {
        let how = match write {
            Write::Worker => How::Cached,
            Write::Queue { how, .. } => how,
        };
        account.add(plan.buffers * Buffer::held_nbytes(plan.demand.out));
        Self {
            writer,
            how,
            free: Mutex::new((0..plan.buffers).map(|_| Buffer::new(plan.demand.out)).collect()),
            returned: Condvar::new(),
            direct: (0..writer.files()).map(|_| OnceLock::new()).collect(),
            refused: AtomicBool::new(false),
        }
    }

    pub(crate) fn writer(&self) -> &'a Writer {
        self.writer
    }

    /// Wait for a buffer, for `nbytes` at `offset` of a slot.
    ///
    /// # Errors
    /// A slot that the delta does not have.
    pub(crate) fn lend(&'a self, slot: usize, offset: usize, nbytes: usize) -> Result<Lent<'a>> {
        let (file, position) = self.writer.place(slot, offset)?;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = loop {
            match free.pop() {
                Some(buffer) => break buffer,
                None => free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(free);
        buffer.room(nbytes, position);
        Ok(Lent { files: self, file, position, buffer })
    }

    /// Write what a buffer holds, or hand it to whoever does.
    ///
    /// # Errors
    /// A failed write, or writing threads that are gone.
    pub(crate) fn put(
        &self,
        index: usize,
        lent: Lent<'a>,
        queue: Option<&Sender<Job<'a>>>,
    ) -> Result<()> {
        match queue {
            None => self.write(&lent),
            Some(queue) => queue.send((index, lent)).map_err(|_| Error::Interrupted),
        }
    }

    /// Write what comes until nobody can send any more. After a failure, and where `stopped` says
    /// so, buffers are only given back.
    pub(crate) fn serve(
        &self,
        queue: &Mutex<Receiver<Job<'a>>>,
        stopped: impl Fn() -> bool,
        failed: impl Fn(usize, Error),
    ) {
        loop {
            // Waiting with the lock held keeps the other writers waiting for it, which is the same.
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((index, lent)) = next else { return };
            if !stopped()
                && let Err(error) = self.write(&lent)
            {
                failed(index, error);
            }
        }
    }

    fn write(&self, lent: &Lent<'_>) -> Result<()> {
        let (path, file) = self.writer.file(lent.file);
        let bytes = lent.filled();
        match self.how {
            How::Cached => file.write_all_at(bytes, lent.position),
            How::Early => {
                let written = file.write_all_at(bytes, lent.position);
                start_writing(file, lent.position, bytes.len());
                written
            }
            How::Direct => self.write_direct(lent, path, file),
        }
        .map_err(|error| self.writer.failed(path, "write the delta", error))
    }

    /// Whole blocks past the page cache, what lies before and after them through it: chunks that
    /// meet within a block then write to the same page.
    fn write_direct(&self, lent: &Lent<'_>, path: &Path, file: &File) -> io::Result<()> {
        let (bytes, position) = (lent.filled(), lent.position);
        let head = (position.next_multiple_of(ALIGNMENT as u64) - position) as usize;
        let (head, rest) = bytes.split_at(head.min(bytes.len()));
        let (body, tail) = rest.split_at(rest.len() / ALIGNMENT * ALIGNMENT);
        if body.len() < DIRECT_NBYTES || self.refused.load(Ordering::Relaxed) {
            return file.write_all_at(bytes, position);
        }
        file.write_all_at(head, position)?;
        let position = position + head.len() as u64;
        let direct = self.direct[lent.file].get_or_init(|| open_direct(path));
        match direct.as_ref().map(|direct| direct.write_all_at(body, position)) {
            // Opened all the same, but of another block size, say.
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidInput => {
                self.refused.store(true, Ordering::Relaxed);
                file.write_all_at(body, position)?;
            }
            Some(result) => result?,
            None => file.write_all_at(body, position)?,
        }
        file.write_all_at(tail, position + body.len() as u64)
    }
}

/// Open a file past the page cache; none where that cannot be had, which costs time alone.
fn open_direct(path: &Path) -> Option<File> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).map(File::from).ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = path;
        None
    }
}

/// Have the system start writing a range to the disk. Linux does so for pages that it is told are not
/// needed, and keeps those that are not clean; where it does not, the flush at the end does it all.
fn start_writing(file: &File, position: u64, nbytes: usize) {
    #[cfg(target_os = "linux")]
    if let Some(nbytes) = std::num::NonZeroU64::new(nbytes as u64) {
        let _ = rustix::fs::fadvise(file, position, Some(nbytes), rustix::fs::Advice::DontNeed);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, position, nbytes);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::budget::Demand;
    use crate::dtype::Dtype;
    use crate::writer::Slot;

    /// Write two slots, the first of `numel` bfloat16 values, and return what is in their file.
    fn written(numel: usize, refused: bool) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let slot = |name: &str, numel| Slot { name: name.to_owned(), shape: vec![numel] };
        let slots = [slot("a", numel), slot("b", 50_000)];
        let target = directory.path().join("delta");
        let writer = Writer::create(&target, &slots, Dtype::BF16, 1 << 30, 0, false).unwrap();
        let out = 2 * numel.max(50_000);
        let plan = Plan { demand: Demand { out, ..Demand::default() }, workers: 1, buffers: 2 };
        let write = Write::Queue { writers: 1, how: How::Direct };
        let account = Account::default();
        let files = Files::new(&writer, write, &plan, &account);
        files.refused.store(refused, Ordering::Relaxed);
        for (index, numel) in [numel, 50_000].into_iter().enumerate() {
            let mut lent = files.lend(index, 0, 2 * numel).unwrap();
            for (at, byte) in lent.bytes().iter_mut().enumerate() {
                *byte = (at % 251) as u8 ^ index as u8;
            }
            files.put(index, lent, None).unwrap();
        }
        assert_eq!(account.peak_nbytes(), 2 * Buffer::held_nbytes(out));
        std::fs::read(writer.file(0).0).unwrap()
    }

    #[test]
    fn what_goes_past_the_page_cache_is_what_goes_through_it() {
        for numel in [1, 2000, 40_000, 65_536, 100_001] {
            let (direct, cached) = (written(numel, false), written(numel, true));
            assert!(direct == cached, "{numel}");
            let data = &direct[direct.len() - 100_000 - 2 * numel..];
            assert!(data[..2 * numel].iter().enumerate().all(|(at, b)| *b == (at % 251) as u8));
        }
    }

    #[test]
    fn a_buffer_that_is_dropped_is_free_again() {
        let directory = tempfile::tempdir().unwrap();
        let slots = [Slot { name: "a".to_owned(), shape: vec![8] }];
        let target = directory.path().join("delta");
        let writer = Writer::create(&target, &slots, Dtype::BF16, 1 << 30, 0, false).unwrap();
        let plan = Plan { demand: Demand { out: 16, ..Demand::default() }, workers: 1, buffers: 1 };
        let files = Files::new(&writer, Write::Worker, &plan, &Account::default());
        for _ in 0..3 {
            assert_eq!(files.lend(0, 0, 16).unwrap().bytes().len(), 16);
        }
        assert!(files.lend(1, 0, 16).is_err());
    }
}
