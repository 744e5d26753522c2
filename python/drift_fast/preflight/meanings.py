"""What a difference between two models means for Δ, in words: the severity, why, and what to do.

`{a}` and `{b}` are how a sentence calls the first and the second model.
"""

from __future__ import annotations

from typing import Literal

Severity = Literal["breaks", "note", "same"]

CHOOSE = "choose two models of one backbone"
# By subject: the severity of a difference, what it means and what to do.
MEANING: dict[str, tuple[Severity, str]] = {
    "model_type": (
        "note",
        "the two have different architectures by name; check that {a} descends from the text model "
        "inside {b}, which the other facts do not prove",
    ),
    "hidden size": (
        "breaks",
        "nearly every tensor has a different shape, so there is no difference to take; " + CHOOSE,
    ),
    "intermediate size": (
        "breaks",
        "the MLPs have different shapes, so the models do not share a base, attention included; "
        + CHOOSE,
    ),
    "layers": (
        "breaks",
        "a layer of one does not correspond to the layer of its number in the other; " + CHOOSE,
    ),
    "attention heads": (
        "breaks",
        "a row of q_proj belongs to a different head on each side even if the shapes agree, so the "
        "difference of two rows means nothing; " + CHOOSE,
    ),
    "KV heads": (
        "breaks",
        "keys and values are shared by different groups of heads on each side, so the difference "
        "of two k_proj or v_proj means nothing; " + CHOOSE,
    ),
    "head dimension": (
        "breaks",
        "the rows of q_proj, k_proj and v_proj are divided into heads differently on each side, "
        "even if the shapes agree, so their difference means nothing; " + CHOOSE,
    ),
    "RoPE scaling": (
        "note",
        "positions are stretched differently on each side, so Δ also carries what training for "
        "long context changed; Δ of {a} − its own base leaves that out",
    ),
    "partial rotary factor": (
        "breaks",
        "positions rotate a different part of each head on each side, so the same rows of q_proj "
        "and k_proj have different meanings; " + CHOOSE,
    ),
    "norm epsilon": (
        "note",
        "it is added to a variance and matters only for tiny activations, so Δ stays usable; "
        "nothing needs to be done, but it hints at two bases",
    ),
    "activation": (
        "breaks",
        "the MLPs compute a different function of the same weights, so what one model learned in "
        "them is not a direction for the other; " + CHOOSE,
    ),
    "query-key norm": (
        "breaks",
        "only one side normalizes queries and keys, so the length of a row of q_proj or k_proj "
        "counts in one and not in the other; " + CHOOSE,
    ),
    "attention biases": (
        "breaks",
        "biases of one side have no match in the other, where they are zero; select only weights "
        "with modules='re:_proj[.]weight$' if the models share a base all the same",
    ),
    "experts": (
        "breaks",
        "an expert of one side has no match of the same role in the other; " + CHOOSE,
    ),
    "experts per token": (
        "breaks",
        "the router sends a token to a different number of experts on each side, so each expert "
        "does a different share of the work; " + CHOOSE,
    ),
    "sliding window": (
        "note",
        "attention reaches a different distance in some layers, so Δ also carries that for texts "
        "longer than the window; keep fine-tuning samples within the shorter one",
    ),
    "max_position_embeddings": (
        "note",
        "only the longest context differs, which is not a dimension of any weight; keep "
        "fine-tuning samples within the shorter one",
    ),
    "dtype": (
        "note",
        "Δ is exact for any mix, but holds the rounding of the coarser side, which can be as large "
        "as what training changed; take both in the precision they were published in",
    ),
}

# What another θ means: of Δ from a multimodal model, from a reference, and of Δ that is attached.
THETA_PAIR = (
    "the two descend from different bases, as DeepSeek-R1-Distill-Qwen-7B (from Qwen2.5-Math, "
    "θ = 10,000) and Qwen2.5-VL-7B (θ = 1,000,000) do, so Δ also carries the difference of the "
    "bases; Δ of {a} − its own base leaves that out, and with it what that base had learned, so "
    "compare both in short runs; drift-fast check REASONING MULTIMODAL --base BASE says from the "
    "weights which model comes from which"
)
THETA_REFERENCE = (
    "{b} may not be the base that {a} was trained from, or long context was trained in between, "
    "and Δ then carries that too; name the checkpoint that {a} was fine-tuned from"
)
THETA_ATTACHED = (
    "Δ was learned on a base with a different θ than {b}; it holds nothing of the difference of "
    "the two bases, which is what a reference is for, but check in a short run that it helps"
)
MROPE = (
    "the sections divide position into time, height and width in a multimodal model; they are "
    "expected, text has the same positions without them, and nothing needs to be done"
)
FAMILY = "a multimodal model's backbone has its family's name and more; nothing needs to be done"
NOT_SELECTED = (
    "it concerns only embeddings and head, which are not selected, so it does not matter here"
)
SAME_VOCABULARY = (
    "the same number of rows need not mean the same tokens in the same order, and special tokens "
    "often differ; match rows by token, not with rows='index', unless the tokenizers are the same"
)
MOVED_TOKENS = (
    "have another row on the other side, or none, although both models have the same number of rows"
)
BY_TOKEN = "match rows by token, not with rows='index'"
NOT_ATTACHED = "leave embed and head out of modules="
VOCABULARY = (
    "embeddings and head have rows that the other side lacks, whose Δ is zero; see the coverage, "
    "or leave embed and head out of modules="
)
VOCABULARY_REFUSED = (
    "rows of embeddings and head cannot be matched to the other side's; provide both tokenizers, "
    "or leave embed and head out of modules="
)
VOCABULARY_ATTACHED = (
    "Δ of an embedding or head has the rows of {a} and fits only a parameter with as many; leave "
    "embed and head out of modules="
)
TIED = (
    "one side has a single tensor for embedding and head and the other has two, so Δ of one also "
    "holds what the other learned as two; leave embed and head out of modules= if in doubt"
)
