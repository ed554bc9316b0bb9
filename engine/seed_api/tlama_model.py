"""The transformer of the tlama document.

In: token ids. Out: logits, and the loss where targets are given. `engine.model.transformer` is the
model that this engine itself trains; this one has the documented names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import CacheFull, PromptError
from engine.model.layer_stack import check_tokens, mean_loss
from engine.model.masks import visible_mask
from engine.model.transformer import make_adamw
from engine.model.view import View
from engine.seed_api.tlama_config import TlamaConfig
from engine.seed_api.tlama_layers import RMSNorm, TransformerBlock, compute_freqs_cis


class Transformer(nn.Module):
    """A decoder.

    Attributes:
        token_emb: embedding of tokens.
        layers: blocks.
        norm: before the output.
        output: projection to the vocabulary.
        freq_cis: complex64 [2 * max_seq_len, head_dim / 2]. No buffer: turning a model to half
            precision would drop the imaginary parts.
    """

    def __init__(self, config: TlamaConfig) -> None:
        """Make random weights."""
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(TransformerBlock(n, config) for n in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.freq_cis = compute_freqs_cis(
            config.head_dim, 2 * config.max_seq_len, config.rope_theta
        )
        self.apply(self._init_weights)
        self._shrink_residual_weights()

    def forward(
        self, tokens: Tensor, start_pos: int = 0, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of every token, and the loss.

        Args:
            tokens: int64 [B, T].
            start_pos: position of the first; above 0 only over a cache, with gradients off.
            targets: int64 [B, T], compared as given (the caller shifts); -100 is not compared.
        Returns: float32 [B, T, vocab_size], and float32 [] or None.
        Raises:
            PromptError: tokens or targets that do not fit, or do not follow the cache.
            CacheFull: more than max_seq_len positions; nothing is cut off silently.
            ConfigError: `start_pos` above 0 without a cache, or with gradients.
        """
        config = self.config
        check_tokens(tokens, config.vocab_size)
        num_tokens = tokens.shape[1]
        end = start_pos + num_tokens
        if not tokens.numel() or start_pos < 0:
            raise PromptError(
                f"tokens {list(tokens.shape)} from position {start_pos}: at least one token from "
                "position 0 on is needed. Give tokens"
            )
        if end > config.max_seq_len:
            raise CacheFull(
                f"the tokens need {end:,} positions, max_seq_len is {config.max_seq_len:,}. "
                "Shorten them, or raise max_seq_len"
            )
        self.freq_cis = self.freq_cis.to(tokens.device)
        positions = torch.arange(end, device=tokens.device)
        mask = None
        if num_tokens > 1:
            mask = visible_mask(View(config.max_seq_len), positions[start_pos:], positions)
        h = self.token_emb(tokens)
        for layer in self.layers:
            h = layer(h, start_pos, self.freq_cis[start_pos:end], mask)
        logits = self.output(self.norm(h)).float()
        return logits, None if targets is None else mean_loss(logits, targets)

    def _init_weights(self, module: nn.Module) -> None:
        """Random values for the weights of one module, by `weight_init`."""
        std, mean = self.config.weight_init
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=mean, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:  # pyright: ignore
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def _shrink_residual_weights(self) -> None:
        """What adds to the residual stream begins smaller the more layers there are."""
        std, mean = self.config.weight_init
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.Wo.weight", "ffn.w2.weight")):
                parameter.normal_(mean, std * (2 * self.config.n_layers) ** -0.5)

    def count_parameters(self) -> int:
        """Numbers to train."""
        return sum(parameter.numel() for parameter in self.parameters())

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        device_type: str,
        master_process: bool = True,
    ) -> torch.optim.AdamW:
        """AdamW that decays what has at least two dimensions.

        Args:
            device_type: "cuda" has one fused kernel, where the parameters lie there.
            master_process: for callers that print; without effect here.
        """
        return make_adamw(self, weight_decay, learning_rate, device_type)
