"""A saved run is whole, and of this run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cur_modifier.training.schedule import History, Plateau
from cur_modifier.training.state import TrainingState


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    checkpoint = TrainingState(tmp_path / "new" / "folder", {"setting seed": "0"})
    assert checkpoint.load() is None
    tensors = {"D.a": torch.randn(3, 2), "best.a": torch.zeros(3, 2).T}
    plateau = Plateau(3, best=0.1, best_step=4, waited=1)
    history = History([(1, 0.3, 1e-3)], [(0, 1 / 3, 0.25)])
    checkpoint.save(tensors, 7, plateau, history)
    loaded = checkpoint.load()
    assert loaded is not None
    assert all(torch.equal(loaded[0][key], value) for key, value in tensors.items())
    assert loaded[1:] == (7, plateau, history)
    assert [p.name for p in checkpoint.path.parent.iterdir()] == [TrainingState.NAME]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved = TrainingState(tmp_path, {"setting seed": "0", "calibration tokens": "ab" * 32})
    saved.save({"D.a": torch.zeros(1)}, 1, Plateau(1), History())
    other = TrainingState(tmp_path, {"setting seed": "1", "calibration tokens": "ab" * 32})
    with pytest.raises(ValueError, match=r"(?s)setting seed: was 0, is 1\nRestore.*delete the"):
        other.load()


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint = TrainingState(tmp_path, {})
    checkpoint.path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"can't be read as a saved training state.*Delete"):
        checkpoint.load()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint_dir .*file.* can't be made"):
        TrainingState(tmp_path / "file", {})
