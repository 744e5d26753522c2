"""What is attached to a model until it is removed; leaving a `with` block removes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Attachment(ABC):
    """Holds Δ and hooks until `remove()`."""

    @abstractmethod
    def remove(self) -> None:
        """Detach from the model and free Δ. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
