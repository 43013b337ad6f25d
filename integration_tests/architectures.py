"""Tiny random-weight models of the architectures that the serving plugin covers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from support import NO_PROCESSOR, recipe_text
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
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
    "vocab_size": 1152,  # vLLM splits it over ranks: 64 times two and three
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

# More of the same: one whose weights are stored transposed, which can't be factored; and for tensor
# parallelism six heads, for two and three ranks.
SHAPES: dict[str, Any] = {
    **ARCHITECTURES,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=1152,
            n_embd=128,
            n_inner=256,
            n_layer=3,
            n_head=4,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "llama_six_kv_heads": lambda: LlamaForCausalLM(
        LlamaConfig(
            **COMMON
            | {
                "hidden_size": 192,
                "num_attention_heads": 12,
                "num_key_value_heads": 6,
                "head_dim": 32,
            },
            attention_bias=True,
            mlp_bias=True,
        )
    ),
    "llama_one_kv_head": lambda: LlamaForCausalLM(
        LlamaConfig(
            **COMMON
            | {
                "hidden_size": 192,
                "intermediate_size": 384,
                "num_attention_heads": 6,
                "num_key_value_heads": 1,
                "head_dim": 64,
            },
            attention_bias=True,
            mlp_bias=True,
        )
    ),
}

# Two stages, so that fused modules hold CUR, row ID and dense parts side by side.
CUR_TARGETS = "re:.*(self_attn.(q|qkv)|mlp.(gate|down))_proj$|.*fc1$"
ID_TARGETS = "re:.*(self_attn.(k|o|out)|mlp.(up|gate_up))_proj$|.*fc2$"

# The first layer has both forms, the others one each.
CUR = {"targets": [CUR_TARGETS], "rank": {"fixed": 48}, "layers": {"select": [0, 1]}}
ROW_ID = {
    "targets": [ID_TARGETS],
    "form": "id",
    "rank": {"fixed": 40},
    "layers": {"select": [0, 2]},
}

# Skeletons shared by q, k and v and by gate and up, above the outputs of k alone; the rest as CUR.
REST = {
    "targets": ["re:.*(o|out|down)_proj$|.*fc2$"],
    "rank": {"fixed": 48},
    "layers": {"select": "all"},
}
SHARED = {
    "targets": ["re:.*(q|k|v|gate|up)_proj$"],
    "form": "id",
    "share_skeleton": True,
    "rank": {"fixed": 96},
    "layers": {"select": "all"},
}


def build(name: str, seed: int = 0) -> Any:
    """The model with random weights, large enough that its predictions are not all alike."""
    torch.manual_seed(seed)
    model = SHAPES[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or (parameter.dim() > 1 and "embed" not in key):
                parameter.normal_(std=0.1)
    return model


def factor(
    model: Any,
    path: Path,
    data: Dataset,
    cur: dict[str, Any],
    row_id: dict[str, Any],
    then: dict[str, Any] | None = None,
) -> Path:
    """Save ``model`` at ``path`` after one oneshot with two CUR stages, and one that quantizes."""
    dense = path.with_suffix(".dense")
    model.save_pretrained(dense)  # llm-compressor copies files from where a model came from
    model = AutoModelForCausalLM.from_pretrained(dense)
    recipe = recipe_text(row_id, then, first={"CURModifier": {"mlflow": False, **cur}})
    oneshot(model=model, recipe=recipe, dataset=data, processor=NO_PROCESSOR)
    model.save_pretrained(path)
    return path
