"""R in the decoder layers after the first `keep_layers`, M elsewhere."""

from __future__ import annotations

from drift_fast.merging.methods.base import Method

METHOD = Method("layer_swap", takes_weight=False, takes_keep_layers=True)
