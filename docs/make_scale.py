"""Write docs/scale.md: bytes, time and memory of pairs from 7B to 671B, from measured rates.

Owns the shapes of four published models and the arithmetic; the rates are arguments, and the page
says where they come from. Shards and their shares are those that drift_fast itself would make.

    python docs/make_scale.py --read-rate 1GB --write-rate 500MB --memory 64MB --rates "..."
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drift_fast._core import shards as shards_of
from drift_fast.delta.shared_writing import balance
from drift_fast.selection import Selection
from drift_fast.sizes import parse_size

PAGE = Path(__file__).parent / "scale.md"
RANKS = (1, 2, 8, 32)
SELECTIONS = {"attn, mlp": ("attn", "mlp"), "everything": ("all",)}
# FP8 checkpoints store one float32 scale for a block of 128 × 128.
BLOCK = 128

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A published configuration: what config.json of the repository says."""

    name: str
    source: str
    shapes: Shapes
    # Whether a checkpoint stores its projections in FP8 at all.
    has_fp8: bool = False


def dense_mlp(at: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)


def grouped_attention(
    at: str, hidden: int, heads: int, kv_heads: int, head: int, *, bias: bool, norms: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
        yield f"{at}.{name}_proj.weight", (rows, hidden)
        if bias:
            yield f"{at}.{name}_proj.bias", (rows,)
    yield f"{at}.o_proj.weight", (hidden, heads * head)
    if norms:
        yield f"{at}.q_norm.weight", (head,)
        yield f"{at}.k_norm.weight", (head,)


def outside(hidden: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def layer_norms(at: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}.input_layernorm.weight", (hidden,)
    yield f"{at}.post_attention_layernorm.weight", (hidden,)


def qwen25(layers: int, hidden: int, inner: int, heads: int, kv_heads: int) -> Shapes:
    shapes = dict(outside(hidden, 152064))
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= dict(
            grouped_attention(
                f"{at}.self_attn", hidden, heads, kv_heads, 128, bias=True, norms=False
            )
        )
        shapes |= dict(dense_mlp(f"{at}.mlp", hidden, inner)) | dict(layer_norms(at, hidden))
    return shapes


def qwen3_moe() -> Shapes:
    hidden, experts, inner = 4096, 128, 1536
    shapes = dict(outside(hidden, 151936))
    for layer in range(94):
        at = f"model.layers.{layer}"
        shapes |= dict(
            grouped_attention(f"{at}.self_attn", hidden, 64, 4, 128, bias=False, norms=True)
        )
        shapes[f"{at}.mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= dict(dense_mlp(f"{at}.mlp.experts.{expert}", hidden, inner))
        shapes |= dict(layer_norms(at, hidden))
    return shapes


def deepseek_v3() -> Shapes:
    """Leave out the layer that predicts a second token: the 671B do not count it."""
    hidden, heads, experts, inner = 7168, 128, 256, 2048
    query_rank, key_rank, nope, rope, value = 1536, 512, 128, 64, 128
    shapes = dict(outside(hidden, 129280))
    for layer in range(61):
        at = f"model.layers.{layer}"
        attention = f"{at}.self_attn"
        shapes |= {
            f"{attention}.q_a_proj.weight": (query_rank, hidden),
            f"{attention}.q_a_layernorm.weight": (query_rank,),
            f"{attention}.q_b_proj.weight": (heads * (nope + rope), query_rank),
            f"{attention}.kv_a_proj_with_mqa.weight": (key_rank + rope, hidden),
            f"{attention}.kv_a_layernorm.weight": (key_rank,),
            f"{attention}.kv_b_proj.weight": (heads * (nope + value), key_rank),
            f"{attention}.o_proj.weight": (hidden, heads * value),
        }
        if layer < 3:
            shapes |= dict(dense_mlp(f"{at}.mlp", hidden, 18432))
        else:
            shapes[f"{at}.mlp.gate.weight"] = (experts, hidden)
            shapes[f"{at}.mlp.gate.e_score_correction_bias"] = (experts,)
            for expert in range(experts):
                shapes |= dict(dense_mlp(f"{at}.mlp.experts.{expert}", hidden, inner))
            shapes |= dict(dense_mlp(f"{at}.mlp.shared_experts", hidden, inner))
        shapes |= dict(layer_norms(at, hidden))
    return shapes


MODELS = (
    Model("7B", "Qwen/Qwen2.5-7B", qwen25(28, 3584, 18944, 28, 4)),
    Model("72B", "Qwen/Qwen2.5-72B", qwen25(80, 8192, 29568, 64, 8)),
    Model("235B-A22B", "Qwen/Qwen3-235B-A22B", qwen3_moe(), has_fp8=True),
    Model("671B", "deepseek-ai/DeepSeek-V3", deepseek_v3(), has_fp8=True),
)


def source_nbytes(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Return what one checkpoint holds of a tensor; only projections are ever in FP8."""
    if dtype == "fp8" and name.endswith("_proj.weight"):
        blocks = math.prod(math.ceil(size / BLOCK) for size in shape)
        return math.prod(shape) + 4 * blocks
    return 2 * math.prod(shape)


@dataclass(frozen=True)
class Work:
    """What one pair costs: bytes read of both sides and written, by rank."""

    read: list[int]
    written: list[int]
    shards: int

    def seconds(self, read_rate: float, write_rate: float) -> tuple[float, float]:
        """Return the slowest rank's time where reading and writing overlap, and in turn."""
        pairs = list(zip(self.read, self.written, strict=True))
        return (
            max(max(read / read_rate, written / write_rate) for read, written in pairs),
            max(read / read_rate + written / write_rate for read, written in pairs),
        )


def work(shapes: Shapes, dtype: str, ranks: int, shard_nbytes: int) -> Work:
    tensors = [(name, list(shape)) for name, shape in shapes.items()]
    plan = shards_of(tensors, "bfloat16", max_shard_nbytes=shard_nbytes)
    read, written = [], []
    for share in balance([nbytes for _, _, nbytes in plan], ranks):
        held = [tensors[place] for shard in share for place in range(*plan[shard][:2])]
        read.append(sum(2 * source_nbytes(name, tuple(shape), dtype) for name, shape in held))
        written.append(sum(plan[shard][2] for shard in share))
    return Work(read, written, len(plan))


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def table(read_rate: int, write_rate: int, shard_nbytes: int) -> str:
    head = ["pair", "sources", "tensors selected", "read", "written", "shards"]
    head += [f"{ranks} rank{'s' if ranks > 1 else ''}" for ranks in RANKS]
    lines = [head, ["---"] * len(head)]
    for model in MODELS:
        for dtype in ("bf16", "fp8") if model.has_fp8 else ("bf16",):
            for told, modules in SELECTIONS.items():
                selection = Selection.parse(modules, None)
                shapes = {name: shape for name, shape in model.shapes.items() if name in selection}
                alone = work(shapes, dtype, 1, shard_nbytes)
                numel = sum(map(math.prod, shapes.values()))
                cells = [
                    f"2 × {model.name}",
                    dtype,
                    f"{told}: {len(shapes):,}, {numel / 1e9:.1f} billion elements",
                    f"{alone.read[0] / 1e9:,.1f} GB",
                    f"{alone.written[0] / 1e9:,.1f} GB",
                    str(alone.shards),
                ]
                for ranks in RANKS:
                    spent = work(shapes, dtype, ranks, shard_nbytes)
                    together, in_turn = map(duration, spent.seconds(read_rate, write_rate))
                    cells.append(together if together == in_turn else f"{together} – {in_turn}")
                lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


ABOUT = """# Large pairs, and more than one machine

Written by `python docs/make_scale.py`. Each rank is taken to read at {read_rate} and to write at
{write_rate} a second. These are {rates}.
If a parallel file system gives all ranks together less than that, it sets the time.

{table}

"Read" counts the selected tensors of both checkpoints, "written" counts Δ as bfloat16, in whole
shards of {shard}, which are given to the ranks, largest first. Times are those of the slowest
rank: from the longer of reading and writing, if the two overlap fully, to the sum of both. `fp8`
is a checkpoint whose projections are FP8 with one float32 scale for each block of 128 × 128, and
whose embeddings, head, norms and routers are bfloat16. Memory is {memory} for each rank above the
interpreter, whatever the size of the model, and the page cache of what is written, which the
system takes back when it is needed. Headers and names come on top: a 671B pair has {largest:,}
tensors.

The shapes follow from the `config.json` of {sources}.

## Under a launcher

Every process of a run makes the same call, on a file system that all of them see. You set nothing:
`RANK` and `WORLD_SIZE` (torchrun), `OMPI_COMM_WORLD_RANK` and `_SIZE` (Open MPI),
`SLURM_PROCID` and `SLURM_NTASKS` (srun), or an initialized `torch.distributed` give the number of
processes.

    torchrun --nnodes 4 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint $HOST:29500 \\
        --no-python drift-fast delta REASONING MULTIMODAL --out /shared/delta

    #!/bin/bash
    #SBATCH --job-name=delta
    #SBATCH --nodes=8
    #SBATCH --ntasks-per-node=1
    #SBATCH --cpus-per-task=16
    #SBATCH --time=01:00:00
    srun drift-fast delta REASONING MULTIMODAL --out /shared/delta --max-shard-size 2GB

One process for each machine is enough, since each uses every core it is given. `compute_delta(…,
out=…)` and `Delta.save` do the same inside a script of yours.

* The result has the bytes that one process with the same `--max-shard-size` writes, `drift.json`
  included. Ranks write whole shards, so have at least two shards for each rank. If there are fewer
  and they are uneven, a warning says which shard size is better.
* All ranks align the checkpoints and compare what they see with rank 0. A different file, a
  different argument or a different version on one of them ends the run. Only rank 0 compares
  samples of the weights, and it downloads before the others, which may share its cache.
* They communicate over `torch.distributed` with gloo, in the process group that exists or in one of
  their own.
* An error or an interruption of one rank ends all of them and names the rank. A rank that is
  killed is noticed after 60 seconds (`DRIFT_FAST_RANK_TIMEOUT=…`). If rank 0 was killed, the hidden
  directory is left; it does not open as a delta, and the next run to the same output removes it.
* **If only one rank is to compute** in a script that a launcher started, pass `ranks=None` or
  `--ranks none`. Without it, that rank waits for the others, and names after the same 60 seconds
  those that never came.
* `inspect`, `check`, `align` and a delta that is not written run in each process separately.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--read-rate", required=True, help="of one rank, such as 1GB a second")
    parser.add_argument("--write-rate", required=True, help="of one rank, flushed")
    parser.add_argument("--memory", required=True, help="of one rank, such as 64MB")
    parser.add_argument("--rates", required=True, help="where these come from, as the page says it")
    parser.add_argument("--max-shard-size", default="5GB")
    given = parser.parse_args()
    read_rate, write_rate = parse_size(given.read_rate), parse_size(given.write_rate)
    names = [f"`{model.source}`" for model in MODELS]
    page = ABOUT.format(
        read_rate=given.read_rate,
        write_rate=given.write_rate,
        rates=given.rates,
        memory=given.memory,
        shard=given.max_shard_size,
        largest=max(len(model.shapes) for model in MODELS),
        sources=", ".join(names[:-1]) + f" and {names[-1]}",
        table=table(read_rate, write_rate, parse_size(given.max_shard_size)),
    )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
