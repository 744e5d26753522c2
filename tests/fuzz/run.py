"""Run all fuzz targets for some seconds each: `make fuzz`.

usage: run.py [--seconds N] [target ...]

`shard`, `index`, `directory` and `pair` are libFuzzer's (rust/fuzz), built by the stable toolchain
with counters of coverage, and held against the official reader; building libFuzzer needs a C++
compiler. `delta` and `merge` are mutate.py's. What libFuzzer finds beyond the corpus in the
repository is kept under build/fuzz, for the next run. The first failure ends the run, with the
input that shows it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "rust" / "fuzz"
BUILD = ROOT / "build" / "fuzz"
NATIVE = ("shard", "index", "directory", "pair")
MUTATED = ("delta", "merge")
# The flags of cargo-fuzz without a sanitizer, which stable compilers know.
COVERAGE = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
]


def build() -> Path:
    """Build the native targets and return the directory that they are in."""
    described = subprocess.check_output(["rustc", "-vV"], text=True)
    # With a target given, build scripts and macros are compiled without the flags.
    host = next(line[6:] for line in described.splitlines() if line.startswith("host: "))
    target = Path(os.environ.get("CARGO_TARGET_DIR", BUILD / "target"))
    command = ["cargo", "build", "--release", "--quiet", "--locked", "--target", host]
    environment = os.environ | {
        "RUSTFLAGS": " ".join(COVERAGE),
        "CARGO_TARGET_DIR": str(target.absolute()),
    }
    subprocess.run(command, cwd=FUZZ, env=environment, check=True)
    return target.absolute() / host / "release"


def run_native(binary: Path, seconds: int) -> None:
    """Run one of libFuzzer's targets."""
    found = BUILD / "corpus" / binary.name
    failures = BUILD / "failures"
    for directory in (found, failures):
        directory.mkdir(parents=True, exist_ok=True)
    limits = ["-timeout=10", "-rss_limit_mb=1000", "-max_len=4096"]
    command = [
        *(binary, found, FUZZ / "corpus" / binary.name),
        *(f"-dict={FUZZ / 'tokens.dict'}", f"-max_total_time={seconds}", *limits),
        *(f"-artifact_prefix={failures}/{binary.name}-", "-print_final_stats=1", "-verbosity=0"),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if answer.returncode:
        print(answer.stderr[-8000:])
        sys.exit(f"{binary.name}: failed; its input is in {failures}")
    stated = "stat::number_of_executed_units:"
    count = next(line.split()[-1] for line in answer.stderr.splitlines() if stated in line)
    print(f"{binary.name}: {count} inputs, none failed", flush=True)


def main() -> None:
    """Run the targets that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", nargs="*", choices=[*NATIVE, *MUTATED, []])
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    chosen = options.target or [*NATIVE, *MUTATED]
    binaries = build() if set(chosen) & set(NATIVE) else BUILD
    for target in chosen:
        if target in NATIVE:
            run_native(binaries / target, options.seconds)
        else:
            mutate = Path(__file__).with_name("mutate.py")
            command = [sys.executable, mutate, target, f"--seconds={options.seconds}"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
