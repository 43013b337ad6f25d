"""Which decoder layers are factored."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from cur_modifier.modifiers.cur.config import LayersConfig

__all__ = ["candidate_layers", "check_count", "choose_layers"]


def candidate_layers(config: LayersConfig, total: int) -> list[int]:
    """Indices of the layers that may be chosen, before any data is seen.

    Raises:
        ValueError: an index outside the model, or fewer layers than ``count``.
    """
    if isinstance(config.select, list):
        bad = [index for index in config.select if not 0 <= index < total]
        if bad or not config.select:
            raise ValueError(
                f"layers.select holds {bad or 'nothing'}; the model has layers 0 to {total - 1}."
            )
        return sorted(set(config.select))
    if config.select == "all":
        return list(range(total))
    count = config.resolved_count
    anywhere = config.select in ("last", "sensitivity")
    pool = list(range(total)) if anywhere else list(range(1, total - 1))
    if count > len(pool):
        excluded = "" if anywhere else ", first and last excluded"
        raise ValueError(
            f"layers.count is {count}, but the model has {len(pool)} layers to choose from "
            f"({total} in all{excluded}). Lower `layers.count`, or use `layers: {{select: all}}`."
        )
    return pool[-count:] if config.select == "last" else pool


def check_count(config: LayersConfig, pool: Collection[int]) -> None:
    """Raises:
    ValueError: fewer candidate layers have targets, those in ``pool``, than are to be chosen.
    """
    chooses = config.select in ("angular", "random", "sensitivity")
    if chooses and config.resolved_count > len(pool):
        raise ValueError(
            f"layers.count is {config.resolved_count}, but the targets match modules in "
            f"{len(pool)} of the layers to choose from. Lower `layers.count`."
        )


def choose_layers(
    config: LayersConfig, pool: Collection[int], seed: int, costs: Sequence[float] | None
) -> list[int]:
    """The chosen layer indices, ascending.

    Args:
        pool: candidate layers that have targets; at least as many as are to be chosen.
        costs: by layer, of which the least are taken: angular distances for ``angular``, expected
            growth of the loss for ``sensitivity``. Ties go to the deeper layer.
    """
    chosen = sorted(pool)
    if config.select == "random":
        chosen = random.Random(seed).sample(chosen, config.resolved_count)
    elif config.select in ("angular", "sensitivity"):
        assert costs is not None
        chosen.sort(key=lambda index: (costs[index], -index))
        chosen = chosen[: config.resolved_count]
    return sorted(chosen)
