"""CUR as it is served."""

from __future__ import annotations

from cur_modifier.vllm.slots import Slots

from .chain import Chain

__all__ = ["CUR", "SERVED"]


class CUR(Chain):
    """``y = C (U (R x))``."""

    factors = ("cur_r", "cur_u", "cur_c")

    def declare(self, slots: Slots) -> None:
        super().declare(slots)
        for name in ("rows", "columns"):  # say where the factors come from; serving needs neither
            slots.add(self.part, name, lambda tensor: None)


SERVED = CUR
