"""Which differences between two models break Δ, and which are worth knowing.

Owns which rule judges which fact. What a difference means is in `meanings`, what a model says of
itself in `facts`, and whether tensors match is for `alignment` to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from drift_fast.alignment.embeddings import TOKENIZER_FILES
from drift_fast.alignment.model_pair import AlignedPair
from drift_fast.alignment.refusals import Refusal, is_usable
from drift_fast.alignment.vocabulary import count_moved
from drift_fast.errors import CheckpointError, CoverageError
from drift_fast.names import container_of, kind_of, layer_of
from drift_fast.preflight import meanings
from drift_fast.preflight.fact import NAMES, STATED, Fact
from drift_fast.preflight.facts import describe
from drift_fast.preflight.findings import DescribedSide, Finding, ModelSide
from drift_fast.preflight.headers import read_headers
from drift_fast.preflight.meanings import Severity
from drift_fast.preflight.quantization import judge_quantization
from drift_fast.shapes import Shape

# A fact that need not be there, and what its absence amounts to.
_OPTIONAL: dict[str, object] = {
    "experts": 0,
    "experts per token": 0,
    "sliding window": None,
    "mrope sections": None,
}


def compare(
    first: ModelSide,
    second: ModelSide,
    pair: AlignedPair,
    refusals: Sequence[Refusal] = (),
    *,
    attaches: bool = False,
    tokens: bool = False,
) -> list[Finding]:
    """Return what two models have in common and what not, one finding for each fact.

    `pair` holds both, aligned as far as possible, and `refusals` the reasons against the pair. With
    `attaches`, Δ is to be attached to the second, and the first has been judged already. With
    `tokens`, tokenizers are read to compare vocabularies of one size.

    Raises:
        CheckpointError: an entry of a config.json that is needed and has a wrong type.
    """
    usable = is_usable(refusals)
    matched = pair.coverage.matched if usable else []
    stated = usable and pair.stated
    sides = []
    for column, side in enumerate((first, second)):
        names, shapes = [names[column] for names in matched], side.opened.shapes
        if stated and names:
            shapes = _in_matched_layers(shapes, names)
        headers = read_headers(shapes, side.opened.dtypes, names)
        sides.append(DescribedSide(side, headers, describe(side.configuration, headers)))
    selected = {
        kind_of(name)
        for side in (first, second)
        for name in side.opened.shapes
        if name in pair.selection
    }
    return _Comparison(
        (sides[0], sides[1]),
        selected,
        matched=not refusals,
        attaches=attaches,
        stated=stated,
        tokens=tokens,
    ).findings()


def _in_matched_layers(shapes: Mapping[str, Shape], matched: Iterable[str]) -> dict[str, Shape]:
    """Return the tensors in layers that are matched, and those outside of layers."""
    held = {(container_of(name), layer_of(name)) for name in matched}
    return {
        name: shape
        for name, shape in shapes.items()
        if layer_of(name) is None or (container_of(name), layer_of(name)) in held
    }


@dataclass(frozen=True)
class _Comparison:
    """Two sides, the kinds of modules that are selected, and how the two are used.

    `matched` says that nothing is refused, `attaches` that Δ is to be attached to the second side,
    `stated` that a mapping says which layer is which, and `tokens` that tokenizers are read.
    """

    sides: tuple[DescribedSide, DescribedSide]
    selected: set[str]
    matched: bool
    attaches: bool
    stated: bool
    tokens: bool

    def findings(self) -> list[Finding]:
        first, second = (side.description for side in self.sides)
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
        a, b = (side.model for side in self.sides)
        message = message.replace("{a}", a.the).replace("{b}", b.the)
        return Finding(subject, severity, first, second, message, (a.role, b.role))

    def _judged(self) -> tuple[DescribedSide, ...]:
        """Return the sides that have not been judged in another comparison."""
        return self.sides[1:] if self.attaches else self.sides

    def _configurations(self) -> list[Finding]:
        present = [side.model.configuration.found for side in self.sides]
        values = [Fact("found" if found else "missing", STATED) for found in present]
        found = []
        for side in self._judged():
            path, conflicts = side.model.configuration.path, side.description.conflicts
            if not side.model.configuration.found:
                message = (
                    f"{path} is missing, so what only a configuration states was not compared; "
                    "put config.json beside the weights"
                )
                found.append(self._finding("config.json", "note", values, message))
            elif conflicts:
                message = (
                    f"{path} does not describe these tensors ({'; '.join(conflicts)}), so nothing "
                    "it states can be relied on; get the checkpoint again"
                )
                found.append(self._finding("config.json", "breaks", values, message))
        return found

    def _layers_on_disk(self) -> list[Finding]:
        values = [Fact(side.headers.layers, NAMES) for side in self.sides]
        found = []
        # With a stated mapping the headers are those of matched layers only.
        for side in self._judged() if not self.stated else ():
            stated, stored = side.description.stated_layers, side.headers.layers
            if not isinstance(stated, int) or not stated or stored in (0, stated):
                continue
            message = f"{side.model.the} states {stated} layers and has tensors of {stored}"
            severity: Severity = "breaks" if stored < stated else "note"
            if stored < stated:
                message += (
                    ", so the checkpoint is incomplete or config.json belongs to another model; "
                    "get it again"
                )
            else:
                message += (
                    "; those beyond are not loaded: leave them out with layers="
                    f"{'0' if stated == 1 else f'0-{stated - 1}'}, or correct num_hidden_layers"
                )
            found.append(self._finding("layers on disk", severity, values, message))
        return found

    def _stated_dtypes(self) -> list[Finding]:
        stated = [side.description.stated_dtype for side in self.sides]
        values = [Fact() if dtype is None else Fact(dtype, STATED) for dtype in stated]
        return [
            self._finding(
                "dtype in config.json",
                "note",
                values,
                f"{side.model.the} is stored as {', '.join(side.headers.dtypes)}; Δ is taken from "
                "what is stored, so nothing needs to be done unless the file was cast by mistake",
            )
            for side in self._judged()
            if side.headers.dtypes
            and side.description.stated_dtype not in (None, *side.headers.dtypes)
        ]

    def _fact(self, subject: str, first: Fact, second: Fact) -> Finding:
        values = first, second
        if subject == "quantization":
            judged = list(zip(self.sides, values, strict=True))[1 if self.attaches else 0 :]
            severity, message = judge_quantization(judged, attaches=self.attaches)
            return self._finding(subject, severity, values, message)
        if subject in _OPTIONAL and all(
            not fact.known or fact.value == _OPTIONAL[subject] for fact in values
        ):
            return self._finding(subject, "same", values)
        if subject == "mrope sections":
            message = "" if first.value == second.value else meanings.MROPE
            return self._finding(subject, "same", values, message)
        if subject in ("vocabulary size", "tie_word_embeddings"):
            return self._embeddings(subject, values)
        if silent := self._silent(values):
            return self._finding(subject, "note", values, _not_compared(silent))
        if first.value == second.value:
            return self._finding(subject, "same", values)
        if subject == "model_type" and str(second.value).startswith(str(first.value)):
            return self._finding(subject, "same", values, meanings.FAMILY)
        if subject == "RoPE θ":
            return self._finding(subject, "note", values, self._theta())
        severity, message = meanings.MEANING[subject]
        if subject == "layers" and self.stated:
            severity, message = "note", "the mapping says which layer is which"
        if subject == "attention biases" and "attn" not in self.selected:
            severity = "note"
        return self._finding(subject, severity, values, message)

    def _theta(self) -> str:
        if self.attaches:
            return meanings.THETA_ATTACHED
        return (
            meanings.THETA_PAIR
            if self.sides[1].model.role == "multimodal"
            else meanings.THETA_REFERENCE
        )

    def _embeddings(self, subject: str, values: tuple[Fact, Fact]) -> Finding:
        first, second = values
        differ = not (first.known and second.known) or first.value != second.value
        if not self.selected & {"embed", "head"}:
            if differ:
                return self._finding(subject, "note", values, meanings.NOT_SELECTED)
            return self._finding(subject, "same", values)
        if subject == "vocabulary size" and not differ:
            return self._tokens(subject, values)
        if not differ:
            return self._finding(subject, "same", values)
        if silent := self._silent(values):
            return self._finding(subject, "note", values, _not_compared(silent))
        if subject == "tie_word_embeddings":
            return self._finding(
                subject, "note" if self.matched else "breaks", values, meanings.TIED
            )
        if self.attaches:
            return self._finding(subject, "breaks", values, meanings.VOCABULARY_ATTACHED)
        if self.matched:
            return self._finding(subject, "note", values, meanings.VOCABULARY)
        return self._finding(subject, "breaks", values, meanings.VOCABULARY_REFUSED)

    def _tokens(self, subject: str, values: tuple[Fact, Fact]) -> Finding:
        """Compare the tokenizers of two models with as many rows."""
        unknown = self._finding(subject, "note", values, meanings.SAME_VOCABULARY)
        if not self.tokens:
            return unknown
        opened = [side.model.opened for side in self.sides]
        for side in opened:
            side.download_files(TOKENIZER_FILES)
        try:
            moved = count_moved(opened[0].directory, opened[1].directory)
        except (CoverageError, CheckpointError):
            return unknown
        if not moved:
            return self._finding(subject, "same", values)
        remedy = meanings.NOT_ATTACHED if self.attaches else meanings.BY_TOKEN
        message = f"{moved:,} tokens {meanings.MOVED_TOKENS}; {remedy}"
        return self._finding(subject, "note", values, message)

    def _silent(self, values: tuple[Fact, Fact]) -> list[str]:
        """Return the sides that do not say what a fact is."""
        sides = zip(self.sides, values, strict=True)
        return [side.model.the for side, fact in sides if not fact.known]


def _not_compared(silent: list[str]) -> str:
    verb = "does" if len(silent) == 1 else "do"
    return (
        f"{' and '.join(silent)} {verb} not state it and the headers do not show it, so it was not "
        "compared; look it up before relying on the pair"
    )
