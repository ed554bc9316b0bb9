"""Keys of GGUF files that would change the arithmetic of a model in a way that is not built.

Only data: each key of an architecture's section with the values that change nothing. Keys that are
read are not here (see `gguf_config` and `gguf_rope`), nor those that say nothing about the
arithmetic.

Source: constants.py of the gguf package; the model files of llama.cpp.
"""

from __future__ import annotations

_EXPERTS: dict[str, tuple[object, ...]] = {
    "expert_shared_count": (0, 1),
    "expert_chunk_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_group_scale": (0, 1),
    "experts_per_group": (0, 1),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "moe_latent_size": (0,),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
}
_ATTENTION: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.relative_buckets_count": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.key_length_mla": (0,),
    "attention.value_length_mla": (0,),
    "attn_logit_softcapping": (0,),
    "full_attention_interval": (0, 1),
}
_ROPE: dict[str, tuple[object, ...]] = {
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0,),
    # How far yarn extrapolates: only wholly, which -1 leaves to the program.
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_attn_factor": (1,),
}
_STREAM: dict[str, tuple[object, ...]] = {
    "activation_sparsity_scale": (0,),
    "altup.active_idx": (0,),
    "altup.num_inputs": (0, 1),
    "embedding_length_per_layer_input": (0,),
    "embedding_scale": (0, 1),
    "logit_scale": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}
# Of architectures that are no such decoder: a file that has them has layers of another kind.
_OTHER_LAYERS: dict[str, tuple[object, ...]] = {
    "attention.decay_lora_rank": (0,),
    "attention.gate_lora_rank": (0,),
    "attention.iclr_lora_rank": (0,),
    "attention.value_residual_mix_lora_rank": (0,),
    "convnext.block_count": (0,),
    "convnext.embedding_length": (0,),
    "decoder_block_count": (0,),
    "features_length": (0,),
    "kda.head_dim": (0,),
    "posnet.block_count": (0,),
    "posnet.embedding_length": (0,),
    "rescale_every_n_layers": (0,),
    "shortconv.l_cache": (0,),
    "ssm.conv_kernel": (0,),
    "ssm.dt_b_c_rms": (False,),
    "ssm.group_count": (0,),
    "ssm.inner_size": (0,),
    "ssm.state_size": (0,),
    "ssm.time_step_rank": (0,),
    "swin_norm": (False,),
    "time_decay_extra_dim": (0,),
    "time_mix_extra_dim": (0,),
    "token_shift_count": (0,),
    "wkv.head_size": (0,),
}
NEUTRAL = {**_EXPERTS, **_ATTENTION, **_ROPE, **_STREAM, **_OTHER_LAYERS}
