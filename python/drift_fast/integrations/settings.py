"""What a training framework's configuration says about an injection: a delta and its options.

Owns where such a configuration is found. What an option means, and the refusal of a misspelled one,
is in `InjectionConfig`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from drift_fast.checkpoints.source import located
from drift_fast.config_files import read_settings
from drift_fast.errors import DriftError
from drift_fast.inject.config import InjectionConfig
from drift_fast.options import option
from drift_fast.paths import local_path

if TYPE_CHECKING:
    from drift_fast.inject.injection import Injection
    from drift_fast.integrations.hf_trainer import TrainerInjection

# Names the file where a framework's own configuration has no room for a section.
CONFIG_VARIABLE = "DRIFT_FAST_CONFIG"


def _check_path(delta: Any) -> None:
    if not isinstance(delta, str) or not delta:
        raise ValueError(f"delta must be a directory, Hub id or URL, got {delta!r}")


@dataclass(frozen=True, kw_only=True)
class Settings(InjectionConfig):
    """The options of a configuration that names its delta, for training frameworks."""

    delta: str = option(
        MISSING,
        "directory of the delta, relative to the configuration's own, or its Hub id or URL",
        check=_check_path,
    )
    csv: str | None = option(
        None,
        "a CSV file for logged metrics; that of an earlier run is renamed unless it is resumed",
    )

    @classmethod
    def from_mapping(cls, mapping: Any, *, origin: str = "the drift_fast section") -> Self:
        """Check a section of a configuration: `delta`, `csv` and any option of an injection.

        origin: what to call the section in an error.

        Raises:
            TypeError: not a mapping.
            ValueError: no delta, an unknown option, or a value without meaning.
        """
        if isinstance(mapping, Mapping) and mapping.get("delta") is None:
            raise ValueError(
                f"{origin} names no delta: set delta to the directory that compute_delta(…, "
                "out=…) or `drift-fast delta … --out` wrote"
            )
        return cls.from_dict(mapping, origin=origin)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON or, where PyYAML is installed, a YAML file.

        Raises:
            FileNotFoundError: no such file.
            ImportError: a YAML file without PyYAML.
            ValueError: another ending than .json, .yaml or .yml, or not readable as that.
            As `from_mapping`.
        """
        file = local_path(path)
        settings = cls.from_mapping(read_settings(file), origin=str(file))
        return replace(settings, delta=located(settings.delta, file.parent))

    @classmethod
    def from_environment(cls) -> Self:
        """Read the file that the variable DRIFT_FAST_CONFIG names.

        Raises:
            DriftError: the variable is not set.
            As `from_file`.
        """
        path = os.environ.get(CONFIG_VARIABLE)
        if not path:
            raise DriftError(
                f"an injection was asked for, but {CONFIG_VARIABLE} is not set: let it name a JSON "
                "or YAML file with at least a `delta`"
            )
        return cls.from_file(path)

    def attach(self, trainer: Any) -> Injection | TrainerInjection:
        """Attach the delta to a trainer.

        Raises:
            As `drift_fast.attach`.
        """
        from drift_fast.integrations.attach import attach

        return attach(trainer, self.delta, self, csv=self.csv)

    def inject(self, model: Any, **objects: Any) -> Injection:
        """Attach the delta to a model whose loop calls `step()`.

        objects: what only the framework has, such as `optimizer` and `scaler`.

        Raises:
            As `Injection`.
        """
        from drift_fast.inject.injection import Injection

        return Injection(model, self.delta, self, **objects)
