"""The dense and the compressed model side by side, one decoder layer in work at a time.

llm-compressor's sequential pipeline shows a stage the compressed model alone. Anchoring a layer to
the dense model, and training it, takes both models' hidden states for the same tokens, and several
passes through one layer. So a stage that asks for either runs the layers itself: the hidden states
of both models between two layers are kept, and the model's own layer modules are called with the
arguments that the model gave them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from cur_modifier.forms.base import is_factored
from cur_modifier.linalg import PairedMoments
from cur_modifier.passes.context import on_device, replaced_forward
from cur_modifier.passes.grams import SharedGrams
from cur_modifier.passes.samples import real_rows, real_tokens, with_constant
from cur_modifier.precision import half_products
from cur_modifier.structure.operators import is_convolution
from cur_modifier.structure.patches import rows_read
from cur_modifier.structure.readers import LastRead, first_tensor

__all__ = ["LayerStreams"]


class _ReachedError(Exception):
    """Leaves a forward pass where nothing further is needed of it."""


class _Arguments(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Batch:
    """One batch between two layers: hidden states of both models, ``(samples, tokens, hidden)`` or,
    of images, ``(samples, channels, height, width)``."""

    dense: torch.Tensor
    compressed: torch.Tensor
    arguments: list[_Arguments]  # of every layer, behind the hidden state
    real: torch.Tensor  # (samples, tokens), False for padding; (samples,) of images


class LayerStreams:
    """Both models' hidden states in front of a layer, for all calibration batches.

    Args:
        model: the dense model; factored containers answer with their dense weights.
        layers: its decoder layers in order.
        batches: what the model is called with; no cache of keys and values.
        device: where layers are run.

    Cost: one forward pass of one batch, and the embedding of all. Memory: two hidden states a
    token, in the model's dtype, and the layers' other arguments; of the layer in work also what
    :meth:`run_dense` returns, which for a chain of convolutions is all that its modules read.

    Raises:
        ValueError: the model does more between its layers than hand on the hidden state, so they
            can't be run by themselves; or it uses a cache.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        batches: Iterable[Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        self._model = model
        self._layers = layers
        self.device = device
        self.depth = 0
        self._ends: list[_End] = []
        self.batches: list[_Batch] = []
        for batch in batches:
            inputs = on_device(batch, device)
            if not self.batches:
                self._check_chain(inputs)
            self.batches.append(self._enter(inputs))

    @property
    def layer(self) -> nn.Module:
        """The layer in work."""
        return self._layers[self.depth]

    @property
    def diverged(self) -> bool:
        """Whether the compressed model has other hidden states in front of the layer."""
        return any(batch.compressed is not batch.dense for batch in self.batches)

    def precision(self) -> torch.autocast:
        """The precision of the passes; moments and factors are float32 or wider all the same."""
        return half_products(self.batches[0].dense.dtype, self.device)

    def forward(self, hidden: torch.Tensor, batch: int, row: int | None = None) -> torch.Tensor:
        """The layer's output for hidden states ``(samples, tokens, hidden)`` of a batch, or of one
        ``row`` of it."""
        args, kwargs = self.batches[batch].arguments[self.depth]
        if row is not None:
            samples = self.batches[batch].dense.shape[0]
            args = _row(args, row, samples)
            kwargs = {key: _row(value, row, samples) for key, value in kwargs.items()}
        out: torch.Tensor = first_tensor(self.layer(hidden, *args, **kwargs))
        return out

    @torch.no_grad()
    def run_dense(
        self, modules: Mapping[str, nn.Module], *, keep_inputs: bool
    ) -> tuple[list[torch.Tensor], dict[str, dict[int, torch.Tensor]], list[list[str]]]:
        """One pass of the dense stream through the layer, which is still dense.

        Returns:
            The layer's outputs by batch; where they are kept, the inputs of ``modules`` by name and
            batch (one tensor for modules that read the same), of those that a batch reaches; and
            the names of the modules that any batch reaches, grouped by the tensor that they read,
            in the order of execution. A convolution is in a group of its own: its kernel decides
            what it multiplies.
        """
        outputs: list[torch.Tensor] = []
        inputs: dict[str, dict[int, torch.Tensor]] = {name: {} for name in modules}
        groups: list[list[str]] = []
        reached: set[str] = set()
        last = LastRead()

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if keep_inputs:
                    inputs[name][len(outputs)] = args[0].detach()
                if name in reached:
                    return
                reached.add(name)
                if last.is_again(args[0]) and not is_convolution(modules[name]):
                    groups[-1].append(name)
                else:
                    groups.append([name])

            return hook

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
            stack.enter_context(self.precision())
            for index, batch in enumerate(self.batches):
                with self._found_ends() if index == 0 else nullcontext():
                    out = self.forward(batch.dense, index)
                outputs.append(out.to(batch.dense.dtype))
                last.forget()
        return outputs, inputs, groups

    @torch.no_grad()
    def moments(
        self,
        module: nn.Module,
        dense_inputs: Mapping[int, torch.Tensor],
        features: int,
        *,
        constant: bool = False,
    ) -> PairedMoments:
        """Moments of ``module``'s inputs, the compressed model's beside the dense one's; of a
        convolution, those of patches at a seeded choice of positions.

        Where the two see different numbers of tokens (an expert that routing reaches differently),
        or the dense inputs were not kept, the dense ones are left out: the module is then not
        anchored.

        Args:
            constant: count one more feature, which is always 1: with it the moments hold means.

        Cost: a pass through the layer from the last part that is settled up to ``module``, and that
        of :class:`PairedMoments`; memory one tensor a token for every part of the layer.
        """
        moments = PairedMoments(features + constant, device=self.device)
        for index, x in self._inputs_of(module):
            dense = dense_inputs.get(index, x)
            if dense.shape != x.shape:
                dense = x
            real = self.batches[index].real
            for pair in rows_read(module, x, dense, seed=index):
                rows = real_rows(pair[0], real), real_rows(pair[1], real)
                if constant:
                    rows = with_constant(rows[0]), with_constant(rows[1])
                moments.update(*rows)
        return moments

    @torch.no_grad()
    def advance(self, dense_outputs: Sequence[torch.Tensor], *, changed: bool) -> None:
        """Go on to the next layer, the compressed stream through the layer as it is now.

        Args:
            dense_outputs: as :meth:`run_dense` gave them.
            changed: whether the layer is another since. Streams are one up to the first that is.
        """
        with self.precision():
            for index, batch in enumerate(self.batches):
                if not changed and batch.compressed is batch.dense:
                    batch.compressed = dense_outputs[index]
                else:
                    with self._settled_parts(index):
                        out = self.forward(batch.compressed, index)
                    batch.compressed = out.to(batch.compressed.dtype)
                batch.dense = dense_outputs[index]
        self.depth += 1
        self._ends.clear()

    def unsettle(self) -> None:
        """Forget what the compressed stream made of the layer: its factors are going to change."""
        for end in self._ends:
            end.inputs.clear()
            end.outputs.clear()

    def shrunk(self, old: nn.Module, new: nn.Module, inputs: torch.Tensor) -> None:
        """A module of the layer has a smaller one in its place, which reads those of its inputs.

        What a settled part computed of them stays: the others are not computed any more, and these
        as before.
        """
        for end in self._ends:
            if end.module is old:
                end.module = new
                end.inputs = {index: x[..., inputs] for index, x in end.inputs.items()}

    @torch.no_grad()
    def grams(self, modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Second moments ``(n, n)`` of what modules of the layer read in the compressed stream, of
        those that any token reaches.

        Cost: a pass through the layer; memory one moment for each tensor that is read.
        """
        sums = SharedGrams()
        real: torch.Tensor | None = None

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                sums.update(name, args[0], real)

            return hook

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
            stack.enter_context(self.precision())
            for index, batch in enumerate(self.batches):
                sums.next_batch()
                real = batch.real
                self.forward(batch.compressed, index)
        found = {name: sums.get(name) for name in modules}
        return {name: gram.second_moment() for name, gram in found.items() if gram is not None}

    # -- steps ---------------------------------------------------------------------------------

    def _inputs_of(self, module: nn.Module) -> Iterator[tuple[int, torch.Tensor]]:
        found: list[torch.Tensor] = []

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0])
            raise _ReachedError

        handle = module.register_forward_pre_hook(hook)
        try:
            for index, batch in enumerate(self.batches):
                found.clear()
                with self.precision(), self._settled_parts(index):
                    try:
                        self.forward(batch.compressed, index)
                    except _ReachedError:
                        yield index, found[0]
        finally:
            handle.remove()

    @contextmanager
    def _found_ends(self) -> Iterator[None]:
        """Find the parts of the layer that answer with what one of their Linears answers."""
        self._ends.clear()
        answers: list[tuple[nn.Module, torch.Tensor, int]] = []

        def answered(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            answers.append((module, out, out._version))

        def left(part: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            first, *others = out if isinstance(out, tuple) else (out,)
            ends = [
                m for m, answer, as_of in answers if answer is first and as_of == first._version
            ]
            once = len(ends) == 1 and sum(m is ends[0] for m, _, _ in answers) == 1
            if once and all(other is None for other in others):
                rest = (None,) * len(others) if isinstance(out, tuple) else None
                self._ends.append(_End(part, ends[0], rest))

        with ExitStack() as stack:
            for part in self.layer.children():
                for module in part.modules():
                    if module is not part and (
                        isinstance(module, nn.Linear) or is_factored(module)
                    ):
                        stack.callback(module.register_forward_hook(answered).remove)
                stack.callback(part.register_forward_hook(left).remove)
            yield

    @contextmanager
    def _settled_parts(self, index: int) -> Iterator[None]:
        """Parts of the layer are run once for each batch as far as they are fitted.

        Attention is the larger half of a pass, and every group of modules behind it takes a pass.
        What the last Linear of attention read is what was there when it was fitted itself: from
        then on its own product is all that is left to do.
        """
        with ExitStack() as stack:
            for end in self._ends:
                if index in end.inputs and _fitted(end.module):
                    end.outputs[index] = end.module(end.inputs.pop(index))
                if index in end.outputs:
                    stack.enter_context(replaced_forward(end.part, end.answering(index)))
                elif all(_fitted(m) for m in end.part.modules() if m is not end.module):
                    hook = end.module.register_forward_pre_hook(end.keeping(index), prepend=True)
                    stack.callback(hook.remove)
            yield

    @torch.no_grad()
    def _check_chain(self, inputs: Mapping[str, Any]) -> None:
        """Every layer's first argument is the output of the layer before it, bit for bit."""
        entered: list[torch.Tensor] = []
        left: list[torch.Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(_entering(args, kwargs)[0].clone())

        def leave(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            left.append(first_tensor(out).clone())

        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(leave).remove)
            self._model(**inputs)
        whole = len(entered) == len(self._layers)
        if not whole or any(
            not torch.equal(before, after)
            for before, after in zip(left[:-1], entered[1:], strict=True)
        ):
            raise ValueError(
                f"the decoder layers of {type(self._model).__name__} do not simply follow one "
                "another, so they can't be run by themselves. Leave out `anchor` and `refine`, "
                "which need that."
            )

    @torch.no_grad()
    def _enter(self, inputs: Mapping[str, Any]) -> _Batch:
        """What the model hands to each layer, with the layers themselves passed over."""
        arguments: list[_Arguments] = []
        first: list[torch.Tensor] = []
        last = self._layers[-1]

        def passing(layer: nn.Module) -> Callable[..., Any]:
            def forward(*given: Any, **named: Any) -> Any:
                hidden_states, args, kwargs = _entering(given, named)
                if kwargs.get("past_key_values") is not None:
                    raise ValueError(
                        f"{type(self._model).__name__} hands a cache of keys and values to its "
                        "layers, and a layer that is run twice would read what its first run left "
                        "there. Call it with use_cache=False."
                    )
                if not first:
                    first.append(hidden_states)
                arguments.append(_Arguments(args, kwargs))
                if layer is last:
                    raise _ReachedError
                return hidden_states

            return forward

        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(replaced_forward(layer, passing(layer)))
            with suppress(_ReachedError):
                self._model(**inputs)
        real = real_tokens(inputs)
        if real is None:
            shape = first[0].shape[: 2 if first[0].ndim == 3 else 1]
            real = torch.ones(shape, dtype=torch.bool, device=self.device)
        return _Batch(first[0], first[0], arguments, real=real)


@dataclass
class _End:
    """A part of a layer that answers with what its last Linear ``module`` answers.

    Attributes:
        rest: what follows it in the part's tuple of answers; None where it answers a tensor.
        inputs, outputs: the module's, in the compressed stream, by batch.
    """

    part: nn.Module
    module: nn.Module
    rest: tuple[None, ...] | None
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def keeping(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.inputs[index] = args[0]

        return hook

    def answering(self, index: int) -> Callable[..., Any]:
        out = self.outputs[index]
        return lambda *args, **kwargs: out if self.rest is None else (out, *self.rest)


def _entering(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden state that a layer is given, and its other arguments. A model that is one layer as
    a whole is given images."""
    if args:
        return args[0], args[1:], dict(kwargs)
    name = "hidden_states" if "hidden_states" in kwargs else "pixel_values"
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def _fitted(module: nn.Module) -> bool:
    return not is_factored(module) or module.dense is None


def _row(value: Any, row: int, samples: int) -> Any:
    """One sample's part of a layer's argument; what all samples share stays as it is."""
    if isinstance(value, tuple):
        return tuple(_row(part, row, samples) for part in value)
    if torch.is_tensor(value) and value.ndim > 1 and value.shape[0] == samples:
        return value[row : row + 1]
    return value
