"""Tiny random-weight models of the architectures that the serving plugin covers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
WINDOW = 32  # of sliding attention; the prompts are longer
OPT_ONLY = {
    "ffn_dim": 256,
    "word_embed_proj_dim": 128,
    "do_layer_norm_before": True,
}

ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=32)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=WINDOW)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**COMMON)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**COMMON, **OPT_ONLY)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
        )
    ),
}

# Two stages, so that fused modules hold CUR, row ID and dense parts side by side.
CUR_TARGETS = "re:.*(self_attn.(q|qkv)|mlp.(gate|down))_proj$|.*fc1$"
ID_TARGETS = "re:.*(self_attn.(k|o|out)|mlp.(up|gate_up))_proj$|.*fc2$"


def build(name: str, seed: int = 0) -> Any:
    """The model with random weights, large enough that its predictions are not all alike."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or (parameter.dim() > 1 and "embed" not in key):
                parameter.normal_(std=0.1)
    return model
