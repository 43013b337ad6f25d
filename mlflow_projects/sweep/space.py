"""What a sweep varies, and the recipe of each point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PROJECTIONS = "re:.*(q|k|v|o|gate|up|down)_proj$"
FORMS = ("dense", "id", "cur")
OPTIMAL = "optimal"  # the selection of a row ID that approximates best
QUANTIZATIONS = ("none", "rtn4", "gptq4", "gptq3", "rtn8", "w8a8")
W8A8_UNIT = 16  # inputs of a quantized layer that 8-bit kernels want


@dataclass(frozen=True)
class Point:
    """One trial.

    Attributes:
        form: ``dense`` is not factored.
        selection: of rows and columns; "" where the form is dense.
        ratio: parameters stored after ÷ before over the seven projections; 1 where dense.
        quantization: one of ``QUANTIZATIONS``.
    """

    form: str
    selection: str
    ratio: float
    quantization: str

    def __str__(self) -> str:
        factors = self.form if self.form == "dense" else f"{self.form}-{self.ratio:g}"
        chosen = "" if self.selection in ("", OPTIMAL) else f"-{self.selection}"
        return f"{factors}{chosen}-{self.quantization}"

    @property
    def grouped(self) -> bool:
        """Whether groups of weights share a scale."""
        return self.quantization not in ("none", "w8a8")

    def params(self) -> dict[str, Any]:
        """As Optuna and MLflow have them."""
        return asdict(self)

    def recipe(self, group_size: int, seed: int) -> dict[str, Any]:
        """The recipe as data; empty for the dense model in 16 bits."""
        stage: dict[str, Any] = {}
        if self.form != "dense":
            cur: dict[str, Any] = {
                "targets": [PROJECTIONS],
                "form": self.form,
                "fit": "loss",
                "anchor": 0.25,
                "rank": {"ratio": self.ratio, "budget": "sensitivity"},
                "layers": {"select": "all"},
                "seed": seed,
            }
            if self.selection != OPTIMAL:
                cur["selection"] = self.selection
            if self.quantization == "w8a8":
                cur["multiple_of"] = W8A8_UNIT
            elif self.grouped:
                cur["multiple_of"] = group_size
            stage["cur_modifiers"] = {"CURModifier": cur}
        if self.quantization != "none":
            stage["quantization_modifiers"] = _quantization(self.quantization, group_size)
        return {"compress_stage": stage} if stage else {}


def points(
    forms: Iterable[str],
    selections: Sequence[str],
    ratios: Sequence[float],
    quantizations: Sequence[str],
) -> Iterator[Point]:
    """The grid. The dense form has one point a quantization; CUR has no selection ``optimal``."""
    for form in forms:
        for selection in selections if form != "dense" else [""]:
            if form == "cur" and selection == OPTIMAL:
                continue
            for ratio in ratios if form != "dense" else [1.0]:
                for quantization in quantizations:
                    yield Point(form, selection, ratio, quantization)


def _quantization(name: str, group_size: int) -> dict[str, Any]:
    ignore = {"ignore": ["lm_head"]}
    if name == "w8a8":
        return {"QuantizationModifier": {"scheme": "W8A8", "targets": ["Linear"], **ignore}}
    bits = int(name[-1])
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "group", "group_size": group_size}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    modifier = "GPTQModifier" if name.startswith("gptq") else "QuantizationModifier"
    return {modifier: {**ignore, **groups}}
