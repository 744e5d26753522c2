"""`drift-fast protect`: samples of a file, through the model's own processor."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import drift_fast
from drift_fast import DriftError
from drift_fast.cli.main import main
from drift_fast.protection.samples import Samples, load
from support.synthetic import refused

pytest.importorskip("transformers")
pytest.importorskip("PIL")

RECIPE = Path(__file__).parents[2] / "examples" / "qwen2_5_vl_7b"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny stand-ins of the recipe, and Δ between two of them."""
    pytest.importorskip("torchvision")
    sys.path.insert(0, str(RECIPE))
    try:
        stand_in = importlib.import_module("stand_in")
    finally:
        sys.path.remove(str(RECIPE))
    folder: Path = stand_in.write(tmp_path_factory.mktemp("protect"), samples=4)
    drift_fast.compute_delta(folder / "reasoning", folder / "text-base", folder / "delta")
    yield folder
    del sys.modules["stand_in"]


def test_the_command_does_what_the_function_does(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(world / one) for one in ("multimodal", "delta", "data/train.json")]
    out = tmp_path / "out"
    assert main(["protect", *places, "-o", str(out), "--directions", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["protected"]["batches"] == [2, 2]
    model, processor = load(places[0], "cpu")
    expected = drift_fast.protect(
        model, world / "delta", Samples(Path(places[2]), processor), directions=2
    )
    found = drift_fast.Delta.open(out)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    before = drift_fast.Delta.open(places[1])
    assert not all(torch.equal(found[name], before[name]) for name in found)
    assert main(["protect", *places, "-o", str(out)]) == 1
    assert "overwrite" in capsys.readouterr().err
    assert main(["protect", *places, "-o", str(out), "--overwrite", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert "in the span of 3 gradients each" in shown
    assert str(out) in shown


def test_answers_are_what_the_loss_sees(world: Path) -> None:
    _, processor = load(str(world / "multimodal"), "cpu")
    samples = Samples(world / "data" / "train.json", processor)
    assert len(samples) == 4
    for number, batch in enumerate(samples):
        seen = batch["labels"][batch["labels"] != -100]
        assert processor.tokenizer.decode(seen) == f"It is {2 * number}.<|im_end|>\n"
        assert torch.equal(batch["input_ids"][batch["labels"] != -100], seen)
        assert "pixel_values" in batch


def test_texts_and_conversations_of_a_text_model(world: Path, tmp_path: Path) -> None:
    _, processor = load(str(world / "multimodal"), "cpu")
    rows: list[Any] = [
        {"text": "two words"},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    text, talk = Samples(file, processor)
    assert torch.equal(text["labels"], text["input_ids"])
    seen = talk["labels"][talk["labels"] != -100]
    assert processor.tokenizer.decode(seen) == "b<|im_end|>\nd<|im_end|>\n"


def test_a_row_without_a_token_to_predict_is_refused_by_its_number(
    world: Path, tmp_path: Path
) -> None:
    _, processor = load(str(world / "multimodal"), "cpu")
    file = tmp_path / "rows.jsonl"
    for text, count in (("", "no tokens"), ("a", "1 token of")):
        file.write_text("\n".join(json.dumps({"text": one}) for one in ("two words", text)))
        with refused(DriftError, f"{file}, sample 1", count, "tokens: write a longer text"):
            list(Samples(file, processor))
    processor.chat_template = "{{ '' }}"
    file.write_text(json.dumps({"messages": [TURN]}))
    with refused(DriftError, f"{file}, sample 0", "no tokens"):
        list(Samples(file, processor))


def test_a_model_without_a_tokenizer_is_named(world: Path, tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "two words"}')
    with refused(DriftError, f"{file}, sample 0", f"{tmp_path} makes no tokens", "no tokenizer"):
        list(Samples(file, tokenizer))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["No such file"]),
        ("", ["no samples"]),
        ('{"text": "a b"}', ["1 sample for 3 directions", "--directions 1"]),
        ('{"text": "a b"}\n' * 2, ["2 samples for 3 directions", "--directions 2"]),
    ],
)
def test_a_file_that_does_not_do_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: list[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["protect", "no-model", "no-delta", str(file), "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in (str(file), *words)), said


TURN = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not JSON", ["neither JSON nor JSON lines"]),
        ("", ["no samples"]),
        ("[]", ["no samples", "messages"]),
        ('{"question": "?"}', ["sample 0", '{"text": …}', "question"]),
        ('{"messages": [{"content": "?"}]}', ["sample 0", "role"]),
        (json.dumps({"messages": [{"role": "user", "content": "?"}]}), ["assistant", "no loss"]),
        (json.dumps({"messages": [TURN], "images": ["a.png"]}), ["0 × <image> and 1 images"]),
        (
            json.dumps({"messages": [{"role": "user", "content": "<image>"}], "images": ["a.png"]}),
            ["a.png is not there"],
        ),
    ],
)
def test_files_of_another_form_are_refused(
    world: Path, tmp_path: Path, content: str, words: list[str]
) -> None:
    _, processor = load(str(world / "multimodal"), "cpu")
    file = tmp_path / "rows.json"
    file.write_text(content)
    with refused(DriftError, str(file), *words):
        list(Samples(file, processor))


def test_a_template_that_changes_earlier_turns_is_refused(world: Path) -> None:
    _, processor = load(str(world / "multimodal"), "cpu")
    processor.chat_template = "{{ messages | length }}" + processor.chat_template
    with refused(DriftError, "sample 0", "otherwise", "batches of your own"):
        list(Samples(world / "data" / "train.json", processor))


def test_an_architecture_that_transformers_does_not_have_is_named(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "architectures": ["Strange"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(DriftError, "Strange", "from Python"):
        load(str(tmp_path), "cpu")
