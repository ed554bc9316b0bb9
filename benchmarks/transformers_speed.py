"""transformers in bfloat16 as a neighbour in a table, in this process.

In: a GGUF file or a folder of safetensors, sizes. Out: tokens per second.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


class TransformersModel:
    """A loaded model; greedy, with transformers' own cache."""

    def __init__(self, path: Path) -> None:
        """Load it in bfloat16.

        Raises: CheckpointError: transformers cannot read it.
        """
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        is_file = path.is_file()
        place = path.parent if is_file else path
        file = {"gguf_file": path.name} if is_file else {}
        try:
            model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, **file)
        except (OSError, ValueError) as error:
            words = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"transformers was to read {path} for comparison and cannot: {words}. Name a model "
                "of a family that it knows"
            ) from None
        self._torch: Any = torch
        self._model: Any = model.eval()
        self._vocab_size = int(self._model.config.get_text_config().vocab_size)

    def measure(
        self, prompt_tokens: int, generated_tokens: int, num_threads: int
    ) -> tuple[float, float]:
        """Prefill and decode tokens per second.

        Args:
            generated_tokens: >= 2; the first one belongs to the prompt's time.
        """
        torch, model = self._torch, self._model
        torch.set_num_threads(num_threads)
        generator = torch.Generator().manual_seed(20)
        ids = torch.randint(3, self._vocab_size, (1, prompt_tokens), generator=generator)
        with torch.inference_mode():
            started = time.perf_counter()
            output = model(ids, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(generated_tokens - 1):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
            last = time.perf_counter()
        return prompt_tokens / (first - started), (generated_tokens - 1) / (last - first)
