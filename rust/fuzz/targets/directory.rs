//! A directory of arbitrary files: each shard that is opened reads as the official reader reads it.
#![no_main]

use std::collections::BTreeMap;

use drift_fast_fuzz::{file, official, open, ours};

const NAMES: [&str; 6] = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "pytorch_model.bin",
];

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Files are separated by a byte that no UTF-8 has; the first byte of each is its name.
    let mut files: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    for part in bytes.split(|&byte| byte == 0xFF) {
        if let Some((name, rest)) = part.split_first() {
            let name = NAMES[*name as usize % NAMES.len()];
            let is_shard = name.ends_with(".safetensors");
            files.insert(name, if is_shard { file(rest) } else { rest.to_vec() });
        }
    }
    let (_, opened) = open(files.clone(), "");
    let Ok(checkpoint) = opened else { return };
    let mut expected = BTreeMap::new();
    for shard in checkpoint.shards() {
        let name = shard.path().file_name().and_then(|name| name.to_str()).expect("a name");
        expected.extend(official(&files[name]).expect("a file that both readers accept"));
    }
    assert_eq!(ours(&checkpoint), expected);
});
