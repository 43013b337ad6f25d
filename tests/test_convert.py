"""Pairs of a published low-rank model, as a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cur_modifier.convert import convert_pairs, main, read_pairs

GATE, QUERY = "model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"
PROMPT = torch.arange(20)[None]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


def pairs_of(model: Any, rank: int = 12) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name in (GATE, QUERY):
        U, s, V = torch.linalg.svd(model.get_submodule(name).weight.detach())
        found[name] = (U[:, :rank] * s[:rank], V[:rank])
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def with_products(model: Any, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """What the model answers with the product of each pair as its weight."""
    for name, (A, B) in pairs.items():
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(A @ B)
    return logits(model)


@pytest.mark.parametrize("form", ["low_rank", "id"])
def test_the_model_answers_with_the_products(model: Any, form: str, tmp_path: Path) -> None:
    pairs = pairs_of(model)
    torch.manual_seed(0)
    wanted = with_products(LlamaForCausalLM(model.config).eval(), pairs)
    layers = convert_pairs(model, pairs, form=form)
    assert list(layers) == [GATE, QUERY]
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-5)


def test_a_row_id_stores_fewer_numbers(model: Any) -> None:
    rank = 12
    pairs = pairs_of(model, rank)
    stored = {
        form: sum(
            layer.stored_parameters
            for layer in convert_pairs(LlamaForCausalLM(model.config), pairs, form=form).values()
        )
        for form in ("low_rank", "id")
    }
    assert stored["low_rank"] - stored["id"] == len(pairs) * rank**2


@pytest.mark.parametrize(
    ("changed", "form", "message"),
    [
        ({}, "low_rank", None),
        ({"model.layers.9.x": (torch.ones(2, 1), torch.ones(1, 2))}, "id", "no such module there"),
        ({"model.norm": (torch.ones(2, 1), torch.ones(1, 2))}, "id", "a LlamaRMSNorm there"),
        ({GATE: (torch.ones(32, 4), torch.ones(4, 48))}, "id", r"is 48x32, but A is \(32, 4\)"),
        ({GATE: (torch.ones(48, 4), torch.ones(5, 32))}, "id", r"swapped or transposed"),
        ({GATE: (torch.ones(48, 4) / 0, torch.ones(4, 32))}, "id", "gate_proj.A contains NaN or"),
        ({QUERY: (torch.ones(32, 32), torch.eye(32))}, "id", "q_proj: rank 32 is above 31"),
        ({GATE: (torch.ones(48, 33), torch.ones(33, 32))}, "low_rank", "rank 33 is above 32"),
        ({}, "cur", "gate_proj: form 'cur' can't hold any product"),
        ({}, "svd", "no form 'svd'"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(
    model: Any, changed: dict[str, Any], form: str, message: str | None
) -> None:
    pairs = pairs_of(model) | changed
    if message is None:
        convert_pairs(model, pairs, form=form)
        return
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        convert_pairs(model, pairs, form=form)
    assert list(model.modules()) == before


def test_no_pairs_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="got no pairs"):
        convert_pairs(model, {})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.ones(2, 2)}, "holds 'a.weight'; expected the names NAME.A and NAME.B"),
        ({"a.A": torch.ones(2, 1)}, "holds a.A without its partner"),
        ({"A": torch.ones(2, 1)}, "holds 'A'"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "pairs.safetensors")
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "pairs.safetensors")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.safetensors").write_text("not safetensors")
    for name in ("pairs.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=r"can't be read as safetensors"):
            read_pairs(tmp_path / name)


def test_the_command_writes_a_checkpoint(model: Any, tmp_path: Path, capsys: Any) -> None:
    model.save_pretrained(tmp_path / "dense")
    pairs = pairs_of(model)
    tensors = {f"{n}.{s}": t for n, pair in pairs.items() for s, t in zip("AB", pair, strict=True)}
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "pairs.safetensors")
    given = [str(tmp_path / "dense"), str(tmp_path / "pairs.safetensors"), "--form", "id"]
    main([*given, "--output", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "2 modules as id" in said.out and "ratio 0.5679" in said.out
    assert "has no tokenizer" in said.err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), with_products(model, pairs), rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match=r"convert: .*no form 'svd'"):
        main([*given[:2], "--form", "svd", "--output", str(tmp_path / "out")])
