"""Fifty answers of 64 tokens, all at once, are the greedy ones of transformers.

Each answer is read by the oracle in one pass: every token must be the likeliest after those before
it. By induction that is its own greedy answer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.session import Session, SessionOptions
from tests.real_model import PROMPTS, chat_ids, oracle_logits

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(900)]

MAX_TOKENS = 64
# Candidates closer than this in the oracle's own logits are a tie.
NEAR_TIE = 1e-3
TOPICS = (
    "the moon", "Roman roads", "photosynthesis", "a lost dog", "prime numbers", "tea", "volcanoes",
    "the violin", "bicycles", "ants", "the French Revolution", "snow", "a lighthouse", "bread",
    "gravity", "chess", "rivers", "the alphabet", "a rainy day", "whales", "glass", "the number pi",
    "honey", "ancient Egypt", "trains", "a small robot", "salt", "northern lights", "soccer",
    "mathematics", "cactus plants", "the heart", "paper", "a dragon", "clouds", "coffee", "maps",
    "penguins", "a clockmaker", "the sun",
)  # fmt: skip
FORMS = (
    "Tell me about {}.",
    "Write a very short story about {}.",
    "List five facts about {}.",
    "Explain {} to a child, in two sentences.",
)


def fifty_prompts() -> list[str]:
    """Ten of other tests, and forty more of different kinds."""
    made = [FORMS[n % len(FORMS)].format(topic) for n, topic in enumerate(TOPICS)]
    return [*PROMPTS, *made]


def test_fifty_answers(default_model_path: Path) -> None:
    prompts = fifty_prompts()
    assert len(set(prompts)) == 50
    options = SessionOptions(model=str(default_model_path), dtype="float32")
    with Session(options) as session:
        answers = session.generate_batch(prompts, max_tokens=MAX_TOKENS)
    num_tokens = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        found = list(answer.token_ids)
        assert len(found) == MAX_TOKENS or found[-1] == 2, prompt
        ids = chat_ids(default_model_path, prompt)
        logits = oracle_logits(default_model_path, ids + found[:-1])[len(ids) - 1 :]
        gaps = logits.max(axis=1) - logits[np.arange(len(found)), found]
        worst = int(gaps.argmax())
        assert gaps[worst] <= NEAR_TIE, f"{prompt!r}: token {worst} is {gaps[worst]:.3g} behind"
        num_tokens += len(found)
    assert num_tokens > 1500
