"""What a comparison of two models finds, and the sides that it compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drift_fast.checkpoints.config_json import Configuration
from drift_fast.checkpoints.opened import Opened
from drift_fast.preflight.fact import Fact
from drift_fast.preflight.facts import Description
from drift_fast.preflight.headers import Headers
from drift_fast.preflight.meanings import Severity


@dataclass(frozen=True)
class Finding:
    """One fact of two models, and what it means for the method.

    `reasoning` and `multimodal` are the values of the first and of the second model that `between`
    names. `message` is one sentence, empty where there is nothing to say.
    """

    subject: str
    severity: Severity
    reasoning: Fact
    multimodal: Fact
    message: str
    between: tuple[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with where each comes from."""
        return {
            "subject": self.subject,
            "severity": self.severity,
            "between": list(self.between),
            "reasoning": {"value": self.reasoning.value, "origin": self.reasoning.origin},
            "multimodal": {"value": self.multimodal.value, "origin": self.multimodal.origin},
            "message": self.message,
        }


@dataclass(frozen=True)
class ModelSide:
    """One of the models, opened: its headers and its configuration, no weight."""

    role: str
    opened: Opened

    @property
    def configuration(self) -> Configuration:
        """Its config.json."""
        return self.opened.configuration

    @property
    def the(self) -> str:
        """What a sentence calls it."""
        adjective = self.role in ("reasoning", "multimodal")
        return f"the {self.role} model" if adjective else f"the {self.role}"


@dataclass(frozen=True)
class DescribedSide:
    """One of the models, and what its headers and its configuration say."""

    model: ModelSide
    headers: Headers
    description: Description
