"""The typed parts of a recipe that several stages have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["RefineConfig", "SensitivityConfig"]

_SAMPLES, _WINDOW = 32, 512  # a sample of a text is a window of so many tokens at least


class SensitivityConfig(BaseModel):
    """How the loss's curvature at the modules' outputs is measured: one pass of gradients.

    Attributes:
        samples: calibration samples that are run backwards. By default 32, or as many as hold
            16,384 tokens: the examples of a task are short, and have one label each.
        damping: share of its mean diagonal that is added to the metric of a module's outputs. The
            curvature is known from few tokens and at the dense model only.
        cache: a file to keep the measurement in. By default it is kept in
            ``$CUR_MODIFIER_CACHE``, ``$XDG_CACHE_HOME/cur_modifier`` or ``~/.cache/cur_modifier``,
            under a name made of the weights, the data and these settings; 20 GB of the newest.
    """

    model_config = ConfigDict(extra="forbid")

    samples: int | None = Field(default=None, ge=1)
    damping: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    cache: str | None = None

    def count(self, lengths: Sequence[int]) -> int:
        """How many of samples of these lengths, in tokens, are run backwards."""
        if self.samples is not None:
            return self.samples
        sums = accumulate(lengths)
        return max(_SAMPLES, 1 + sum(tokens < _SAMPLES * _WINDOW for tokens in sums))


class RefineConfig(BaseModel):
    """How what a stage left of a layer is trained on its output, before the next layer's turn.

    Attributes:
        epochs: passes over the calibration windows that are not held out.
        batch_size: windows a step.
        learning_rate: of Adam, relative to the weights as in ``CURHealModifier``; it falls along
            half a cosine.
        train: ``free`` trains what the stage leaves free: of factors ``U`` of CUR, ``T`` of a row
            ID, ``A`` of a plain pair, after a removal the consumers of the units; ``all`` trains
            all factors, or all matrices of the layer: rows, columns and units are then real no
            more.
        norms: also train the layer's normalization weights.
        validation_share: part of the windows held out. What is kept is never worse on them than the
            fit.
    """

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(default=4, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    train: Literal["free", "all"] = "all"
    norms: bool = True
    validation_share: float = Field(default=1 / 8, gt=0, le=0.5)
