"""The cache folder: where it is, and that it does not grow without end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.cache import cache_folder, keep_newest
from tools.smollm2 import cache_folder as of_the_tool


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/own", "/shared", "/own"),
        (None, "/shared", "/shared/cur_modifier"),
        (None, "", "/home/me/.cache/cur_modifier"),
        (None, None, "/home/me/.cache/cur_modifier"),
    ],
)
def test_the_folder_is_the_users_own_then_the_desktops_then_the_homes(
    monkeypatch: pytest.MonkeyPatch, own: str | None, shared: str | None, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("CUR_MODIFIER_CACHE", own), ("XDG_CACHE_HOME", shared)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cache_folder() == of_the_tool() == Path(expected)


@given(sizes=st.lists(st.integers(0, 9), max_size=8), limit=st.integers(0, 40))
def test_the_newest_files_that_fit_are_kept(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    for age, size in enumerate(sizes):
        file = folder / f"{age}.safetensors"
        file.write_bytes(b"x" * size)
        os.utime(file, ns=(10**18 - age, 10**18 - age))

    deleted = {path.name for path in keep_newest(folder, limit)}

    kept = sorted((p for p in folder.iterdir()), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    assert [p.name for p in kept] == [f"{age}.safetensors" for age in range(len(kept))]
    assert deleted == {f"{age}.safetensors" for age in range(len(kept), len(sizes))}
    if len(kept) > 1:
        assert sum(sizes[: len(kept)]) <= limit
    if deleted:  # the next one did not fit
        assert sum(sizes[: len(kept) + 1]) > limit
