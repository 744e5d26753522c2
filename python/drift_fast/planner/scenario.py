"""What is planned: two models, the run, and the multimodal model's tensors that Δ covers."""

from __future__ import annotations

from dataclasses import dataclass

from drift_fast.planner.counts import ADAPTED, Model
from drift_fast.planner.options import PlanOptions
from drift_fast.selection import Selection


@dataclass(frozen=True)
class Scenario:
    """Two models and a run; `names` are the multimodal model's tensors that Δ covers."""

    run: PlanOptions
    reasoning: Model
    multimodal: Model
    selection: Selection
    names: list[str]

    @classmethod
    def of(cls, run: PlanOptions, reasoning: Model, multimodal: Model) -> Scenario:
        """Select the tensors.

        Raises:
            ValueError: the run selects none of the multimodal model's tensors.
        """
        selection = Selection.parse(run.modules, run.layers)
        names = multimodal.selected(selection)
        if not names:
            raise ValueError(f"{multimodal.given}: {selection} selects none of its tensors")
        adapted = any(multimodal.kind(name) in ADAPTED for name in names)
        if run.lora_rank and not adapted:
            raise ValueError(
                f"{selection} selects nothing that LoRA trains; give modules of attention or MLP, "
                "or leave lora_rank out"
            )
        return cls(run, reasoning, multimodal, selection, names)

    @property
    def delta_numel(self) -> int:
        """Number of elements of Δ."""
        return self.multimodal.numel(self.names)

    @property
    def trained_numel(self) -> int:
        """Number of the multimodal model's elements that train, or of LoRA's factors."""
        return self.multimodal.trained_numel(self.run)
