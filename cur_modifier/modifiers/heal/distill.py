"""A factored model beside the dense one that it was: both outputs, layer by layer, and their
distance.

The dense model is not a second model: factored layers that keep their dense layer answer with it
for one pass (:func:`~cur_modifier.forms.base.answering_dense`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from loguru import logger
from torch import nn
from torch.nn import functional

from cur_modifier.forms.base import FactoredLinear, answering_dense
from cur_modifier.passes.context import evaluation_forward, frozen, on_device, replaced_forward
from cur_modifier.passes.samples import Sample
from cur_modifier.precision import half_products
from cur_modifier.training.coordinates import inverse_root

__all__ = ["Distillation", "Loss", "Moments"]

# Windows from which the scales of the loss and the moments of the inputs are taken.
STATISTICS_SAMPLES = 8
# A dimension whose share of the mean square is below this part of the average counts as this part.
LEAST_SHARE = 0.01


class Loss(NamedTuple):
    """``layers``: mean relative squared distance; ``logits``: KL divergence in nats a token."""

    layers: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Moments:
    """What is around the free factor ``F (p, q)`` of a layer whose output is ``L F z`` and a rest.

    Attributes:
        inputs: ``E[z zᵀ] (q, q)``.
        output: ``LᵀL (p, p)``, or None for the identity.
        error: ``E‖y − ŷ‖² / E‖y‖²`` between the dense layer and this one, on the same inputs.
        floor: the same with the best ``F`` that there is: what no training of ``F`` can remove.
    """

    inputs: torch.Tensor
    output: torch.Tensor | None
    error: float
    floor: float


class _Targets(NamedTuple):
    entering: torch.Tensor | None
    outputs: list[torch.Tensor]


class Distillation:
    """Runs student and teacher on samples. Use as a context: inside it the free factors of the
    containers are :attr:`values`, every parameter is frozen, and no layer is quantized.

    Layer ``l`` has the loss ``mean over tokens of Σ_d w_d (ŷ_d − y_d)² / Σ_d w_d y_d²`` with
    ``1 / w_d`` the mean of ``y_d²`` in the teacher, each token scaled to the same length. So a
    token counts by its relative error, however large its activations (the first token of a window
    often has ones a thousand times the others'); a dimension counts by its relative error, however
    large it always is; and so does a layer. The layers are those that hold factored modules, and
    the last, into which everything flows.

    Layers before the first factored one are the teacher's own: they run once a sample, without
    gradients. Teacher outputs are rounded to bfloat16 (a relative squared error of 1e-6) and held
    in memory where all of them fit in ``cache_bytes``; else the teacher runs again for every
    sample. Either way the numbers are the same.

    Args:
        model: with fitted containers that keep their dense layers.
        containers: by name.
        layers: all decoder layers by name.
        autocast: products of a float32 model in bfloat16, in student and teacher alike, where the
            device has units for it.
        logits: whether the KL divergence of the last logits is wanted.
        cache_bytes: for what the teacher says.

    Memory: one sample's activations from the first factored layer on. The KL divergence adds about
    five times vocabulary × tokens numbers of 4 bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        containers: Mapping[str, FactoredLinear],
        layers: Sequence[tuple[str, nn.Module]],
        samples: Sequence[Sample],
        *,
        autocast: bool,
        logits: bool,
        cache_bytes: float,
    ) -> None:
        holding = [
            index
            for index, (layer, _) in enumerate(layers)
            if any(name.startswith(f"{layer}.") for name in containers)
        ]
        self._model = model
        self._containers = containers
        self._layers = [module for _, module in layers]
        self._first = holding[0]
        self._watched = sorted({*holding, len(layers) - 1})
        self._samples = samples
        self._logits = logits
        self._cache_bytes = cache_bytes
        self._cache: dict[int, _Targets] | None = {}
        self._scales: list[torch.Tensor] = []
        self._in_tuple = False
        self._stack = ExitStack()
        self._device = torch.device("cpu")
        self.values: dict[str, torch.Tensor] = {}
        self._dtype = next(next(iter(containers.values())).parameters()).dtype
        self._autocast = autocast and self._dtype == torch.float32

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._device = stack.enter_context(evaluation_forward(self._model, logits=self._logits))
            stack.enter_context(frozen(self._model))
            for name, container in self._containers.items():
                factor = container.factors[self._free(name)]
                self.values[name] = factor.weight.detach().to(self._device)
                stack.enter_context(
                    replaced_forward(factor, self._answer(name, factor.weight.dtype))
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()
        self._cache = {}

    def measure(self, indices: Sequence[int]) -> dict[str, Moments]:
        """Set the scales of the loss from these samples, and measure what surrounds each factor.

        Cost: on at most 8 samples, one pass of the teacher, and one of the student in which every
        factored layer also runs dense.
        """
        indices = indices[:STATISTICS_SAMPLES]
        shares: list[torch.Tensor] = []
        gathered = {name: _Gathered() for name in self._containers}
        for index in indices:
            targets = self._targets(index)
            for place, output in enumerate(targets.outputs):
                y = output.to(self._device).float().flatten(0, -2)[self._real(index)]
                share = y.square() / y.square().mean(dim=-1, keepdim=True).clamp_min(1e-30)
                if place == len(shares):
                    shares.append(torch.zeros_like(share[0]))
                shares[place] += share.mean(dim=0) / len(indices)
            with ExitStack() as stack:
                for name, container in self._containers.items():
                    watch = _Watch(container, gathered[name], self._real(index))
                    stack.enter_context(watch.attached())
                self._run(index, targets.entering)
        self._scales = [1 / share.clamp_min(LEAST_SHARE) for share in shares]
        return {name: gathered[name].moments(c) for name, c in self._containers.items()}

    def loss(self, index: int) -> Loss:
        """The distance of student and teacher on one sample, with gradients to :attr:`values`."""
        targets = self._targets(index)
        real = self._real(index)
        with self._watching() as seen:
            out = self._run(index, targets.entering)
        terms = []
        for student, teacher, scale in zip(seen, targets.outputs, self._scales, strict=True):
            y = teacher.to(self._device).float()
            distance = (student.float() - y).square() @ scale
            relative = distance / (y.square() @ scale).clamp_min(1e-30)
            terms.append(relative.reshape(-1)[real].mean())
        layers = torch.stack(terms).mean()
        if not self._logits:
            return Loss(layers, torch.zeros_like(layers))
        with torch.no_grad():
            dense = self._run(index, targets.outputs[-1], skip=len(self._layers)).logits
            wanted = dense.flatten(0, -2)[real].float().log_softmax(dim=-1)
        given = out.logits.flatten(0, -2)[real].float().log_softmax(dim=-1)
        divergence = functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return Loss(layers, divergence)

    # -- passes --------------------------------------------------------------------------------

    def _targets(self, index: int) -> _Targets:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        entered: list[torch.Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append((args[0] if args else kwargs["hidden_states"]).detach())

        first = self._layers[self._first]
        handle = first.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with torch.no_grad(), answering_dense(self._model), self._watching() as seen:
                self._run(index, None)
        finally:
            handle.remove()
        targets = _Targets(
            entered[0] if self._first else None, [y.to(torch.bfloat16) for y in seen]
        )
        if self._cache is not None:
            if not self._cache:
                self._decide(index, targets)
            if self._cache is not None:
                self._cache[index] = targets
        return targets

    def _decide(self, index: int, targets: _Targets) -> None:
        held = [y for y in (targets.entering, *targets.outputs) if y is not None]
        size = sum(y.numel() * y.element_size() for y in held)
        whole = size / self._samples[index].tokens * sum(s.tokens for s in self._samples)
        if whole > self._cache_bytes:
            logger.info(
                f"the teacher's outputs would take {whole / 2**30:.2f} GiB, more than "
                f"teacher_cache_gib {self._cache_bytes / 2**30:g}: the dense model runs again for "
                "every sample"
            )
            self._cache = None

    def _run(self, index: int, entering: torch.Tensor | None, skip: int | None = None) -> Any:
        """One pass; with ``entering``, the layers below ``skip`` (the first factored one) are
        passed over and the next one gets it."""
        sample = self._samples[index]
        inputs = on_device(sample.inputs, self._device)
        with ExitStack() as stack:
            if entering is not None:
                state = entering.to(self._device, self._dtype)
                for layer in self._layers[: self._first if skip is None else skip]:
                    stack.enter_context(replaced_forward(layer, self._passing(state)))
            stack.enter_context(self._products())
            return self._model(**inputs)

    def _products(self) -> AbstractContextManager[Any]:
        return half_products(self._dtype, self._device) if self._autocast else nullcontext()

    def _passing(self, state: torch.Tensor) -> Callable[..., Any]:
        answer: Any = (state,) if self._in_tuple else state
        return lambda *args, **kwargs: answer

    @contextmanager
    def _watching(self) -> Iterator[list[torch.Tensor]]:
        """Collects the outputs of the watched layers, in their order."""
        seen: list[torch.Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)
            seen.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for index in self._watched:
                stack.callback(self._layers[index].register_forward_hook(hook).remove)
            yield seen

    def _real(self, index: int) -> torch.Tensor:
        return self._samples[index].real.to(self._device)

    def _free(self, name: str) -> str:
        return self._containers[name].free_factor

    def _answer(self, name: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        # Rounded to the dtype it will be stored in, so that what is measured is what is kept.
        return lambda x: functional.linear(x, self.values[name].to(dtype))


class _Gathered:
    """Sums over tokens for :class:`Moments`."""

    def __init__(self) -> None:
        self.tokens = 0
        self.inputs: torch.Tensor | None = None
        self.cross: torch.Tensor | None = None  # Σ Lᵀ(y − ŷ) zᵀ
        self.residual = 0.0
        self.energy = 0.0

    def moments(self, container: FactoredLinear) -> Moments:
        factor = container.factors[container.free_factor]
        p, q = factor.out_features, factor.in_features
        ones = torch.ones(container.out_features, device=factor.weight.device).double()
        output = container.output_metric(container.free_factor, ones)
        if self.inputs is None or self.cross is None or not self.tokens:
            empty = torch.zeros(q, q, device=factor.weight.device)
            return Moments(empty, output, 0.0, 0.0)
        inputs = self.inputs / self.tokens
        gain = self.cross / self.tokens @ inverse_root(inputs)
        if output is not None:
            gain = inverse_root(output.to(gain)) @ gain
        assert gain.shape == (p, q)
        floor = self.residual - self.tokens * float(gain.double().square().sum())
        energy = max(self.energy, 1e-30)
        return Moments(inputs, output, self.residual / energy, max(floor, 0.0) / energy)


class _Watch:
    """Hooks that compare one container with its dense layer while the student runs.

    ``Lᵀ(y − ŷ)`` comes from autograd: it is the gradient of ``⟨ŷ, y − ŷ⟩`` by the free factor's
    output, whatever the form does after it.
    """

    def __init__(self, container: FactoredLinear, gathered: _Gathered, real: torch.Tensor) -> None:
        self._container = container
        self._gathered = gathered
        self._real = real
        self._z = self._u = torch.empty(0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        factor = self._container.factors[self._container.free_factor]
        handles = [
            factor.register_forward_hook(self._after_factor),
            self._container.register_forward_hook(self._after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_factor(
        self, _: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> torch.Tensor:
        self._z, self._u = args[0].detach(), out.detach().requires_grad_()
        return self._u

    def _after(
        self, _: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> torch.Tensor:
        dense = self._container.teacher
        assert dense is not None
        with torch.no_grad():
            y = dense(args[0])
            error = y.float() - out.float()
            if dense.bias is not None:
                y = y - dense.bias
        (pulled,) = torch.autograd.grad(out, self._u, error.to(out.dtype))
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            z, pulled, error, y = (self._rows(t) for t in (self._z, pulled, error, y))
            sums = self._gathered
            inputs, cross = z.T @ z, pulled.T @ z
            sums.inputs = inputs if sums.inputs is None else sums.inputs + inputs
            sums.cross = cross if sums.cross is None else sums.cross + cross
            sums.tokens += len(z)
            sums.residual += float(error.square().sum())
            sums.energy += float(y.square().sum())
        return out.detach()

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.detach().float().flatten(0, -2)
        # An expert sees a choice of the tokens, not the window.
        return rows[self._real] if len(rows) == len(self._real) else rows
