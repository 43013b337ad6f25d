"""Perplexities of a decoder, compressed case by case: a fresh model each, the same windows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from mlflow_projects.bench.quality.methods import recipe_of
from mlflow_projects.reproduce import domains
from mlflow_projects.reproduce.cases import Case, Row

__all__ = ["Perplexities"]


class Perplexities:
    """Runs recipes on a model and measures it on texts.

    Raises:
        OSError, ValueError: no such model or text, too few tokens, more layers than there are.
    """

    def __init__(
        self, options: argparse.Namespace, texts: Sequence[str], cases: Sequence[Case]
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from cur_modifier.compress import model_source
        from cur_modifier.data import token_windows

        self._source = source = model_source(options.model)
        depth = AutoConfig.from_pretrained(source).num_hidden_layers
        if max(map(_layers, cases)) > depth - 2:
            raise ValueError(
                f"layers {options.layers} are more than the {depth - 2} that there are between the "
                "first and the last. Lower it."
            )
        self._texts = texts
        length = options.sequence_length
        tokenizer = AutoTokenizer.from_pretrained(source)

        def windows(documents: list[str], wanted: int) -> Any:
            return token_windows(documents, tokenizer, windows=wanted, sequence_length=length)

        calibrate = {case.calibrate for case in cases}
        self._calibration, self._evaluation = {}, {}
        for name in sorted(calibrate | {*texts}):
            try:
                found = domains.read(name, options.data)
                if name in calibrate:
                    self._calibration[name] = windows(found.calibration, options.samples)
                if name in texts:
                    self._evaluation[name] = windows(found.evaluation, options.windows)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def measure(self, case: Case) -> Row:
        """Ratios, perplexities and seconds of one compression.

        A budget that no selection meets is no failure of the experiment: its row says so.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from cur_modifier.evaluate import perplexity
        from cur_modifier.modifiers.report import parameter_bytes

        model = AutoModelForCausalLM.from_pretrained(self._source, dtype=torch.float32)
        before, layers = _numbers(model), _numbers_of_layers(model)
        started = time.perf_counter()
        row: Row = {}
        try:
            if case.stages:
                self._compress(model, case)
        except ValueError as error:
            if not case.may_fail:
                raise
            print(f"refused: {error}", flush=True)
            nothing = dict.fromkeys(f"perplexity {text}" for text in self._texts)
            return (
                {"layer ratio": None, "model ratio": None, "MB": None} | nothing | {"seconds": 0.0}
            )
        seconds = time.perf_counter() - started
        if case.with_sizes:
            row["layer ratio"] = _numbers_of_layers(model) / layers
        row["model ratio"] = _numbers(model) / before
        if case.with_sizes:
            row["MB"] = _stored_bytes(model, parameter_bytes(model)) / 1e6
        for text in self._texts:
            found = perplexity(model, self._evaluation[text], bfloat16=True)
            row[f"perplexity {text}"] = found.perplexity
        return row | {"seconds": round(seconds, 1)}

    def _compress(self, model: Any, case: Case) -> None:
        import yaml
        from llmcompressor import oneshot

        import cur_modifier  # noqa: F401 - registers the stages
        from cur_modifier.data import windows_dataset

        ids = self._calibration[case.calibrate]
        oneshot(
            model=model,
            dataset=windows_dataset(ids),
            recipe=yaml.safe_dump(recipe_of(case.stages), sort_keys=False),
            num_calibration_samples=len(ids),
        )


def _layers(case: Case) -> int:
    chosen = case.stages.get("CURModifier", {}).get("layers", {})
    return int(chosen.get("count", 0))


def _numbers_of_layers(model: Any) -> int:
    """What stands in the decoder layers, as a recipe's ``ratio`` counts it."""
    from cur_modifier.structure.layers import decoder_layers

    return sum(_numbers(layer) for _, layer in decoder_layers(model))


def _numbers(module: Any) -> int:
    """Parameters, tied ones once; not the scales and zero points of a quantization."""
    unique = {
        parameter.data_ptr(): parameter.numel()
        for name, parameter in module.named_parameters()
        if not name.endswith(("_scale", "_zero_point", "_g_idx"))
    }
    return sum(unique.values())


def _stored_bytes(model: Any, as_it_is: int) -> int:
    """Bytes of a checkpoint in bfloat16: what is not quantized is float32 here."""
    import torch

    seen: dict[int, int] = {}
    for module in model.modules():
        quantized = getattr(module, "quantization_scheme", None) is not None
        for name, parameter in module.named_parameters(recurse=False):
            halved = parameter.dtype is torch.float32 and not (quantized and name == "weight")
            seen[parameter.data_ptr()] = 2 * parameter.numel() if halved else 0
    return as_it_is - sum(seen.values())
