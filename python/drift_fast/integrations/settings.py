"""What a training framework's configuration says about an injection: a delta and its options.

Owns reading and checking; what an option means is `Injection`'s. A key that no option has is an
error, never ignored, since a misspelt `alpha` would otherwise train at the default.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_fast.errors import DriftError

if TYPE_CHECKING:
    from drift_fast.inject.injection import Injection

# Names the file where a framework's own configuration has no room for a section.
CONFIG_VARIABLE = "DRIFT_FAST_CONFIG"


def known_options() -> list[str]:
    """Return the options that a configuration may set: those of `InjectionConfig`, and `csv`."""
    from drift_fast.inject.config import InjectionConfig

    return [*InjectionConfig.names(), "csv"]


@dataclass(frozen=True)
class Settings:
    """The directory of a delta, and the options of `Injection` to attach it with."""

    delta: str
    options: Mapping[str, Any]

    @classmethod
    def from_mapping(cls, mapping: Any, *, origin: str = "the drift_fast section") -> Settings:
        """Check a section of a configuration: `delta`, and any options of `Injection` or `csv`.

        origin: what to call the section in an error.

        Raises:
            TypeError: not a mapping, or a delta that is not a path.
            ValueError: no delta, or a key that is no option.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"{origin} must be a mapping of options, such as {{delta: path, alpha: 1.0}}, got "
                f"{type(mapping).__name__}"
            )
        known = known_options()
        unknown = [key for key in mapping if key != "delta" and key not in known]
        if unknown:
            raise ValueError(
                f"{origin} has no option {', '.join(map(repr, unknown))}; known are "
                f"{', '.join(['delta', *known])}"
            )
        delta = mapping.get("delta")
        if delta is None:
            raise ValueError(
                f"{origin} names no delta: set delta to the directory that compute_delta(…, "
                "out=…) or `drift-fast delta … --out` wrote"
            )
        if not isinstance(delta, str | os.PathLike) or not os.fspath(delta):
            raise TypeError(f"{origin}: delta must be the path of a directory, got {delta!r}")
        options = {key: value for key, value in mapping.items() if key != "delta"}
        return cls(os.fspath(delta), options)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Settings:
        """Read a JSON or, where PyYAML is installed, a YAML file.

        A delta given as a relative path lies beside the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another ending than .json, .yaml or .yml, or not readable as that.
            ImportError: a YAML file without PyYAML.
            As `from_mapping`.
        """
        file = Path(path)
        content = parse_file(file)
        settings = cls.from_mapping(content, origin=str(file))
        return cls(str(file.parent / settings.delta), settings.options)

    @classmethod
    def from_environment(cls) -> Settings:
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

    def attach(self, trainer_or_optimizer: Any, **more: Any) -> Injection:
        """Attach the delta to a trainer or an optimizer.

        more: what only the framework has, such as `model`.

        Raises:
            As `drift_fast.attach`.
        """
        from drift_fast.integrations.attach import attach

        return attach(trainer_or_optimizer, self._opened(), **self.options, **more)

    def inject(self, model: Any, **more: Any) -> Injection:
        """Attach the delta to a model whose loop calls `step()`, and writes `csv` if it is set.

        more: what only the framework has, such as `optimizer` and `scaler`.

        Raises:
            As `Injection`.
        """
        from drift_fast.inject.injection import Injection

        options = {key: value for key, value in self.options.items() if key != "csv"}
        return Injection(model, self._opened(), **options, **more)

    def _opened(self) -> Any:
        from drift_fast.delta.delta import Delta

        return Delta.open(self.delta)


def parse_file(file: Path) -> Any:
    """Return the content of a JSON or YAML file."""
    if file.suffix == ".json":
        text = file.read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
    if file.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"{file}: expected a file that ends in .json, .yaml or .yml, got {file.suffix!r}"
        )
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError as error:
        raise ImportError(
            f"{file} is YAML, which needs PyYAML: pip install pyyaml, or write it as JSON"
        ) from error
    text = file.read_text(encoding="utf-8")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
