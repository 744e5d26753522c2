//! Files beside a model's weights that a merge copies.
//!
//! Owns the list of names: settings, text and tokenizers. Files that can run code (`.py`, pickles) or
//! contain weights are never on it.

/// Names that transformers, sentencepiece, tiktoken and mistral-common use.
pub const NAMES: [&str; 25] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
    "configuration.json",
];

const LICENSES: [&str; 3] = ["license", "licence", "notice"];
const TEXTS: [&str; 4] = [".txt", ".md", ".rst", ".html"];

/// Whether a merge copies a file with this name: one of [`NAMES`], or a license in a text file.
pub fn is_side_file(name: &str) -> bool {
    NAMES.contains(&name) || is_license(&name.to_ascii_lowercase())
}

/// `LICENSE`, `notice.txt`, `LICENSE-MODEL.md`, but not with other endings, which may mean code.
fn is_license(name: &str) -> bool {
    let Some(rest) = LICENSES.iter().find_map(|word| name.strip_prefix(word)) else { return false };
    let rest = TEXTS.iter().find_map(|ending| rest.strip_suffix(ending)).unwrap_or(rest);
    let of_a_word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    rest.is_empty() || (rest.starts_with(['-', '_']) && rest.bytes().all(of_a_word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_and_licenses_are_copied_and_nothing_that_could_run() {
        for name in ["config.json", "qwen.tiktoken", "LICENSE", "licence.txt", "LICENSE-MODEL.md"] {
            assert!(is_side_file(name), "{name}");
        }
        for name in [
            "license.py",
            "license.pkl",
            "NOTICE.bin",
            "licence.safetensors",
            "license.py.txt",
            "LICENSE-x.py",
            "LICENSES/a.txt",
            "notice_../x",
            "modeling.py",
            "Config.json",
            "",
        ] {
            assert!(!is_side_file(name), "{name}");
        }
    }
}
