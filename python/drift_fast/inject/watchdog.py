"""The watchdog: no optimizer steps on gradients that were to be injected and were not.

Owns the account of which targets were injected when, and whether what is in their gradients now is
what was injected. What counts is the content of a gradient, not calls:

* A backward pass that writes to a gradient makes it plain, whatever was injected into it before.
  Hooks note that. Without one it is noticed where the gradient is another tensor.
* Clipping, unscaling or moving changes an injected gradient and leaves it injected.
* An injected gradient to which a backward pass was added holds the injection already. It is told
  from one that was cleared in place by the number of changes that its tensor counts.
* After an optimizer's step the same tensor may be used again, by an optimizer inside another, or
  zeroed and used before the next backward pass: it holds nothing that was not injected. Another
  tensor in its place is plain.

Nothing here waits for a device. The only tensors that are kept are counts, where they were
computed; what is noted of a gradient is an attribute of its own.
"""

from __future__ import annotations

import enum
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from drift_fast.errors import DriftError, DriftWarning
from drift_fast.inject.claims import Claim
from drift_fast.inject.config import ScopeName
from drift_fast.inject.missing import MissingAccount
from drift_fast.inject.presence import Present
from drift_fast.inject.refusals import frozen_since
from drift_fast.inject.target import Target

# What is noted of a gradient: whose injection it holds, and its version then.
_MARK = "_drift_fast"


TORN = (
    "the last injection was cut off, so that some gradients hold Δ and some do not: call "
    "zero_grad() and run backward again"
)


class _Content(enum.Enum):
    """What is in the gradient of a target, if it has one."""

    PLAIN = enum.auto()
    INJECTED = enum.auto()
    # Injected, and then a backward pass wrote to it before any optimizer stepped.
    ADDED_TO = enum.auto()
    # Injected, and an optimizer has used it.
    USED = enum.auto()


class Watchdog:
    """Follows injections and optimizer steps, and fails a step without an injection.

    A target is one parameter, or the factors of one weight, which are injected together. An
    optimizer may hold some of the targets only, and several may step after one injection.

    optimizer_is_given: whether it was checked that an optimizer holds all targets. While another
        one steps, they may be frozen, as a generator is while a discriminator trains.
    written: the tensors into which autograd accumulates each target's gradient; none where no hook
        may be put on them.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        written: Sequence[Iterable[torch.Tensor]],
        claim: Claim,
        *,
        scope: ScopeName,
        missing: MissingAccount,
        remedy: str,
        optimizer_is_given: bool,
    ) -> None:
        self._targets = list(targets)
        self._claim = claim
        self._scope = scope
        self._account = missing
        self._remedy = remedy
        self._optimizer_is_given = optimizer_is_given
        self._present = Present(model, targets)
        # Of optimizers that hold no target, how many parameters they had when they were looked at,
        # and whether they hold others of the model.
        self._foreign: Any = weakref.WeakKeyDictionary()
        self._place = {id(p): at for at, target in enumerate(targets) for p in target.trained}
        self._content = [_Content.PLAIN] * len(targets)
        self._current: set[int] = set()
        self._missing = 0
        # Whether an optimizer of the model has stepped since the last injection, and what any has
        # ever used.
        self._stepped = False
        # Whether the last injection was cut off.
        self.torn = False
        self._ever_used: set[int] = set()
        self._has_warned = False
        # Counts stay where they were computed; adding them up is what waits for a device.
        self._skips: list[Any] = []
        self._skip_of: dict[int, Any] = {}
        # Backward passes add to the first set, from threads of their own.
        self._written: set[int] = set()
        # And to the second where nothing had cleared an injected gradient before.
        self._added: set[int] = set()
        # And to the third where they were captured into a CUDA graph.
        self._captured: set[int] = set()
        self._has_hook: set[int] = set()
        self._was_heard: set[int] = set()
        self.handles: list[Any] = []
        if scope == "step":
            self._listen(written)

    def begin(self, missing: int) -> None:
        """Start the account of a new step."""
        self._warn_of_unused()
        self._current, self._missing, self._skips, self._skip_of = set(), missing, [], {}
        self._stepped = False

    def note(self, parameters: Sequence[nn.Parameter], skipped: Any = None) -> None:
        """Note that these were injected; a hook says at once whether its parameter was skipped."""
        if self._stepped:
            self.begin(0)
        self._settle()
        self._added.clear()
        self.torn = False
        for parameter in parameters:
            at = self._place[id(parameter)]
            self._content[at] = _Content.INJECTED
            self._current.add(at)
            if skipped is not None:
                self._skip_of[at] = skipped
            if self._scope == "step":
                self._mark(at)
            else:
                self._was_heard.add(at)

    def tear(self) -> None:
        """Note that an injection was cut off, so that Δ may be in any of the gradients."""
        self.note([target.parameter for target in self._targets])
        self.torn = True

    def leave(self, parameters: Sequence[nn.Parameter]) -> None:
        """Note that the gradients of these were left as they are, on purpose."""
        for parameter in parameters:
            at = self._place[id(parameter)]
            self._content[at] = _Content.INJECTED
            self._mark(at)

    def skip(self, count: Any) -> None:
        """Add a number of parameters that were skipped, an int or a device tensor."""
        self._skips.append(count)

    def forget(self) -> None:
        """Note that the injected gradients were thrown away."""
        self._written.clear()
        self._content = [_Content.PLAIN] * len(self._targets)
        self.torn = False
        self.begin(0)

    def use_all(self) -> None:
        """Note that all injected gradients were used, by an optimizer of copies."""
        self._settle()
        self._use(range(len(self._targets)))

    def check(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether an optimizer that is about to step holds any target.

        Raises:
            DriftError: it would use gradients without the injection or inside backward, or targets
                were replaced or frozen after attaching.
        """
        held = self._held_by(optimizer)
        try:
            if not held:
                self._stepped |= self._look_at_foreign(optimizer)
                return False
            if not self._optimizer_is_given and not any(map(self._gradients, held)):
                self._refuse_frozen()
        except DriftError:
            # Who attached anew after a remedy may have nothing to remove this one by.
            if self._claim.is_held or not self._claim.superseded:
                raise
            return False
        # torch calls a running backward pass a graph task.
        if torch._C._current_graph_task_id() != -1:
            raise DriftError(
                f"{type(optimizer).__name__} steps inside backward, so that nothing was injected "
                "into whole gradients, and each parameter would be a step of its own: let the "
                "optimizer step after backward (leave hooks that step, "
                "_apply_optimizer_in_backward and layer-wise optimizers out), or call "
                "injection.remove() to train without it"
            )
        self._present.check()
        if self.torn:
            raise DriftError(f"{type(optimizer).__name__} steps, and {TORN}")
        self._settle()
        plain = [at for at in held if self._is_plain(at)]
        if plain:
            # Of the others, this process may hold no element.
            present = sum(bool(self._gradients(at)) for at in held)
            raise self._refusal(optimizer, plain, present)
        fresh = {at for at in held if self._content[at] is _Content.INJECTED}
        if self._scope == "microbatch" and fresh:
            refusal = self._account.see(fresh, set(held) - fresh)
            if refusal is not None:
                raise refusal
        self._stepped = True
        self._use(held)
        return True

    def check_present(self) -> None:
        """Refuse targets that are no longer in the model.

        Raises:
            DriftError: the first of them.
        """
        self._present.check()

    def would_use_plain(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer holds a target whose gradient was not injected.

        Raises:
            DriftError: that cannot be known.
        """
        self._settle()
        held = self._held_by(optimizer)
        if self._captured.intersection(held):
            raise DriftError(
                "the backward pass was captured into a CUDA graph, whose replays write gradients "
                "unseen, so that an optimizer that injects by itself would leave them plain: call "
                "Injection(model, delta, …).step() after each replay, or train without the graph"
            )
        return any(self._is_plain(at) for at in held)

    def holds_unused(self) -> bool:
        """Whether an injection has happened that no optimizer has used, and all is as it was."""
        self._settle()
        if _Content.INJECTED not in self._content:
            return False
        present = [at for at in range(len(self._targets)) if self._gradients(at)]
        if any(self._content[at] is not _Content.INJECTED for at in present):
            return False
        return bool(present) and all(
            self._is_marked(gradient) for at in present for gradient in self._gradients(at)
        )

    def holds_injected_and_plain(self) -> bool:
        """Whether a backward pass added to injected gradients that nothing has used or cleared."""
        self._settle()
        return any(self._content[at] is _Content.ADDED_TO for at in self._added)

    def injected(self) -> int:
        """Return how many targets were injected; waits for the device."""
        return len(self._current) - self._counted()

    def skipped(self) -> int:
        """Return how many targets were left alone; waits for the device."""
        return self._missing + self._counted()

    def _counted(self) -> int:
        return sum(int(count) for count in [*self._skips, *self._skip_of.values()])

    # What is in the gradients.

    def _listen(self, written: Sequence[Iterable[torch.Tensor]]) -> None:
        places: dict[int, tuple[Any, list[int]]] = {}
        for at, tensors in enumerate(written):
            for tensor in tensors:
                # Under FSDP1 many targets share one.
                places.setdefault(id(tensor), (tensor, []))[1].append(at)
        for tensor, those in places.values():
            self._has_hook.update(those)
            hook = self._noter(those)
            self.handles.append(tensor.register_post_accumulate_grad_hook(hook))

    def _noter(self, places: Sequence[int]) -> Callable[[Any], None]:
        # A hook keeps these alive, and not the watchdog.
        written, added, captured = self._written, self._added, self._captured
        token = self._claim.token

        def note(tensor: Any) -> None:
            written.update(places)
            added.difference_update(places)
            if _is_captured(tensor):
                captured.update(places)
            gradient = tensor.grad
            if gradient is None:
                return
            # Accumulation is one change. Where there are more, the gradient was cleared before.
            changes = _changes(gradient)
            if getattr(gradient, _MARK, None) == (token, changes - 1):
                added.update(places)
                setattr(gradient, _MARK, (token, changes))

        return note

    def _settle(self) -> None:
        """Take account of what backward passes have written since the last call."""
        written, kept = self._written.copy(), self._content
        self._written -= written
        self._was_heard |= written
        for at in written:
            was_unused = kept[at] in (_Content.INJECTED, _Content.ADDED_TO)
            kept[at] = _Content.ADDED_TO if was_unused else _Content.PLAIN

    def _gradients(self, at: int) -> list[torch.Tensor]:
        return [p.grad for p in self._targets[at].trained if p.grad is not None]

    def _mark(self, at: int) -> None:
        token = self._claim.token
        for parameter in self._targets[at].trained:
            gradient = parameter.grad
            if gradient is not None:
                setattr(gradient, _MARK, (token, _changes(gradient)))

    def _is_marked(self, gradient: torch.Tensor) -> bool:
        return bool(getattr(gradient, _MARK, (None,))[0] == self._claim.token)

    def _is_plain(self, at: int) -> bool:
        """Whether a target has a gradient that holds what was not injected."""
        content = self._content[at]
        if content is _Content.INJECTED and (at in self._has_hook or self._scope == "microbatch"):
            return False
        gradients = self._gradients(at)
        if not gradients or content in (_Content.PLAIN, _Content.ADDED_TO):
            return bool(gradients)
        if not all(map(self._is_marked, gradients)):
            return True
        # Where no backward pass is ever heard, gradients may be written by hand.
        unheard = content is _Content.USED and at not in self._was_heard
        return unheard and any(getattr(g, _MARK)[1] != _changes(g) for g in gradients)

    def _use(self, places: Iterable[int]) -> None:
        for at in places:
            if self._content[at] is _Content.INJECTED:
                self._content[at] = _Content.USED
                self._ever_used.add(at)
                self._mark(at)

    # What is refused.

    def _held_by(self, optimizer: torch.optim.Optimizer) -> list[int]:
        place = self._place
        return sorted(
            {
                place[id(parameter)]
                for group in optimizer.param_groups
                for parameter in group["params"]
                if id(parameter) in place
            }
        )

    def _refusal(
        self, optimizer: torch.optim.Optimizer, plain: Sequence[int], present: int
    ) -> DriftError:
        kind, name = type(optimizer).__name__, self._targets[plain[0]].name
        if any(self._content[at] is _Content.ADDED_TO for at in plain):
            return DriftError(
                f"nothing was injected before this step of {kind} into what a backward pass wrote "
                f"to {len(plain)} of {present} gradients after the last injection, {name} first: "
                "call injection.step() once, after the last backward pass, in a closure before it "
                "returns, and just before clipping"
            )
        call = (
            self._remedy
            if self._scope == "step"
            else "no backward pass reached its hooks (were the parameters replaced, moved or "
            "wrapped after attaching?)"
        )
        injected = present - len(plain)
        what = f"only {injected} of {present} targets were" if injected else "nothing was"
        return DriftError(
            f"{what} injected before this step of "
            f"{kind}, {name} has a plain gradient: {call}; or call injection.remove() to train "
            "without it"
        )

    def _look_at_foreign(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether an optimizer that holds no target trains other parameters of the model.

        Raises:
            DriftError: it trains a copy of the model, or the model without what was attached to.
        """
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._foreign.get(optimizer)
        if known is not None and known[0] == count:
            return bool(known[1])
        copies = self._claim.copies_in(optimizer)
        if copies:
            raise DriftError(
                f"{copies} parameters of this {type(optimizer).__name__} are copies of targets, "
                "from copy.deepcopy or a pickle of the model, and nothing is injected into "
                "copies: attach to the copy, or call injection.remove() before it is made"
            )
        trains = self._present.holds_any(optimizer)
        if trains:
            self._present.check()
            if not self._optimizer_is_given:
                self._refuse_frozen()
        self._foreign[optimizer] = count, trains
        return trains

    def _refuse_frozen(self) -> None:
        """Refuse a step while no target trains any more.

        Raises:
            DriftError: all were frozen after attaching.
        """
        frozen = frozen_since(self._targets)
        if frozen is not None and not any(target.trains for target in self._targets):
            raise frozen

    def _warn_of_unused(self) -> None:
        """Warn once where optimizers have stepped, and none has ever held some of the targets."""
        if self._has_warned or not self._stepped:
            return
        unused = sorted(self._current - self._ever_used)
        if not unused:
            return
        self._has_warned = True
        warnings.warn(
            f"the optimizer holds {len(self._current) - len(unused)} of {len(self._current)} "
            f"targets: what was injected into {self._targets[unused[0]].name} and the others was "
            "not used by any optimizer that stepped, so they do not train. Build the optimizer "
            "from all of them, or leave them out with modules=… or layers=…",
            DriftWarning,
            stacklevel=6,
        )


def _changes(gradient: Any) -> int:
    """Return how often a gradient was changed in place, of FSDP2 as a whole or in its own part."""
    # Asking each of hundreds of plain tensors for what it lacks takes longer than all else here.
    local = None if type(gradient) is torch.Tensor else getattr(gradient, "_local_tensor", None)
    return int(gradient._version + (0 if local is None else local._version))


def _is_captured(tensor: torch.Tensor) -> bool:
    """Whether what is done to a tensor now is captured into a CUDA graph, and not heard again."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
