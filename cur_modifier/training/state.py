"""A training run on disk: one file that is always a whole state, and says of which run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cur_modifier.checkpoint.files import changed, replacing
from cur_modifier.training.schedule import History, Plateau

__all__ = ["TrainingState"]


class TrainingState:
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
        # safetensors refuses tensors that share memory and shapes that are not contiguous.
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        with replacing(self.path, durable=True) as partial:
            save_file(plain, partial, metadata={"state": json.dumps(state)})

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
        differing = changed(saved, now)
        if differing:
            lines = [
                f"{key}: was {_short(saved.get(key))}, is {_short(now.get(key))}"
                for key in differing[:6]
            ]
            more = f"\n  … and {len(differing) - 6} more" if len(differing) > 6 else ""
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
