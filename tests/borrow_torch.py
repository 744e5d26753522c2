"""Give an environment the torch of another: `python tests/borrow_torch.py ENVIRONMENT OTHER`.

A second torch is five gigabytes and two minutes. Linked is torch with the libraries that only it
brings; everything else is left to pip, which sees the linked ones as installed.
"""

import sys
from pathlib import Path

HEAVY = ("torch", "torchgen", "functorch", "triton", "nvidia", "cuda")
VISION = ("torchvision", "torchvision.libs")


def borrow(environment: Path, other: Path, also: tuple[str, ...] = ()) -> list[str]:
    """Link torch and what it needs of another environment; return the pins that keep it."""
    heavy = (*HEAVY, *also)
    (packages,) = other.resolve().glob("lib/python*/site-packages")
    (own,) = environment.resolve().glob("lib/python*/site-packages")
    borrowed = own.parent / "borrowed"
    borrowed.mkdir()
    pins = []
    for each in packages.iterdir():
        name, _, version = each.name.removesuffix(".dist-info").partition("-")
        described = each.name.endswith(".dist-info") and (
            name in heavy or name.startswith(("nvidia_", "cuda_"))
        )
        if each.name in heavy or described:
            (borrowed / each.name).symlink_to(each)
        if described and name in ("torch", "torchvision"):
            pins.append(f"{name}=={version}")
    (own / "borrowed.pth").write_text(f"{borrowed}\n")
    return pins


if __name__ == "__main__":
    borrow(*map(Path, sys.argv[1:]))
