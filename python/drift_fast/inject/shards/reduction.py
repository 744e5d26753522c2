"""Sums over the processes that share the same parameters, and agreement between them.

Owns the one rule by which a failure of one process ends all of them: what may fail is done
`together`, and no other collective runs between a failure and the end of what is done together.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from drift_fast.errors import DriftError

# On an exception: the ranks of the groups whose processes all raise, so that none waits any more.
_AGREED = "_drift_fast_agreed"
_nesting = threading.local()


class Reduction:
    """Sums and agreement over process groups; without any, this process is alone.

    torch may make several groups of the same processes, for equal meshes; one of them is kept.
    """

    def __init__(self, process_groups: Sequence[Any]) -> None:
        self._groups = {ranks_of(group): group for group in process_groups}
        self.process_groups = tuple(self._groups.values())

    def sum(self, vector: torch.Tensor) -> torch.Tensor:
        """Add a vector up over all processes, in its own memory, and return it.

        Each group takes one collective; only two-dimensional meshes have more than one group.
        """
        return self._reduce(vector, dist.ReduceOp.SUM)

    def agree(self, error: Exception | None) -> None:
        """Raise on every process if one of them failed, so that no other waits for it forever.

        Raises:
            Exception: the error of this process.
            DriftError: another process failed; its rank and its message.
        """
        if not self.process_groups:
            if error is not None:
                raise error
            return
        if not self.sum(torch.tensor([0.0 if error is None else 1.0])).item():
            return
        said = None if error is None else f"{type(error).__name__}: {error}"
        failed = {rank: text for rank, text in self._gathered(said).items() if text is not None}
        if error is None:
            rank, text = next(iter(failed.items()))
            more = f" ({len(failed)} processes failed, this one first)" if len(failed) > 1 else ""
            error = DriftError(f"process {rank} of this run failed{more}: {text}")
        setattr(error, _AGREED, set(self._groups))
        raise error

    @contextlib.contextmanager
    def together(self, undo: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Keep a process from going on to a sum that another one, which failed here, never reaches.

        It may be nested, over the same groups: a process that fails outside is heard of inside.
        undo: what to call where any process failed.

        Raises:
            As `agree`.
        """
        failure: Exception | None = None
        outside = getattr(_nesting, "depth", 0)
        _nesting.depth = outside + 1
        try:
            try:
                yield
            except Exception as error:
                if self._groups.keys() <= getattr(error, _AGREED, set()):
                    raise
                failure = error
            self.agree(failure)
        except BaseException as error:
            if not outside:
                # What is raised once more is another failure.
                error.__dict__.pop(_AGREED, None)
            undo()
            raise
        finally:
            _nesting.depth = outside

    def refuse_different(self, lines: Sequence[str]) -> None:
        """Refuse to go on where processes have other lines than this one; all must call it.

        Raises:
            DriftError: on every process; the first line that differs, and whose it is.
        """
        if not self.process_groups:
            return
        code = float(zlib.crc32("\n".join(lines).encode()))
        low, high = self.extremes(torch.tensor([code], dtype=torch.float64))
        if low == high:
            return
        (first, mine), *others = self._gathered(list(lines)).items()
        for rank, theirs in others:
            if theirs != mine:
                here = next((line for line in mine if line not in theirs), "nothing")
                there = next((line for line in theirs if line not in mine), "nothing")
                error = DriftError(
                    f"the processes of this run attach differently: process {first} has {here} "
                    f"where process {rank} has {there}. Give all of them the same model, delta "
                    "and options"
                )
                setattr(error, _AGREED, set(self._groups))
                raise error

    def extremes(self, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smallest and the largest of each element over all processes."""
        low, high = self._reduce(torch.cat([-vector, vector]), dist.ReduceOp.MAX).chunk(2)
        return -low, high

    def _reduce(self, vector: torch.Tensor, operation: Any) -> torch.Tensor:
        for group in self.process_groups:
            device = _reducible_device(group, vector.device)
            there = vector.to(device)
            dist.all_reduce(there, operation, group=group)
            if there is not vector:
                vector.copy_(there)
        return vector

    def _gathered(self, value: Any) -> dict[int, Any]:
        """Return what each process gave by its rank in the whole run, lowest first."""
        found = {dist.get_rank(): value}
        for group in self.process_groups:
            every: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(every, found, group=group)
            found = {rank: one for some in every for rank, one in some.items()}
        return dict(sorted(found.items()))


def ranks_of(process_group: Any) -> tuple[int, ...]:
    """Return the ranks of a group's processes in the whole run."""
    return tuple(dist.get_process_group_ranks(process_group))


ALONE = Reduction(())


def _reducible_device(group: Any, device: torch.device) -> torch.device:
    """Return a device that the group's backends can reduce on: `device` itself where they can."""
    # For a group that was made without a backend, only this call names all its backends.
    if device.type == "cpu" and "cpu:" not in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return device
