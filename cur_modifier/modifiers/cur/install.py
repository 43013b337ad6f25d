"""Putting empty factored modules in the model, which answer with their dense weight until fitted.

Later stages of the recipe then attach to the factors at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.offload import set_onload_device
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from torch import nn

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.sizes import dense_parameters
from cur_modifier.modifiers.cur.candidates import Candidate
from cur_modifier.modifiers.cur.followers import follower_bits
from cur_modifier.modifiers.cur.plan import Plan
from cur_modifier.modifiers.report import ModuleRecord

__all__ = ["Installed", "install", "onload", "quantization_noise"]


@dataclass(frozen=True)
class Installed:
    """A candidate whose factored modules, by name, are in the model and not fitted yet."""

    candidate: Candidate
    containers: dict[str, FactoredLinear]

    @property
    def first(self) -> FactoredLinear:
        """The module that runs first: what it reads, all of them read."""
        return next(iter(self.containers.values()))

    @property
    def last(self) -> FactoredLinear:
        """The module that runs last: after it all of them are done."""
        return next(reversed(self.containers.values()))


def install(
    model: nn.Module, plan: Plan, stage: Modifier
) -> tuple[list[Installed], dict[str, ModuleRecord]]:
    """Put the modules of all candidates that have a rank in the model.

    Returns:
        Them, and a record for every module by name, dense ones too.
    """
    installed: list[Installed] = []
    records: dict[str, ModuleRecord] = {}
    for candidate in plan.candidates:
        own = _records(plan, candidate)
        records |= {record.name: record for record in own}
        if candidate.rank is None:
            energy = plan.settings.rank.energy
            why = (
                f"the rank that holds energy {energy} would store no less than"
                if energy is not None
                else "the budget gives it all of"
            )
            before = sum(record.parameters_before for record in own)
            logger.warning(f"{candidate.name} stays dense: {why} its {before} parameters")
            continue
        form = plan.settings.storage
        # Followers are known only now; the pass that fits the factors runs without them.
        bits = follower_bits(stage, candidate, form) if form.expects_noise else None
        containers = candidate.empty_modules(form)
        for record, container in zip(own, containers.values(), strict=True):
            record.expected_noise = quantization_noise(bits)
            _describe(record, candidate, container)
            linear = candidate.members[record.name]
            container.stand_in(linear)
            container.train(linear.training)
            model.set_submodule(record.name, container)
        installed.append(Installed(candidate, containers))
    return installed, records


def onload(installed: Sequence[Installed]) -> None:
    """Bring the dense layers that answer for them to the accelerator, where there is one."""
    if not torch.accelerator.is_available():
        return
    for each in installed:
        for container in each.containers.values():
            if container.dense is not None:
                set_onload_device(container.dense, get_main_device())


def quantization_noise(bits: int | None) -> float:
    """Relative error power of rounding weights to ``bits``, 0 for None.

    A symmetric grid over ±2.5 standard deviations has steps of ``5σ/2^bits``, and a uniform error
    has a twelfth of the step's square: ``25/12 · 4^-bits``, 0.8 % at 4 bits.
    """
    return 0.0 if bits is None else 25 / 12 * 4.0**-bits


def _records(plan: Plan, candidate: Candidate) -> list[ModuleRecord]:
    return [
        ModuleRecord(
            name=name,
            layer=candidate.layer,
            form=plan.settings.form,
            out_features=linear.out_features,
            in_features=linear.in_features,
            parameters_before=dense_parameters(
                linear.out_features, linear.in_features, bias=linear.bias is not None
            ),
        )
        for name, linear in candidate.members.items()
    ]


def _describe(record: ModuleRecord, candidate: Candidate, container: FactoredLinear) -> None:
    record.rank = container.rank
    record.parameters_after = container.stored_parameters
    if candidate.shared:
        record.direct_outputs = container.direct_outputs
        if container.leader is not None:
            record.shared_skeleton = next(iter(candidate.members))
