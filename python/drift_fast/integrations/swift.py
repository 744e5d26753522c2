"""ms-swift: a callback named `drift_fast`, registered by an external plugin.

    DRIFT_FAST_CONFIG=drift.yaml swift sft … --external_plugins plugin.py --callbacks drift_fast

where plugin.py, in a directory of its own, holds `import drift_fast.integrations.swift`. The file
that DRIFT_FAST_CONFIG names holds the delta's directory and options of `Injection`.

Tested with ms-swift 4.6.0 (transformers 5.19): `sft_main` on a tiny Qwen2, full SFT, one process;
where it is not installed, against a Trainer that builds its callbacks as ms-swift does. The
Megatron backend has callbacks of its own and is not served.
"""

from __future__ import annotations

from typing import Any

from drift_fast.errors import DriftError
from drift_fast.integrations.settings import Settings

NAME = "drift_fast"

if __name__ != "drift_fast.integrations.swift":
    # ms-swift puts the directory of a plugin first on sys.path, where transformers.py and others
    # of this package would hide the libraries they are named after.
    raise DriftError(
        f"do not pass {__file__} to --external_plugins; pass a file in a directory of its own that "
        "holds `import drift_fast.integrations.swift`"
    )

from swift.callbacks import TrainerCallback, callbacks_map  # noqa: E402


class DriftCallback(TrainerCallback):  # type: ignore[misc]
    """Attach to ms-swift's Trainer, once it is built."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        # Read before the model trains, so that a mistake costs no time.
        self.settings = Settings.from_environment()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach.

        Raises:
            As `drift_fast.attach`.
        """
        self.settings.attach(self.trainer)


callbacks_map[NAME] = DriftCallback
