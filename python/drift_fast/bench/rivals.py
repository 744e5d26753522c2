"""Other programs that compute statistics or Δ of a pair, each in its own process.

    python -P rivals.py {plain,tuned,public,merge} REASONING MULTIMODAL [--out DIR] …

*plain* is what one would write in a notebook; *tuned* is PyTorch streaming, as fast as we could
make it; *public* does what the method's public code does: it loads two whole models by
`from_pretrained` and loops over their state dictionaries, attention and MLP only, in memory.
*merge* is a linear merge as in a notebook. mergekit has its own command, so this file only writes
its configuration.

This file imports nothing from drift_fast, which would slow a rival down. `results` has the
statistics by the multimodal checkpoint's names: ‖Δ‖, ‖W_reason‖, ‖W_multimodal‖ and the cosine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Results = dict[str, list[float]]

# Elements of a chunk: the fastest of 2^14 to 2^21 with two threads on 1 MiB of L2 each.
CHUNK = 3 << 17


def backbone_name(name: str) -> str | None:
    """Return the text model's name for a multimodal one; None if it has none."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name if name == "lm_head.weight" else None


class Opened:
    """Every tensor of a checkpoint by name, through safetensors, before any is read."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file: Any = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def plain(reasoning: Path, multimodal: Path, out: Path | None) -> Results:
    """Load and subtract tensor by tensor in float32; on request save Δ at the end."""
    import torch
    from safetensors.torch import save_file

    results: Results = {}
    written = {}
    a, b = Opened(reasoning), Opened(multimodal)
    for name in b:
        source = backbone_name(name)
        if source is None:
            continue
        x, y = a[source].float(), b[name].float()
        delta = x - y
        norms = [float(delta.norm()), float(x.norm()), float(y.norm())]
        cosine = float(torch.dot(x.flatten(), y.flatten())) / (norms[1] * norms[2])
        results[name] = [*norms, cosine]
        if out is not None:
            written[name] = delta.to(torch.bfloat16)
    if out is not None:
        out.mkdir(parents=True)
        save_file(written, out / "delta.safetensors")
    return results


def merge(reasoning: Path, multimodal: Path, weight: float, out: Path) -> None:
    """Merge tensor by tensor in float32, copy the rest, and save the model at the end."""
    import torch
    from safetensors.torch import save_file

    written = {}
    a, b = Opened(reasoning), Opened(multimodal)
    for name in b:
        source, tensor = backbone_name(name), b[name]
        if source is not None:
            merged = (1 - weight) * tensor.float() + weight * a[source].float()
            tensor = merged.to(torch.bfloat16)
        written[name] = tensor
    out.mkdir(parents=True)
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})


class Tuned:
    """Views of the mapped files in chunks that stay in cache, reused buffers, BLAS for the sums.

    Each thread takes the next chunk and runs single-threaded torch on it, which was faster than
    torch's own threads. Δ goes into a file that is allocated beforehand and flushed at the end.
    With `out` and without `measure`, it subtracts in bfloat16 and computes no statistics.
    """

    def __init__(
        self,
        reasoning: Path,
        multimodal: Path,
        *,
        threads: int,
        out: Path | None = None,
        measure: bool = True,
    ) -> None:
        self._paths = (reasoning, multimodal)
        self._out = out
        self._measure = measure
        self._scratch = [_Scratch() for _ in range(threads)]

    def run(self) -> Results:
        """Do one pass, which opens the files again."""
        a, b = (Opened(path) for path in self._paths)
        pairs = [
            (name, a[source].view(-1), b[name].view(-1))
            for name in b
            if (source := backbone_name(name)) is not None
        ]
        sums = [[0.0] * 4 for _ in pairs]
        jobs = iter(
            [
                (index, start)
                for index, (_, left, _) in enumerate(pairs)
                for start in range(0, left.numel(), CHUNK)
            ]
        )
        lock = threading.Lock()
        output = None
        if self._out is not None:
            output = _Output(self._out, {name: list(b[name].shape) for name, _, _ in pairs})

        def work(scratch: _Scratch) -> None:
            import torch

            # This sets the number for the calling thread, not for the process.
            torch.set_num_threads(1)
            with torch.inference_mode():
                while True:
                    with lock:
                        job = next(jobs, None)
                    if job is None:
                        return
                    index, start = job
                    name, left, right = pairs[index]
                    p, q = left[start : start + CHUNK], right[start : start + CHUNK]
                    if self._measure:
                        found = scratch.measure(p, q)
                        with lock:
                            sums[index] = [x + y for x, y in zip(sums[index], found, strict=True)]
                    if output is not None:
                        output.write(name, start, scratch.rounded(p, q, self._measure))

        with ThreadPoolExecutor(len(self._scratch)) as pool:
            list(pool.map(work, self._scratch))
        if output is not None:
            output.close()
        if not self._measure:
            return {}
        return {
            name: [*(math.sqrt(s) for s in row[:3]), row[3] / math.sqrt(row[1] * row[2])]
            for (name, _, _), row in zip(pairs, sums, strict=True)
        }


class _Scratch:
    """One thread's buffers, touched before they are used."""

    def __init__(self) -> None:
        import torch

        self._x, self._y, self._d = (torch.ones(CHUNK) for _ in range(3))
        self._out = torch.ones(CHUNK, dtype=torch.bfloat16)

    def measure(self, p: torch.Tensor, q: torch.Tensor) -> list[float]:
        import torch

        u, v, w = self._x[: len(p)], self._y[: len(p)], self._d[: len(p)]
        u.copy_(p)
        v.copy_(q)
        torch.sub(u, v, out=w)
        return [torch.dot(s, t).item() for s, t in ((w, w), (u, u), (v, v), (u, v))]

    def rounded(self, p: torch.Tensor, q: torch.Tensor, measured: bool) -> memoryview:
        import torch

        out = self._out[: len(p)]
        if measured:
            out.copy_(self._d[: len(p)])
        else:
            torch.sub(p, q, out=out)
        return out.view(torch.uint8).numpy().data


class _Output:
    """A safetensors file, allocated at full size, that any thread can write to at any place."""

    def __init__(self, out: Path, shapes: dict[str, list[int]]) -> None:
        header: dict[str, Any] = {}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._begin = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in header}
        out.mkdir(parents=True)
        self._file = os.open(out / "delta.safetensors", os.O_WRONLY | os.O_CREAT, 0o644)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file, 0, 8 + len(text) + end)
        os.pwrite(self._file, len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, start: int, chunk: memoryview) -> None:
        at = self._begin[name] + 2 * start
        while chunk:
            written = os.pwrite(self._file, chunk, at)
            at, chunk = at + written, chunk[written:]

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


def public(reasoning: Path, multimodal: Path, sample: list[str], out: Path | None) -> None:
    """Load both models as a whole and subtract their state dictionaries, attention and MLP.

    Δ stays in memory. With `out`, which is given to check results but not to time them, Δ of the
    multimodal names in `sample` is written there afterwards.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

    text = AutoModelForCausalLM.from_pretrained(reasoning, dtype=torch.bfloat16).state_dict()
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(multimodal, dtype=torch.bfloat16)
    deltas = {}
    for name, weight in whole.state_dict().items():
        source = backbone_name(name)
        if source is not None and (".self_attn." in name or ".mlp." in name):
            deltas[name] = text[source] - weight
    if out is not None:
        out.mkdir(parents=True)
        kept = {name: deltas[name].contiguous() for name in sample if name in deltas}
        save_file(kept, out / "delta.safetensors")


def mergekit_configuration(
    reasoning: Path, renamed: Path, weights: tuple[float, float], dtypes: str
) -> str:
    """Return the YAML of mergekit's linear method; weights 1 and −1 give Δ."""
    return f"""\
merge_method: linear
models:
  - model: {json.dumps(str(reasoning))}
    parameters: {{weight: {weights[0]}}}
  - model: {json.dumps(str(renamed))}
    parameters: {{weight: {weights[1]}}}
parameters: {{normalize: false}}
{dtypes}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("plain", "tuned", "public", "merge"))
    parser.add_argument("reasoning", type=Path)
    parser.add_argument("multimodal", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path, help="write the statistics here, as JSON")
    parser.add_argument("--weight", type=float, help="merge: weight of the reasoning model")
    parser.add_argument("--sample", nargs="*", default=[], help="public: names to write to --out")
    options = parser.parse_args()
    pair = options.reasoning, options.multimodal
    results: Results = {}
    if options.what == "public":
        public(*pair, options.sample, options.out)
    else:
        import torch

        torch.set_num_threads(options.threads)
        if options.what == "merge":
            merge(*pair, options.weight, options.out)
            return
        if options.what == "plain":
            results = plain(*pair, options.out)
        else:
            results = Tuned(*pair, threads=options.threads, out=options.out).run()
    if options.results is not None:
        options.results.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
