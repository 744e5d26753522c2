"""Seeded synthetic pairs with the names and shapes of Qwen2.5-VL's text backbones, kept on disk.

Owns which tensors a pair has and how they are written: in bfloat16, shard by shard, without torch.
The text model has the names `model.layers…`; the multimodal one has `model.language_model.layers…`
and a tiny vision tower. Invariant: a checkpoint is reused only if its seal, which is written last,
names every file with its size; if not, it is written again.

Values are runs of one seeded block of random numbers. Each tensor starts at its own place in the
block, so that no two tensors are equal, and the disk limits how fast a pair is written.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_VERSION = 1
_SEED = 20_510
# A prime number, so that runs of values do not begin where rows of a tensor do.
_BLOCK = 8_388_593
_SHARD_NBYTES = 2_000_000_000
_VISION = 64

TEXT, MULTIMODAL = "model.", "model.language_model."


@dataclass(frozen=True)
class Size:
    """The dimensions of a backbone; `keys` is the width of the keys and of the values."""

    hidden: int
    inner: int
    layers: int
    keys: int
    head: int
    vocab: int
    tied: bool


SIZES = {
    "0.5B": Size(896, 4864, 24, 128, 64, 151_936, True),
    "1.5B": Size(1536, 8960, 28, 256, 128, 151_936, True),
    "3B": Size(2048, 11_008, 36, 256, 128, 151_936, True),
    "7B": Size(3584, 18_944, 28, 512, 128, 152_064, False),
    # For the tests of the suite.
    "tiny": Size(64, 96, 2, 32, 16, 256, True),
}


@dataclass(frozen=True)
class Pair:
    """A text and a multimodal checkpoint on disk; `shapes` has the text model's names."""

    label: str
    layers: int
    reasoning: Path
    multimodal: Path
    # The multimodal weights with the text model's names, for a rival that matches by name only.
    renamed: Path | None
    shapes: dict[str, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that both models have, in both together."""
        return 2 * self.delta_nbytes

    @property
    def delta_nbytes(self) -> int:
        """Bytes of Δ in bfloat16."""
        return sum(2 * math.prod(shape) for shape in self.shapes.values())

    @property
    def files(self) -> list[Path]:
        """Every shard of either model."""
        return [*shards(self.reasoning), *shards(self.multimodal)]

    def multimodal_name(self, name: str) -> str:
        """Return the multimodal checkpoint's name for a text model's name."""
        return MULTIMODAL + name.removeprefix(TEXT) if name.startswith(TEXT) else name


def shards(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint in order."""
    return sorted(directory.glob("*.safetensors"))


def make_pair(
    directory: Path,
    size: str,
    *,
    layers: int | None = None,
    renamed: bool = False,
    outputs: int = 0,
    shard_nbytes: int = _SHARD_NBYTES,
) -> Pair:
    """Return the pair under `directory`; write its checkpoints that are missing or incomplete.

    Args:
        layers: number of layers; by default that of the model.
        renamed: also write the multimodal weights with the text model's names.
        outputs: how many deltas in bfloat16 need space beside the pair.
        shard_nbytes: maximum size of one shard, unless a single tensor is larger.

    Raises:
        ValueError: an unknown size, or no layers.
        OSError: not enough space; nothing was written.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    model = SIZES[size]
    layers = model.layers if layers is None else layers
    if layers < 1:
        raise ValueError(f"a pair needs at least one layer, got {layers}")
    home = directory / f"{size}-{layers}"
    shapes = backbone(model, layers)
    wanted = _checkpoints(home, model, layers, shapes)
    if not renamed:
        wanted.pop()
    spec = {"version": _VERSION, "layers": layers, **asdict(model), "shard_nbytes": shard_nbytes}
    missing = [checkpoint for checkpoint in wanted if not checkpoint.sealed(spec)]
    delta_nbytes = sum(2 * math.prod(shape) for shape in shapes.values())
    _check_space(home, sum(one.nbytes for one in missing) + outputs * delta_nbytes)
    blocks = _blocks() if missing else []
    for checkpoint in missing:
        checkpoint.write(blocks[checkpoint.side], spec, shard_nbytes)
    return Pair(
        label=size if layers == model.layers else f"{size}, {layers} layers",
        layers=layers,
        reasoning=home / "text",
        multimodal=home / "multimodal",
        renamed=home / "renamed" if renamed else None,
        shapes=shapes,
    )


def _checkpoints(
    home: Path, model: Size, layers: int, shapes: dict[str, tuple[int, ...]]
) -> list[_Checkpoint]:
    """Return the text, the multimodal and the renamed checkpoint, in this order."""
    prefixed = {
        MULTIMODAL + name.removeprefix(TEXT) if name.startswith(TEXT) else name: shape
        for name, shape in shapes.items()
    }
    text = _text_configuration(model, layers)
    multimodal = _multimodal_configuration(model, layers)
    return [
        _Checkpoint(home / "text", shapes, {}, 0, text),
        _Checkpoint(home / "multimodal", prefixed, vision_tower(model), 1, multimodal),
        _Checkpoint(home / "renamed", shapes, {}, 1, text),
    ]


def backbone(size: Size, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a text model, name → shape, in the order of a checkpoint."""
    hidden = size.hidden
    found: dict[str, tuple[int, ...]] = {f"{TEXT}embed_tokens.weight": (size.vocab, hidden)}
    for layer in range(layers):
        at = f"{TEXT}layers.{layer}."
        found[f"{at}input_layernorm.weight"] = (hidden,)
        found[f"{at}mlp.down_proj.weight"] = (hidden, size.inner)
        found[f"{at}mlp.gate_proj.weight"] = (size.inner, hidden)
        found[f"{at}mlp.up_proj.weight"] = (size.inner, hidden)
        found[f"{at}post_attention_layernorm.weight"] = (hidden,)
        for name, width in (("q", hidden), ("k", size.keys), ("v", size.keys)):
            found[f"{at}self_attn.{name}_proj.bias"] = (width,)
            found[f"{at}self_attn.{name}_proj.weight"] = (width, hidden)
        found[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
    found[f"{TEXT}norm.weight"] = (hidden,)
    if not size.tied:
        found["lm_head.weight"] = (size.vocab, hidden)
    return found


def vision_tower(size: Size) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a vision tower of one block, named as in transformers."""
    at, width = "model.visual.", _VISION
    found: dict[str, tuple[int, ...]] = {f"{at}patch_embed.proj.weight": (width, 3, 2, 14, 14)}
    for norm in ("norm1", "norm2"):
        found[f"{at}blocks.0.{norm}.weight"] = (width,)
    for name, rows in (
        ("blocks.0.attn.qkv", 3 * width),
        ("blocks.0.attn.proj", width),
        ("blocks.0.mlp.gate_proj", width),
        ("blocks.0.mlp.up_proj", width),
        ("blocks.0.mlp.down_proj", width),
    ):
        found |= {f"{at}{name}.weight": (rows, width), f"{at}{name}.bias": (rows,)}
    found[f"{at}merger.ln_q.weight"] = (width,)
    for number, rows in ((0, 4 * width), (2, size.hidden)):
        name = f"{at}merger.mlp.{number}"
        found |= {f"{name}.weight": (rows, 4 * width), f"{name}.bias": (rows,)}
    return found


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint to write: its backbone, its other tensors, and whose values it gets."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    others: dict[str, tuple[int, ...]]
    side: int
    configuration: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(2 * math.prod(shape) for shape in (self.shapes | self.others).values())

    @property
    def _seal(self) -> Path:
        return self.path.with_name(self.path.name + ".seal.json")

    def sealed(self, spec: dict[str, Any]) -> bool:
        """Return whether the seal is this pair's and every file has the stated size."""
        try:
            seal = json.loads(self._seal.read_bytes())
            files = {str(name): int(nbytes) for name, nbytes in seal["files"].items()}
            found = {path.name: path.stat().st_size for path in self.path.iterdir()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False
        return seal.get("spec") == spec and bool(files) and found == files

    def write(self, block: memoryview, spec: dict[str, Any], shard_nbytes: int) -> None:
        self._seal.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        # A tensor's place in the block follows from its place in the backbone, in either model.
        places = {name: number for number, name in enumerate([*self.shapes, *self.others])}
        groups = _grouped(self.shapes | self.others, shard_nbytes)
        weight_map = {}
        for number, group in enumerate(groups):
            name = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
            with (self.path / name).open("wb", buffering=0) as file:
                file.write(_header(group))
                for tensor, shape in group.items():
                    _write_values(file, block, places[tensor], math.prod(shape))
                os.fsync(file.fileno())
            weight_map.update(dict.fromkeys(group, name))
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.path / "config.json").write_text(json.dumps(self.configuration, indent=1))
        files = {path.name: path.stat().st_size for path in self.path.iterdir()}
        self._seal.write_text(json.dumps({"spec": spec, "files": files}))


def _grouped(
    shapes: dict[str, tuple[int, ...]], shard_nbytes: int
) -> list[dict[str, tuple[int, ...]]]:
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if groups[-1] and filled + nbytes > shard_nbytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += nbytes
    return groups


def _header(group: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in group.items():
        end = begin + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_values(file: BinaryIO, block: memoryview, place: int, numel: int) -> None:
    start = place * 1_299_709 % _BLOCK
    while numel:
        count = min(numel, _BLOCK - start)
        rest = block[2 * start : 2 * (start + count)]
        while rest:
            # An unbuffered file may write less than it was given.
            rest = rest[file.write(rest) :]
        numel -= count
        start = 0


def _blocks() -> list[memoryview]:
    """Return the bytes of both models' blocks: common values, and the same slightly moved."""
    import numpy as np

    rng = np.random.default_rng(_SEED)
    common = rng.standard_normal(_BLOCK, dtype=np.float32) * np.float32(0.02)
    moved = common + rng.standard_normal(_BLOCK, dtype=np.float32) * np.float32(0.002)
    return [to_bfloat16(values).data.cast("B") for values in (moved, common)]


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bits of finite float32 values in bfloat16, rounded to nearest even."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)


def _check_space(home: Path, needed: int) -> None:
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < needed * 1.02:
        raise OSError(
            errno.ENOSPC,
            f"{home}: the pair and what is written from it need {needed / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB are free; choose another --directory, a smaller --size or fewer "
            "--layers",
        )


def _text_configuration(size: Size, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": size.tied,
        **_dimensions(size, layers),
    }


def _multimodal_configuration(size: Size, layers: int) -> dict[str, Any]:
    half = size.head // 2
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": size.tied,
        # Real models have these ids near the end of the vocabulary.
        "image_token_id": size.vocab - 1,
        "video_token_id": size.vocab - 2,
        "vision_start_token_id": size.vocab - 4,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "tie_word_embeddings": size.tied,
            "rope_scaling": {"type": "mrope", "mrope_section": sections},
            **_dimensions(size, layers),
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 1,
            "hidden_size": _VISION,
            "intermediate_size": _VISION,
            "num_heads": 4,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [0],
        },
    }


def _dimensions(size: Size, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": size.hidden // size.head,
        "num_key_value_heads": size.keys // size.head,
        "vocab_size": size.vocab,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
    }
