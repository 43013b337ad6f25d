"""Tiny models of many families, whose attention and MLPs hold their units in many ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
NEOX = SIZES | {"use_parallel_residual": False}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
OPT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}

BUILDERS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "grouped Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "Llama with biases": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)
    ),
    "Qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8)),
    "Phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZES)),
    "Phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED, pad_token_id=0)),
    "Gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8)),
    "OPT": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, ffn_dim=48)),
    "GPT2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "GPTNeoX": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**NEOX)),
    "BERT": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
    "RoBERTa": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZES, pad_token_id=0)),
    "Mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)
    ),
    "OLMo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**SIZES, pad_token_id=0)),
    "Bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**GPT2)),
}


def built(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of random weights so large that heads and neurons tell each other apart."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()
