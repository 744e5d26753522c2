//! An index of two shards: every file that it names and nothing else is read, and nothing outside of
//! its directory.
#![no_main]

use std::collections::BTreeSet;

use drift_fast_fuzz::{official, open, ours, valid};
use serde_json::Value;

const SHARDS: [&str; 2] = ["a.safetensors", "b.safetensors"];

libfuzzer_sys::fuzz_target!(|index: &[u8]| {
    let files = [valid(&[("x", &[1.0]), ("y", &[2.0, 3.0])]), valid(&[("z", &[4.0])])];
    let expected = named(index).map(|names| {
        let read = names.iter().map(|name| files[usize::from(*name == SHARDS[1])].as_slice());
        read.flat_map(|file| official(file).expect("a valid file")).collect()
    });
    let [a, b] = files;
    let index = ("model.safetensors.index.json", index.to_vec());
    let (directory, opened) = open([(SHARDS[0], a), (SHARDS[1], b), index], "");
    match opened {
        Ok(checkpoint) => {
            let inside = |path: &std::path::Path| path.parent() == Some(&directory);
            assert!(checkpoint.shards().iter().all(|shard| inside(shard.path())));
            if let Some(expected) = expected {
                assert_eq!(ours(&checkpoint), expected);
            }
        }
        Err(error) => {
            let message = error.to_string();
            let stricter = ["twice", "holds it too", "which is the limit"];
            let is_stricter = stricter.iter().any(|why| message.contains(why));
            assert!(expected.is_none() || is_stricter, "refused: {message}");
        }
    }
});

/// The shards that an index names, if those are all that it names.
fn named(index: &[u8]) -> Option<BTreeSet<&'static str>> {
    let index: Value = serde_json::from_slice(index).ok()?;
    let map = index.get("weight_map")?.as_object()?;
    let shard = |value: &Value| SHARDS.into_iter().find(|name| value.as_str() == Some(name));
    let found: Option<BTreeSet<_>> = map.values().map(shard).collect();
    found.filter(|found| !found.is_empty())
}
