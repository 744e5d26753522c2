//! A checkpoint: one safetensors file, or a directory of shards with or without an index.
//!
//! Owns where each tensor is; which files belong together is [`files`]', and what is inside one is
//! [`shard`]'s. No tensor is in two shards; one in another shard than the index names is noted.

pub mod block_scales;
mod files;
mod header;
mod limits;
mod magic;
pub(crate) mod operand;
mod partial;
mod regular;
pub(crate) mod shard;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::dtype::Fp8;
use crate::error::{Error, Result};
use crate::interrupt;
use block_scales::BlockScales;
use files::{Files, Index};
pub use header::Tensor;
use limits::Stated;
pub use operand::Operand;
pub use shard::{Reader, Shard};

/// An open checkpoint; its shards are read, or mapped when first read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    places: HashMap<String, (usize, usize)>,
    notes: Vec<String>,
    absent: Vec<(String, String)>,
}

impl Checkpoint {
    /// Open a `.safetensors` file, an index file (`*.index.json`), or a directory with
    /// `model.safetensors`, `model.safetensors.index.json` or shards whose numbers say that all are
    /// there.
    ///
    /// # Errors
    /// A missing file, a directory without safetensors, a `.bin` checkpoint, an index that is not
    /// valid or names a file outside the directory, an invalid shard, or a tensor in two of them.
    pub fn open(path: &Path, reader: Reader) -> Result<Self> {
        Self::from_files(path, Files::find(path)?, reader)
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

    /// What other loaders may read differently, as sentences.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Tensors that the index places in a file which does not hold them, with its name.
    pub fn absent(&self) -> &[(String, String)] {
        &self.absent
    }

    fn from_files(path: &Path, mut files: Files, reader: Reader) -> Result<Self> {
        let mut opened = Self {
            path: path.to_owned(),
            shards: Vec::with_capacity(files.paths.len()),
            places: HashMap::new(),
            notes: std::mem::take(&mut files.notes),
            absent: Vec::new(),
        };
        let mut stated = Stated::default();
        let (mut unnamed, mut misplaced) = (Vec::new(), Vec::new());
        for (number, file) in files.paths.iter().enumerate() {
            interrupt::poll()?;
            let shard = Shard::open(file, reader)?;
            let names = shard.tensors().iter().map(|tensor| &tensor.name);
            limits::check_all(path, &mut stated, names)?;
            for (position, tensor) in shard.tensors().iter().enumerate() {
                let named = files.index.as_ref().map(|index| index.places.get(&tensor.name));
                let held = opened.places.insert(tensor.name.clone(), (number, position));
                if let Some((other, _)) = held {
                    return Err(held_twice(&files, &tensor.name, (other, number)));
                }
                match named {
                    Some(None) => unnamed.push(tensor.name.clone()),
                    Some(Some(&named)) if named != number => {
                        misplaced.push((tensor.name.clone(), named, number));
                    }
                    _ => {}
                }
            }
            opened.shards.push(shard);
        }
        if let Some(index) = &files.index {
            opened.compare(index, &unnamed, &misplaced);
        }
        if opened.places.is_empty() {
            return Err(Error::checkpoint(path, HOLDS_NOTHING));
        }
        Ok(opened)
    }

    /// Note where the index and the shards disagree on which tensors there are.
    fn compare(&mut self, index: &Index, unnamed: &[String], misplaced: &[(String, usize, usize)]) {
        let file = |number: usize| {
            self.shards[number].path().file_name().unwrap_or_default().to_string_lossy()
        };
        self.absent = index
            .places
            .iter()
            .filter(|(tensor, _)| !self.places.contains_key(*tensor))
            .map(|(tensor, &number)| (tensor.clone(), file(number).into_owned()))
            .collect();
        let path = index.path.display();
        if let Some(first) = unnamed.first() {
            self.notes.push(format!(
                "{path}: the shards hold {} that the index does not name, {first:?} first; they \
                 are read, as transformers 5 does and 4 does not. Save the checkpoint again for an \
                 index that names them",
                counted(unnamed.len())
            ));
        }
        if let Some((first, named, held_by)) = misplaced.first() {
            self.notes.push(format!(
                "{path}: the index places {} in another shard than the one that holds it: {first:?} \
                 in {:?}, found in {:?}. It is read from there, as transformers does; other loaders \
                 may not find it. Save the checkpoint again for an index that is right",
                counted(misplaced.len()),
                file(*named),
                file(*held_by),
            ));
        }
        if let Some((first, held_by)) = self.absent.first() {
            self.notes.push(format!(
                "{path}: the index names {} that no shard holds, {first:?} of {held_by:?} first; \
                 download the checkpoint again if a model needs them",
                counted(self.absent.len())
            ));
        }
    }
}

const HOLDS_NOTHING: &str = "the checkpoint holds no tensor, as one that was saved under ZeRO-3 or FSDP \
    without gathering the weights; save it again with them, or download it again";

fn counted(tensors: usize) -> String {
    if tensors == 1 { "a tensor".to_owned() } else { format!("{tensors} tensors") }
}

/// The error for a tensor that two files hold.
fn held_twice(files: &Files, tensor: &str, (first, second): (usize, usize)) -> Error {
    let [first, second] = [first, second].map(|number| files.paths[number].display());
    match &files.index {
        Some(index) => Error::tensor(
            &index.path,
            tensor,
            format!(
                "{first} and {second} hold it, and loaders differ in which they take, whatever the \
                 index says: save the checkpoint again"
            ),
        ),
        None => Error::tensor(
            files.paths[0].parent().unwrap_or(Path::new(".")),
            tensor,
            format!(
                "{first} and {second} hold it, and the index is missing that says which counts: \
                 download the checkpoint again"
            ),
        ),
    }
}
