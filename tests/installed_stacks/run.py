"""Install one training stack, run what the documentation says of it, and note what ran.

    python tests/installed_stacks/run.py STACK [--torch-from ENVIRONMENT] [--keep]

Owns the environment, the matrix of runs and the row of docs/stacks.md. Each case is the stack's own
command on what `drift-fast setup` writes: whole weights and LoRA, text and images, four
micro-batches a step. Checked are the first gradient against float64, two steps with α = 0 against
the stack's own run, bit by bit, and a resumed run against one that was not interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "stacks"
PAGE = ROOT / "docs" / "stacks.md"
ALWAYS = ("msgspec", "rich", "numpy", "safetensors", "pyyaml", "pillow")
# Only against a run that hangs: on a busy machine one took more than ten minutes.
LIMIT = 3600


def install(stack: str, torch_from: Path | None) -> Path:
    """Make the environment of a stack, and return its interpreter."""
    from borrow_torch import VISION, borrow

    given = tomllib.loads((HERE / "versions.toml").read_text())[stack]
    place = BUILD / stack
    shutil.rmtree(place, ignore_errors=True)
    start = [given.get("python", sys.executable), "-m", "venv", str(place)]
    subprocess.run(start, check=True)
    python = place / "bin" / "python"
    pins = []
    if torch_from is not None and given.get("torch") != "own":
        pins = borrow(place, torch_from, also=VISION)
    quiet = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*quiet, "--upgrade", "pip"], check=True)
    subprocess.run([*quiet, *given["packages"], *ALWAYS, "torch", "torchvision", *pins], check=True)
    return python


def call(
    words: list[str],
    folder: Path,
    python: Path,
    *,
    plain: bool = False,
    gpus: bool = False,
    **more: str,
) -> str:
    """Run a command in the environment of a stack; return what it printed.

    plain: whether a script finds a stand-in of drift_fast. gpus: whether the command sees any.
    """
    path = [HERE / "spy", *([HERE / "without"] if plain else []), ROOT / "python"]
    environment = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        # Axolotl and others report runs to their makers unless they are told not to.
        "DO_NOT_TRACK": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_MODE": "disabled",
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        **more,
    }
    environment.pop("PYTEST_CURRENT_TEST", None)
    ended = subprocess.run(
        words, cwd=folder, env=environment, text=True, timeout=LIMIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    (folder / f"{folder.name}.log").write_text(ended.stdout)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(words)} in {folder}\n{ended.stdout[-3000:]}")
    return ended.stdout


def case(stack: str, python: Path, world: Path, tuning: str, kind: str) -> str:
    """Run and compare one case; return what was found."""
    import cases
    import checks

    folder = BUILD / "runs" / stack / f"{tuning}-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    template = folder / "setup"
    template.mkdir(parents=True)
    setup = [
        *(str(python), "-m", "drift_fast", "setup", stack),
        *(str(world / "reasoning"), str(world / "multimodal")),
        *("--tuning", tuning, "--delta", str(world / "delta"), "--out", "."),
    ]
    call(setup, template, python, STACKS_RECORD="")
    (template / "train.jsonl").symlink_to(world / "data" / f"{kind}.jsonl")
    (template / "images").symlink_to(world / "data" / "images")

    def train(name: str) -> Path:
        """Run once; return the record of it."""
        run, here = cases.RUNS[name], folder / name
        shutil.copytree(template, here, symlinks=True)
        if run.resume:
            whole = folder / ("injected" if run.injected else "own")
            shutil.copytree(whole / "saves", here / "saves", symlinks=True)
        words = cases.STACKS[stack](here, run, str(python))
        plain = not run.injected and stack in cases.SCRIPTS
        gpus = cases.on_gpus(stack)
        call(words, here, python, plain=plain, gpus=gpus, STACKS_RECORD=str(here / "record"))
        return here / "record"

    if kind == "text" and stack in cases.ONLY_IMAGES:
        with contextlib.suppress(RuntimeError):
            train("plain")
        log = (folder / "plain" / "plain.log").read_text()
        assert cases.ONLY_IMAGES[stack] in log, f"{stack} may train without images by now"
        return "fails without drift_fast too"
    plain, injected = train("plain"), train("injected")
    error = checks.parity(plain, injected, world / "delta", clip=cases.CLIP)
    found = [f"parity {error:.0e}"]
    assert error <= checks.TOLERANCE, found
    same = checks.same(plain, train("zero"), steps=2)
    found.append("α = 0 same bits" if same else "**α = 0 differs**")
    if stack in cases.WITHOUT_RESUMING:
        return ", ".join(found)
    if checks.same(injected, train("resumed"), steps=4, start=cases.SAVED):
        found.append("resumed, same bits")
    elif checks.same(train("own"), train("own-resumed"), steps=4, start=cases.SAVED):
        found.append("**resumed, differs**")
    else:
        found.append("resumed, differs without drift_fast too")
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", choices=tomllib.loads((HERE / "versions.toml").read_text()))
    parser.add_argument("--torch-from", type=Path, help="environment whose torch is linked")
    parser.add_argument("--keep", action="store_true", help="keep the environment, or take it")
    parser.add_argument("--only", default="", help="cases with this in their name, such as lora")
    given = parser.parse_args()
    sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT / "python")]
    python = BUILD / given.stack / "bin" / "python"
    if not (given.keep and python.exists()):
        python = install(given.stack, given.torch_from and given.torch_from.resolve())
    import cases

    world = BUILD / "world"
    if not (world / "delta").is_dir():
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir(parents=True)
        stand_in = ROOT / "examples" / "qwen2_5_vl_7b" / "stand_in.py"
        code = (
            f"import runpy; runpy.run_path({str(stand_in)!r})['write']({str(world)!r}, samples=16)"
        )
        # With the tool's own packages: every stack is given the same models.
        call([sys.executable, "-c", code], world, Path(sys.executable), STACKS_RECORD="")
        for images in (False, True):
            cases.rows(world, images=images, count=16)
        words = [sys.executable, "-m", "drift_fast", "delta", "reasoning", "multimodal"]
        call([*words, "--out", "delta"], world, Path(sys.executable), STACKS_RECORD="")
    found, failed = {}, False
    for tuning in ("full", "lora"):
        for kind in ("text", "images"):
            name = f"{tuning}-{kind}"
            if given.only not in name:
                continue
            try:
                found[name] = case(given.stack, python, world, tuning, kind)
            except Exception as error:
                failed, found[name] = True, "**failed**"
                print(f"{name}: {error}", file=sys.stderr)
            print(f"{given.stack} {name}: {found[name]}", flush=True)
            # At once: a stack takes long enough to be interrupted.
            write_row(given.stack, versions(python, given.stack), found)
    if not given.keep:
        shutil.rmtree(BUILD / given.stack)
    return int(failed)


def versions(python: Path, stack: str) -> str:
    """Return the versions of the stack and of what it stands on."""
    pinned = tomllib.loads((HERE / "versions.toml").read_text())[stack]["packages"][0]
    names = dict.fromkeys([re.split("[=<>]", pinned)[0], "transformers", "torch"])
    code = (
        "import importlib.metadata as m, sys\n"
        "print(', '.join(f'{name} {m.version(name)}' for name in sys.argv[1:]))"
    )
    words = [str(python), "-c", code, *names]
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


COLUMNS = ("full-text", "full-images", "lora-text", "lora-images")
START, END = "<!-- make test-stacks writes this table -->", "<!-- end of the table -->"


def write_row(stack: str, version: str, found: dict[str, str]) -> None:
    """Put a stack's row into the table of docs/stacks.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    table, _, after = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if "|" in line}
    header = "| stack | versions | whole weights, text | with images | LoRA, text | with images |"
    for heading in ("stack", "---"):
        rows.pop(heading, None)
    # Cases that were left out keep what an earlier run found.
    cells = [cell.strip() for cell in rows.get(stack, "").split("|")[3:-1]]
    found = dict(zip(COLUMNS, cells or ["not run"] * len(COLUMNS), strict=True)) | found
    rows[stack] = f"| {stack} | {version} | {' | '.join(found[name] for name in COLUMNS)} |"
    lines = [
        START,
        "",
        header,
        "|---|---|---|---|---|---|",
        *(rows[name] for name in sorted(rows)),
        "",
        END,
    ]
    PAGE.write_text(before + "\n".join(lines) + after, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
