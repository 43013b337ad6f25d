"""The methods by name. Two kinds: one function for one weight, or a recipe for ``oneshot``.

To add one, add a line to ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_projects.bench.quality.calibration import Calibration

__all__ = [
    "METHODS",
    "Method",
    "by_function",
    "by_matrix",
    "by_recipe",
    "gptq",
    "recipe_of",
]


Compress = Callable[[Any, "Calibration", "float | None"], float]
"""Compresses a model in place, given the ratio wanted, and returns the ratio reached: parameters
stored after ÷ before, over the projections."""


@dataclass(frozen=True)
class Method:
    """A way to compress. One with its ``own_ratio`` is measured once and is given None for it."""

    compress: Compress
    own_ratio: bool = False


def by_matrix(function: str, *, calibrated: bool = True) -> Method:
    """Every weight by itself, with what it reads in the dense model.

    Args:
        function: its name in ``baselines.py``, which is imported when a model is compressed: the
            command lists the methods without torch.
        calibrated: whether it looks at the inputs.
    """

    def compress(model: Any, calibration: Calibration, ratio: float | None) -> float:
        import torch
        from tqdm import tqdm

        from mlflow_projects.bench.quality import baselines
        from mlflow_projects.bench.quality.calibration import kept_statistics, projections

        statistics = kept_statistics(model, calibration) if calibrated else {}
        before = after = 0
        for name, linear in tqdm(projections(model).items(), desc="Factoring", leave=False):
            weight = linear.weight
            factored = getattr(baselines, function)(weight.detach(), statistics.get(name), ratio)
            with torch.no_grad():
                weight.copy_(factored.product)
            bias = 0 if linear.bias is None else linear.bias.numel()
            before += weight.numel() + bias
            after += factored.stored + bias
        return after / before

    return Method(compress)


def by_recipe(
    cur: dict[str, Any],
    then: dict[str, Any] | None = None,
    *,
    rank: dict[str, Any] | None = None,
) -> Method:
    """The whole model through ``llmcompressor.oneshot``, evaluated as it comes out of it.

    Args:
        cur: fields of ``CURModifier``. A ``rank`` among them is kept, and the method has its own
            ratio; without, it is ``{ratio: …}``.
        then: modifiers that follow in the same recipe, by class name.
        rank: what to add to ``{ratio: …}``.
    """

    def compress(model: Any, calibration: Calibration, ratio: float | None) -> float:
        wish = {"ratio": ratio} | (rank or {})
        return _measured(model, calibration, CURModifier={"rank": wish} | cur, **then or {})

    return Method(compress, own_ratio="rank" in cur)


def _measured(model: Any, calibration: Calibration, **stages: dict[str, Any]) -> float:
    """Compress by modifiers one after another; parameters after ÷ before, over the projections."""
    import yaml
    from llmcompressor import oneshot

    from cur_modifier.data import windows_dataset
    from cur_modifier.modifiers.report import parameter_count
    from mlflow_projects.bench.quality.calibration import projections

    before = sum(p.numel() for m in projections(model).values() for p in m.parameters())
    whole = parameter_count(model)
    oneshot(
        model=model,
        dataset=windows_dataset(calibration.windows),
        recipe=yaml.safe_dump(recipe_of(stages), sort_keys=False),
    )
    # By difference, so that factors count wherever in the model a stage puts them.
    return 1 - (whole - parameter_count(model)) / before


def recipe_of(stages: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A recipe of modifiers by class name, one after another; ours log nothing to MLflow."""
    groups = {}
    for name, fields in stages.items():
        quiet = {} if name == "GPTQModifier" else {"mlflow": False}
        groups[f"{name}_modifiers"] = {name: fields | quiet}
    return {"compress_stage": groups}


def gptq(bits: int, group_size: int) -> dict[str, Any]:
    """Fields of a ``GPTQModifier`` that rounds all Linears but the last to ``bits``, symmetrically,
    with a scale for every ``group_size`` inputs."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"ignore": ["lm_head"], "config_groups": groups}


def by_pruning(
    prune: dict[str, Any], then: Callable[[float], tuple[float, dict[str, Any]]] | None = None
) -> Method:
    """The whole model by ``IDPruningModifier``, and by a stage behind it.

    Args:
        prune: fields of the stage, without its budget.
        then: of the ratio of the whole that of the removal, and the modifiers that follow.
    """

    def compress(model: Any, calibration: Calibration, ratio: float | None) -> float:
        assert ratio is not None
        first, later = then(ratio) if then else (ratio, {})
        budget = prune.get("budget", {}) | {"ratio": first}
        return _measured(model, calibration, IDPruningModifier=prune | {"budget": budget}, **later)

    return Method(compress)


def by_function(module: str, function: str) -> Method:
    """The whole model by a function of this package, imported when a model is compressed."""

    def compress(model: Any, calibration: Calibration, ratio: float | None) -> float:
        run = getattr(import_module(f"mlflow_projects.bench.quality.{module}"), function)
        return run(model, calibration.windows, ratio)

    return Method(compress)


EVERYTHING = {
    "targets": ["re:.*(q|k|v|o|gate|up|down)_proj$"],
    "layers": {"select": "all"},
}
# Park and Moon 2025: the ten layers that turn the hidden state least ...
TEN_LAYERS = {
    "targets": ["re:.*(q|k|gate)_proj$"],
    "layers": {"select": "angular", "count": 10},
    "form": "cur",
    "multiple_of": 1,
}
# ... and U = C⁺ W R⁺.
CURING = TEN_LAYERS | {
    "scores": "wanda",
    "selection": "deim",
    "fit": "weight",
    "rank": {"fixed": 144},
}

# Ours: recipes/id.yaml and recipes/id_refined.yaml, at any ratio.
ID = EVERYTHING | {"form": "id", "fit": "loss", "anchor": 0.25}
BUDGET = {"budget": "sensitivity"}
# Ten layers with our fit, and their healing: recipes/cur_healed.yaml. The paper chooses the layers
# by angular distance.
CUR_ANGULAR = TEN_LAYERS | {
    "selection": "greedy",
    "fit": "loss",
    "anchor": 0.25,
    "rank": {"max": 256},
}
CUR = CUR_ANGULAR | {"layers": {"select": "sensitivity", "count": 10}}
HEALING = {
    "CURHealModifier": {
        "steps": 240,
        "batch_size": 1,
        "learning_rate": 7e-3,
        "logits_weight": 1.0,
        "mlflow": False,
    }
}

# recipes/prune.yaml and its like, at any ratio. Where all layers have one count, steps of 16 come
# near each ratio.
PRUNE = {"units": ["neurons"], "shapes": "uniform", "multiple_of": 16}
PRUNE_FREE = {"units": ["neurons"], "shapes": "free", "multiple_of": 32}


def attention_as_row_ids(ratio: float) -> tuple[float, dict[str, Any]]:
    """Removal of neurons takes 0.6 of what is to be saved, row IDs of attention the rest."""
    first = 1 - 0.6 * (1 - ratio)
    attention = 0.25  # of the projections' parameters
    left = 1 - (first - ratio) / attention
    fields = ID | {"targets": ["re:.*(q|k|v|o)_proj$"], "rank": {"ratio": left, **BUDGET}}
    return first, {"CURModifier": fields}


METHODS: dict[str, Method] = {
    "dense": Method(lambda model, calibration, ratio: 1.0, own_ratio=True),
    "svd": by_matrix("svd", calibrated=False),
    "asvd": by_matrix("asvd"),
    "svd-llm": by_matrix("svd_llm"),
    "svd-llm-id": by_matrix("svd_llm_id"),
    "curing": by_recipe(CURING),
    "curing-full": by_matrix("curing"),
    "mpifa": by_function("mpifa", "mpifa"),
    "cur": by_recipe(CUR),
    "cur-angular": by_recipe(CUR_ANGULAR),
    "cur-healed": by_recipe(CUR, HEALING),
    "cur-angular-healed": by_recipe(CUR_ANGULAR, HEALING),
    # SVD-LLM's whitening, by the stage: each layer on what the compressed model gives it.
    "low-rank": by_recipe(EVERYTHING | {"form": "low_rank", "fit": "gram", "multiple_of": 1}),
    "id-gram": by_recipe(EVERYTHING | {"form": "id", "fit": "gram"}),
    "id-uniform": by_recipe(ID),
    "id": by_recipe(ID, rank=BUDGET),
    "id-refined": by_recipe(ID | {"refine": {}}, rank=BUDGET),
    "prune": by_pruning(PRUNE),
    "prune-consumers": by_pruning(PRUNE_FREE | {"correct": "consumers"}),
    "prune-free": by_pruning(PRUNE_FREE),
    "prune-refined": by_pruning(PRUNE_FREE | {"refine": {}}),
    "prune-id": by_pruning(PRUNE_FREE, attention_as_row_ids),
}
