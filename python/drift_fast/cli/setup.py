"""The command `drift-fast setup`: a ready configuration of a training stack for a model pair.

Owns what each stack's files are made of and the values that fill them. The text is in setups/:
a line that begins with @full or @lora is for that tuning only, and $name is a value.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from drift_fast.alignment.options import SelectionOptions
from drift_fast.checkpoints.opened import open_checkpoint
from drift_fast.cli.options import add_options, add_sources, given_flags
from drift_fast.cli.output import next_step, remark, show
from drift_fast.delta.delta import delta_at
from drift_fast.errors import DriftError
from drift_fast.inject.config import InjectionConfig
from drift_fast.options import option
from drift_fast.paths import local_path
from drift_fast.planner.planning import plan
from drift_fast.planner.remedies import NONE
from drift_fast.planner.report import TrainingPlan
from drift_fast.preflight.check import Preflight, check
from drift_fast.sizes import parse_size

TUNINGS = ("full", "lora")
_RANK = 64
# That of the paper; adapters take larger steps than whole weights.
_LEARNING_RATES = {"full": 1e-6, "lora": 1e-4}


@dataclass(frozen=True)
class Stack:
    """What a stack's files are made of, how they are run, and what their imports are."""

    title: str
    run: str
    parts: Mapping[str, tuple[str, ...]]
    imports: str = ""


def _script(
    title: str, own: str, imports: str = "from PIL import Image\n", *, run: str = "python train.py"
) -> Stack:
    """Return a stack whose one file is a script that loads the model and makes batches itself."""
    parts = ("model.py.txt", *(() if own == "trl" else ("batches.py.txt",)), f"{own}.py.txt")
    return Stack(title, run, {"train.py": parts}, imports)


_PICTURES = "from PIL import Image\n"
STACKS = {
    "trainer": _script("The Hugging Face Trainer", "trainer"),
    "trl": _script("TRL's SFTTrainer", "trl", "import datasets\nimport trl\n"),
    "accelerate": _script(
        "Accelerate",
        "accelerate",
        f"from accelerate import Accelerator\n{_PICTURES}",
        run="accelerate launch train.py",
    ),
    "lightning": _script(
        "Lightning",
        "lightning",
        f"import lightning.pytorch as pl\n{_PICTURES}"
        "from drift_fast.integrations.lightning import DriftCallback\n",
    ),
    "deepspeed": _script(
        "DeepSpeed",
        "deepspeed",
        f"import deepspeed\n{_PICTURES}",
        run="deepspeed --num_gpus 1 train.py",
    ),
    "loop": _script("A loop of your own", "loop"),
    "llamafactory": Stack(
        "LLaMA-Factory's own configuration, with one more section",
        "python -m drift_fast.integrations.llamafactory train.yaml",
        {"train.yaml": ("llamafactory.yaml",), "dataset_info.json": ("dataset_info.json",)},
    ),
    "swift": Stack(
        "ms-swift, with a callback",
        "bash train.sh",
        {"train.sh": ("swift.sh",), "drift.yaml": ("drift.yaml",), "plugin.py": ("plugin.py.txt",)},
    ),
    "axolotl": Stack(
        "Axolotl's own configuration, with the plugin and its section",
        "axolotl train train.yaml",
        {"train.yaml": ("axolotl.yaml",)},
    ),
    "verl": Stack(
        "verl, with an engine that injects",
        "bash train.sh",
        {"train.sh": ("verl.sh",), "drift.yaml": ("drift.yaml",)},
    ),
}

# By model_type of config.json: LLaMA-Factory's template, and ms-swift's model type and template.
_NAMES = {
    "gemma3": ("gemma3", "gemma3_vision"),
    "internvl": ("intern_vl", "internvl_hf"),
    "llava": ("llava", "llava1_5_hf"),
    "llava_next": ("llava_next", "llava1_6_mistral_hf"),
    "qwen2_vl": ("qwen2_vl", "qwen2_vl"),
    "qwen2_5_vl": ("qwen2_vl", "qwen2_5_vl"),
    "qwen3_vl": ("qwen3_vl", "qwen3_vl"),
}
# Both frameworks refuse this name, and say which they have.
_UNKNOWN = "FILL_IN"
# Without one of them transformers makes no processor of images.
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def _check_rank(value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"lora_rank must be at least 1, got {value!r}")


def _check_rate(value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"learning_rate must be finite and above 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SetupOptions(SelectionOptions):
    """The options of `setup`."""

    tuning: str | None = option(
        None,
        "train all weights of the language model, or adapters; full by default, and lora where "
        "the plan does not fit into gpu_memory",
        choices=TUNINGS,
    )
    lora_rank: int | None = option(
        None,
        f"rank of the adapters, which it chooses as tuning; {_RANK} by default",
        check=_check_rank,
        metavar="N",
    )
    gpu_memory: int | str | None = option(
        None,
        "memory of one GPU, such as 80GB, to choose the tuning and where Δ lives",
        check=lambda value: value is None or parse_size(value),
        metavar="SIZE",
    )
    learning_rate: float | None = option(
        None,
        "largest learning rate; 1e-6 by default, as in the paper, and 1e-4 for adapters",
        check=_check_rate,
        metavar="X",
    )
    data: str = option(
        "train.jsonl", "the samples, with messages and images in each row", metavar="FILE"
    )
    delta: str = option(
        "delta",
        "directory or Hub id of Δ; a Δ that is there is not computed again",
        metavar="DIR",
    )
    overwrite: bool = option(False, "replace files of an earlier setup")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank is not None and self.tuning == "full":
            raise ValueError(
                "lora_rank is of adapters, and tuning is 'full'; leave one of them out"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Print a ready configuration of a training stack for a model pair, or write it. A pair "
        "that does not fit is refused as by `check`."
    )
    parser.add_argument("stack", choices=tuple(STACKS), help="the training stack")
    add_sources(parser)
    parser.add_argument("--out", "-o", type=Path, metavar="DIR", help="directory to write")
    add_options(parser, SetupOptions)
    parser.set_defaults(run=run, value_error_status=2, advice_for="delta")


def run(given: argparse.Namespace) -> int:
    """Check, plan, and print or write."""
    options = SetupOptions(**given_flags(given, SetupOptions))
    chosen = {name: getattr(options, name) for name in SelectionOptions.names()}
    report = check(given.reasoning, given.multimodal, **chosen)
    if not report.ok:
        show(*report.blocks(), spelled=given.spelled)
        return 1
    notes = sum(finding.severity == "note" for finding in report.findings)
    if notes:
        remark(f"`drift-fast check` has {notes} note{'s' if notes > 1 else ''} on this pair")
    folder = local_path(given.multimodal)
    if folder.is_dir() and not any((folder / name).is_file() for name in _PROCESSORS):
        remark(
            f"{given.multimodal} has no {' or '.join(_PROCESSORS)}, and a run loads the processor "
            "from there: copy it, with the tokenizer, from the model that this one comes from "
            "(AutoProcessor.from_pretrained(…).save_pretrained(…))"
        )
    stack = STACKS[given.stack]
    values, tuning = _values(given, options, report)
    if options.learning_rate is None and tuning == "full":
        remark(
            "the learning rate is the paper's 1e-6, at which λ may hardly move; "
            "`drift-fast plan … --learning-rate X` predicts λ, and --learning-rate sets it here"
        )
    texts = render(stack, values, tuning)
    if given.out is None:
        for name, text in texts.items():
            print(text if len(texts) == 1 else f"# ---- {name}\n{text}", end="")
        return 0
    _write(local_path(given.out), texts, overwrite=options.overwrite)
    remark(f"wrote {', '.join(texts)} to {given.out}")
    next_step(*filter(None, (shlex.join(["cd", str(given.out)]), values["compute"], stack.run)))
    return 0


def render(stack: Stack, values: Mapping[str, str], tuning: str) -> dict[str, str]:
    """Return the text of each file of a stack."""
    filled = {"title": stack.title, "imports": stack.imports, **values}
    texts = {}
    for name, parts in stack.parts.items():
        whole = "".join((files(__package__) / "setups" / part).read_text("utf-8") for part in parts)
        kept = [
            line.removeprefix(f"@{tuning} ")
            for line in whole.splitlines(keepends=True)
            if not line.startswith("@") or line.startswith(f"@{tuning} ")
        ]
        texts[name] = Template("".join(kept)).substitute(filled)
    return texts


def values_for(
    multimodal: str,
    model_type: str | None,
    tuning: str,
    *,
    adapted: Collection[str] = (),
    rank: int = _RANK,
    learning_rate: float | None = None,
    compute: str = "drift-fast delta REASONING MULTIMODAL --out delta",
    **more: str,
) -> dict[str, str]:
    """Return the values that fill the text of every stack.

    Args:
        multimodal: the model that trains, a path or a Hub id.
        model_type: that of its config.json.
        adapted: the modules that Δ reaches, which adapters must reach too.
        rank: that of adapters.
        learning_rate: the largest; by default that of the tuning.
        compute: the command that computes Δ, or nothing where Δ is there.
        more: values in the place of the defaults.
    """
    template, swift = _NAMES.get(model_type or "", (_UNKNOWN, _UNKNOWN))
    defaults = InjectionConfig()
    return {
        "multimodal": multimodal,
        "llamafactory_template": template,
        "swift_type": swift,
        "axolotl_template": template,
        # With a point, without which YAML reads text.
        "learning_rate": np.format_float_scientific(
            learning_rate or _LEARNING_RATES[tuning], trim="0", exp_digits=1
        ),
        "rank": str(rank),
        "lora_alpha": str(2 * rank),
        "adapted": rf".*language_model.*\.({'|'.join(sorted(adapted))})",
        "compute": compute,
        "first": f"First compute Δ: {compute}" if compute else f"Δ: {more['delta']}",
        "alpha": str(defaults.alpha),
        "scale": defaults.scale,
        "residency": defaults.residency,
        **more,
    }


def _values(
    given: argparse.Namespace, options: SetupOptions, report: Preflight
) -> tuple[dict[str, str], str]:
    """Return the values of a checked pair, and what is tuned."""
    tuning, residency = _planned(given, options)
    reasoning, multimodal = map(_from_anywhere, (given.reasoning, given.multimodal))
    model_type = open_checkpoint(given.multimodal).configuration.around[-1].text("model_type")
    modules = options.modules if isinstance(options.modules, str) else ",".join(options.modules)
    flags = {
        "modules": modules,
        "layers": options.layers,
        "mapping": options.mapping,
        "rows": options.rows,
    }
    # A directory of that name which nobody gave may be the Δ of another pair.
    known = "delta" in given and _is_there(options.delta)
    words = ["drift-fast", "delta", reasoning, multimodal, "--out", options.delta]
    for name, flag in flags.items():
        words += [] if flag is None else [f"--{name}", str(flag)]
    return (
        values_for(
            multimodal,
            model_type,
            tuning,
            adapted={module for kinds in report.selected.values() for module in kinds},
            rank=options.lora_rank or _RANK,
            learning_rate=options.learning_rate,
            compute="" if known else shlex.join(words),
            delta=_from_anywhere(options.delta) if known else options.delta,
            data=options.data,
            modules=modules,
            residency=residency,
        ),
        tuning,
    )


def _is_there(delta: str) -> bool:
    """Return whether Δ is there; a directory to be written may be spelled like a Hub id."""
    path = local_path(delta)
    if path.exists() or path.parent.is_dir():
        return (path / "drift.json").is_file()
    try:
        return delta_at(delta) is not None
    except FileNotFoundError:
        return False
    except DriftError as error:
        remark(f"{error}; {delta} is taken for a directory")
        return False


def _from_anywhere(source: str) -> str:
    """Return a path whole, since the files may lie in another directory; Hub id and URL stay."""
    path = local_path(source)
    return str(path.resolve()) if path.exists() else source


def _planned(given: argparse.Namespace, options: SetupOptions) -> tuple[str, str]:
    """Return what is tuned and where Δ lives, as far as the plan decides it."""
    rank = options.lora_rank or _RANK
    tuning = options.tuning or ("full" if options.lora_rank is None else "lora")
    if options.gpu_memory is None:
        return tuning, InjectionConfig().residency

    def planned(lora_rank: int) -> TrainingPlan:
        return plan(
            given.reasoning,
            given.multimodal,
            steps=1,
            modules=options.modules,
            layers=None if options.layers is None else str(options.layers),
            gradient_checkpointing=True,
            gpu_memory=options.gpu_memory,
            lora_rank=lora_rank,
        )

    found = planned(rank if tuning == "lora" else 0)
    if not found.fits and tuning == "full" and options.tuning is None:
        remedies = "; ".join(text for text in found.remedies if not text.startswith("with LoRA"))
        would = f"; all would fit {remedies}" if remedies else ""
        remark(f"LoRA, since all weights do not fit into {options.gpu_memory}{would}")
        tuning, found = "lora", planned(rank)
    if not found.fits:
        what = "all weights do" if tuning == "full" else "LoRA does"
        fits = f"it fits {'; '.join(found.remedies)}" if found.remedies else NONE
        remark(f"{what} not fit into {options.gpu_memory} of one GPU; {fits}")
        return tuning, InjectionConfig().residency
    place = str(found["residency of Δ"].value)
    return tuning, InjectionConfig().residency if place == "device" else place


def _write(folder: Path, texts: Mapping[str, str], *, overwrite: bool) -> None:
    there = [name for name in texts if (folder / name).exists()]
    if there and not overwrite:
        raise DriftError(
            f"{folder} has {', '.join(there)} already; pass --overwrite, or another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
