"""A model the host has open: its checkpoint, its text side, and how it will be computed.

In: a path. Out: requests turned into token sequences. It moves no weights.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.decode.image_rows import ImageRows
from engine.decode.request_rules import check_ids, check_logprobs_fit, check_request
from engine.decode.sequence import Sequence
from engine.decode.stopping import IdStopMatcher, StopMatcher
from engine.errors import CacheFull, ConfigError, PromptError
from engine.host import messages as api
from engine.host.kv_settings import choose_dtype, choose_window
from engine.kernels.available import has_native_kernels
from engine.model.batch import ComputeDtype
from engine.model.config import CacheDtype
from engine.model.weight_formats import auto_dtype
from engine.text.chat_template import ChatTemplate, Message, encode_chat
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.vision.encoder import ImageEncoder
from engine.vision.files import read_image_files
from engine.vision.layout import TileGrid, expand_images, feature_positions, find_image_tokens
from engine.weights.checkpoint import Checkpoint, open_checkpoint

BENCHMARK_SEED = 20


class OpenedModel:
    """One open model; used by one thread at a time, except `checkpoint`.

    A second thread may be in `generation` with images, which takes as long as their encoding;
    `close` ends that.
    """

    def __init__(
        self,
        path: Path,
        dtype: api.DtypeChoice,
        kv_window: int | None,
        kv_dtype: api.CacheDtypeChoice = "auto",
    ) -> None:
        """Open the file or folder.

        Raises: CheckpointError, ConfigError: it cannot be used; the message says why.
        """
        self.path = path
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.config = self.checkpoint.config
        try:
            self.tokenizer: Tokenizer = load_tokenizer(path, self.config.vocab_size)
            self.template = ChatTemplate.for_tokenizer(self.tokenizer)
        except Exception:
            self.checkpoint.close()
            raise
        self._image_encoder = ImageEncoder(path) if self.config.vision is not None else None
        tensors = self.checkpoint.tensors.values()
        try:
            self.dtype: ComputeDtype = (
                auto_dtype(tensors, has_native_kernels()) if dtype == "auto" else dtype
            )
            self.kv_window = choose_window(kv_window, os.environ, self.config.max_positions)
            self.kv_dtype: CacheDtype = choose_dtype(kv_dtype, os.environ, self.dtype)
        except ConfigError:
            self.close()
            raise
        self.tensors = tuple(tensors)
        self.identity = identify(self.checkpoint)
        self.file_bytes = sum(f.stat().st_size for f in self.checkpoint.files)

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
        if self._image_encoder is not None:
            self._image_encoder.close()
        self.checkpoint.close()

    # ---- requests ----------------------------------------------------------------------------

    def prompt_ids(self, call: api.Generate) -> list[int]:
        """The tokens of a chat or a raw prompt, with one token for each image.

        Raises: PromptError: the request breaks a rule.
        """
        check_request(call, self.config.vocab_size)
        if call.raw_prompt is not None:
            ids = self.tokenizer.encode(call.raw_prompt)
            if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None:
                ids = [self.tokenizer.bos_id, *ids]
        else:
            turns = [Message(t.role, t.content, len(t.images)) for t in call.turns]
            if not turns:
                raise PromptError("the conversation has no message; write one")
            ids = encode_chat(self.tokenizer, self.template, turns)
        if not ids:
            raise PromptError("the prompt is empty; write at least one character")
        return ids

    def generation(
        self,
        call: api.Generate,
        ids: list[int],
        on_text: Callable[[int, str], None],
        on_prefill: Callable[[int, int], None],
        is_cancelled: Callable[[], bool],
    ) -> Sequence:
        """A sequence that answers a chat or continues a raw prompt.

        Args:
            ids: `prompt_ids` of the call.
        Raises:
            PromptError, CacheFull: an image cannot be used, or the prompt does not fit the window.
            Cancelled: `is_cancelled` said so while images were encoded.
        """
        paths = image_paths(call)
        images: ImageRows | None = None
        if paths:
            ids, images = self._with_images(ids, paths, is_cancelled)
        sequence = self._sequence(call, ids, on_text, on_prefill)
        sequence.images = images
        return sequence

    def _with_images(
        self, ids: list[int], paths: list[str], is_cancelled: Callable[[], bool]
    ) -> tuple[list[int], ImageRows]:
        """Put the tokens of images in their places, and compute their features."""
        vision = self.config.vision
        if vision is None or self._image_encoder is None:
            raise PromptError(
                f"{len(paths)} image(s) were given, but {self.path.name} reads text only. Leave "
                "them out, or open a model with an image encoder, such as Llama 4"
            )
        tokens = find_image_tokens(self.tokenizer.control_id, vision)
        expanded = ids

        def expand(grids: tuple[TileGrid, ...]) -> None:
            nonlocal expanded
            expanded = expand_images(ids, grids, tokens, vision.tokens_per_tile)
            self._check_length(len(expanded))

        # The length is known before minutes of encoding.
        images = self._image_encoder.encode(read_image_files(paths), is_cancelled, expand)
        num_features = sum(len(image.features) for image in images)
        positions = feature_positions(expanded, num_features, vision.image_token_id)
        return expanded, ImageRows(positions, images)

    def benchmark(
        self,
        call: api.Benchmark,
        on_text: Callable[[int, str], None],
        on_prefill: Callable[[int, int], None],
    ) -> Sequence:
        """A sequence of random prompt tokens and a fixed number of generated ones."""
        if call.prompt_tokens < 1 or call.generated_tokens < 1:
            raise PromptError("a benchmark needs at least one prompt and one generated token")
        self._check_length(call.prompt_tokens)
        random = np.random.default_rng(BENCHMARK_SEED)
        ids = random.integers(0, self.tokenizer.vocab_size, call.prompt_tokens).tolist()
        sequence = self._sequence(
            _greedy(call.request_id, call.generated_tokens), ids, on_text, on_prefill
        )
        sequence.may_reuse = False
        return sequence

    def logits(self, call: api.ComputeLogits, on_prefill: Callable[[int, int], None]) -> Sequence:
        """A sequence whose logits are wanted at every position."""
        if not call.ids:
            raise PromptError("no token ids were given; name at least one")
        check_ids(call.ids, self.config.vocab_size)
        sequence = self._sequence(
            _greedy(call.request_id, 1), list(call.ids), lambda _id, _text: None, on_prefill
        )
        sequence.logits_only, sequence.may_reuse = True, False
        return sequence

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.kv_window:
            raise CacheFull(
                f"the prompt needs {num_tokens:,} positions, the KV window has "
                f"{self.kv_window:,}. Shorten it, or raise --kv-window"
            )

    def _sequence(
        self,
        call: api.Generate,
        ids: list[int],
        on_text: Callable[[int, str], None],
        on_prefill: Callable[[int, int], None],
    ) -> Sequence:
        self._check_length(len(ids))
        # Without a limit an answer ends where the window is full; with one it may slide past
        # that. The last token needs no place.
        max_tokens = call.max_tokens or max(self.kv_window - len(ids) + 1, call.min_tokens)
        check_logprobs_fit(call.logprobs, max_tokens)
        eos_ids = frozenset[int]() if call.ignore_eos else self.tokenizer.eos_ids
        # A run of one id is a stop id, so that min_tokens forbids it too.
        runs = [run for run in call.stop_sequences if len(run) > 1]
        single = {run[0] for run in call.stop_sequences if len(run) == 1}
        stop_ids = frozenset(call.stop_ids) | single
        settings = call.sampling
        if call.min_tokens and len(eos_ids | stop_ids) >= self.config.vocab_size:
            raise PromptError(
                f"min_tokens {call.min_tokens:,} forbids every token: all are stop ids. "
                "Leave some out"
            )
        return Sequence(
            request_id=call.request_id,
            checkpoint_id=self.identity,
            ids=ids,
            num_prompt=len(ids),
            max_tokens=max_tokens,
            settings=settings,
            seed=settings.seed if settings.seed is not None else secrets.randbits(63),
            eos_ids=eos_ids,
            stops=StopMatcher(call.stop),
            detokenizer=IncrementalDetokenizer(self.tokenizer, is_start=call.raw_prompt is None),
            on_text=on_text,
            on_prefill=on_prefill,
            stop_ids=stop_ids,
            id_stops=IdStopMatcher(runs),
            min_tokens=call.min_tokens,
            num_logprobs=call.logprobs,
            batch_index=call.batch_index,
            speculation=call.speculation,
        )


def image_paths(call: api.Generate) -> list[str]:
    """The image files of a chat, in the order of their places."""
    return [path for turn in call.turns for path in turn.images]


def _greedy(request_id: int, max_tokens: int) -> api.Generate:
    """A call for exactly so many of the likeliest tokens, each in a step of its own."""
    return api.Generate(
        request_id=request_id,
        max_tokens=max_tokens,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
        speculation="off",
    )


def identify(checkpoint: Checkpoint) -> str:
    """A name for these weights, so that a runner knows what it may keep for a new plan."""
    stamp = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    tensors = tuple(checkpoint.tensors.values())
    return hashlib.sha256(repr((stamp, tensors)).encode()).hexdigest()
