"""Checkpoints to serve: random weights of real shapes, dense and factored, 16 bits and 4.

Speed depends on shapes and formats, not on what the numbers are. The factors are drawn as they are,
with the ranks that the ratio gives and an order of the outputs as the stage writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "DEFAULT",
    "DENSE",
    "MODELS",
    "VARIANTS",
    "Variant",
    "make_checkpoint",
    "stored_ratio",
    "weight_bytes",
]

# The second is SmolLM2-135M's. Neither has another width for its heads than hidden ÷ heads.
MODELS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
GROUP = 64  # inputs that share a scale at 4 bits; it divides the widths of both models


@dataclass(frozen=True)
class Variant:
    """A way to store a model.

    Attributes:
        form: ``dense``, or a form's name, of all seven projections.
        ratio: parameters stored after ÷ before, over them; None where dense.
        quantization: ``W4A16``, ``W8A8`` or None.
    """

    form: str
    ratio: float | None = None
    quantization: str | None = None

    def __str__(self) -> str:
        factored = self.form if self.ratio is None else f"{self.form}-{self.ratio:g}"
        return factored if self.quantization is None else f"{factored}-{self.quantization}"


DENSE = Variant("dense")
VARIANTS = {
    str(variant): variant
    for variant in (
        Variant("id", 0.8),
        Variant("id", 0.7),
        Variant("id", 0.5),
        Variant("cur", 0.8),
        Variant("low_rank", 0.8),
        Variant("low_rank", 0.5),
        Variant("dense", None, "W4A16"),
        Variant("id", 0.7, "W4A16"),
        Variant("dense", None, "W8A8"),
        Variant("id", 0.7, "W8A8"),
    )
}

DEFAULT = ["id-0.8", "id-0.5", "dense-W4A16", "id-0.7-W4A16"]  # three quarters of an hour


def make_checkpoint(sizes: dict[str, Any], variant: Variant, directory: Path) -> None:
    """Save a model of random weights, with ``sizes`` as in ``MODELS``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cur_modifier.checkpoint.save import wrap_save_pretrained

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=2048)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
        if variant.form != "dense":
            factor(model, variant)
    finally:
        torch.set_default_dtype(torch.float32)
    if variant.quantization is not None:
        import yaml
        from llmcompressor import oneshot

        # It reads the configuration again from where a model came from.
        config.save_pretrained(directory)
        model.config.name_or_path = str(directory)
        oneshot(model=model, recipe=yaml.safe_dump(recipe(variant.quantization)))
    if variant.form != "dense":
        wrap_save_pretrained(model)
    model.save_pretrained(directory)


def factor(model: Any, variant: Variant) -> None:
    """Put factored modules of random numbers in the place of all projections."""
    import torch

    from cur_modifier.forms.registry import find_form
    from cur_modifier.forms.sizes import Shape
    from cur_modifier.linalg import round_rank_down
    from mlflow_projects.bench.quality.calibration import projections

    form = find_form(variant.form)
    unit = 8 if variant.quantization is None else GROUP
    for name, linear in projections(model).items():
        m, n = linear.weight.shape
        rank = round_rank_down(form.sizes.ratio_rank(m, n, variant.ratio or 1.0), unit)
        container: Any = form.build(Shape(m, n, rank), bias=False, device="cpu")
        if "order" in container.tensors():
            # The stage puts the neurons of an MLP in the order in which they are computed.
            neurons = name.endswith(("gate_proj", "up_proj"))
            container.order = (
                torch.arange(m) if neurons else in_pairs(torch.randperm(m // 2))
            ).int()
        model.set_submodule(name, container)


def in_pairs(order: Any) -> Any:
    """The order of single outputs, given that of pairs of them."""
    import torch

    return torch.stack([2 * order, 2 * order + 1], dim=1).flatten()


def recipe(scheme: str) -> dict[str, Any]:
    """Round-to-nearest, of everything but the head."""
    modifier: dict[str, Any] = {"ignore": ["lm_head"]}
    if scheme == "W4A16":
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
        }
        modifier["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    else:
        modifier |= {"targets": ["Linear"], "scheme": scheme}
    return {"quantize_stage": {"quantize_modifiers": {"QuantizationModifier": modifier}}}


def weight_bytes(directory: Path) -> int:
    """Bytes of the checkpoint's tensors."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def stored_ratio(directory: Path, dense: Path) -> float:
    """Bytes of the projections, ÷ those of the dense checkpoint."""
    return projection_bytes(directory) / projection_bytes(dense)


def projection_bytes(directory: Path) -> int:
    """Bytes of the projections' tensors: weights or factors, with scales and orders."""
    from safetensors import safe_open

    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                if "_proj" in name:
                    tensor = file.get_tensor(name)
                    total += tensor.numel() * tensor.itemsize
    return total
