"""The names of the GQA cluster document: a tokenizer, a model handler, a transformer on a cluster.

In: a model's path and how to share it out. Out: text. The work is done by a `Session` with real
worker processes; one layer at a time can be had through `Lockstep`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import torch
from torch import Tensor

from engine.cluster.cluster_matrix import share_fractions
from engine.cluster.lockstep import Lockstep
from engine.errors import ConfigError, PromptError
from engine.host import messages as api
from engine.host.kv_settings import choose_dtype, choose_window
from engine.model.batch import ComputeDtype
from engine.plan.plan import Plan, PlanShape
from engine.plan.presets import from_percentages
from engine.session import Session, SessionOptions
from engine.text.tokenizer import load_tokenizer
from engine.weights.checkpoint import Checkpoint, open_checkpoint

BACKENDS = ("torch",)
DEFAULT_MAX_GEN_LEN = 200
_PROBE = "The quick brown foxes don't jump 1,234 times.\n\n\tif x != y: größer 中文 🦊"


class Tokenizer:
    """Text to ids and back, as the model at a path has it.

    Attributes:
        bos_id: begins a text, or None.
        eos_id: ends an answer, or None; `eos_ids` are all that do.
        vocab_size: one more than the largest id that has a token.
    """

    def __init__(self, path: str | Path) -> None:
        """Open it.

        Args:
            path: a model's folder, its tokenizer.json, a SentencePiece .model, or a GGUF file.
        Raises: CheckpointError: there is none, or it is damaged.
        """
        self._tokenizer = load_tokenizer(Path(path))
        self.bos_id = self._tokenizer.bos_id
        self.eos_ids = self._tokenizer.eos_ids
        self.eos_id = min(self.eos_ids, default=None)
        self.vocab_size = self._tokenizer.vocab_size

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, which never become control tokens.

        Args:
            bos, eos: whether to put that token before or after, where there is one.
        Raises: PromptError: the text is too long or is not Unicode.
        """
        ids = self._tokenizer.encode(text)
        first = [self.bos_id] if bos and self.bos_id is not None else []
        last = [self.eos_id] if eos and self.eos_id is not None else []
        return [*first, *ids, *last]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens have none."""
        return self._tokenizer.decode(ids)

    def is_same_as(self, other: Tokenizer) -> bool:
        """Whether both cut a text of many kinds of characters into the same ids."""
        return self.encode(_PROBE) == other.encode(_PROBE)


class hugging_face_model_handler:  # noqa: N801 - the documented name
    """Which model, and how it is shared out. It starts nothing and keeps no file open.

    Attributes:
        plan: the table that the shares became: every row of every layer by these percentages.
        split_dim: kept for `ClusterMatrix`; plans cut what each row needs (heads, columns).
    """

    def __init__(
        self,
        model_path: str | Path,
        percentages: Sequence[float] = (100,),
        CPU_GPU_select_list: Sequence[bool | str] | None = None,
        backend_select_list: Sequence[str] | None = None,
        split_dim: int = 1,
    ) -> None:
        """Check everything.

        Args:
            model_path: folder or GGUF file.
            percentages: one for each share, summing to 100 (or to 1). A single share is computed
                on this computer, several by as many simulated nodes.
            CPU_GPU_select_list: for each share, True or "cuda:0" for a GPU of this computer,
                False or "cpu" for a CPU; the CPU for all if None. GPUs are counted from 0.
            backend_select_list: for each share, one of BACKENDS.
            split_dim: 0 or 1.
        Raises:
            ConfigError: a wrong number, name or count, or a GPU that is not there.
            CheckpointError: the model cannot be opened.
        """
        self.model_path = Path(model_path)
        self.fractions = share_fractions(percentages)
        self.percentages = tuple(float(100 * share) for share in self.fractions)
        count = len(self.fractions)
        selected = [False] * count if CPU_GPU_select_list is None else list(CPU_GPU_select_list)
        backends = [BACKENDS[0]] * count if backend_select_list is None else backend_select_list
        for name, found in (
            ("CPU_GPU_select_list", selected),
            ("backend_select_list", backends),
        ):
            if len(found) != count:
                raise ConfigError(
                    f"{name} has {len(found)} entries for {count} percentages; give one for each"
                )
        for backend in backends:
            if backend not in BACKENDS:
                raise ConfigError(
                    f"backend {backend!r} is not one of ours; use {', '.join(BACKENDS)}"
                )
        if split_dim not in (0, 1):
            raise ConfigError(f"split_dim {split_dim!r} is not 0 (rows) or 1 (columns). Choose one")
        self.split_dim = split_dim
        self.backend_select_list = tuple(backends)
        self.CPU_GPU_select_list = tuple(selected)
        self.torch_devices = _torch_devices(selected)
        with open_checkpoint(self.model_path) as checkpoint:
            self.config = checkpoint.config
        devices = [_device_name(n, count, d) for n, d in enumerate(self.torch_devices, start=1)]
        self.plan: Plan = from_percentages(
            PlanShape.from_config(self.config), devices, self.percentages
        )


def _torch_devices(selected: Sequence[bool | str]) -> list[torch.device]:
    """A device for each share; every True takes the next GPU."""
    num_gpus = torch.cuda.device_count()
    devices: list[torch.device] = []
    for entry in selected:
        name = entry.strip().lower() if isinstance(entry, str) else ("cuda" if entry else "cpu")
        kind, _, number = name.partition(":")
        if kind == "cpu" and not number:
            devices.append(torch.device("cpu"))
            continue
        if kind not in ("cuda", "gpu") or (number and not number.isdecimal()):
            raise ConfigError(
                f"CPU_GPU_select_list holds {entry!r}; use True or 'cuda:0' for a GPU, False or "
                "'cpu' for a CPU"
            )
        index = int(number) if number else sum(d.type == "cuda" for d in devices)
        if index >= num_gpus:
            raise ConfigError(
                f"GPU {index} was asked for in CPU_GPU_select_list, this computer has {num_gpus} "
                "that torch can use. Use False or 'cpu' there"
            )
        if torch.device("cuda", index) in devices:
            raise ConfigError(
                f"GPU {index} is in CPU_GPU_select_list twice; add its percentages up in one share"
            )
        devices.append(torch.device("cuda", index))
    return devices


def _device_name(number: int, count: int, device: torch.device) -> str:
    if device.type == "cuda":
        return f"this/cuda{device.index}"
    return "this/cpu" if count == 1 else f"local-{number}/cpu"


class llama_cluster_transformer:  # noqa: N801 - the documented name
    """A model on its cluster; a context manager, since it holds processes.

    Attributes:
        session: what answers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_handler: hugging_face_model_handler,
        *,
        dtype: api.DtypeChoice = "auto",
        kv_window: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Start the worker processes and load every share.

        OPEN_CLUSTER_KV_WINDOW and OPEN_CLUSTER_KV_CACHE_DTYPE are read here.

        Args:
            tokenizer: that of the model.
            kv_window: positions of the cache; the environment decides if None.
            num_threads: of each runner; None shares the cores out.
        Raises: EngineError: told in one line; nothing is left running.
        """
        if not tokenizer.is_same_as(Tokenizer(model_handler.model_path)):
            raise ConfigError(
                f"the tokenizer is not that of {model_handler.model_path}: its ids mean other "
                "tokens. Open the tokenizer at the model's own path"
            )
        self.tokenizer = tokenizer
        self.model_handler = model_handler
        self._kv_window = kv_window
        self._checkpoint: Checkpoint | None = None
        self._lockstep: Lockstep | None = None
        options = SessionOptions(
            model=str(model_handler.model_path),
            dtype=dtype,
            plan=model_handler.plan,
            num_threads=num_threads,
            kv_window=kv_window,
        )
        self.session = Session(options)

    def __enter__(self) -> Self:
        """The model itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End every process; a second call does nothing."""
        self.session.close()
        self._lockstep = None
        if self._checkpoint is not None:
            self._checkpoint.close()
            self._checkpoint = None

    def generate(
        self,
        prompts: str | Sequence[str],
        max_gen_len: int = DEFAULT_MAX_GEN_LEN,
        temperature: float = 0.8,
        top_p: float = 0.95,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int = 0,
        stop_ids: Iterable[int] = (),
        stop_words: str | Iterable[str] = (),
        stop_sequences: Iterable[Sequence[int]] = (),
        min_gen_len: int = 0,
        on_token: Callable[[int, int, str], None] | None = None,
        chat: bool = False,
    ) -> list[str]:
        """Continue every prompt.

        Args:
            prompts: one text or several of any lengths, which are computed together.
            max_gen_len: tokens of each answer at most; 0 means up to the KV window.
            temperature: 0 takes the likeliest token.
            repetition_penalty: above 1, a repeated token never becomes more likely.
            seed: the same call with the same seed gives the same texts.
            stop_words: one text or several that end an answer and are not part of it.
            stop_sequences: runs of ids that end an answer.
            on_token: hears batch index, token id, and the text that became certain with it.
            chat: whether each prompt is a question for the model's chat template.
        Returns: the new text for each prompt, in their order.
        Raises: PromptError, CacheFull: a request that cannot be served.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise PromptError("no prompts were given, at least one is needed. Give a text")
        sampling = api.SamplingSettings(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=tuple((logit_bias or {}).items()),
            seed=seed,
        )
        answers = self.session.generate_batch(
            texts,
            raw=not chat,
            sampling=sampling,
            on_token=on_token,
            max_tokens=max_gen_len,
            stop=(stop_words,) if isinstance(stop_words, str) else tuple(stop_words),
            stop_ids=tuple(stop_ids),
            stop_sequences=tuple(tuple(run) for run in stop_sequences),
            min_tokens=min_gen_len,
        )
        return [answer.text for answer in answers]

    def clear_kv_cache(self) -> None:
        """Forget what `run_QKV_mlp_cluster` kept; `generate` begins anew with every call anyway."""
        if self._lockstep is not None:
            self._lockstep.clear()

    def run_QKV_mlp_cluster(  # noqa: N802 - the documented name
        self, layer_index: int, hidden: Tensor, start_pos: int | None = None
    ) -> Tensor:
        """One layer over the plan's shares, in this process: norm, attention, norm, MLP, residuals.

        For research: the shares are computed one after the other, with the cuts, the wire and the
        order of addition that the worker processes have. The layer keeps its keys and values.

        Args:
            layer_index: 0 to the number of layers - 1.
            hidden: float32 [T, width] or [1, T, width], the residual stream before the layer.
            start_pos: position of the first token; 0 begins anew, None follows the call before.
        Returns: the stream after the layer, in the shape of `hidden`.
        Raises:
            PromptError: another shape or dtype.
            PlanError: there is no such layer.
            ProtocolError: the tokens do not follow those before.
        """
        is_batch = hidden.ndim == 3
        if is_batch and hidden.shape[0] != 1:
            raise PromptError(
                f"a batch of {hidden.shape[0]} sequences, one layer alone takes 1. Pass them one "
                "by one, with clear_kv_cache() between"
            )
        lockstep = self._layers()
        result = lockstep.run_layer(layer_index, hidden[0] if is_batch else hidden, start_pos)
        return result[None] if is_batch else result

    def _layers(self) -> Lockstep:
        """The plan in this process, loaded at first use: most programs only generate."""
        if self._lockstep is None:
            handler = self.model_handler
            if self._checkpoint is None:
                self._checkpoint = open_checkpoint(handler.model_path)
            dtype = _compute_dtype(self.session.model.dtype)
            self._lockstep = Lockstep(
                self._checkpoint,
                handler.plan,
                dtype,
                choose_window(self._kv_window, os.environ, handler.config.max_positions),
                choose_dtype("auto", os.environ, dtype),
                handler.torch_devices,
            )
        return self._lockstep


def _compute_dtype(name: str) -> ComputeDtype:
    for dtype in get_args(ComputeDtype):
        if name == dtype:
            return dtype
    raise ConfigError(f"one layer alone cannot be computed in {name}; open the model in float32")
