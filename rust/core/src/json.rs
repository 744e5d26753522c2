//! What a JSON text will take once it is parsed, found before it is: a small one may ask for gigabytes.
//!
//! Looks at brackets, commas, colons and strings alone. Whether the text is valid is its parser's to
//! say; of a text that is not, what is found here means nothing.

use std::borrow::Cow;
use std::collections::HashSet;

/// Levels of nesting; deeper than any parser goes without recursion of its own.
const DEPTH: usize = 500;
// Bytes of Python's objects on a 64-bit machine, where they are largest: an object of one key, a key
// and its place, an element and its place.
const CONTAINER: u64 = 192;
const KEY: u64 = 160;
const VALUE: u64 = 64;

/// Return how many bytes the text and the Python objects made of it take, at most.
///
/// # Errors
/// Nesting that is too deep and, with `unique`, a key that occurs twice in one object.
pub fn memory(text: &[u8], unique: bool) -> Result<u64, String> {
    let mut memory = VALUE;
    // The keys of each object that is open; a list has none.
    let mut open: Vec<Option<HashSet<Cow<'_, [u8]>>>> = Vec::new();
    let (mut characters, mut widest) = (0, 1);
    let mut last: &[u8] = b"";
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        at += 1;
        match byte {
            b'[' | b'{' => {
                memory += CONTAINER;
                open.push((byte == b'{').then(HashSet::new));
                if open.len() > DEPTH {
                    return Err("nested too deeply".to_owned());
                }
            }
            b']' | b'}' => drop(open.pop()),
            b',' => memory += VALUE,
            b':' => {
                memory += KEY;
                if unique
                    && let Some(Some(keys)) = open.last_mut()
                    && !keys.insert(unescaped(last))
                {
                    let shown = String::from_utf8_lossy(last);
                    let shown: String = shown.trim_matches('"').chars().take(80).collect();
                    return Err(format!(
                        "key '{}' occurs twice in an object",
                        shown.escape_debug()
                    ));
                }
            }
            b'"' => {
                let start = at - 1;
                let width;
                (at, width) = string(text, at);
                last = &text[start..at];
                let length = last.iter().filter(|byte| !is_continuation(**byte)).count() as u64;
                memory += length * width;
                characters += length;
                widest = widest.max(width);
            }
            _ => {}
        }
        characters += u64::from(byte != b'"');
    }
    Ok(memory + characters * widest + text.len() as u64)
}

fn is_continuation(byte: u8) -> bool {
    byte & 0xC0 == 0x80
}

/// Where a string that begins at `at` ends, and the bytes that Python takes for a character of it.
fn string(text: &[u8], mut at: usize) -> (usize, u64) {
    let mut width = 1;
    while let Some(&byte) = text.get(at) {
        at += 1;
        match byte {
            b'"' => break,
            b'\\' => {
                // What is escaped may be as wide as any other.
                width = match text.get(at..at + 2) {
                    Some([b'u', b'0']) => width.max(2),
                    Some([b'u', _]) => 4,
                    _ => width,
                };
                at += 1;
            }
            0xF0.. => width = 4,
            0xC4.. => width = width.max(2),
            _ => {}
        }
    }
    (at.min(text.len()), width)
}

fn unescaped(key: &[u8]) -> Cow<'_, [u8]> {
    if !key.contains(&b'\\') {
        let end = key.len().saturating_sub(1).max(1);
        return Cow::Borrowed(key.get(1..end).unwrap_or_default());
    }
    match serde_json::from_slice::<String>(key) {
        Ok(text) => Cow::Owned(text.into_bytes()),
        Err(_) => Cow::Borrowed(key),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn memory_grows_with_what_is_made_and_not_with_the_text_alone() {
        let plain = memory(format!("{:?}", "a".repeat(3000)).as_bytes(), false).unwrap();
        let lists = memory(format!("[{}[]]", "[],".repeat(1000)).as_bytes(), false).unwrap();
        let wide = memory(format!("{:?}", "😀".to_owned() + &"a".repeat(3000)).as_bytes(), false);
        assert!(plain < 10_000 && lists > 200_000 && wide.unwrap() > 20_000);
    }

    #[test]
    fn a_key_that_occurs_twice_is_found_however_it_is_spelled() {
        for text in [r#"{"a": 1, "b": [{"a": 2}], "\u0061": 3}"#, r#"[{"a":{},"a":{}}]"#] {
            let error = memory(text.as_bytes(), true).unwrap_err();
            assert!(error.contains("occurs twice"), "{error}");
            assert!(memory(text.as_bytes(), false).is_ok());
        }
        let fine = r#"{"a": "a", "b": ["a", {"a": "{\"a\":", "\\": 1}]}"#;
        assert!(memory(fine.as_bytes(), true).is_ok());
        assert!(memory("[".repeat(501).as_bytes(), true).is_err());
        for broken in [&b"\""[..], b"\"\\", b"\":", b"]]}:,", b"\\\"", b":\"a"] {
            let _ = memory(broken, true);
        }
    }
}
