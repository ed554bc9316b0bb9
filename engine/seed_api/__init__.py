"""The interface of the documents that the project grew from, as thin views on the real thing.

The classes and functions of the GQA cluster document, the tlama document, and the advanced
transformer document, with their documented arguments, shapes and results. Where two documents have
one name (`Attention`, `RMSNorm`, ...), it is the tlama document's here; the parts of an `LLM` are in
`engine.seed_api.llm`.
"""

from engine.cluster.cluster_matrix import ClusterMatrix
from engine.seed_api.cluster import (
    Tokenizer,
    hugging_face_model_handler,
    llama_cluster_transformer,
)
from engine.seed_api.llm import LLM, MaskedEmbedding, TransformerInput, TransformerOutput
from engine.seed_api.llm_args import ModelArgs, MoEArgs, VisionArgs
from engine.seed_api.tlama_config import TlamaConfig
from engine.seed_api.tlama_layers import (
    Attention,
    FeedForward,
    RMSNorm,
    TransformerBlock,
    apply_rope,
    compute_freqs_cis,
    repeat_kv,
    reshape_for_broadcast,
)
from engine.seed_api.tlama_model import Transformer

__all__ = [
    "LLM",
    "Attention",
    "ClusterMatrix",
    "FeedForward",
    "MaskedEmbedding",
    "MoEArgs",
    "ModelArgs",
    "RMSNorm",
    "TlamaConfig",
    "Tokenizer",
    "Transformer",
    "TransformerBlock",
    "TransformerInput",
    "TransformerOutput",
    "VisionArgs",
    "apply_rope",
    "compute_freqs_cis",
    "hugging_face_model_handler",
    "llama_cluster_transformer",
    "repeat_kv",
    "reshape_for_broadcast",
]
