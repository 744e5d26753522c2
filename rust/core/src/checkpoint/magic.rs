//! What a file that is not safetensors is, by its first bytes, and what to do about it.

const LFS: &str = "this is a git-lfs pointer, which stands for a file that was not downloaded: run \
    `git lfs pull` in its repository";
const PAGE: &str = "this is a web page, which a download without a login gives: download the file \
    again";
const MACOS: &str = "this is a note of macOS on the file of the same name without `._`, and not a model: \
    remove it";
const ANSWER: &str = "this is text, such as what a server answers in place of a file: look at it, and \
    download the file again";
const GGUF: &str = "this is GGUF, a format of quantized weights that is not read: give the \
    safetensors checkpoint that it was made from";
const PICKLED: &str =
    "this looks like a PyTorch pickle, which is never loaded: convert it to safetensors";

const KINDS: &[(&[u8], &str)] = &[
    (b"version ", LFS),
    (b"<!DOCTYP", PAGE),
    (b"<!doctyp", PAGE),
    (b"<html", PAGE),
    (b"GGUF", GGUF),
    (b"\0\x05\x16\x07", MACOS),
    (b"PK\x03\x04", PICKLED),
    (b"\x80", PICKLED),
    (
        b"\0\0\0\0\0\0\0\0",
        "the file begins with zeros, as one does whose download was cut off: download it again",
    ),
];

/// What begins like this, if that is known; eight bytes are enough.
pub(super) fn describe(start: &[u8]) -> Option<&'static str> {
    KINDS.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, message)| *message)
}

/// The same for what should be the length of a header, which is never text.
pub(super) fn describe_length(start: &[u8]) -> Option<&'static str> {
    let is_text = || start.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
    describe(start).or_else(|| is_text().then_some(ANSWER))
}
