"""A method of one object, replaced until it is given back.

Libraries call some methods at the moment that an injection needs and offer no hook there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class WrappedMethod:
    """Replaces a method on the instance; `original` is what it was."""

    def __init__(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self.original = getattr(owner, name)
        self._owner = owner
        self._name = name
        self._wrapper = wrapper
        self._before = owner.__dict__.get(name)
        setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Give the owner its method back. May be called twice."""
        # Somebody may have wrapped it once more, and then calls this one, which passes it on.
        if self._owner.__dict__.get(self._name) is not self._wrapper:
            return
        if self._before is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._before)
