"""Files that are whole or not there, and fingerprints of what is in them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.checkpoint import files
from cur_modifier.checkpoint.files import changed, digest, digest_text, put_text, replacing


def test_digest_tells_values_shapes_and_dtypes_apart() -> None:
    x = torch.arange(6.0)
    others = [x + 1, x.view(2, 3), x.double(), x.bfloat16(), torch.empty(0)]
    assert digest([x]) == digest([x.clone()])
    assert len(Counter([digest([x]), *(digest([o]) for o in others)])) == 6


@pytest.mark.parametrize("durable", [False, True])
def test_a_whole_file_takes_the_place_of_the_old_one(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "weights.safetensors"
    for text in ("old", "new"):
        with replacing(path, durable=durable) as partial:
            assert partial.parent == path.parent and partial.suffix == path.suffix
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    put_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old"


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    put_text(path, "old")
    code = (
        "import os, runpy, signal\nfrom pathlib import Path\n"
        f"replacing = runpy.run_path({files.__file__!r})['replacing']\n"
        f"with replacing(Path({str(path)!r})) as partial:\n"
        "    partial.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


@given(st.dictionaries(st.text(max_size=3), st.integers()))
def test_a_digest_of_a_value_depends_on_no_order(value: dict[str, int]) -> None:
    backwards = dict(reversed(value.items()))
    assert digest_text(value) == digest_text(backwards)
    assert digest_text(value) != digest_text(value | {"more": 1})


FINGERPRINTS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"))


@given(FINGERPRINTS, FINGERPRINTS)
def test_what_differs_is_listed_once(saved: dict[str, str], now: dict[str, str]) -> None:
    listed = changed(saved, now)
    assert len(listed) == len(set(listed))
    assert set(listed) == {key for key in {*saved, *now} if saved.get(key) != now.get(key)}
    assert [key for key in listed if key in saved] == [key for key in saved if key in listed]
