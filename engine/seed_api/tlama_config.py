"""The configuration of the tlama document, and the width of a feed-forward network.

Plain numbers, checked when they are given. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.model.config import Layer, ModelConfig, Rope


def ffn_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Inner width of a gated network that replaces a plain one of `hidden_dim`.

    Two thirds of it, since there are three matrices and not two; then the multiplier; then up to a
    multiple. Llama 3 8B: 4 * 4096, multiplier 1.3, multiples of 1024: 14336.

    Raises: ConfigError: a number that is not above 0.
    """
    multiplier = 1.0 if ffn_dim_multiplier is None else ffn_dim_multiplier
    for name, value in (
        ("hidden_dim", hidden_dim),
        ("multiple_of", multiple_of),
        ("ffn_dim_multiplier", multiplier),
    ):
        _check_positive(name, value)
    width = int(multiplier * int(2 * hidden_dim / 3))
    return max(1, -(-width // multiple_of)) * multiple_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TlamaConfig:
    """Sizes and constants of a tlama transformer.

    Attributes:
        n_kv_heads: as `n_heads` if None.
        max_seq_len: positions of a sequence.
        max_batch_size: sequences that the cache has room for.
        weight_init: standard deviation and mean of the random weights.
        use_parallel: taken and without effect here: a plan shares a model out over devices.
        kv_cache: whether attention keeps keys and values while gradients are off.
    """

    vocab_size: int = 32000
    d_model: int = 1024
    n_layers: int = 12
    n_heads: int = 16
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_batch_size: int = 32
    max_seq_len: int = 2048
    weight_init: Sequence[float] = (0.02, 0.0)
    use_parallel: bool = False
    kv_cache: bool = False

    def __post_init__(self) -> None:
        """Check.

        Raises: ConfigError: names the field, its value and the rule it breaks.
        """
        _check_positive("d_model", self.d_model)
        _check_positive("max_batch_size", self.max_batch_size)
        _check_positive("n_heads", self.n_heads)
        if self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; choose "
                "numbers that divide"
            )
        if len(self.weight_init) != 2 or self.weight_init[0] < 0:
            raise ConfigError(
                f"weight_init {list(self.weight_init)} is not [deviation >= 0, mean]; give two "
                "numbers such as [0.02, 0.0]"
            )
        self.model_config()

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Inner width of a feed-forward network."""
        return ffn_width(4 * self.d_model, self.multiple_of, self.ffn_dim_multiplier)

    def model_config(self) -> ModelConfig:
        """The same model as this engine describes it.

        Raises: ConfigError: a size that breaks a rule.
        """
        return ModelConfig(
            family="llama",
            width=self.d_model,
            layers=(Layer(mlp_width=self.hidden_dim),) * self.n_layers,
            num_heads=self.n_heads,
            num_kv_heads=self.n_heads if self.n_kv_heads is None else self.n_kv_heads,
            head_width=self.head_dim,
            vocab_size=self.vocab_size,
            norm_epsilon=self.norm_eps,
            ropes=(Rope(theta=self.rope_theta),),
            rope_layout="adjacent",
            max_positions=self.max_seq_len,
            is_head_tied=False,
        ).validate()


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} {value} is not above 0; choose a larger number")
