"""A model the host has open: its checkpoint, its text side, and how it will be computed.

In: a path. Out: requests turned into token sequences. It moves no weights.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.decode.sampling import validate_sampling
from engine.decode.sequence import Sequence
from engine.decode.stopping import StopMatcher
from engine.errors import CacheFull, ConfigError, PromptError
from engine.host import messages as api
from engine.model.batch import ComputeDtype
from engine.text.chat_template import ChatTemplate, Message, encode_chat
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.formats import TensorInfo

DEFAULT_KV_WINDOW = 8192
MAX_KV_WINDOW = 1 << 24
BENCHMARK_SEED = 20


class OpenedModel:
    """One open model; used by one thread at a time, except `checkpoint`."""

    def __init__(self, path: Path, dtype: api.DtypeChoice, kv_window: int | None) -> None:
        """Open the file or folder.

        Raises: CheckpointError, ConfigError: it cannot be used; the message says why.
        """
        if kv_window is not None and not 1 <= kv_window <= MAX_KV_WINDOW:
            raise ConfigError(
                f"--kv-window {kv_window} is not between 1 and {MAX_KV_WINDOW:,} positions"
            )
        self.path = path
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.config = self.checkpoint.config
        try:
            self.tokenizer: Tokenizer = load_tokenizer(path)
            if self.tokenizer.vocab_size > self.config.vocab_size:
                raise ConfigError(
                    f"{path}: the tokenizer has {self.tokenizer.vocab_size:,} tokens, the model "
                    f"embeddings for {self.config.vocab_size:,}; files of two models are mixed"
                )
            self.template = ChatTemplate.for_tokenizer(self.tokenizer)
        except Exception:
            self.checkpoint.close()
            raise
        self.dtype: ComputeDtype = self._choose_dtype(dtype)
        self.kv_window = kv_window or min(self.config.max_positions, DEFAULT_KV_WINDOW)
        self.tensors = tuple(self.checkpoint.tensors.values())
        self.identity = _identity(path, self.tensors)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        self.file_bytes = sum(f.stat().st_size for f in files)

    def _choose_dtype(self, choice: api.DtypeChoice) -> ComputeDtype:
        if choice != "auto":
            return choice
        formats = {t.format for t in self.checkpoint.tensors.values() if len(t.shape) > 1}
        return "float32" if formats == {"F32"} else "bfloat16"

    @property
    def warning(self) -> str | None:
        """What a person should know, such as a window past the trained context."""
        if self.kv_window > self.config.max_positions:
            return (
                f"the KV window of {self.kv_window:,} positions is longer than the "
                f"{self.config.max_positions:,} this model was trained on; answers may get worse"
            )
        return None

    def close(self) -> None:
        """Close files and the template's process."""
        self.template.close()
        self.checkpoint.close()

    # ---- requests ----------------------------------------------------------------------------

    def generation(
        self,
        call: api.Generate,
        on_text: Callable[[int, str], None],
        on_prefill: Callable[[int, int], None],
    ) -> Sequence:
        """A sequence that answers a chat or continues a raw prompt.

        Raises: PromptError, CacheFull: the request breaks a rule, or does not fit the window.
        """
        validate_sampling(call.sampling)
        if call.max_tokens < 0:
            raise PromptError(f"max_tokens must be 0 (no limit) or more, got {call.max_tokens}")
        if call.raw_prompt is not None:
            ids = self.tokenizer.encode(call.raw_prompt)
            if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None:
                ids = [self.tokenizer.bos_id, *ids]
        else:
            turns = [Message(turn.role, turn.content) for turn in call.turns]
            if not turns:
                raise PromptError("the conversation has no message; write one")
            ids = encode_chat(self.tokenizer, self.template, turns)
        if not ids:
            raise PromptError("the prompt is empty; write at least one character")
        eos_ids = frozenset[int]() if call.ignore_eos else self.tokenizer.eos_ids
        return self._sequence(
            call.request_id,
            ids,
            call.max_tokens,
            call.sampling,
            eos_ids,
            call.stop,
            on_text,
            on_prefill,
        )

    def benchmark(
        self,
        call: api.Benchmark,
        on_text: Callable[[int, str], None],
        on_prefill: Callable[[int, int], None],
    ) -> Sequence:
        """A sequence of random prompt tokens and a fixed number of generated ones."""
        if call.prompt_tokens < 1 or call.generated_tokens < 1:
            raise PromptError("a benchmark needs at least one prompt and one generated token")
        random = np.random.default_rng(BENCHMARK_SEED)
        ids = random.integers(0, self.tokenizer.vocab_size, call.prompt_tokens).tolist()
        greedy = api.SamplingSettings(temperature=0.0)
        return self._sequence(
            call.request_id,
            ids,
            call.generated_tokens,
            greedy,
            frozenset(),
            (),
            on_text,
            on_prefill,
        )

    def logits(self, call: api.ComputeLogits, on_prefill: Callable[[int, int], None]) -> Sequence:
        """A sequence whose logits are wanted at every position."""
        if not call.ids:
            raise PromptError("no token ids were given; name at least one")
        bad = next((i for i in call.ids if not 0 <= i < self.config.vocab_size), None)
        if bad is not None:
            raise PromptError(
                f"token id {bad} is not in the vocabulary of {self.config.vocab_size:,} "
                f"(0 to {self.config.vocab_size - 1})"
            )
        sequence = self._sequence(
            call.request_id,
            list(call.ids),
            1,
            api.SamplingSettings(temperature=0.0),
            frozenset(),
            (),
            lambda _id, _text: None,
            on_prefill,
        )
        sequence.logits_only = True
        return sequence

    def _sequence(
        self,
        request_id: int,
        ids: list[int],
        max_tokens: int,
        settings: api.SamplingSettings,
        eos_ids: frozenset[int],
        stops: tuple[str, ...],
        on_text: Callable[[int, str], None],
        on_prefill: Callable[[int, int], None],
    ) -> Sequence:
        if len(ids) > self.kv_window:
            raise CacheFull(
                f"the prompt needs {len(ids):,} positions, the KV window has "
                f"{self.kv_window:,}. Shorten it, or raise --kv-window"
            )
        # The last generated token needs no place in the window.
        room = self.kv_window - len(ids) + 1
        return Sequence(
            request_id=request_id,
            ids=ids,
            num_prompt=len(ids),
            max_tokens=min(max_tokens or room, room),
            settings=settings,
            seed=settings.seed if settings.seed is not None else secrets.randbits(63),
            eos_ids=eos_ids,
            stops=StopMatcher(stops),
            detokenizer=IncrementalDetokenizer(self.tokenizer),
            on_text=on_text,
            on_prefill=on_prefill,
        )


def _identity(path: Path, tensors: tuple[TensorInfo, ...]) -> str:
    """A name for these weights, so that a runner knows what it may keep for a new plan."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    stamp = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((stamp, tensors)).encode()).hexdigest()
