//! The modules of the core import downwards only.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

/// From the ground up.
const ORDER: [&str; 13] = [
    "platform",
    "error",
    "dtype",
    "interrupt",
    "json",
    "workers",
    "kernel",
    "checkpoint",
    "align",
    "output",
    "stream",
    "merge",
    "in_memory",
];

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn level(module: &str) -> usize {
    ORDER.iter().position(|name| *name == module).unwrap_or_else(|| panic!("{module} has no level"))
}

#[test]
fn every_module_imports_from_below() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in files(&source) {
        let relative = path.strip_prefix(&source).unwrap().with_extension("");
        let module = relative.iter().next().unwrap().to_str().unwrap();
        if module == "lib" {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        // Tests may use what is above.
        let text = text.split("#[cfg(test)]").next().unwrap();
        for after in text.split("crate::").skip(1) {
            let end = after.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap();
            let used = &after[..end];
            assert!(level(used) <= level(module), "{} imports {used}", path.display());
        }
    }
}
