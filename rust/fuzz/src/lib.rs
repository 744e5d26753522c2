//! What the fuzz targets share: files made of the fuzzer's bytes, and the official reader beside ours.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use drift_fast_core::{Checkpoint, Error, Reader};
use safetensors::SafeTensors;

/// What a tensor is to a reader: dtype, shape and bytes.
pub type Read = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// Where the official reader accepts a file that ours refuses: a name given twice, what is beyond
/// our limits, a file without a tensor. See docs/reliability.md.
const STRICTER: [&str; 5] = [
    "is named twice",
    "is there twice",
    "expected at most",
    "which is the limit",
    "holds no tensor",
];

/// A file of the fuzzer's bytes: as they are, or a header up to the first zero byte, given its right
/// length, and data after it. The first byte says which.
pub fn file(bytes: &[u8]) -> Vec<u8> {
    match bytes.split_first() {
        None => Vec::new(),
        Some((kind, rest)) if kind % 4 == 0 => rest.to_vec(),
        Some((_, rest)) => {
            let end = rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len());
            let (header, data) = rest.split_at(end);
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend(header);
            file.extend(data.get(1..).unwrap_or_default());
            file
        }
    }
}

/// A directory of this process, emptied; in memory where the system has one there.
pub fn directory() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let path = parent.join(format!("drift-fast-fuzz-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).expect("a directory for the files");
    path
}

/// Write some files into an emptied directory and open it, or one file of it.
pub fn open<'f>(
    files: impl IntoIterator<Item = (&'f str, Vec<u8>)>,
    name: &str,
) -> (PathBuf, Result<Checkpoint, Error>) {
    let directory = directory();
    for (name, bytes) in files {
        std::fs::write(directory.join(name), bytes).expect("a file to be written");
    }
    let opened = Checkpoint::open(&directory.join(name), Reader::Auto);
    (directory, opened)
}

/// What our reader reads of an open checkpoint.
pub fn ours(checkpoint: &Checkpoint) -> Read {
    let read = |(shard, tensor): (&drift_fast_core::checkpoint::Shard, &_)| {
        let tensor: &drift_fast_core::checkpoint::Tensor = tensor;
        let mut bytes = vec![0; (tensor.range.end - tensor.range.start) as usize];
        shard.read_exact_at(&mut bytes, tensor.range.start).expect("what a header names is there");
        (tensor.name.clone(), (tensor.dtype.to_string(), tensor.shape.clone(), bytes))
    };
    checkpoint.tensors().map(read).collect()
}

/// What the official reader reads of a file; nothing if it refuses it.
pub fn official(file: &[u8]) -> Option<Read> {
    let found = SafeTensors::deserialize(file).ok()?;
    let read = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        (name, (view.dtype().to_string(), view.shape().to_vec(), view.data().to_vec()))
    };
    Some(found.tensors().into_iter().map(read).collect())
}

/// Hold our reader's answer against the official one.
pub fn compare(opened: &Result<Checkpoint, Error>, expected: Option<&Read>) {
    match (opened, expected) {
        (Ok(checkpoint), Some(expected)) => assert_eq!(&ours(checkpoint), expected),
        (Ok(_), None) => panic!("accepted what the official reader refuses"),
        (Err(error), Some(_)) => {
            let message = error.to_string();
            assert!(STRICTER.iter().any(|why| message.contains(why)), "refused: {message}");
        }
        (Err(_), None) => {}
    }
}

/// A valid file of float32 tensors of one dimension.
pub fn valid(tensors: &[(&str, &[f32])]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let entry = serde_json::json!({
            "dtype": "F32", "shape": [values.len()], "data_offsets": [start, data.len()]
        });
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}
