"""Axolotl: a plugin, with a section of its own in the configuration.

    plugins:
      - drift_fast.integrations.axolotl.DriftPlugin
    drift_fast:
      delta: path/to/delta
      alpha: 1.0

Axolotl only logs a plugin that fails to import and goes on; it then trains plainly, and does not
know the section either. Look for "injecting into … parameters" in its log.

Tested with axolotl 0.19.0 (transformers 5.16): `load_cfg` and `train` on a tiny Qwen2, full SFT,
one process, no GPU; where it is not installed, against a base class with the hooks that are used.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from drift_fast.integrations.settings import Settings


class DriftArgs(BaseModel):
    """The section of the configuration; Axolotl joins this to its own schema."""

    drift_fast: dict[str, Any] | None = None

    @field_validator("drift_fast")
    @classmethod
    def _check(cls, section: dict[str, Any] | None) -> dict[str, Any] | None:
        if section is not None:
            Settings.from_mapping(section)
        return section


class DriftPlugin(BasePlugin):  # type: ignore[misc]
    """Attach to Axolotl's Trainer, once it is built."""

    def get_input_args(self) -> str:
        """Return where the section's schema is."""
        return f"{DriftArgs.__module__}.{DriftArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach.

        Raises:
            ValueError: the configuration has no section `drift_fast`.
            As `drift_fast.attach`.
        """
        section = cfg.get("drift_fast")
        if section is None:
            raise ValueError(
                "the plugin is listed but the configuration has no section `drift_fast:` with a "
                "delta; add it, or take the plugin out of `plugins:`"
            )
        Settings.from_mapping(dict(section)).attach(trainer)
