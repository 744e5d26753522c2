"""Rows of two embeddings are matched by what their tokens mean, or not at all.

The reader is checked against `Tokenizer.get_vocab()` on files that the tokenizers library writes;
the runs against a dictionary; and files of strangers get one clear error with file and key.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from drift_fast import CheckpointError, CoverageError
from drift_fast.alignment.tokenizer_files import Vocabulary, read_vocabulary
from drift_fast.alignment.vocabulary import RowCount, RowMap, TokenRows, match_rows
from support.processes import python
from support.synthetic import refused

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "Straße, café and 東京 are spelled in more than one byte each",
    "two and two are four; four and four are eight",
] * 4
# Added with a space, beyond ASCII, and one that every trained vocabulary here holds already.
ADDED = ["<think>", "<｜User｜>", "two words", "a"]


def write(directory: Path, files: dict[str, Any]) -> Path:
    """Write each file as JSON, or text and bytes as they are; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        (directory / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return directory


def plain(tokens: dict[str, Any], **other: Any) -> dict[str, Any]:
    """A tokenizer.json without spelling steps: equal strings are equal tokens."""
    return {"model": {"type": "WordLevel", "vocab": tokens}, **other}


def at(directory: Path, tokens: dict[str, Any], **other: Any) -> Path:
    return write(directory, {"tokenizer.json": plain(tokens, **other)})


def byte_level() -> tuple[Any, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # As Llama 3 and Qwen2 have it: ByteLevel inside a sequence.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )


def byte_level_normalized() -> tuple[Any, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.ByteLevel()])
    return tokenizer, trainers.BpeTrainer(vocab_size=120, show_progress=False)


def byte_level_decoded() -> tuple[Any, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])
    return tokenizer, trainers.BpeTrainer(vocab_size=120, show_progress=False)


def unigram() -> tuple[Any, Any]:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )


def replaced() -> tuple[Any, Any]:
    """As Llama 2 and Gemma are converted: a normalizer writes the space."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer, trainers.BpeTrainer(vocab_size=150, show_progress=False)


def fallback() -> tuple[Any, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    return tokenizer, trainers.BpeTrainer(vocab_size=120, show_progress=False)


def wordpiece() -> tuple[Any, Any]:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[UNK]"], show_progress=False
    )


def word_level() -> tuple[Any, Any]:
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=["[UNK]", "a"], show_progress=False)


def clip() -> tuple[Any, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer, trainers.BpeTrainer(
        vocab_size=300, end_of_word_suffix="</w>", show_progress=False
    )


REAL: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "BPE of bytes": (byte_level, "byte-level"),
    "BPE of bytes, by the normalizer": (byte_level_normalized, "byte-level"),
    "BPE of bytes, by the decoder": (byte_level_decoded, "byte-level"),
    "Unigram": (unigram, "metaspace"),
    "BPE with replaced spaces": (replaced, "metaspace"),
    "BPE with byte fallback": (fallback, "metaspace"),
    "WordPiece": (wordpiece, "wordpiece"),
    "WordLevel": (word_level, "plain"),
    "BPE with ends of words": (clip, "byte-level with '</w>'"),
}


def trained(make: Callable[[], tuple[Any, Any]], added: list[str]) -> Any:
    tokenizer, trainer = make()
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens(added)
    return tokenizer


@pytest.mark.parametrize("added", [[], ADDED], ids=["as trained", "with added tokens"])
@pytest.mark.parametrize("kind", REAL)
def test_a_file_of_the_tokenizers_library_reads_as_its_own_vocabulary(
    kind: str, added: list[str], tmp_path: Path
) -> None:
    make, scheme = REAL[kind]
    tokenizer = trained(make, added)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    found = read_vocabulary(tmp_path)

    assert found == Vocabulary(
        tokenizer.get_vocab(with_added_tokens=True), scheme, tmp_path / "tokenizer.json"
    )
    assert set(added) <= set(found.tokens)


def test_a_vocabulary_of_the_slow_layout_has_the_tokens_of_all_its_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "vocab.json": {"Ġ": 0, "Ġthe": 1, "é": 2},
            "merges.txt": "#version: 0.2\n",
            "added_tokens.json": {"<|im_start|>": 3, "<think>": 7},
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer",
                "added_tokens_decoder": {
                    "3": {"content": "<|im_start|>", "special": True},
                    "4": {"content": "<|im_end|>", "special": True},
                },
            },
        },
    )

    found = read_vocabulary(tmp_path)

    assert found is not None
    assert found.tokens == {
        "Ġ": 0,
        "Ġthe": 1,
        "é": 2,
        "<|im_start|>": 3,
        "<|im_end|>": 4,
        "<think>": 7,
    }
    assert found.scheme == "byte-level"
    assert found.path == tmp_path / "vocab.json"


def test_the_slow_layout_needs_only_its_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, {"vocab.json": {"Ġ": 0}, "tokenizer_config.json": {"model_max_length": 9}})

    assert read_vocabulary(tmp_path) == Vocabulary({"Ġ": 0}, "byte-level", tmp_path / "vocab.json")


def test_a_slow_and_a_fast_file_of_one_tokenizer_match_every_row(tmp_path: Path) -> None:
    tokenizer = trained(byte_level, [])
    tokenizer.add_tokens(["<think>"])
    fast = write(tmp_path / "fast", {"tokenizer.json": tokenizer.to_str()})
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    size = tokenizer.get_vocab_size()
    slow = write(
        tmp_path / "slow", {"vocab.json": vocab, "added_tokens.json": {"<think>": size - 1}}
    )

    assert match_rows(TokenRows(fast, size), TokenRows(slow, size), by="token").runs == [
        (0, 0, size)
    ]


@pytest.mark.parametrize(
    "tokens",
    [{"▁the": 0, "é": 1, "▁": 2}, {"Ġ": 0, "a": 1, "a</w>": 2}, {"[PAD]": 0, "E": 1}],
    ids=["M2M100", "CLIP", "Wav2Vec2"],
)
def test_a_vocab_json_that_is_not_plainly_byte_level_is_refused(
    tokens: dict[str, int], tmp_path: Path
) -> None:
    write(tmp_path, {"vocab.json": tokens})

    with refused(CheckpointError, tmp_path / "vocab.json", "byte-level", "tokenizer.json"):
        read_vocabulary(tmp_path)


def test_tokenizer_json_wins_over_the_slow_layout(tmp_path: Path) -> None:
    at(tmp_path, {"fast": 0})
    write(tmp_path, {"vocab.json": {"Ġ": 0, "slow": 1}})

    found = read_vocabulary(tmp_path)

    assert found is not None
    assert found.tokens == {"fast": 0}


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "tiktoken.model", "vocab.txt"])
def test_a_tokenizer_of_another_format_is_refused_with_the_way_to_convert_it(
    name: str, tmp_path: Path
) -> None:
    write(tmp_path, {name: b"\n\x0e\n\x05<unk>"})

    with refused(
        CheckpointError, tmp_path / name, "AutoTokenizer.from_pretrained", "save_pretrained"
    ):
        read_vocabulary(tmp_path)


def test_a_directory_without_a_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": {}, "tokenizer_config.json": {}})

    assert read_vocabulary(tmp_path) is None


def test_a_missing_directory_does_not_borrow_the_tokenizer_above_it(tmp_path: Path) -> None:
    at(tmp_path, {"a": 0})

    assert read_vocabulary(tmp_path / "missing") is None


def test_a_file_of_weights_has_the_vocabulary_beside_it(tmp_path: Path) -> None:
    at(tmp_path, {"a": 0})
    write(tmp_path, {"model.safetensors": b""})

    assert read_vocabulary(tmp_path / "model.safetensors") == read_vocabulary(tmp_path)


def test_untagged_models_of_old_files_are_told_by_their_vocabulary(tmp_path: Path) -> None:
    old = write(tmp_path / "a", {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}}})
    older = write(tmp_path / "b", {"tokenizer.json": {"model": {"vocab": [["a", -1.5], ["b", 0]]}}})

    for directory in (old, older):
        found = read_vocabulary(directory)
        assert found is not None
        assert found.tokens == {"a": 0, "b": 1}


def test_an_empty_affix_is_no_affix(tmp_path: Path) -> None:
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": None}
    model = {"type": "BPE", "vocab": {"a": 0}, "byte_fallback": False, **affixes}
    write(tmp_path, {"tokenizer.json": {"model": model, "decoder": {"type": "ByteLevel"}}})

    found = read_vocabulary(tmp_path)

    assert found is not None
    assert found.scheme == "byte-level"


def text(vocab: str, added: str = "[]", kind: str = "BPE") -> str:
    return f'{{"added_tokens": {added}, "model": {{"type": "{kind}", "vocab": {vocab}}}}}'


HOSTILE: dict[str, tuple[str | bytes, list[str]]] = {
    "two tokens with one id": (text('{"a": 0, "b": 0}'), ["model.vocab", "'a'", "'b'", "0"]),
    "two ids of one token": (
        text('{"a": 3}', '[{"id": 5, "content": "a"}]'),
        ["added_tokens", "'a'", "3", "5"],
    ),
    "an added token on a taken id": (
        text('{"a": 0}', '[{"id": 0, "content": "<x>"}]'),
        ["added_tokens", "'a'", "'<x>'"],
    ),
    "a repeated piece": (text('[["a", 0], ["a", 0]]', kind="Unigram"), ["'a'", "0", "1"]),
    "a repeated key": (text('{"a": 0, "b": 1, "a": 2}'), ["'a'", "twice"]),
    "a repeated key of one id": (text('{"a": 0, "a": 0}'), ["'a'", "twice"]),
    "a repeated model": ('{"model": {"vocab": {}}, "model": {"vocab": {"a": 0}}}', ["'model'"]),
    "a negative id": (text('{"a": -1}'), ["model.vocab", "'a'", "-1"]),
    "a float as id": (text('{"a": 1.0}'), ["model.vocab", "'a'", "1.0"]),
    "not a number as id": (text('{"a": NaN}'), ["not valid JSON"]),
    "true as id": (text('{"a": true}'), ["model.vocab", "'a'", "True"]),
    "a string as id": (text('{"a": "0"}'), ["model.vocab", "'a'", "'0'"]),
    "null as id": (text('{"a": null}'), ["model.vocab", "'a'"]),
    "a list as id": (text('{"a": [0]}'), ["model.vocab", "'a'", "a list"]),
    "an id of five thousand digits": (text('{"a": ' + "9" * 5000 + "}"), ["JSON"]),
    "two ids of many digits": (
        text('{"a": ' + "9" * 4000 + "}", '[{"id": 0, "content": "a"}]'),
        ["added_tokens", "'a'", "999…"],
    ),
    "an added token without an id": (text("{}", '[{"content": "a"}]'), ["added_tokens", "'a'"]),
    "an added token without content": (text("{}", '[{"id": 7}]'), ["added_tokens", "string", "7"]),
    "an added number": (text("{}", "[7]"), ["added_tokens[0]", "object", "an integer"]),
    "added tokens as an object": (text("{}", '{"a": 0}'), ["added_tokens", "list"]),
    "added tokens of null": (text('{"a": 0}', "null"), ["added_tokens", "list"]),
    "no model": ('{"added_tokens": []}', ["model", "object"]),
    "a model of null": ('{"model": null}', ["model", "object"]),
    "a vocabulary of null": (text("null"), ["model.vocab", "object"]),
    "a list where an object belongs": (text('[["a", 0]]'), ["model.vocab", "object"]),
    "an object where a list belongs": (text('{"a": 0}', kind="Unigram"), ["model.vocab", "list"]),
    "a piece without a score": (text('[["a"]]', kind="Unigram"), ["model.vocab[0]", "length 2"]),
    "a piece that is a number": (
        text('[["a", 0], 3]', kind="Unigram"),
        ["model.vocab[1]", "a list", "an integer"],
    ),
    "a piece of a number": (text("[[3, 0.5]]", kind="Unigram"), ["model.vocab", "string", "3"]),
    "an unknown model": (text('{"a": 0}', kind="Tekken"), ["model.type", "'Tekken'"]),
    "an empty vocabulary": (text("{}"), ["model.vocab", "none"]),
    "an empty list of pieces": (text("[]", kind="Unigram"), ["model.vocab", "none"]),
    "a list": ("[1, 2]", ["object", "a list"]),
    "a string": ('"vocab"', ["object", "a string"]),
    "null": ("null", ["object"]),
    "nothing": ("", ["JSON"]),
    "not JSON": ("version https://git-lfs.github.com/spec/v1\n", ["JSON"]),
    "not text": (b'{"model": "\xff\xfe\xfa"}', ["JSON"]),
    "a file cut off": (text('{"a": 0}')[:-9], ["JSON"]),
    "enormous nesting": ("[" * 200_000 + "]" * 200_000, ["JSON", "nested too deeply"]),
    "nested objects": ('{"model":' * 100_000 + "0" + "}" * 100_000, ["JSON", "nested too deeply"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gets_one_error_that_names_it_and_the_place(
    name: str, tmp_path: Path
) -> None:
    content, words = HOSTILE[name]
    write(tmp_path, {"tokenizer.json": content})

    with refused(CheckpointError, tmp_path / "tokenizer.json", "AutoTokenizer", *words):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"added_tokens.json": {"<x>": 0}}, ["added_tokens.json", "'<x>'", "'Ġ'"]),
        ({"added_tokens.json": {"Ġ": 4}}, ["added_tokens.json", "'Ġ'", "4"]),
        ({"added_tokens.json": ["<x>"]}, ["added_tokens.json", "object"]),
        ({"added_tokens.json": '{"<x>": 2, "<x>": 3}'}, ["added_tokens.json", "'<x>'", "twice"]),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, ["decoder", "object"]),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"2": "<x>"}}},
            ["decoder", "an object"],
        ),
        *(
            (
                {"tokenizer_config.json": {"added_tokens_decoder": {number: {"content": "<x>"}}}},
                ["tokenizer_config.json", "added_tokens_decoder", "'<x>'", repr(number)[:40]],
            )
            for number in ("-1", "1.0", "x", "", " 3", "1_0", "٣", "9" * 5000)
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"2": {}}}}, ["decoder", "string"]),
    ],
)
def test_a_hostile_file_of_the_slow_layout_is_named(
    files: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    write(tmp_path, {"vocab.json": {"Ġ": 0, "a": 1}, **files})

    with refused(CheckpointError, tmp_path, *words):
        read_vocabulary(tmp_path)


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer.json": "{"})
    os.truncate(tmp_path / "tokenizer.json", 100_000_001)

    with refused(CheckpointError, tmp_path / "tokenizer.json", "100,000,000", "100,000,001"):
        read_vocabulary(tmp_path)


def test_an_error_shows_no_more_than_the_beginning_of_a_long_token(tmp_path: Path) -> None:
    at(tmp_path, {"x" * 1_000_000: -1, "\ud800": 0})

    with pytest.raises(CheckpointError) as caught:
        read_vocabulary(tmp_path)
    assert len(str(caught.value)) < 1000


def test_an_error_about_a_lone_surrogate_can_be_printed(tmp_path: Path) -> None:
    write(tmp_path, {"vocab.json": '{"Ġ": 0, "\\ud800": -1}'})

    with pytest.raises(CheckpointError) as caught:
        read_vocabulary(tmp_path)
    assert r"'\ud800'" in str(caught.value).encode().decode()


@pytest.mark.parametrize("depth", [10, 200, 400, 450, 480, 500, 2_000, 4_000])
def test_steps_are_walked_however_deep_json_can_be_read(depth: int, tmp_path: Path) -> None:
    step = '{"type": "Sequence", "steps": [' * depth + '{"type": "ByteLevel"}' + "]}" * depth
    document = f'{{"pre_tokenizer": {step}, "model": {{"vocab": {{"a": 0}}}}}}'
    write(tmp_path, {"tokenizer.json": document})

    # How deep that is differs between versions of Python, but not the kinds of answer.
    try:
        found = read_vocabulary(tmp_path)
    except CheckpointError:
        assert depth > 200
    else:
        assert found is not None
        assert found.scheme == "byte-level"


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["model", "vocab", "type", "added_tokens", "content", "id", "decoder", "a"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.binary(max_size=40)
    | documents.map(lambda document: json.dumps(document).encode())
    | documents.map(lambda vocab: json.dumps(plain(vocab)).encode())
    | documents.map(lambda added: json.dumps(plain({"a": 0}, added_tokens=added)).encode())
    | documents.map(lambda step: json.dumps(plain({"a": 0}, decoder=step)).encode())
)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "any"
    write(directory, {"tokenizer.json": data})

    with contextlib.suppress(CheckpointError):
        found = read_vocabulary(directory)
        assert found is not None
        assert len(set(found.tokens.values())) == len(found.tokens) > 0


# Nearly full and of few rows, so that runs of every length and break are met.
vocabularies = st.builds(
    lambda ids, size: dict(zip("abcde"[:size], ids, strict=False)),
    st.permutations(range(6)),
    st.integers(2, 5),
)


@given(vocabularies, vocabularies, st.integers(1, 6), st.integers(1, 6))
@example({"a": 0, "b": 1}, {"a": 1, "b": 3}, 2, 4)
@example({"a": 0, "b": 1}, {"a": 3, "b": 4}, 2, 5)
@example({"a": 0, "b": 1}, {"a": 1, "b": 0}, 2, 2)
@example({"a": 0, "b": 2}, {"a": 1, "b": 3}, 3, 4)
@example({"a": 0, "b": 2}, {"a": 1, "b": 2}, 3, 4)
def test_runs_expand_to_the_answer_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory,
    first: dict[str, int],
    second: dict[str, int],
    left_rows: int,
    right_rows: int,
) -> None:
    base = tmp_path_factory.getbasetemp()
    left, right = at(base / "left", first), at(base / "right", second)
    expected = {
        second[token]: first[token]
        for token in first.keys() & second.keys()
        if first[token] < left_rows and second[token] < right_rows
    }
    if not expected:
        with refused(CoverageError, left, right):
            match_rows(TokenRows(left, left_rows), TokenRows(right, right_rows), by="token")
        return

    found = match_rows(TokenRows(left, left_rows), TokenRows(right, right_rows), by="token")

    expanded = [(r + i, le + i) for le, r, count in found.runs for i in range(count)]
    assert expanded == sorted(expected.items())
    assert all(count > 0 for _, _, count in found.runs)
    assert not any(
        (le + count, r + count) == following[:2]
        for (le, r, count), following in zip(found.runs, found.runs[1:], strict=False)
    )
    assert found.matched == len(expected)
    assert found.reasoning.unmatched == len([i for i in first.values() if i < left_rows]) - len(
        expected
    )
    assert found.multimodal.unmatched == len([i for i in second.values() if i < right_rows]) - len(
        expected
    )
    assert found.reasoning.beyond == len([i for i in first.values() if i >= left_rows])
    assert found.multimodal.beyond == len([i for i in second.values() if i >= right_rows])
    assert (found.reasoning_rows, found.multimodal_rows, found.how) == (
        left_rows,
        right_rows,
        "token",
    )


@given(st.integers(1, 9), st.integers(1, 9))
def test_by_index_matches_the_rows_up_to_the_smaller_size(left_rows: int, right_rows: int) -> None:
    nowhere = Path("no/such/directory")
    count = min(left_rows, right_rows)

    found = match_rows(TokenRows(nowhere, left_rows), TokenRows(nowhere, right_rows), by="index")

    assert found == RowMap(
        [(0, 0, count)],
        left_rows,
        right_rows,
        RowCount(left_rows - count),
        RowCount(right_rows - count),
        "index",
    )


def test_index_of_an_embedding_without_rows_covers_nothing(tmp_path: Path) -> None:
    with refused(CoverageError, tmp_path, "0"):
        match_rows(TokenRows(tmp_path, 0), TokenRows(tmp_path, 5), by="index")


def test_another_way_to_match_is_refused(tmp_path: Path) -> None:
    at(tmp_path, {"a": 0})

    with refused(ValueError, "'token'", "'index'", "'position'"):
        match_rows(TokenRows(tmp_path, 1), TokenRows(tmp_path, 1), by="position")  # type: ignore[arg-type]


def test_unsaid_means_by_token_and_never_by_index(tmp_path: Path) -> None:
    left = at(tmp_path / "left", {"a": 0, "b": 1})
    right = at(tmp_path / "right", {"b": 0, "a": 1})

    found = match_rows(TokenRows(left, 2), TokenRows(right, 2), by=None)

    assert found.how == "token"
    assert found.runs == [(1, 0, 1), (0, 1, 1)]


def test_an_id_of_a_quintillion_is_counted_and_takes_no_memory(tmp_path: Path) -> None:
    left = at(tmp_path / "left", {"a": 0, "b": 10**18})
    right = at(tmp_path / "right", {"a": 0, "b": 1})

    found = match_rows(TokenRows(left, 4), TokenRows(right, 2), by="token")

    assert found == RowMap([(0, 0, 1)], 4, 2, RowCount(0, 1), RowCount(1, 0))


@pytest.mark.parametrize("by", [None, "token"])
@pytest.mark.parametrize("missing", [["left"], ["right"], ["left", "right"]])
def test_a_missing_tokenizer_is_named_with_the_remedy(
    missing: list[str], by: Any, tmp_path: Path
) -> None:
    for side in ("left", "right"):
        write(tmp_path / side, {} if side in missing else {"tokenizer.json": plain({"a": 0})})

    with pytest.raises(CoverageError) as caught:
        match_rows(TokenRows(tmp_path / "left", 1), TokenRows(tmp_path / "right", 1), by=by)

    message = str(caught.value)
    assert [side for side in ("left", "right") if str(tmp_path / side) in message] == missing
    assert 'rows="index"' in message
    assert "tokenizer.json" in message


def test_tokenizers_of_two_spellings_are_refused_with_the_remedy(tmp_path: Path) -> None:
    paths = []
    for name, make in (("left", byte_level), ("right", unigram)):
        write(tmp_path / name, {"tokenizer.json": trained(make, []).to_str()})
        paths.append(tmp_path / name)

    with refused(CoverageError, *paths, "byte-level", "metaspace", 'rows="index"'):
        match_rows(*(TokenRows(path, 300) for path in paths), by="token")


def test_tokenizers_without_a_common_token_cover_nothing(tmp_path: Path) -> None:
    left, right = at(tmp_path / "left", {"a": 0}), at(tmp_path / "right", {"b": 0})

    with refused(CoverageError, left, right, "token", "leave embeddings and heads out"):
        match_rows(TokenRows(left, 1), TokenRows(right, 1), by="token")


def qwen_like(directory: Path, added: dict[str, int]) -> Path:
    """151,643 byte-level tokens, and special ones behind them."""
    vocab = {f"Ġ{number}": number for number in range(151_643)}
    extra = [{"id": row, "content": token, "special": True} for token, row in added.items()]
    document = {
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "added_tokens": extra,
    }
    return write(directory, {"tokenizer.json": document})


def test_renamed_special_tokens_of_a_large_vocabulary_are_left_out(tmp_path: Path) -> None:
    left = qwen_like(tmp_path / "left", {"<user>": 151_643, "<think>": 151_644, "<eos>": 151_645})
    right = qwen_like(tmp_path / "right", {"<|im_end|>": 151_643, "<eos>": 151_646})

    found = match_rows(TokenRows(left, 151_936), TokenRows(right, 152_064), by="token")

    assert found.runs == [(0, 0, 151_643), (151_645, 151_646, 1)]
    assert str(found) == (
        "151,644 of 152,064 rows matched by token string; 2 tokens only in the reasoning "
        "checkpoint, 1 only in the multimodal one"
    )


def test_the_report_says_what_was_left_out() -> None:
    token = RowMap([(0, 0, 1_000)], 1_500, 2_000, RowCount(5, 0), RowCount(0, 1_234))
    index = RowMap([(0, 0, 1_500)], 1_500, 2_000, RowCount(0), RowCount(500), "index")

    assert str(token) == (
        "1,000 of 2,000 rows matched by token string; 5 tokens only in the reasoning checkpoint, "
        "0 only in the multimodal one; ids beyond the rows: 0 and 1,234"
    )
    assert str(index) == (
        "1,500 of 2,000 rows matched by index; 0 rows only in the reasoning checkpoint, 500 only "
        "in the multimodal one"
    )


def test_reading_a_vocabulary_imports_no_library_of_models(tmp_path: Path) -> None:
    at(tmp_path, {"a": 0})
    program = (
        "import sys, pathlib; from drift_fast.alignment.vocabulary import TokenRows, match_rows\n"
        f"path = pathlib.Path({str(tmp_path)!r})\n"
        "assert match_rows(TokenRows(path, 1), TokenRows(path, 1), by=None).matched == 1\n"
        "loaded = {'torch', 'numpy', 'tokenizers', 'transformers', 'sentencepiece'}\n"
        "sys.exit(repr(loaded & set(sys.modules)) if loaded & set(sys.modules) else 0)"
    )
    python(program)
