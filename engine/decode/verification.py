"""From the logits of a step to tokens of an answer: the next one, and guesses that came true.

In: a work and what its logits say. Out: tokens, taken by its sequence. A guessed token, or one that a
device went on with, is taken only where it is what the sampler chooses with that position's logits and
noise, so the answer is the one that single steps give.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.cluster import messages as m
from engine.decode.batching import Work
from engine.decode.drafting import MODEL_SOURCE
from engine.errors import EngineError
from engine.sampling.choice import Candidates, all_candidates


def take_tokens(
    work: Work, candidates: Seq[Candidates], fetch_full: Callable[[], m.Array]
) -> list[m.SlotOperation]:
    """Choose as many tokens as the guesses that came true allow, at least one.

    Args:
        candidates: the short form for each position of `work.changes`.
        fetch_full: gives float32 [positions, vocab], where the short form proves no choice.
    Returns: what takes guesses that did not come true out of the cache.
    Raises: EngineError: the logits are not numbers, or the full ones cannot be had.
    """
    sequence, drafted = work.sequence, work.drafted
    expected = drafted or work.continued
    before = len(sequence.ids)
    for n, changes in enumerate(work.changes):
        token = sequence.choose(candidates[n], changes)
        if token is None:
            token = sequence.choose(all_candidates(fetch_full()[n]), changes)
        if token is None:
            raise EngineError(
                "the logits are not numbers: the weights are damaged, or the numbers too large "
                "for this dtype. Try --dtype float32, or another file"
            )
        sequence.accept(token)
        is_right = n < len(expected) and token.token_id == expected[n]
        if sequence.finish_reason is not None or not is_right:
            break
    chosen = sequence.ids[before:]
    num_right = work.num_right = len(chosen) - 1
    for guess in (work.guess, work.passed_over):
        sequence.acceptance.note(guess.source, guess.ids, chosen)
    num_accepted = num_right if drafted else 0
    if work.guess.source == MODEL_SOURCE:
        sequence.num_model_drafted += len(drafted)
        sequence.num_model_accepted += num_accepted
    is_first = before == sequence.num_prompt
    sequence.count_step(len(drafted), num_accepted, is_first=is_first)
    sequence.advance(work.count + num_right, len(expected) - num_right)
    if num_right == len(expected):
        return []
    length = sequence.num_computed
    return [m.SlotOperation(action="truncate", slot=sequence.slot, length=length)]
