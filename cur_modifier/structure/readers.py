"""Which modules read one tensor: seen in a forward pass, not told by names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Call", "LastRead", "called_once", "first_tensor", "recorded"]


class Call(NamedTuple):
    """What a module was given, and what it answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def tensor(self) -> int:
        """Tells the tensor that was read from others, while this call is held."""
        return id(self.args[0])


def first_tensor(answer: Any) -> Any:
    """The tensor that a module hands on: the first of a tuple, or of a model's outputs, where it is
    not the loss."""
    if isinstance(answer, tuple):
        return answer[0]
    if isinstance(answer, Mapping):
        return next((value for key, value in answer.items() if key != "loss"), None)
    return answer


class LastRead:
    """The tensor that was read last. Modules that read one tensor run one after another.

    It holds the tensor, not its id: what is let go of leaves its id to another.
    """

    def __init__(self) -> None:
        self._x: torch.Tensor | None = None

    def is_again(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is that tensor; from now on it is."""
        again = self._x is x
        self._x = x
        return again

    def forget(self) -> None:
        """Let go of it."""
        self._x = None


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Call]]]:
    """All calls of the modules inside the context by name, in the order in which they first end."""
    calls: dict[str, list[Call]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.setdefault(name, []).append(Call(args, kwargs, output))

        return hook

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            handle = module.register_forward_hook(watch(name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield calls


def called_once(calls: Mapping[str, Sequence[Call]]) -> dict[str, Call]:
    """The calls of those modules that were called once, with what they read as first argument."""
    return {name: seen[0] for name, seen in calls.items() if len(seen) == 1 and seen[0].args}
