"""Loads this factored checkpoint where cur_modifier is not installed."""

from transformers.models.llama.modeling_llama import LlamaForCausalLM as _Base

from .cur_quantizer import register

register()


class LlamaForCausalLM(_Base):
    """LlamaForCausalLM whose factored layers are rebuilt by the quantizer registered above."""
