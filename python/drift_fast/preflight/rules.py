"""What each difference between two models means for Δ: which breaks it and which is worth knowing.

Owns the severities and their reasons. Whether tensors have partners is `pairing`'s to say, and what
a model says of itself `facts`'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.refusals import Refusal, is_usable
from drift_fast.checkpoints.config_json import Configuration
from drift_fast.checkpoints.opened import Opened
from drift_fast.checkpoints.source import Source
from drift_fast.names import container_of, kind_of, layer_of
from drift_fast.preflight.facts import (
    NAMES,
    STATED,
    Description,
    Fact,
    Headers,
    describe,
    read_headers,
)

Severity = Literal["breaks", "note", "same"]

_CHOOSE = "choose two models of one backbone"
# By subject: the severity of a difference, what it means and what to do.
_MEANING: dict[str, tuple[Severity, str]] = {
    "model_type": (
        "note",
        "the two are of different architectures by name; see that {a} descends from the text model "
        "inside {b}, which the other facts do not prove",
    ),
    "hidden size": (
        "breaks",
        "nearly every tensor has another shape, so there is no difference to take; " + _CHOOSE,
    ),
    "intermediate size": (
        "breaks",
        "the MLPs have other shapes and so the models are not of one base, attention included; "
        + _CHOOSE,
    ),
    "layers": (
        "breaks",
        "a layer of one does not correspond to the layer of its number in the other; " + _CHOOSE,
    ),
    "attention heads": (
        "breaks",
        "a row of q_proj belongs to another head on each side even where the shapes agree, so the "
        "difference of two rows means nothing; " + _CHOOSE,
    ),
    "KV heads": (
        "breaks",
        "keys and values are shared by other groups of heads on each side, so the difference of "
        "two k_proj or v_proj means nothing; " + _CHOOSE,
    ),
    "head dimension": (
        "breaks",
        "the rows of q_proj, k_proj and v_proj are cut into heads elsewhere on each side, even "
        "where the shapes agree, so their difference means nothing; " + _CHOOSE,
    ),
    "RoPE scaling": (
        "note",
        "positions are stretched otherwise on each side, so Δ also carries what training for long "
        "context changed; Δ of {a} − its own base leaves that out",
    ),
    "partial rotary factor": (
        "breaks",
        "position turns another part of each head on each side, so the same rows of q_proj and "
        "k_proj do another thing; " + _CHOOSE,
    ),
    "norm epsilon": (
        "note",
        "it is added to a variance and matters only where activations are tiny, so Δ stays usable; "
        "nothing needs doing, but it hints at two bases",
    ),
    "activation": (
        "breaks",
        "the MLPs compute another function of the same weights, so what one model learnt in them "
        "is no direction for the other; " + _CHOOSE,
    ),
    "query-key norm": (
        "breaks",
        "only one side normalises queries and keys, so the length of a row of q_proj or k_proj "
        "counts in one and not in the other; " + _CHOOSE,
    ),
    "attention biases": (
        "breaks",
        "biases of one side have no partner in the other, where they are zero; select weights "
        "alone with modules='re:_proj[.]weight$' if the models are of one base all the same",
    ),
    "experts": (
        "breaks",
        "an expert of one side has no counterpart of the same role in the other; " + _CHOOSE,
    ),
    "experts per token": (
        "breaks",
        "the router sends a token to another number of experts on each side, so each expert holds "
        "another share of the work; " + _CHOOSE,
    ),
    "sliding window": (
        "note",
        "attention reaches another distance in some layers, so Δ also carries that on texts longer "
        "than the window; keep fine-tuning samples within the shorter one",
    ),
    "max_position_embeddings": (
        "note",
        "only the longest context differs and no weight has it as a dimension; keep fine-tuning "
        "samples within the shorter one",
    ),
    "dtype": (
        "note",
        "Δ is exact for any mix, but holds the rounding of the coarser side, which can be as large "
        "as what training changed; take both in the precision they were published in",
    ),
}

# By whether Δ is attached, and else whether it is taken from a multimodal model.
_THETA_PAIR = (
    "the two descend from different bases, as DeepSeek-R1-Distill-Qwen-7B (from Qwen2.5-Math, "
    "θ = 10,000) and Qwen2.5-VL-7B (θ = 1,000,000) do, so Δ also carries the difference of the "
    "bases; Δ of {a} − its own base leaves that out, and with it what that base had learned, so "
    "compare both in short runs: drift-fast check REASONING BASE MULTIMODAL"
)
_THETA_REFERENCE = (
    "{b} may not be the base that {a} was trained from, or long context was trained in between, "
    "and Δ then carries that too; name the checkpoint that {a} was fine-tuned from"
)
_THETA_ATTACHED = (
    "Δ was learnt on a base with another θ than that of {b}; it holds nothing of the difference of "
    "the two bases, which is what a reference is for, but check that it helps in a short run"
)
_MROPE = (
    "the sections divide position into time, height and width in a multimodal model; they are "
    "expected, text is placed as without them, and nothing needs doing"
)
_FAMILY = "a multimodal model's backbone carries its family's name and more; nothing needs doing"
_NOT_SELECTED = (
    "it concerns embeddings and head alone, which are not selected, so it does not matter here"
)
_SAME_VOCABULARY = (
    "as many rows need not be the same tokens in the same order, and special tokens often are not; "
    "let rows be matched by token and not with rows='index' unless the tokenizers are the same"
)
_VOCABULARY = (
    "embeddings and head have rows that the other side lacks, whose Δ is zero; see the coverage, "
    "or leave embed and head out of modules="
)
_VOCABULARY_REFUSED = (
    "rows of embeddings and head cannot be matched to the other side's; give both tokenizers, "
    "or leave embed and head out of modules="
)
_VOCABULARY_ATTACHED = (
    "Δ of an embedding or head has the rows of {a} and fits none but a parameter of as many; leave "
    "embed and head out of modules="
)
_TIED = (
    "one side has a single tensor for embedding and head and the other has two, so Δ of one also "
    "holds what the other learnt as two; leave embed and head out of modules= if in doubt"
)

# A fact that need not be there, and what its absence amounts to.
_OPTIONAL: dict[str, object] = {
    "experts": 0,
    "experts per token": 0,
    "sliding window": None,
    "mrope sections": None,
}

_QUANTISED_NAME = re.compile(
    r"[-_.](?:AWQ|GPTQ|(?:GPTQ-)?Int[48]|FP8|NVFP4|MXFP4|bnb|4bit|8bit|w4a16|w8a8)\b.*$", re.I
)


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
        """How a sentence calls it."""
        adjective = self.role in ("reasoning", "multimodal")
        return f"the {self.role} model" if adjective else f"the {self.role}"


def compare(
    first: ModelSide,
    second: ModelSide,
    pair: AlignedPair,
    refusals: Sequence[Refusal] = (),
    *,
    attaches: bool = False,
) -> list[Finding]:
    """Return what two models have in common and what not, one finding for each fact.

    `pair` are the two, aligned as far as it goes, and `refusals` what is refused about them. With
    `attaches`, Δ is to be attached to the second, and the first has been judged already.

    Raises:
        CheckpointError: an entry of a config.json that has a wrong type.
    """
    usable = is_usable(refusals)
    matched = pair.coverage.matched if usable else []
    stated = usable and pair.stated
    headers = tuple(
        read_headers(
            _paired_layers(side.opened.shapes, [pair[column] for pair in matched])
            if stated and matched
            else side.opened.shapes,
            side.opened.dtypes,
            [pair[column] for pair in matched],
        )
        for column, side in enumerate((first, second))
    )
    selected = {
        kind_of(name)
        for side in (first, second)
        for name in side.opened.shapes
        if name in pair.selection
    }
    return _Comparison(
        (first, second),
        headers,
        tuple(
            describe(side.configuration, headers[column])
            for column, side in enumerate((first, second))
        ),
        selected,
        paired=not refusals,
        attaches=attaches,
        stated=stated,
    ).findings()


def _paired_layers(
    shapes: Mapping[str, tuple[int, ...]], paired: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Return what lies in layers that are paired, and outside of layers."""
    held = {(container_of(name), layer_of(name)) for name in paired}
    return {
        name: shape
        for name, shape in shapes.items()
        if layer_of(name) is None or (container_of(name), layer_of(name)) in held
    }


@dataclass(frozen=True)
class _Comparison:
    sides: tuple[ModelSide, ModelSide]
    headers: tuple[Headers, ...]
    described: tuple[Description, ...]
    selected: set[str]
    paired: bool
    attaches: bool
    stated: bool

    def findings(self) -> list[Finding]:
        first, second = self.described
        found = self._configurations()
        for subject, fact in first.facts.items():
            found.append(self._fact(subject, fact, second.facts[subject]))
            if subject == "layers":
                found += self._layers_on_disk()
            if subject == "dtype":
                found += self._stated_dtypes()
        return found

    def _finding(
        self, subject: str, severity: Severity, values: Iterable[Fact], message: str = ""
    ) -> Finding:
        first, second = values
        a, b = self.sides
        message = message.replace("{a}", a.the).replace("{b}", b.the)
        return Finding(subject, severity, first, second, message, (a.role, b.role))

    def _judged(self) -> list[tuple[ModelSide, Headers, Description]]:
        """Return the sides that have not been judged in another comparison."""
        every = list(zip(self.sides, self.headers, self.described, strict=True))
        return every[1:] if self.attaches else every

    def _configurations(self) -> list[Finding]:
        values = [
            Fact("found" if side.configuration.found else "missing", STATED) for side in self.sides
        ]
        found = []
        for side, _, described in self._judged():
            path = side.configuration.path
            if not side.configuration.found:
                message = (
                    f"{path} is not there, so what only a configuration states was not compared; "
                    "put config.json where the weights are"
                )
                found.append(self._finding("config.json", "note", values, message))
            elif described.conflicts:
                message = (
                    f"{path} is not of these tensors ({'; '.join(described.conflicts)}), so "
                    "nothing it states can be relied on; get the checkpoint again"
                )
                found.append(self._finding("config.json", "breaks", values, message))
        return found

    def _layers_on_disk(self) -> list[Finding]:
        values = [Fact(headers.layers, NAMES) for headers in self.headers]
        found = []
        for side, headers, described in self._judged():
            stated = described.stated_layers
            if self.stated:
                # The headers are those of paired layers only.
                continue
            if not isinstance(stated, int) or headers.layers in (0, stated):
                continue
            message = f"{side.the} states {stated} layers and has tensors of {headers.layers}"
            if headers.layers < stated:
                message += (
                    ", so the checkpoint is incomplete or config.json is another model's; get it "
                    "again"
                )
                found.append(self._finding("layers on disk", "breaks", values, message))
            else:
                message += (
                    "; those beyond, such as layers that predict further tokens, are not loaded: "
                    "leave them out with layers="
                )
                found.append(self._finding("layers on disk", "note", values, message))
        return found

    def _stated_dtypes(self) -> list[Finding]:
        values = [
            Fact() if described.stated_dtype is None else Fact(described.stated_dtype, STATED)
            for described in self.described
        ]
        return [
            self._finding(
                "dtype in config.json",
                "note",
                values,
                f"{side.the} is stored as {', '.join(headers.dtypes)}; Δ is taken from what is "
                "stored, so nothing needs doing unless the file was cast by mistake",
            )
            for side, headers, described in self._judged()
            if headers.dtypes and described.stated_dtype not in (None, *headers.dtypes)
        ]

    def _fact(self, subject: str, first: Fact, second: Fact) -> Finding:
        values = first, second
        if subject == "quantisation":
            return self._quantisation(values)
        if subject in _OPTIONAL and all(
            not fact.known or fact.value == _OPTIONAL[subject] for fact in values
        ):
            return self._finding(subject, "same", values)
        if subject == "mrope sections":
            message = "" if first.value == second.value else _MROPE
            return self._finding(subject, "same", values, message)
        if subject in ("vocabulary size", "tie_word_embeddings"):
            return self._embeddings(subject, values)
        silent = [side.the for side, fact in zip(self.sides, values, strict=True) if not fact.known]
        if silent:
            return self._finding(subject, "note", values, _not_compared(silent))
        if first.value == second.value:
            return self._finding(subject, "same", values)
        if subject == "model_type" and str(second.value).startswith(str(first.value)):
            return self._finding(subject, "same", values, _FAMILY)
        if subject == "RoPE θ":
            return self._finding(subject, "note", values, self._theta())
        severity, message = _MEANING[subject]
        if subject == "layers" and self.stated:
            severity, message = "note", "the mapping says which layer is which"
        if subject == "attention biases" and "attn" not in self.selected:
            severity = "note"
        return self._finding(subject, severity, values, message)

    def _theta(self) -> str:
        if self.attaches:
            return _THETA_ATTACHED
        return _THETA_PAIR if self.sides[1].role == "multimodal" else _THETA_REFERENCE

    def _embeddings(self, subject: str, values: tuple[Fact, Fact]) -> Finding:
        first, second = values
        differ = not (first.known and second.known) or first.value != second.value
        if not self.selected & {"embed", "head"}:
            if differ:
                return self._finding(subject, "note", values, _NOT_SELECTED)
            return self._finding(subject, "same", values)
        if subject == "vocabulary size" and not differ:
            return self._finding(subject, "note", values, _SAME_VOCABULARY)
        if not differ:
            return self._finding(subject, "same", values)
        silent = [side.the for side, fact in zip(self.sides, values, strict=True) if not fact.known]
        if silent:
            return self._finding(subject, "note", values, _not_compared(silent))
        if subject == "tie_word_embeddings":
            return self._finding(subject, "note" if self.paired else "breaks", values, _TIED)
        if self.attaches:
            return self._finding(subject, "breaks", values, _VOCABULARY_ATTACHED)
        if self.paired:
            return self._finding(subject, "note", values, _VOCABULARY)
        return self._finding(subject, "breaks", values, _VOCABULARY_REFUSED)

    def _quantisation(self, values: tuple[Fact, Fact]) -> Finding:
        facts = values[1:] if self.attaches else values
        judged = list(zip(self._judged(), facts, strict=True))
        scaled = [
            f"{side.the} ({fact.value})"
            for (side, headers, _), fact in judged
            if not self.attaches and _is_block_scaled(side, headers)
        ]
        judged = [one for one in judged if self.attaches or not _is_block_scaled(*one[0][:2])]
        quantised = [
            f"{side.the} ({fact.value}) is quantised: name its unquantised checkpoint"
            + _unquantised(side.opened.source)
            for (side, _, _), fact in judged
            if fact.value is not None
        ]
        if scaled and not quantised:
            verb = "is" if len(scaled) == 1 else "are"
            message = (
                f"{' and '.join(scaled)} {verb} stored as 8-bit floats under block scales: Δ is "
                "taken at the values that the model computes with and carries their rounding, "
                "which can be as large as what training changed; take the BF16 checkpoint if "
                "there is one"
            )
            return self._finding("quantisation", "note", values, message)
        if not quantised:
            return self._finding("quantisation", "same", values)
        use = "trained along Δ" if self.attaches else "subtracted"
        message = f"{', and '.join(quantised)}, since codes of quantised weights cannot be {use}"
        return self._finding("quantisation", "breaks", values, message)


def _is_block_scaled(side: ModelSide, headers: Headers) -> bool:
    """Whether all that is packed are 8-bit floats whose block scales are there and fit."""
    return (
        bool(headers.packed)
        and all(dtype in ("F8_E4M3", "F8_E5M2") for dtype in headers.packed)
        and not side.opened.unscaled
    )


def _not_compared(silent: list[str]) -> str:
    verb = "does" if len(silent) == 1 else "do"
    return (
        f"{' and '.join(silent)} {verb} not state it and the headers do not tell, so it was not "
        "compared; look it up before relying on the pair"
    )


def _unquantised(source: Source) -> str:
    """Return the name without the suffix that says how it was quantised, if it has one."""
    name = source.repo or source.path.name
    shorter = _QUANTISED_NAME.sub("", name)
    return f", by its name {shorter}" if shorter and shorter != name else ""
