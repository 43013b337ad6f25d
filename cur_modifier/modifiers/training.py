"""Pieces of a training loop that know nothing of models: rates, order, steps, stopping, saving.

Everything here is a function of the step and a seed, so that a run that was killed and continued is
the run that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = [
    "DIVERGED",
    "Checkpoint",
    "Coordinates",
    "History",
    "Plateau",
    "batch_at",
    "digest",
    "split",
    "warmup_cosine",
]


# A held-out loss this many times that before the first step is a divergence.
DIVERGED = 4.0


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Share of the learning rate at ``step`` in 1 to ``steps``.

    It rises linearly to 1 at step ``warmup`` (from 1 at once without one), then falls along half a
    cosine that would reach 0 one step after the last.
    """
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup))) / 2


def split(samples: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out: ``share`` of them, at least one, drawn by ``seed``.

    Raises:
        ValueError: nothing would be left to train on.
    """
    held_out = max(1, round(samples * share))
    if samples - held_out < 1:
        raise ValueError(
            f"{samples} calibration samples can't be split into training and validation "
            f"(validation_share {share:g} holds out {held_out}). Give more samples, or a smaller "
            "share."
        )
    order = torch.randperm(samples, generator=_generator(seed, 0)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def batch_at(step: int, *, batch_size: int, samples: int, seed: int) -> list[int]:
    """Positions in 0 to ``samples − 1`` of the samples of ``step``, which counts from 1.

    One epoch after the other, each a permutation of its own; a batch may begin in one and end in
    the next. Needs no state: any step can be the first.
    """
    first = (step - 1) * batch_size
    wanted = range(first, first + batch_size)
    epochs = {place // samples for place in wanted}
    orders = {
        epoch: torch.randperm(samples, generator=_generator(seed, epoch + 1)).tolist()
        for epoch in epochs
    }
    return [orders[place // samples][place % samples] for place in wanted]


@dataclass
class Plateau:
    """The best value seen, and whether ``patience`` values in a row have failed to beat it."""

    patience: int
    best: float = math.inf
    best_step: int = 0
    waited: int = 0

    def update(self, step: int, value: float) -> bool:
        """Take the value of ``step``; whether it is the best so far. NaN never is."""
        if value < self.best:
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience


@dataclass
class History:
    """What a run has seen: training as ``(step, loss, learning rate)``, validation as ``(step,
    loss, the part of it that the layers make)``."""

    train: list[tuple[int, float, float]] = field(default_factory=list)
    validation: list[tuple[int, float, float]] = field(default_factory=list)

    def stagnated(self, gain: float) -> bool:
        """Whether the second half of the run lowered the best validation loss by less than the
        share ``gain``. A run of fewer than four validations has not had the time to."""
        if len(self.validation) < 4:
            return False
        half = self.validation[-1][0] / 2
        early = min(loss for step, loss, _ in self.validation if step <= half)
        return min(loss for _, loss, _ in self.validation) > (1 - gain) * early


class Coordinates:
    """A factor ``F = F0 + A D B`` whose change ``D`` is trained where the loss is round.

    A step along an entry of ``F`` changes the layer's output by as much as the factors around ``F``
    and its inputs happen to be large there, which differs by orders of magnitude. In ``D`` each
    entry changes the output ``L F z`` by the same mean square: ``A = (LᵀL)^{-1/2}`` and
    ``B = E[z zᵀ]^{-1/2}``. (The Kronecker-factored preconditioner of Martens and Grosse 2015, which
    here is exact for the layer's own error and fixed, since everything around ``F`` is frozen.)

    Cost: two eigendecompositions at start; four products of the size of ``F`` a step.

    Args:
        start: ``F0 (p, q)``, kept in float32.
        output: ``LᵀL (p, p)``, or None for the identity.
        inputs: ``E[z zᵀ] (q, q)``.

    Attributes:
        D: ``(p, q)``, zero at first; what an optimizer trains.
        value: ``F (p, q)``, float32, a leaf that collects gradients.
        unit: what a change of every entry of ``D`` by 1 must be multiplied with to be as large as
            ``F0`` itself, in the mean square of the layer's output.
    """

    def __init__(
        self, start: torch.Tensor, output: torch.Tensor | None, inputs: torch.Tensor
    ) -> None:
        self.start = start.detach().float().clone()
        self.left = None if output is None else inverse_root(output)
        self.right = inverse_root(inputs)
        F0 = self.start.double()
        weighted = F0 if output is None else output.double() @ F0
        energy = float((weighted * (F0 @ inputs.double())).sum())
        self.unit = math.sqrt(max(energy, 0.0) / F0.numel())
        self.D = torch.zeros_like(self.start)
        self.value = self.start.clone().requires_grad_()

    def pull_gradient(self) -> None:
        """Turn the gradient of ``value`` into that of ``D``, and clear it."""
        gradient = self.value.grad
        if gradient is None:  # an expert that no token of the batch went to
            gradient = torch.zeros_like(self.value)
        if self.left is not None:
            gradient = self.left @ gradient
        self.D.grad = gradient @ self.right
        self.value.grad = None

    def at(self, D: torch.Tensor) -> torch.Tensor:
        """``F0 + A D B``; exactly ``F0`` for zero."""
        change = D if self.left is None else self.left @ D
        return self.start + change @ self.right

    def push(self) -> None:
        """Bring ``value`` up to date with ``D``."""
        with torch.no_grad():
            self.value.copy_(self.at(self.D))


def inverse_root(moment: torch.Tensor, damping: float = 1e-3) -> torch.Tensor:
    """``(M + δ mean(λ) I)^{-1/2}`` of a positive semidefinite ``M``, float32; I where ``M`` is 0.

    The damping bounds what a direction that the data hardly show is amplified by.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    mean = float(values.clamp_min(0).mean())
    if not mean > 0:
        return torch.eye(len(values), device=moment.device)
    roots = (values.clamp_min(0) + damping * mean).rsqrt()
    return ((vectors * roots) @ vectors.T).float()


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of dtypes, shapes and bytes. Reads every tensor once, about 1 s a gigabyte."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        if data.numel():
            sha.update(data.view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Checkpoint:
    """One file in ``folder`` that is always a whole state: written aside, then put in its place.

    Args:
        folder: made where it is missing.
        fingerprint: what a continued run must share with the one that wrote the file, as text.

    Raises:
        ValueError: ``folder`` can't be written to.
    """

    NAME = "training_state.safetensors"

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.path = Path(folder) / self.NAME
        self._fingerprint = dict(fingerprint)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.path.parent, os.W_OK)
        except OSError as error:
            raise ValueError(
                f"checkpoint_dir {str(folder)!r} can't be made: {error}. Name another folder."
            ) from error
        if not writable:
            raise ValueError(
                f"checkpoint_dir {str(folder)!r} is not writable. Name another folder."
            )

    def save(
        self,
        tensors: Mapping[str, torch.Tensor],
        step: int,
        plateau: Plateau,
        history: History,
    ) -> None:
        """Replace the file. A kill at any moment leaves the old state or the new one."""
        state = {
            "fingerprint": self._fingerprint,
            "step": step,
            "plateau": asdict(plateau),
            "history": asdict(history),
        }
        partial = self.path.with_suffix(".partial")
        # safetensors refuses tensors that share memory and shapes that are not contiguous.
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(plain, partial, metadata={"state": json.dumps(state)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def load(self) -> tuple[dict[str, torch.Tensor], int, Plateau, History] | None:
        """What was saved, or None where nothing was.

        Raises:
            ValueError: the file is not one of ours, or of another run, naming what differs.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                state: dict[str, Any] = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            saved, step = dict(state["fingerprint"]), int(state["step"])
            plateau = Plateau(**state["plateau"])
            history = History(
                train=[(int(s), float(v), float(r)) for s, v, r in state["history"]["train"]],
                validation=[
                    (int(s), float(v), float(p)) for s, v, p in state["history"]["validation"]
                ],
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} can't be read as a saved training state ({error}). Delete the folder "
                f"{self.path.parent} to start afresh, or name another checkpoint_dir."
            ) from error
        self._refuse_another_run(saved)
        return tensors, step, plateau, history

    def _refuse_another_run(self, saved: Mapping[str, str]) -> None:
        now = self._fingerprint
        changed = [key for key in [*saved, *(now.keys() - saved)] if saved.get(key) != now.get(key)]
        if changed:
            lines = [
                f"{key}: was {_short(saved.get(key))}, is {_short(now.get(key))}"
                for key in changed[:6]
            ]
            more = f"\n  … and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise ValueError(
                f"{self.path} was saved by another run. What differs:\n  "
                + "\n  ".join(lines)
                + more
                + f"\nRestore it to continue that run, or delete the folder {self.path.parent} to "
                "start afresh. Only `steps` may change. Where only starting values differ, the "
                "calibration ran in another order or with another number of threads: start the "
                "same command in a fresh process, or pass shuffle_calibration_samples=False."
            )


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= 40 else f"{value[:12]}…"


def _generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for each use of a seed; the global one is left alone."""
    text = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(text[:7], "big"))
