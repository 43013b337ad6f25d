"""Units are found by trying, and a model without them is the model that reads zeros for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.linalg import interpolative, kept_features
from cur_modifier.passes.context import trial
from cur_modifier.structure.layers import decoder_layers
from cur_modifier.structure.operators import as_matrix
from cur_modifier.structure.removal import Kind, Units, remove
from cur_modifier.structure.search import find_units

from .models import BUILDERS, GPT2, GROUPED, OPT, SIZES, built

KINDS: list[Kind] = ["heads", "neurons"]
# Heads and neurons of a layer; 0 where they can't be removed.
COUNTS = {
    "Llama": (4, 48),
    "grouped Llama": (2, 48),
    "Llama with biases": (2, 48),
    "Qwen3": (2, 48),
    "Phi": (4, 48),
    "Phi3": (0, 48),  # its heads are split where the config says, not where a layer does
    "Gemma2": (2, 48),
    "OPT": (4, 48),
    "GPT2": (4, 128),
    "GPTNeoX": (4, 48),
    "BERT": (4, 48),
    "RoBERTa": (4, 48),
    "Mixtral": (2, 0),  # experts are no Linears
    "OLMo2": (0, 48),  # a norm over all heads
    "Bloom": (0, 256),  # ALiBi
}
# Attributes that count units, and how many each unit counts.
ATTRIBUTES = {
    ("OPT", "heads"): {"self_attn.num_heads": 1},
    ("GPT2", "heads"): {"attn.split_size": 8},
}
REMOVABLE = [
    (name, kind)
    for name, counts in COUNTS.items()
    for kind, count in zip(KINDS, counts, strict=True)
    if count
]
LAYER = "model.layers.0"


def found_in(model: Any, kinds: Sequence[Kind] = KINDS) -> list[Units]:
    with trial(model) as run:
        return find_units(model, [name for name, _ in decoder_layers(model)], kinds, run)


@cache
def searched(name: str) -> tuple[Any, list[Units]]:
    """A model, which is not to be changed, and its units."""
    model = built(name)
    return model, found_in(model)


def some(units: Units, seed: int = 0) -> torch.Tensor:
    """Half of the units at random, others in every layer."""
    generator = torch.Generator().manual_seed(seed + int(units.layer.rpartition(".")[2]))
    return torch.randperm(units.count, generator=generator)[: units.count // 2].sort().values


@contextmanager
def zeros_read(model: nn.Module, kept: Mapping[str, tuple[Units, torch.Tensor]]) -> Iterator[None]:
    """Consumers read zeros in the place of all units but the kept ones."""

    def blank(units: Units, stay: torch.Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = torch.zeros_like(args[0])
            left = kept_features(units.reads, stay, x.shape[-1])
            x[..., left] = args[0][..., left]
            return (x, *args[1:])

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(blank(units, stay))
        for name, (units, stay) in kept.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    return model(ids).logits


def attributes_of(units: Units) -> dict[str, int]:
    """By their names inside the layer."""
    return {
        f"{name.removeprefix(units.layer)}.{attribute}".strip("."): each
        for (name, attribute), each in units.attributes.items()
    }


def test_all_models_have_an_expectation() -> None:
    assert COUNTS.keys() == BUILDERS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_every_layer_has_the_units_that_can_be_removed(name: str) -> None:
    model, found = searched(name)
    wanted = dict(zip(KINDS, COUNTS[name], strict=True))
    layers = sorted({each.layer for each in found})
    assert len(layers) == 2 and set(layers) <= {n for n, _ in decoder_layers(model)}
    expected = [(at, kind, count) for at in layers for kind, count in wanted.items() if count]
    assert [(each.layer, each.kind, each.count) for each in found] == expected
    for each in found:
        assert attributes_of(each) == ATTRIBUTES.get((name, each.kind), {})
        assert all(module.startswith(f"{each.layer}.") for module in each.modules)


@pytest.mark.parametrize("name", COUNTS)
def test_units_share_no_feature(name: str) -> None:
    model, found = searched(name)
    for each in found:
        for features in (each.reads, *each.producers.values()):
            assert len(features) == each.count and features.unique().numel() == features.numel()
        width = as_matrix(model.get_submodule(each.consumer)).shape[1]
        assert sorted(each.reads.flatten().tolist()) == list(range(width))
        for producer, features in each.producers.items():
            outputs = len(as_matrix(model.get_submodule(producer)))
            assert sorted(features.flatten().tolist()) == list(range(outputs))


@pytest.mark.parametrize(("name", "kind"), REMOVABLE)
def test_without_units_the_model_is_the_one_that_reads_zeros(name: str, kind: Kind) -> None:
    original, found = searched(name)
    model = copy.deepcopy(original)
    units = {each.consumer: (each, some(each)) for each in found if each.kind == kind}
    with zeros_read(model, units):
        wanted = logits(model)
    assert (wanted - logits(model)).norm() > 0.01 * wanted.norm()  # or zeros would show nothing
    before = sum(p.numel() for p in model.parameters())
    for each, kept in units.values():
        remove(model, each, kept)
    torch.testing.assert_close(
        logits(model), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
    )
    assert sum(p.numel() for p in model.parameters()) < before
    for each, kept in units.values():
        for (module, attribute), worth in each.attributes.items():
            assert getattr(model.get_submodule(module), attribute) == worth * len(kept)


@pytest.mark.parametrize("name", [name for name, counts in COUNTS.items() if all(counts)])
@pytest.mark.parametrize("order", [1, -1])
def test_both_kinds_can_go_one_after_the_other(name: str, order: int) -> None:
    original, found = searched(name)
    model = copy.deepcopy(original)
    units = {each.consumer: (each, some(each, seed=7)) for each in found}
    with zeros_read(model, units):
        wanted = logits(model)
    for each, kept in list(units.values())[::order]:
        remove(model, each, kept)
    torch.testing.assert_close(
        logits(model), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("name", ["Llama with biases", "OPT", "GPT2", "BERT", "Bloom"])
def test_a_search_changes_nothing(name: str) -> None:
    model = built(name).train()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    plain = {
        (key, attribute): value
        for key, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, int | float | str)
    }
    modules = dict(model.named_modules())
    found_in(model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(
        vars(model.get_submodule(key))[attribute] == value
        for (key, attribute), value in plain.items()
    )
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


@pytest.mark.parametrize("name", ["grouped Llama", "Phi3", "OPT", "GPT2", "GPTNeoX", "Bloom"])
def test_the_same_is_found_in_bfloat16(name: str) -> None:
    """Where the rounding of a pass would hide a wrong layout: layers are tried in float32."""
    found = found_in(built(name, torch.bfloat16))
    wanted = searched(name)[1]
    assert [(u.consumer, u.count, u.attributes) for u in found] == [
        (u.consumer, u.count, u.attributes) for u in wanted
    ]
    for one, other in zip(found, wanted, strict=True):
        assert (
            torch.equal(one.reads, other.reads) and one.producers.keys() == other.producers.keys()
        )
        assert all(torch.equal(one.producers[key], other.producers[key]) for key in one.producers)


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("Llama", SIZES | {"intermediate_size": 32}),
        ("Llama", GROUPED | {"intermediate_size": 32}),
        ("Llama", GROUPED | {"intermediate_size": 16}),
        ("OPT", OPT | {"ffn_dim": 32}),
        ("GPT2", GPT2 | {"n_inner": 32}),
        ("GPTNeoX", SIZES | {"intermediate_size": 96}),
        ("Bert", SIZES | {"intermediate_size": 32}),
    ],
)
def test_attention_that_is_as_wide_as_the_mlp_has_no_neurons(
    name: str, wide: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    head = {"Bert": "ForMaskedLM", "GPT2": "LMHeadModel"}.get(name, "ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**wide)
    monkeypatch.setitem(BUILDERS, "wide", lambda: getattr(transformers, f"{name}{head}")(config))
    model = built("wide")
    found = found_in(model)
    assert [each.kind for each in found] == KINDS * 2
    for each in found:
        inside = any("attn" in m or "attention" in m for m in each.modules)
        assert inside is (each.kind == "heads")


def test_one_group_of_heads_stays() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))
    assert found_in(model, ["heads"]) == []


def test_only_what_is_asked_for_is_looked_for() -> None:
    model, _ = searched("grouped Llama")
    with trial(model) as run:
        assert find_units(model, [], KINDS, run) == []
        assert find_units(model, [LAYER], [], run) == []
        [neurons] = find_units(model, [LAYER], ["neurons"], run)
        turned = find_units(model, [LAYER], KINDS[::-1], run)
    assert (neurons.layer, neurons.kind) == (LAYER, "neurons")
    assert [each.kind for each in turned] == KINDS[::-1]


@pytest.mark.parametrize("part", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])
def test_factored_and_quantized_modules_are_not_looked_at(part: str) -> None:
    model = built("grouped Llama")
    linear = model.get_submodule(f"{LAYER}.{part}")
    linear.quantization_scheme = object()
    kinds = [(each.layer, each.kind) for each in found_in(model)]
    assert (LAYER, "neurons") not in kinds and len(kinds) == 3
    del linear.quantization_scheme
    factored = RowIDLinear.from_factors(interpolative(linear.weight.detach(), 8))
    model.set_submodule(f"{LAYER}.{part}", factored)
    kinds = [(each.layer, each.kind) for each in found_in(model)]
    assert (LAYER, "neurons") not in kinds and len(kinds) == 3


@pytest.mark.parametrize("function", [nn.LayerNorm(48), nn.Softmax(dim=-1), nn.Tanh()])
def test_a_function_that_mixes_neurons_leaves_none(function: nn.Module) -> None:
    model = built("grouped Llama")
    model.get_submodule(LAYER).mlp.act_fn = function
    kinds = [(each.layer, each.kind) for each in found_in(model)]
    assert ((LAYER, "neurons") in kinds) is isinstance(function, nn.Tanh)


def test_neurons_that_someone_else_reads_stay() -> None:
    """A second reader of what gate and up compute would go without."""
    model = built("grouped Llama")
    mlp = model.get_submodule(LAYER).mlp
    mlp.other = nn.Linear(48, 32, bias=False)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in mlp.named_children():
                self.add_module(name, child)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(hidden) + self.other(hidden)

    model.get_submodule(LAYER).mlp = Both()
    kinds = [(each.layer, each.kind) for each in found_in(model)]
    assert (LAYER, "neurons") not in kinds and len(kinds) == 3


def test_heads_that_the_config_counts_otherwise_are_not_found() -> None:
    """Half a head is none, though the sizes would go together."""
    model = built("Llama")
    for each in found_in(model, ["heads"]):
        remove(model, each, torch.tensor([1, 3]))
    assert found_in(model, ["heads"]) == []
    assert [each.count for each in found_in(model, ["neurons"])] == [48, 48]
