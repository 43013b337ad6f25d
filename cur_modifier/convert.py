"""Published low-rank models as checkpoints of ours: a dense model, and a pair for each module.

``python -m cur_modifier.convert MODEL PAIRS.safetensors --form id --output OUT`` reads ``NAME.A``
``(m, r)`` and ``NAME.B`` ``(r, n)`` for every module ``NAME`` with ``W ≈ A B``, and writes a
checkpoint that loads with ``from_pretrained`` and is served by vLLM. Form ``low_rank`` stores the
pairs as they are, ``id`` stores each product as a row ID: ``r²`` numbers fewer, and the same
product.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.form import Form
from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import Shape, dense_parameters
from cur_modifier.linalg import LowRank

__all__ = ["convert_pairs", "read_pairs"]

Pair = tuple[torch.Tensor, torch.Tensor]


def convert_pairs(
    model: nn.Module, pairs: Mapping[str, Pair], *, form: str = "low_rank"
) -> dict[str, FactoredLinear]:
    """Put factored layers in the place of a model's Linears, which keep their biases.

    ``model.save_pretrained`` writes a factored checkpoint from then on. Nothing is changed unless
    all pairs fit.

    Args:
        pairs: ``A (m, r)`` and ``B (r, n)`` by module name.
        form: a name in :data:`~cur_modifier.forms.sizes.FORMS` that can hold any product.

    Returns:
        The factored layers by name.

    Cost: nothing but copies for ``low_rank``; for ``id`` that of ``linalg.row_id_of_pair``.

    Raises:
        ValueError: no pairs; a name that is no Linear of the model, shapes that do not fit it, or
            numbers that are not finite; a form that can't hold the product. It names the module.
    """
    storage = find_form(form)
    if not pairs:
        raise ValueError("got no pairs: give A (m, r) and B (r, n) for one module at least.")
    linears = {name: _linear(model, name, *pair) for name, pair in pairs.items()}
    layers: dict[str, FactoredLinear] = {}
    for name, (A, B) in tqdm(pairs.items(), desc=f"Storing as {form}"):
        try:
            layers[name] = _layer(storage, linears[name], A, B)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    wrap_save_pretrained(model)
    return layers


def read_pairs(path: str | Path) -> dict[str, Pair]:
    """The pairs in a safetensors file: ``NAME.A`` and ``NAME.B`` of every module.

    Raises:
        ValueError: the file can't be read, or a tensor in it is not one of a pair.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as safetensors ({error}).") from error
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, side = key.rpartition(".")
        if not name or side not in ("A", "B"):
            raise ValueError(
                f"{path} holds {key!r}; expected the names NAME.A and NAME.B, e.g. "
                "'model.layers.0.mlp.up_proj.A'. Rename the tensors."
            )
        pairs.setdefault(name, {})[side] = tensor
    for name, found in pairs.items():
        if len(found) < 2:
            [side] = found
            raise ValueError(f"{path} holds {name}.{side} without its partner.")
    return {name: (found["A"], found["B"]) for name, found in pairs.items()}


def _linear(model: nn.Module, name: str, A: torch.Tensor, B: torch.Tensor) -> nn.Linear:
    """The Linear that a pair stands for."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        found = "no such module" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"{name}: the model has {found} there, and a pair takes the place of an nn.Linear. "
            "Name the modules as model.named_modules() does."
        )
    m, n = module.out_features, module.in_features
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0] or (len(A), B.shape[1]) != (m, n):
        raise ValueError(
            f"{name} is {m}x{n}, but A is {tuple(A.shape)} and B {tuple(B.shape)}; expected "
            f"({m}, r) and (r, {n}). Are the two swapped or transposed?"
        )
    for side, factor in (("A", A), ("B", B)):
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(f"{name}.{side} contains NaN or infinity. Compress the model again.")
    return module


def _layer(form: Form, linear: nn.Linear, A: torch.Tensor, B: torch.Tensor) -> FactoredLinear:
    m, n, rank = linear.out_features, linear.in_features, A.shape[1]
    if rank > form.sizes.largest_rank(m, n):
        raise ValueError(
            f"rank {rank} is above {form.sizes.largest_rank(m, n)} ({form.sizes.rank_limit}) for a "
            f"{m}x{n} weight in form '{form.name}'. Leave the module dense."
        )
    factors = form.of_pair(LowRank(A=A.float(), B=B.float()))
    weight = linear.weight
    bias = None if linear.bias is None else linear.bias.detach()
    layer = form.build(
        Shape(m, n, rank), bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    form.load([layer], factors, [bias])
    return layer.train(linear.training)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cur_modifier.convert",
        description="Write a dense model and a file of low-rank pairs as one checkpoint.",
    )
    parser.add_argument("model", help="directory or hub name of the dense model")
    parser.add_argument("pairs", type=Path, help="safetensors file with NAME.A and NAME.B")
    parser.add_argument("--form", default="low_rank", help="low_rank as they are, or id [low_rank]")
    parser.add_argument("--output", required=True, type=Path, help="directory of the checkpoint")
    options = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        find_form(options.form)
        pairs = read_pairs(options.pairs)
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
        layers = convert_pairs(model, pairs, form=options.form)
        model.save_pretrained(options.output)
    except (OSError, ValueError) as error:
        sys.exit(f"convert: {error}")
    try:
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)
    except (OSError, ValueError) as error:
        print(f"convert: {options.model} has no tokenizer to copy ({error})", file=sys.stderr)
    stored = sum(layer.stored_parameters for layer in layers.values())
    dense = sum(
        dense_parameters(
            layer.out_features, layer.in_features, bias=layer.effective_bias() is not None
        )
        for layer in layers.values()
    )
    print(
        f"{len(layers)} modules as {options.form} in {options.output}: {stored:,} parameters for "
        f"{dense:,}, ratio {stored / dense:.4f}"
    )


if __name__ == "__main__":
    main()
