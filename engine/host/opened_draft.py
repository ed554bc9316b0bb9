"""A draft model the host has open: a small model with the vocabulary of the one that answers.

In: a path, and the model it is to guess for. Out: what loading it takes, and what it needs of this
computer's memory. It moves no weights, and computes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from engine.cluster.coordinator import LoadRequest
from engine.cluster.local_copies import describe_files
from engine.errors import CheckpointError, ConfigError, PlanError, one_line
from engine.host.kv_settings import choose_dtype
from engine.host.opened_model import OpenedModel, identify
from engine.kernels.available import has_native_kernels
from engine.model.batch import ComputeDtype
from engine.model.config import CacheDtype
from engine.model.memory import ShareMemory, gibibytes, share_memory
from engine.model.weight_formats import auto_dtype
from engine.plan.plan import PlanShape
from engine.plan.presets import single
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.models import resolve_model

# The one device that computes it; plans of other models do not know it.
DRAFT_DEVICE = "draft/cpu"


class OpenedDraft:
    """One open draft model.

    Attributes:
        checkpoint: also the source of its embeddings.
        memory: what it needs for its weights, and for one conversation.
    """

    def __init__(self, argument: str, model: OpenedModel) -> None:
        """Open the file or folder.

        It computes in what is fast for its file, whatever the model computes in: guesses change no
        token.

        Args:
            model: the one that answers.
        Raises: CheckpointError, ConfigError: it cannot be used; the message says why.
        """
        self.path = _find(argument)
        self.checkpoint: Checkpoint = open_checkpoint(self.path)
        self.config = self.checkpoint.config
        try:
            tokenizer = load_tokenizer(self.path, self.config.vocab_size)
            check_same_vocabulary(tokenizer, model.tokenizer)
            tensors = self.checkpoint.tensors
            self.dtype: ComputeDtype = auto_dtype(tensors.values(), has_native_kernels())
            self.kv_dtype: CacheDtype = choose_dtype("auto", os.environ, self.dtype)
        except Exception:
            self.checkpoint.close()
            raise
        self.kv_window = min(model.kv_window, self.config.max_positions)
        self.plan = single(PlanShape.from_config(self.config), DRAFT_DEVICE)
        self.memory: ShareMemory = share_memory(
            self.config, self.plan, 0, tensors, self.dtype, self.kv_window, self.kv_dtype
        )

    @property
    def name(self) -> str:
        """For a person."""
        return self.path.stem if self.path.is_file() else self.path.name

    def check_memory(self, memory_bytes: int, taken_bytes: int) -> None:
        """Refuse it where it does not fit beside the model's share of this computer.

        Raises: PlanError: says what it needs and what is left.
        """
        left = memory_bytes - taken_bytes
        if self.memory.total > left:
            raise PlanError(
                f"the draft model {self.name} needs {gibibytes(self.memory.weights)} for its "
                f"weights and {gibibytes(self.memory.cache)} for one conversation; of this "
                f"computer's {gibibytes(memory_bytes)} the plan leaves {gibibytes(max(0, left))}. "
                "Choose a smaller one, or leave --draft-model out"
            )

    def load_request(self, num_threads: int, kept_positions: int) -> LoadRequest:
        """How its runner loads it; the scheduler numbers the epochs.

        Args:
            kept_positions: that conversations which ended may keep in its cache, for their next
                turn.
        """
        return LoadRequest(
            epoch=0,
            config=self.config,
            plan=self.plan,
            dtype=self.dtype,
            kv_window=self.kv_window,
            kv_dtype=self.kv_dtype,
            kept_positions=kept_positions,
            threads={DRAFT_DEVICE: num_threads},
            checkpoint_id=identify(self.checkpoint),
            tensors=tuple(self.checkpoint.tensors.values()),
            source=self.checkpoint,
            files={DRAFT_DEVICE: describe_files(self.checkpoint.files, True)},
            # After its last guess the big model computes, perhaps on the same cores.
            may_go_ahead=False,
        )

    def close(self) -> None:
        """Close its files."""
        self.checkpoint.close()


def check_same_vocabulary(draft: Tokenizer, model: Tokenizer) -> None:
    """Refuse a draft model whose ids do not mean what the model's mean.

    Raises: ConfigError: names both, and the first token that differs.
    """
    id = model.first_difference(draft)
    if id is None:
        return
    raise ConfigError(
        f"--draft-model {draft.path}: its token {id:,} is {draft.show(id)}, that of {model.path} is "
        f"{model.show(id)}; both vocabularies must be the same, token for token. Choose a smaller "
        "model of the same family, or leave it out"
    )


def _find(argument: str) -> Path:
    """The path of the draft model. Raises: CheckpointError: there is no such file or folder."""
    try:
        return resolve_model(argument, lambda _done, _total: None)
    except CheckpointError:
        raise CheckpointError(
            f"--draft-model {one_line(argument, 200)!r}: no such file or folder; give a .gguf file "
            "or a folder with config.json and safetensors, or leave it out"
        ) from None
