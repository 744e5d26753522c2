"""What a library's trainer is given: the interface of `Injection`, of one that may come later.

Owns which attributes are passed on, each by name, so that a misspelled one is an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from drift_fast.alignment.coverage import Coverage
from drift_fast.errors import DriftError
from drift_fast.inject.attachment import Attachment
from drift_fast.inject.injection import Injection
from drift_fast.inject.strength.per_module import PerModule
from drift_fast.tables import to_html

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class AttachedInjection(Attachment):
    """Has an `Injection`, which is None until training starts."""

    injection: Injection | None = None

    @property
    def alpha(self) -> float | dict[str, float]:
        """As `Injection.alpha`."""
        return self._started().alpha

    @alpha.setter
    def alpha(self, value: PerModule) -> None:
        self._started().alpha = value

    @property
    def coverage(self) -> Coverage:
        """As `Injection.coverage`."""
        return self._started().coverage

    @property
    def residency(self) -> str:
        """As `Injection.residency`."""
        return self._started().residency

    @property
    def targets(self) -> list[str]:
        """As `Injection.targets`."""
        return self._started().targets

    @property
    def steps(self) -> int:
        """As `Injection.steps`; none before training starts."""
        return 0 if self.injection is None else self.injection.steps

    @property
    def injected(self) -> int:
        """As `Injection.injected`."""
        return self._started().injected

    @property
    def skipped(self) -> int:
        """As `Injection.skipped`."""
        return self._started().skipped

    def step(self) -> None:
        """As `Injection.step`."""
        self._started().step()

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """As `Injection.accumulating`."""
        with self._started().accumulating():
            yield

    def metrics(self) -> dict[str, float]:
        """As `Injection.metrics`."""
        return self._started().metrics()

    def summary(self) -> dict[str, float]:
        """As `Injection.summary`."""
        return self._started().summary()

    @property
    def history(self) -> dict[int, dict[str, float]]:
        """As `Injection.history`; empty before training starts."""
        return {} if self.injection is None else self.injection.history

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """As `Injection.plot`."""
        return self._started().plot(path)

    def to_pandas(self) -> pandas.DataFrame:
        """As `Injection.to_pandas`."""
        return self._started().to_pandas()

    def __str__(self) -> str:
        return repr(self) if self.injection is None else str(self.injection)

    def _repr_html_(self) -> str:
        return to_html([repr(self)] if self.injection is None else self.injection.blocks())

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """As `Injection.write_csv`."""
        self._started().write_csv(path)

    def state_dict(self) -> dict[str, Any]:
        """As `Injection.state_dict`."""
        return self._started().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Injection.load_state_dict`."""
        self._started().load_state_dict(state)

    def remove(self) -> None:
        """As `Injection.remove`."""
        if self.injection is not None:
            self.injection.remove()

    def _started(self) -> Injection:
        if self.injection is None:
            raise DriftError("this injection attaches when training starts, and knows nothing yet")
        return self.injection
