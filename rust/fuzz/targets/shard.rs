//! One file: what the official reader reads, ours reads with the same names, dtypes, shapes and bytes,
//! and what it refuses, ours refuses.
#![no_main]

use drift_fast_fuzz::{compare, file, official, open};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let bytes = file(bytes);
    let expected = official(&bytes);
    let (_, opened) = open([("x.safetensors", bytes)], "x.safetensors");
    compare(&opened, expected.as_ref());
});
