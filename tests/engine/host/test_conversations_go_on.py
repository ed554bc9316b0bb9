"""Turns reuse what earlier ones left in the cache, and answers slide past the KV window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from engine.decode.scheduler import MAX_RUNNING
from engine.decode.slots import MAX_KEPT
from engine.errors import CacheFull, PlanError
from engine.host import messages as api
from engine.host.kv_settings import DTYPE_VARIABLE, WINDOW_VARIABLE
from engine.host.opened_model import OpenedModel
from engine.session import Session, SessionOptions
from engine.text.tokenizer import load_tokenizer
from tests.tiny_families import save_tiny
from tests.tiny_files import save_tiny_gguf
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

WINDOW = 48


@dataclass(frozen=True)
class Tiny:
    """A model on disk, and as an oracle that masks every layer to the window."""

    folder: Path
    oracle: Any

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The likeliest tokens, by transformers."""
        with torch.no_grad():
            output = self.oracle.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    llama = save_tiny_llama(folder, max_position_embeddings=512)
    fields = {k: v for k, v in llama.config.to_dict().items() if k != "model_type"}
    config = MistralConfig(**{**fields, "sliding_window": WINDOW})
    config._attn_implementation = "sdpa"
    oracle = MistralForCausalLM(config).eval()
    oracle.load_state_dict(llama.state_dict())
    return Tiny(folder, oracle)


@pytest.fixture(scope="module")
def session(tiny: Tiny) -> Iterator[Session]:
    options = SessionOptions(
        model=str(tiny.folder), dtype="float32", num_workers=2, kv_window=WINDOW
    )
    with Session(options) as session:
        yield session


def go_on(session: Session, text: str, count: int) -> api.Finished:
    """Continue a raw prompt by so many tokens."""
    return session.generate(text, raw=True, max_tokens=count, ignore_eos=True)


def test_an_answer_slides_past_the_window_like_an_oracle_with_that_mask(
    tiny: Tiny, session: Session
) -> None:
    ids = load_tokenizer(tiny.folder).encode("abcabcXYZ")
    found = go_on(session, "abcabcXYZ", 200)
    assert len(found.token_ids) == 200
    assert list(found.token_ids) == tiny.greedy(ids, 200)
    assert found.finish_reason == "length"


def test_without_a_limit_an_answer_ends_where_the_window_is_full(session: Session) -> None:
    found = go_on(session, "abcabcXYZ", 0)
    assert found.prompt_tokens + len(found.token_ids) == WINDOW + 1


def test_a_prompt_longer_than_the_window_is_refused(session: Session) -> None:
    with pytest.raises(CacheFull, match="the prompt needs 49 positions, the KV window has 48"):
        go_on(session, "a" * 49, 5)


def test_every_conversation_in_the_cache_takes_the_memory_that_was_stated(tiny: Tiny) -> None:
    """The first, then a second that fits beside it, then a third that does not."""
    with Session(SessionOptions(model=str(tiny.folder), dtype="float32", kv_window=300)) as session:
        stated = session.memory["this/cpu"].cache_bytes
        assert stated == 512 * 2 * 2 * 20 * 3 * 4
        taken = [
            go_on(session, text, 287).devices[0].cache_bytes
            for text in ("the first one", "a second talk", "at last a third")
        ]
    # What a conversation of 300 positions leaves is kept until others need its room.
    assert taken == [stated, 2 * stated, 2 * stated]


def test_the_next_turn_computes_only_what_is_new(tiny: Tiny, session: Session) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    first = go_on(session, "abcdefgh", 6)
    prompt = "abcdefgh" + first.text + "ijkl"
    ids = tokenizer.encode(prompt)
    assert ids[:14] == [*tokenizer.encode("abcdefgh"), *first.token_ids]
    second = go_on(session, prompt, 10)
    # The last generated token was never an input.
    assert second.reused_tokens == 13
    assert list(second.token_ids) == tiny.greedy(ids, 10)


def test_a_changed_turn_goes_back_to_where_it_differs(tiny: Tiny, session: Session) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    go_on(session, "the same beginning and one end", 4)
    prompt = "the same beginning and another"
    other = go_on(session, prompt, 8)
    assert other.reused_tokens == len("the same beginning and ")
    assert list(other.token_ids) == tiny.greedy(tokenizer.encode(prompt), 8)


def test_many_conversations_by_turns(tiny: Tiny, session: Session) -> None:
    """More than are kept: what was let go is computed again, with the same result."""
    tokenizer = load_tokenizer(tiny.folder)
    random = np.random.default_rng(4)
    texts = ["".join(chr(97 + n) for n in random.integers(0, 26, 12)) for _ in range(7)]
    for _turn in range(3):
        for n, text in enumerate(texts):
            found = go_on(session, text, 3)
            assert list(found.token_ids) == tiny.greedy(tokenizer.encode(text), 3)
            texts[n] = text + found.text


def test_a_batch_with_one_beginning(tiny: Tiny, session: Session) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    go_on(session, "a common beginning, ", 2)
    prompts = ["a common beginning, then one", "a common beginning, then two!", "other"]
    found = session.generate_batch(prompts, raw=True, max_tokens=7, ignore_eos=True)
    for prompt, finished in zip(prompts, found, strict=True):
        assert list(finished.token_ids) == tiny.greedy(tokenizer.encode(prompt), 7)


def test_a_benchmark_is_not_shortened_by_what_was_read_before(session: Session) -> None:
    for _ in range(2):
        assert session.benchmark(40, 4).reused_tokens == 0


def test_a_plan_that_needs_more_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, num_key_value_heads=6, num_hidden_layers=40)
    options = SessionOptions(model=str(tmp_path), dtype="float32", kv_window=1 << 24)
    with pytest.raises(PlanError, match=r"this/cpu needs .* too much") as caught, Session(options):
        pass
    assert "--kv-window" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_environment_sets_window_and_dtype(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WINDOW_VARIABLE, "33")
    monkeypatch.setenv(DTYPE_VARIABLE, "fp16")
    with Session(SessionOptions(model=str(tiny.folder), dtype="float32")) as session:
        assert (session.model.kv_window, session.model.kv_dtype) == (33, "float16")
        ids = load_tokenizer(tiny.folder).encode("abcabcXYZ")
        found = go_on(session, "abcabcXYZ", 8)
        assert list(found.token_ids) == tiny.greedy(ids, 8)
    options = SessionOptions(model=str(tiny.folder), kv_window=20, kv_dtype="bfloat16")
    with Session(options) as session:
        assert (session.model.kv_window, session.model.kv_dtype) == (20, "bfloat16")


def test_more_requests_than_are_computed_at_once_wait_for_their_turn(
    tiny: Tiny, session: Session
) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    prompts = [f"prompt {n}" for n in range(MAX_RUNNING + 9)]
    found = session.generate_batch(prompts, raw=True, max_tokens=2, ignore_eos=True)
    for prompt, finished in list(zip(prompts, found, strict=True))[:: MAX_RUNNING // 2]:
        assert list(finished.token_ids) == tiny.greedy(tokenizer.encode(prompt), 2)
    for device in found[-1].devices:
        num_slots = device.cache_bytes / session.memory[device.device].cache_bytes
        assert num_slots <= MAX_RUNNING + MAX_KEPT


def test_a_replaced_part_of_a_split_model_is_another_model(tmp_path: Path) -> None:
    """Only the first part was stamped: runners went on with the weights of the old file."""
    oracle = save_tiny("llama", tmp_path / "folder")
    (tmp_path / "parts").mkdir()

    def add_tokenizer(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        letters = [chr(0x100 + n) for n in range(VOCAB_SIZE - 1)]
        writer.add_token_list([*letters, "\u0101\u0102"])
        writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB_SIZE)
        writer.add_token_merges(["\u0101 \u0102"])

    path = tmp_path / "parts" / "tiny.gguf"
    save_tiny_gguf(oracle, path, max_tensors_per_part=9, change=add_tokenizer)
    parts = sorted((tmp_path / "parts").glob("*.gguf"))
    assert len(parts) > 2
    before = Checked.of(parts[0])
    assert before.file_bytes == sum(part.stat().st_size for part in parts)
    data = bytearray(parts[-1].read_bytes())
    data[-4:] = b"\x00\x00\x80\x3f"
    parts[-1].write_bytes(data)
    assert Checked.of(parts[0]).identity != before.identity


@dataclass(frozen=True)
class Checked:
    """What the host says of a file."""

    identity: str
    file_bytes: int

    @classmethod
    def of(cls, path: Path) -> Checked:
        model = OpenedModel(path, "float32", None)
        try:
            return cls(model.identity, model.file_bytes)
        finally:
            model.close()
