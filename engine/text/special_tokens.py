"""Which tokens carry structure, which end an answer, and which a person's text must not become.

In: tokens and what a model's own files say of them. Out: one answer for every file form. It reads
no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# They end a turn wherever the chat template writes them, declared or not.
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<|end|>",
    "<end_of_turn>",
)
# Structure by agreement: SentencePiece files list such tokens among those that are text.
TURN_MARKS = frozenset(
    {
        *TURN_ENDS,
        "<start_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
        "<|im_start|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|image|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "<</SYS>>",
        "<s>",
        "</s>",
        "<bos>",
        "<eos>",
        "<pad>",
    }
)


@dataclass(frozen=True, slots=True)
class Roles:
    """What tokens do.

    Attributes:
        control: ids that carry structure and are never shown.
        ends: ids that end an answer; all are control tokens.
        protected: text to id of the tokens that no text of a person becomes.
    """

    control: frozenset[int]
    ends: frozenset[int]
    protected: dict[str, int]


def assign_roles(
    *,
    tokens: Mapping[int, str],
    control: Iterable[int],
    others: Iterable[int],
    ends: Iterable[int],
    bos_id: int | None,
    template: str | None,
) -> Roles:
    """Decide what tokens do.

    Args:
        tokens: id to text.
        control: ids that the file calls control or special.
        others: ids of tokens that the file adds to the trained ones and calls text.
        ends: ids that the model's files declare as ends, each in `tokens`.
        bos_id: begins a text, or None.
        template: the chat template, or None.
    """
    extra = [id for id in others if tokens[id]]
    marks = {id for id in extra if tokens[id] in TURN_MARKS}
    declared = {*ends}
    controls = {*control, *marks, *declared}
    if bos_id is not None:
        controls.add(bos_id)
    source = template or ""
    named = {id for id in controls if tokens.get(id) in TURN_ENDS and tokens[id] in source}
    written = {id for id in extra if _is_mark(tokens[id]) and tokens[id] in source}
    protected = {tokens[id]: id for id in sorted(controls | written) if tokens.get(id)}
    return Roles(frozenset(controls), frozenset(declared | named), protected)


def _is_mark(text: str) -> bool:
    # Runs of spaces, digits or newlines are added tokens too, and templates contain them: they
    # must go on matching in text.
    return len(text) > 2 and text[0] in "<[{|\uff5c" and text[-1] in ">]}|\uff5c"
