"""What the loss thinks of each module: measured once, kept, and never taken for another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.linalg import curvature_spectrum
from cur_modifier.passes import sensitivity
from cur_modifier.passes.sensitivity import Sensitivity, fingerprint, load_or_measure, measure
from cur_modifier.structure.layers import decoder_layers

ATTENTION = "model.layers.0.self_attn"


@pytest.fixture
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(0, num_hidden_layers=2)


def batches(count: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (1, 8), generator=generator)} for _ in range(count)]


def modules(model: Any) -> dict[str, list[nn.Linear]]:
    """One by itself, and two as one."""
    q, k, o = (model.get_submodule(f"{ATTENTION}.{name}_proj") for name in "qko")
    return {f"{ATTENTION}.o_proj": [o], f"{ATTENTION}.q_proj+k_proj": [q, k]}


def measured(model: Any, *, seed: int = 0) -> Sensitivity:
    return measure(model, modules(model), decoder_layers(model), batches(), seed=seed)


def kept(model: Any, cache: Path | None, **changes: Any) -> Sensitivity:
    given: dict[str, Any] = {"samples": 3, "seed": 0, "cache": cache} | changes
    data = given.pop("batches", batches())
    return load_or_measure(model, modules(model), decoder_layers(model), data, **given)


def same(one: Sensitivity, other: Sensitivity) -> bool:
    pairs = [(one.outputs, other.outputs), (one.spectra, other.spectra)]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs
    )


def test_metrics_are_second_moments_of_gradients(model: Any) -> None:
    found = measured(model)
    assert found.outputs.keys() == {*modules(model), "model.layers.0", "model.layers.1"}
    assert found.outputs[f"{ATTENTION}.o_proj"].shape == (16, 16)
    assert found.outputs[f"{ATTENTION}.q_proj+k_proj"].shape == (24, 24)
    for H in found.outputs.values():
        wide = H.double()
        torch.testing.assert_close(wide, wide.T)
        values = torch.linalg.eigvalsh(wide)
        assert values[-1] > 0 and values[0] >= -0.01 * values[-1]  # rounded to bfloat16


def test_spectra_are_those_of_the_weight_between_both_metrics(model: Any) -> None:
    found = measured(model)
    name = f"{ATTENTION}.o_proj"
    assert found.spectra[name].shape == (16,) and bool((found.spectra[name].diff() <= 0).all())
    read: list[torch.Tensor] = []
    [o] = modules(model)[name]
    handle = o.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    x = torch.cat(read).flatten(0, -2)
    expected = curvature_spectrum(o.weight.detach(), x.T @ x / len(x), found.outputs[name])
    scale = float(expected[0])
    torch.testing.assert_close(found.spectra[name].double(), expected, rtol=0.02, atol=1e-3 * scale)


def test_the_model_is_as_before(model: Any) -> None:
    model.train()
    model.lm_head.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    measured(model)
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]
        assert p.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_the_labels_follow_the_seed(model: Any) -> None:
    assert same(measured(model), measured(model))
    assert not same(measured(model), measured(model, seed=1))


def test_wide_outputs_keep_their_diagonal(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = measured(model).outputs
    monkeypatch.setattr(sensitivity, "FULL_METRIC_OUTPUTS", 20)
    found = measured(model).outputs
    name = f"{ATTENTION}.q_proj+k_proj"
    torch.testing.assert_close(found[name], full[name].diagonal(), rtol=0.02, atol=0)
    assert found[f"{ATTENTION}.o_proj"].ndim == 2


def test_a_second_call_reads_what_the_first_kept(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUR_MODIFIER_CACHE", str(tmp_path / "users"))
    for cache in (tmp_path / "own.safetensors", None):
        first = kept(model, cache)
        with monkeypatch.context() as context:
            context.setattr(sensitivity, "measure", lambda *_, **__: pytest.fail("measured again"))
            assert same(kept(model, cache), first)
    assert len(list((tmp_path / "users/sensitivity").iterdir())) == 1
    kept(model, None, seed=1)
    assert len(list((tmp_path / "users/sensitivity").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "settings"),
        ({"samples": 1}, "data and other settings"),
        ({"batches": batches(seed=5)}, "data"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    model: Any, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    cache = tmp_path / "own.safetensors"
    kept(model, cache)
    with pytest.raises(ValueError, match=rf"holds sensitivities of another {what}\. Name another"):
        kept(model, cache, **change)


def test_a_cache_of_another_model_is_refused(
    model: Any, small_llama: Callable[..., Any], tmp_path: Path
) -> None:
    cache = tmp_path / "own.safetensors"
    kept(model, cache)
    with pytest.raises(ValueError, match=r"of another model\. Name another"):
        kept(small_llama(1, num_hidden_layers=2), cache)


def test_a_broken_file_of_the_user_is_refused_and_one_of_ours_measured_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "own.safetensors"
    cache.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"is no file of sensitivities.*Delete it"):
        kept(model, cache)
    monkeypatch.setenv("CUR_MODIFIER_CACHE", str(tmp_path / "users"))
    first = kept(model, None)
    [file] = (tmp_path / "users/sensitivity").iterdir()
    file.write_bytes(b"half")
    assert same(kept(model, None), first)


def test_a_folder_that_takes_no_file_costs_a_warning(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert same(kept(model, tmp_path / "file/own.safetensors"), measured(model))


def test_a_module_that_nothing_reaches_is_named(model: Any) -> None:
    unread = {"expert": [nn.Linear(2, 2)]}
    with pytest.raises(ValueError, match=r"no gradient reached expert: .*Put it on `ignore`"):
        measure(model, unread, [], batches(), seed=0)


def test_a_fingerprint_names_what_a_measurement_depends_on(model: Any) -> None:
    def of(**changes: Any) -> dict[str, str]:
        given = {"batches": batches(), "samples": 3, "seed": 0} | changes
        return fingerprint(model, modules(model), *given.values())

    before = of()
    assert before.keys() == {"model", "data", "settings"} and of() == before
    assert of(seed=1)["settings"] != before["settings"]
    assert of(batches=batches(seed=1))["data"] != before["data"]
    nn.init.zeros_(model.lm_head.weight)
    assert of()["model"] != before["model"]


def traces(name: str, W: torch.Tensor, G: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """A curve of two numbers that takes all that it is given."""
    return torch.stack([(H @ W @ G * W).sum(), torch.tensor(float(len(name)))])


def test_another_curve_is_made_of_weight_and_metrics(model: Any, tmp_path: Path) -> None:
    plain = measured(model)
    found = kept(model, tmp_path / "own.safetensors", curve=("traces", traces))
    assert found.outputs.keys() == plain.outputs.keys()
    assert all(torch.equal(found.outputs[name], H) for name, H in plain.outputs.items())
    for name, curve in found.spectra.items():
        assert curve.shape == (2,) and curve.dtype == torch.float32
        # The trace is the sum of the squared singular values.
        assert float(curve[0]) == pytest.approx(float(plain.spectra[name].sum()), rel=1e-3)
        assert float(curve[1]) == len(name)


def test_a_file_of_one_curve_is_not_taken_for_another(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "own.safetensors"
    curve = kept(model, cache, curve=("traces", traces))
    with monkeypatch.context() as context:
        context.setattr(sensitivity, "measure", lambda *_, **__: pytest.fail("measured again"))
        assert same(kept(model, cache, curve=("traces", traces)), curve)
    for other in (None, ("others", traces)):
        with pytest.raises(ValueError, match=r"of another settings\. Name another file"):
            kept(model, cache, curve=other)
    monkeypatch.setenv("CUR_MODIFIER_CACHE", str(tmp_path / "users"))
    for other in (None, ("traces", traces), ("others", traces), None, ("traces", traces)):
        found = kept(model, None, curve=other)
        assert same(found, curve if other else measured(model))
    assert len(list((tmp_path / "users/sensitivity").iterdir())) == 3


def test_a_fingerprint_without_a_curve_is_what_it_was(model: Any) -> None:
    given = (modules(model), batches(), 3, 0)
    plain = fingerprint(model, *given)
    assert fingerprint(model, *given, "") == plain and "curve" not in plain["settings"]
    assert fingerprint(model, *given, "traces") != plain


def test_gradients_of_convolutions_are_rows_of_positions(
    small_resnet: Callable[..., Any], images: Any
) -> None:
    """``E[g gᵀ]`` over all positions of all images, of a classifier's labels."""
    model = small_resnet(0)
    name = "resnet.encoder.stages.1.layers.1.layer.1.convolution"
    module = model.get_submodule(name)
    labelled = [b | {"labels": torch.arange(4)} for b in images]
    seen: list[torch.Tensor] = []

    def curve(_: str, W: torch.Tensor, G: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        seen.append(G)
        return W.new_zeros(1)

    layer = ("resnet.encoder.stages.1.layers.1", model.get_submodule(name.rsplit(".", 3)[0]))
    found = measure(model, {name: [module]}, [layer], labelled, seed=0, curve=curve)
    total, positions = torch.zeros(16, 16), 0
    gram, reads = torch.zeros(144, 144), []
    handle = module.register_forward_hook(lambda _, args, out: reads.append((args[0], out)))
    for batch in labelled:
        loss = model(**batch).loss * 4
        x, out = reads.pop()
        [g] = torch.autograd.grad(loss, out)
        rows = g.movedim(1, -1).reshape(-1, 16)
        total, positions = total + rows.T @ rows, positions + len(rows)
        patches = nn.functional.unfold(x, 3, padding=1).mT.reshape(-1, 144)
        gram += patches.T @ patches
    handle.remove()
    torch.testing.assert_close(
        found.outputs[name].float(),
        total / positions,
        rtol=0.02,
        atol=1e-3 * float(total.abs().max()) / positions,
    )
    torch.testing.assert_close(seen[0], (gram / positions).detach(), rtol=1e-3, atol=1e-5)
    assert found.outputs[layer[0]].shape == (16, 16)


def test_other_images_are_another_measurement(
    small_resnet: Callable[..., Any], images: Any
) -> None:
    model = small_resnet(0)
    one, other = (fingerprint(model, {}, data, 4, 0) for data in (images, images[1:]))
    assert one["data"] != other["data"] and one["model"] == other["model"]
