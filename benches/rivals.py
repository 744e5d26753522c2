"""The rivals of `benches/delta.py`, each a process of its own: plain, tuned, xor."""

from __future__ import annotations

import argparse
import math
import mmap
import threading
from pathlib import Path

CHUNK = 1 << 20


def pairs(text: Path, multimodal: Path) -> list[tuple[str, str]]:
    from safetensors import safe_open

    with safe_open(multimodal / "model.safetensors", "pt") as b:
        return [(n.replace("model.language_model.", "model."), n) for n in b.keys()]  # noqa: SIM118


def plain(text: Path, multimodal: Path, out: Path | None) -> None:
    """Open, load and subtract one tensor at a time in float32, as one would in a notebook."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    written = {}
    with (
        safe_open(text / "model.safetensors", "pt") as a,
        safe_open(multimodal / "model.safetensors", "pt") as b,
    ):
        for left, right in pairs(text, multimodal):
            x, y = a.get_tensor(left).float(), b.get_tensor(right).float()
            delta = x - y
            norms = delta.norm(), x.norm(), y.norm()
            cosine = torch.dot(x.flatten(), y.flatten()) / (norms[1] * norms[2])
            print(right, *map(float, norms), float(cosine))
            if out is not None:
                written[right] = delta.to(torch.bfloat16)
    if out is not None:
        out.mkdir()
        save_file(written, out / "delta.safetensors")


def tuned(text: Path, multimodal: Path) -> None:
    """Views of the mapped files, chunks that stay in cache, buffers reused, BLAS for the sums."""
    import torch
    from safetensors import safe_open

    x, y, d = (torch.empty(CHUNK, dtype=torch.float32) for _ in range(3))
    with (
        torch.inference_mode(),
        safe_open(text / "model.safetensors", "pt") as a,
        safe_open(multimodal / "model.safetensors", "pt") as b,
    ):
        for left, right in pairs(text, multimodal):
            p, q = a.get_tensor(left).view(-1), b.get_tensor(right).view(-1)
            sums = [0.0, 0.0, 0.0, 0.0]
            for start in range(0, p.numel(), CHUNK):
                n = min(CHUNK, p.numel() - start)
                u, v, w = x[:n], y[:n], d[:n]
                u.copy_(p[start : start + n])
                v.copy_(q[start : start + n])
                torch.sub(u, v, out=w)
                for at, (s, t) in enumerate(((w, w), (u, u), (v, v), (u, v))):
                    sums[at] += float(torch.dot(s, t))
            print(right, *(math.sqrt(s) for s in sums[:3]), sums[3] / math.sqrt(sums[1] * sums[2]))


def xor(text: Path, multimodal: Path) -> None:
    """Read both files once on two threads: about what the machine's memory allows."""
    import numpy as np

    views = []
    for directory in (text, multimodal):
        with open(directory / "model.safetensors", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        views.append(np.frombuffer(mapped, dtype=np.uint64, count=len(mapped) // 8))
    n = min(len(view) for view in views)

    def half(start: int, end: int) -> None:
        buffer = np.empty(CHUNK // 8, dtype=np.uint64)
        for at in range(start, end, len(buffer)):
            stop = min(end, at + len(buffer))
            np.bitwise_xor(views[0][at:stop], views[1][at:stop], out=buffer[: stop - at])

    threads = [threading.Thread(target=half, args=span) for span in ((0, n // 2), (n // 2, n))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("plain", "tuned", "xor"))
    parser.add_argument("text", type=Path)
    parser.add_argument("multimodal", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "plain":
        plain(options.text, options.multimodal, options.out)
    else:
        {"tuned": tuned, "xor": xor}[options.what](options.text, options.multimodal)


if __name__ == "__main__":
    main()
