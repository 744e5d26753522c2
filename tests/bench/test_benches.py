"""The timing scripts run from end to end on a CPU, and check what they time."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from support import processes
from support.processes import environment

BENCHES = Path(__file__).parents[2] / "benches"
ERROR = r"\| {} \| 2 \| \d\.\de-0[6-9] \| \d\.\de-0[6-9] \| \d\.\de-0[6-9] \|"


def run(script: str, *options: str) -> str:
    command = [sys.executable, BENCHES / script, "--device", "cpu", *options]
    return processes.run(*command, env=environment(CUDA_VISIBLE_DEVICES=""), limit=280).stdout


@pytest.mark.slow
def test_every_stack_over_two_processes_is_compared_with_float64_and_timed() -> None:
    pytest.importorskip("deepspeed")
    sizes = ("--size", "tiny", "--layers", "2", "--tokens", "32", "--steps", "1", "--repeats", "1")
    printed = run("multi_gpu.py", "--gpus", "2", *sizes)
    for stack in ("ddp", "fsdp2", "zero2", "zero3"):
        assert re.search(ERROR.format(stack), printed), printed
        assert len(re.findall(rf"\| {stack} \| 2 \| 2 \| 32 \|.*adaptive", printed)) == 2, printed
    # One sum over processes, of two numbers for each of 20 targets.
    assert "| 40 in 1 |" in printed


@pytest.mark.slow
def test_one_process_in_the_place_of_two_is_timed_and_not_compared() -> None:
    pytest.importorskip("peft")
    sizes = ("--size", "tiny", "--layers", "2", "--tokens", "32", "--steps", "1", "--repeats", "1")
    printed = run("multi_gpu.py", "--pretend", "2", "--lora", "--stacks", "fsdp2", *sizes)
    assert "| fsdp2 | 2 | not compared |" in printed
    assert re.search(r"\| fsdp2 \| 2 \| 2 \| drift_fast, adaptive .* in 3 \|", printed), printed


@pytest.mark.slow
def test_fine_tuning_with_images_is_timed_beside_the_public_way() -> None:
    printed = run(
        "throughput.py",
        *("--size", "tiny", "--samples", "1", "--image", "28", "--text", "8"),
        *("--steps", "1", "--repeats", "1"),
    )
    for row in ("SFT", "DRIFT, attention + MLP", "the public way, attention + MLP"):
        assert f"| {row} | " in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "row"),
    [
        ("reading.py", r"\| written in pieces of 4 KiB \|[^|]*\| 2 \|"),
        ("merging.py", r"\| \*\*layer_swap\*\* \| \d+\.\d\d "),
    ],
)
def test_readers_and_merge_methods_are_timed_on_a_pair_that_is_made(
    script: str, row: str, tmp_path: Path
) -> None:
    out = tmp_path / "results.md"
    options = ("--size", "tiny", "--repeats", "1", "--directory", tmp_path / "pairs", "--out", out)
    processes.run(sys.executable, BENCHES / script, *options, limit=280)
    assert re.search(row, out.read_text())
    assert not list((tmp_path / "pairs").glob("*-????????")), "a run left its folder behind"
