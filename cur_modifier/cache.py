"""The user's cache folder: what a later run may use again, outside any clone or output."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["cache_folder", "keep_newest"]


def cache_folder() -> Path:
    """``$CUR_MODIFIER_CACHE``, else ``$XDG_CACHE_HOME/cur_modifier``, else
    ``~/.cache/cur_modifier``. It may not exist yet."""
    if explicit := os.environ.get("CUR_MODIFIER_CACHE"):
        return Path(explicit)
    shared = os.environ.get("XDG_CACHE_HOME")  # empty counts as unset, says the specification
    return (Path(shared) if shared else Path.home() / ".cache") / "cur_modifier"


def keep_newest(folder: Path, limit: int) -> list[Path]:
    """Delete the oldest files of ``folder`` until they hold at most ``limit`` bytes together.

    The newest stays even where it alone holds more. A file is as old as its modification time:
    touch it when it is used. Other processes may do the same at the same time.

    Returns:
        The files that are gone.
    """
    files = []
    for path in folder.iterdir():
        with suppress(OSError):
            if path.is_file():
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    files.sort(reverse=True)
    deleted, held = [], 0
    for number, (_, size, path) in enumerate(files):
        held += size
        if number and held > limit:
            with suppress(OSError):  # another process was faster, or the file is another user's
                path.unlink()
                deleted.append(path)
    return deleted
