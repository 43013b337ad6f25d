"""The healing stage: what it asks for, and that it never makes the model worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from pydantic import ValidationError

from cur_modifier.forms.base import factored_layers
from cur_modifier.modifiers.cur.modifier import CURModifier
from cur_modifier.modifiers.heal.modifier import CURHealModifier

Q = "model.layers.1.self_attn.q_proj"


def cur(**fields: Any) -> CURModifier:
    given: dict[str, Any] = {
        "targets": ["re:.*q_proj$"],
        "rank": {"fixed": 4},
        "layers": {"select": [1]},
        "mlflow": False,
    }
    return CURModifier(**given | fields)


def heal(**fields: Any) -> CURHealModifier:
    given: dict[str, Any] = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "validate_every": 2}
    return CURHealModifier(**given | {"mlflow": False} | fields)


@pytest.fixture
def healed(
    state: Any, recipe: Callable[..., Any], calibrated: Callable[..., Any]
) -> Callable[..., None]:
    """``healed(first, stage)`` takes both stages of a recipe through their events."""

    def run(first: CURModifier, stage: CURHealModifier) -> None:
        recipe(first, stage)
        first.on_initialize(state)
        stage.on_initialize(state)
        recipe(first)
        first.on_calibration_start(state, None)
        with torch.no_grad():
            for batch in state.data.calib:
                state.model(**batch)
        first.on_sequential_epoch_end(state, None, list(state.model.modules()))
        first.on_calibration_end(state, None)
        before.update({n: t.clone() for n, t in state.model.state_dict().items()})
        stage.on_calibration_start(state, None)
        stage.on_finalize(state)

    before: dict[str, torch.Tensor] = {}
    run.before = before  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize(("form", "free"), [("cur", "cur_u"), ("id", "id_t"), ("low_rank", "lr_a")])
def test_the_free_factor_alone_is_trained(
    model: Any, healed: Any, form: str, free: str, logged: list[str]
) -> None:
    healed(cur(form=form), heal())
    after = model.state_dict()
    moved = {name for name, t in after.items() if not torch.equal(t, healed.before[name])}
    assert moved <= {f"{Q}.{free}.weight"}
    [message] = [m for m in logged if m.startswith("healing: validation loss")]
    start, best = (float(message.split()[place]) for place in (3, 5))
    assert best <= start and bool(moved) == ("at step 0 of" not in message)
    layer = factored_layers(model)[Q]
    assert layer.teacher is None and layer.dense is None


def test_a_run_continues_from_its_folder(model: Any, healed: Any, tmp_path: Any) -> None:
    healed(cur(), heal(checkpoint_dir=str(tmp_path / "state"), checkpoint_every=2))
    assert (tmp_path / "state/training_state.safetensors").is_file()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_steps": 4}, r"warmup_steps 4 leaves none of 4 steps"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"validation_share": 0.6}, "validation_share"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        heal(**fields)


def test_a_dense_model_has_nothing_to_heal(state: Any, recipe: Callable[..., Any]) -> None:
    stage = recipe(heal())
    with pytest.raises(ValueError, match=r"finds no factored modules.*behind the CURModifier"):
        stage.on_initialize(state)


def test_a_factored_model_of_an_earlier_run_has_no_teacher(
    state: Any, calibrated: Callable[..., Any], recipe: Callable[..., Any]
) -> None:
    calibrated(cur())
    with pytest.raises(ValueError, match=rf"'{Q}'\] were factored in an earlier run"):
        recipe(heal()).on_initialize(state)


@pytest.fixture
def installed(state: Any, recipe: Callable[..., Any]) -> Any:
    recipe(cur()).on_initialize(state)
    return state


def test_quantized_factors_are_refused(installed: Any, recipe: Callable[..., Any]) -> None:
    layer = factored_layers(installed.model)[Q]
    layer.cur_u.quantization_scheme = object()
    with pytest.raises(ValueError, match=rf"'{Q}\.cur_u'\] are already quantized.*Heal first"):
        recipe(heal()).on_initialize(installed)


def test_too_little_data_is_refused(installed: Any, recipe: Callable[..., Any]) -> None:
    stage = recipe(heal(batch_size=8))
    with pytest.raises(ValueError, match=r"batch_size 8 is more than the 7 windows"):
        stage.on_initialize(installed)
    installed.data.calib = None
    with pytest.raises(ValueError, match=r"no calibration data.*Pass `dataset=`"):
        stage.on_initialize(installed)


def test_stages_in_one_pass_are_refused_and_the_teachers_let_go(
    installed: Any, recipe: Callable[..., Any]
) -> None:
    stage = recipe(heal())
    stage.on_initialize(installed)
    layer = factored_layers(installed.model)[Q]
    assert layer.teacher is layer.dense
    with pytest.raises(ValueError, match=r"have no fitted factors to heal.*pipeline='independent'"):
        stage.on_calibration_start(installed, None)
    stage.on_finalize(installed)
    assert layer.teacher is None


def test_a_folder_that_cannot_be_made_is_refused_at_once(
    installed: Any, recipe: Callable[..., Any], tmp_path: Any
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint_dir .* can't be made"):
        recipe(heal(checkpoint_dir=str(tmp_path / "file"))).on_initialize(installed)
