"""One row. Measured in a process of its own, its peak memory is the method's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_projects.bench.quality.methods import METHODS
from mlflow_projects.bench.quality.protocol import (
    calibration_windows,
    evaluation_windows,
    model_directory,
)
from mlflow_projects.processes import peak_rss_bytes

if TYPE_CHECKING:
    from cur_modifier.rows import Row

__all__ = ["Job", "measure"]


@dataclass(frozen=True)
class Job:
    """What to measure. ``ratio`` None where the method has its own, ``model`` None for SmolLM2.

    ``kept`` is a folder in which rows of one model leave statistics for each other.
    """

    method: str
    ratio: float | None
    calibration: str
    data: Path
    model: str | None = None
    held_out: bool = False
    kept: Path | None = None

    def __str__(self) -> str:
        wish = "" if self.ratio is None else f" at {self.ratio:g}"
        return f"{self.method}{wish}, calibrated on {self.calibration}"


def measure(job: Job) -> Row:
    """Compress and evaluate.

    ``seconds`` and ``peak_rss_bytes`` are taken after compression and before evaluation; the peak
    includes the dense model in float32. Both include the pass of calibration, also where an earlier
    row ran it. Evaluation is in float32, of held-out text in
    bfloat16 where the device has units for it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # With these comes all that would spoil the timing.
    from cur_modifier.evaluate import perplexity
    from mlflow_projects.bench.quality.calibration import Calibration

    source = model_directory(job.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = evaluation_windows(job.data, tokenizer, held_out=job.held_out)
    windows = calibration_windows(job.calibration, job.data, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)

    calibration = Calibration(windows, job.kept and job.kept / f"{job.calibration}.pt")
    started = time.perf_counter()
    stored_ratio = METHODS[job.method].compress(model, calibration, job.ratio)
    seconds = time.perf_counter() - started + calibration.spared_seconds
    peak = max(peak_rss_bytes(), calibration.spared_peak)
    return {
        "method": job.method,
        "ratio": job.ratio,
        "calibration": job.calibration,
        **{
            f"ppl_{name}": perplexity(model, text, bfloat16=job.held_out).perplexity
            for name, text in texts.items()
        },
        "stored_ratio": stored_ratio,
        "seconds": seconds,
        "peak_rss_bytes": peak,
    }
