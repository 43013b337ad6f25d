"""``CURHealModifier``: the stage that trains the factor that each form leaves free."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import yaml
from compressed_tensors.offload import update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from cur_modifier.checkpoint.files import digest
from cur_modifier.forms.base import FactoredLinear, factored_layers
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.cur.modifier import CURModifier
from cur_modifier.modifiers.heal.distill import Distillation, Moments
from cur_modifier.modifiers.heal.loop import Loop
from cur_modifier.passes.samples import Sample, collect_samples
from cur_modifier.structure.layers import decoder_layers
from cur_modifier.tracking import Tracker, start_tracking
from cur_modifier.tracking.figures import loss_curve
from cur_modifier.training.schedule import split
from cur_modifier.training.state import TrainingState

__all__ = ["CURHealModifier"]

# Stagnation far above zero: the second half of the run gains less than this share ...
LEAST_GAIN = 0.02
# ... of a loss above this, a relative squared distance of 1 %.
FAR_FROM_ZERO = 0.01
# Settings that do not change what a step computes.
_FREE = ("steps", "checkpoint_dir", "checkpoint_every", "teacher_cache_gib", "mlflow")
_BASE = frozenset(Modifier.model_fields)


class CURHealModifier(Modifier):
    """Heals a factored model by distillation from the dense one (CURing, Park and Moon 2025).

    It trains the core of every CUR layer, ``U = U0 + ΔU``, the interpolation ``T`` of every row ID,
    and ``A`` of every plain pair. The other factors (real rows and columns, skeletons, ``B``) and
    orders stay as they are, bit for bit. The loss is the
    distance between the two models' decoder-layer outputs (:class:`~.distill.Distillation` states
    it), with gradients from end to end. The factors kept are the best seen on held-out samples,
    step 0 among them: healing never makes the model worse there.

    Sample yaml:

    ```yaml
    compress_stage:
      cur_modifiers:
        CURModifier: {...}
      healing_modifiers:
        CURHealModifier: {steps: 200, batch_size: 4, checkpoint_dir: healing}
      quantization_modifiers:
        GPTQModifier: {...}
    ```

    Lifecycle:

    - on_initialize
        - check model, data and settings; ask the factored modules to keep their dense layers
    - on_calibration_start
        - train; write the best factors back; let go of the dense layers

    Cost: a step is ``batch_size`` passes forward and backward of one window through the layers from
    the first factored one on; memory that of one window's activations, the dense layers, and eight
    copies of the trained factors in float32, with two matrices ``(r, r)`` for each.

    :param steps: at most so many steps
    :param batch_size: windows a step, passed one after another
    :param learning_rate: size of a step relative to the factors: in the coordinates of
        :class:`~cur_modifier.training.coordinates.Coordinates` an entry moves by about this share
        of the factor's own root mean square
    :param warmup_steps: over which the rate rises from 0; then it falls along a cosine
    :param validate_every: steps between validations
    :param validation_share: part of the calibration windows held out, at least one
    :param patience: stop after so many validations without a new best
    :param logits_weight: adds this times the KL divergence of the logits, in nats a token
    :param autocast: products of a float32 model in bfloat16, where the device has units for it
    :param teacher_cache_gib: memory for the teacher's outputs; where they need more, the dense
        model runs again for every window
    :param checkpoint_dir: where the state is saved, and from where a killed run continues
    :param checkpoint_every: steps between saves
    :param seed: of the split and the order of windows
    :param mlflow: log to the run of the CURModifier stage, or to one of its own where that has none
    """

    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=10, ge=0)
    validate_every: int = Field(default=20, ge=1)
    validation_share: float = Field(default=1 / 8, gt=0, le=0.5)
    patience: int = Field(default=4, ge=1)
    logits_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    autocast: bool = True
    teacher_cache_gib: float = Field(default=4.0, ge=0, allow_inf_nan=False)
    checkpoint_dir: str | None = None
    checkpoint_every: int = Field(default=20, ge=1)
    seed: int = 0
    mlflow: bool = True

    _containers: dict[str, FactoredLinear] = PrivateAttr(default_factory=dict)
    _teachers: list[FactoredLinear] = PrivateAttr(default_factory=list)
    _samples: list[Sample] = PrivateAttr(default_factory=list)
    _before: CURModifier | None = PrivateAttr(default=None)
    _recipe: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves none of {self.steps} steps at the full "
                "learning rate. Lower it, or raise `steps`."
            )
        return self

    def check_ahead(self, model: nn.Module, batches: Any) -> None:
        """Check what needs no factors, before an earlier stage's work; see ``ChecksAhead``.

        Raises:
            ValueError: too little data, or a folder that can't be written to.
        """
        self._checked(batches)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything, and keep the dense layers as teachers.

        Raises:
            ValueError: nothing to heal, factors already quantized, dense layers gone, or too
                little data; each with the remedy.
        """
        found = _healable(state.model)
        self._samples = self._checked(state.data.calib)
        self._teachers = list(found.values())
        for container in self._teachers:
            container.keep_dense()
        # A layer that takes all of its outputs from a shared skeleton has nothing free.
        self._containers = {n: c for n, c in found.items() if c.free_factor in c.factors}
        before = [m for m in upstream.preceding(self) if isinstance(m, CURModifier)]
        self._before = before[-1] if before else None
        self._recipe = upstream.recipe_as_given()
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Train, and write the best factors back.

        Raises:
            ValueError: the factors are not fitted yet; a checkpoint of another run.
        """
        unfitted = [name for name, c in self._containers.items() if c.dense is not None]
        if unfitted:
            raise ValueError(
                f"{unfitted[:4]} have no fitted factors to heal: the stages share one calibration "
                "pass. Call oneshot with its default `pipeline='independent'`."
            )
        try:
            with self._tracking(state.model) as tracker:
                self._heal(state.model, tracker)
        finally:
            self._release()

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Let go of the dense layers, whatever happened."""
        self._release()
        return True

    # -- steps ---------------------------------------------------------------------------------

    def _checked(self, batches: Any) -> list[Sample]:
        """The calibration samples, which are enough."""
        if batches is None:
            raise ValueError(
                "no calibration data, but healing compares the models on it. Pass `dataset=` to "
                "oneshot."
            )
        samples = collect_samples(batches)
        train, _ = split(len(samples), self.validation_share, self.seed)
        if self.batch_size > len(train):
            raise ValueError(
                f"batch_size {self.batch_size} is more than the {len(train)} windows to train on "
                f"({len(samples)} calibration samples, validation_share "
                f"{self.validation_share:g} held out). Give more samples or lower it."
            )
        if self.checkpoint_dir is not None:
            TrainingState(self.checkpoint_dir, {})  # a folder that can't be written to fails here
        return samples

    def _heal(self, model: nn.Module, tracker: Tracker) -> None:
        started = time.perf_counter()
        train, held_out = split(len(self._samples), self.validation_share, self.seed)
        checkpoint = saved = None
        if self.checkpoint_dir is not None:
            checkpoint = TrainingState(self.checkpoint_dir, self._fingerprint(model))
            saved = checkpoint.load()
        with Distillation(
            model,
            self._containers,
            decoder_layers(model),
            self._samples,
            autocast=self.autocast,
            logits=self.logits_weight > 0,
            cache_bytes=self.teacher_cache_gib * 2**30,
        ) as distillation:
            moments = distillation.measure(train)
            run = Loop(self, distillation, moments, train, held_out, tracker)
            if saved is not None:
                run.restore(*saved)
                logger.info(f"healing continues after step {run.step}, from {self.checkpoint_dir}")
            run.train(checkpoint)
        kept = run.kept()
        for name, container in self._containers.items():
            if run.plateau.best_step:
                factor = container.factors[container.free_factor]
                update_offload_parameter(factor, "weight", kept[name].to(factor.weight.dtype))
        self._report(run, moments, tracker, time.perf_counter() - started)

    def _fingerprint(self, model: nn.Module) -> dict[str, str]:
        """What a continued run must share, as text. Reads every weight once."""
        settings = {
            f"setting {key}": str(value)
            for key, value in self
            if key not in _FREE and key not in _BASE
        }
        trained = {f"{name}.{c.free_factor}" for name, c in self._containers.items()}
        factors: dict[str, str] = {}
        for name, container in self._containers.items():
            frozen = [
                tensor
                for key, tensor in sorted(container.tensors().items())
                if key != f"{container.free_factor}.weight"
            ]
            shape = f"{container.form} {container.out_features}x{container.in_features}"
            factors[f"module {name}"] = f"{shape} rank {container.rank}"
            factors[f"frozen factors of {name}"] = digest(frozen)
            factors[f"starting {container.free_factor} of {name}"] = digest(
                [container.factors[container.free_factor].weight]
            )
        rest = [
            tensor
            for name, tensor in sorted(model.named_parameters())
            # Scales that a later stage has made are not set yet and hold anything.
            if name.endswith((".weight", ".bias")) and name.rpartition(".")[0] not in trained
        ]
        teachers = [c.teacher.weight for c in self._teachers if c.teacher is not None]
        return {
            **settings,
            "calibration tokens": digest(t for s in self._samples for t in s.inputs.values()),
            "modules": str(len(self._containers)),
            **factors,
            "other weights of the model": digest([*rest, *teachers]),
        }

    def _report(
        self, run: Loop, moments: Mapping[str, Moments], tracker: Tracker, seconds: float
    ) -> None:
        start, best = run.history.validation[0][1], run.plateau.best
        step, last = run.plateau.best_step, run.step
        logger.info(
            f"healing: validation loss {start:.4f} before, {best:.4f} at step {step} of {last}, "
            f"which is kept ({run.reason}); {seconds:.0f} s"
        )
        layers = min(layers for _, _, layers in run.history.validation)
        if layers > FAR_FROM_ZERO and run.history.stagnated(LEAST_GAIN):
            logger.warning(_stagnation(run, moments, self._containers))
        tracker.log_metrics(
            {
                "healing_validation_loss_before": start,
                "healing_validation_loss_after": best,
                "healing_best_step": step,
                "healing_steps": last,
                "healing_seconds": seconds,
            }
        )
        tracker.log_table(run.table(moments), "healing.csv")
        tracker.log_figure(
            loss_curve(
                [(s, v) for s, v, _ in run.history.train],
                [(s, v) for s, v, _ in run.history.validation],
                [(s, r) for s, _, r in run.history.train],
                step,
            ),
            "healing_loss.png",
        )

    @contextmanager
    def _tracking(self, model: nn.Module) -> Iterator[Tracker]:
        """The run of the CURModifier stage, or a new one where it has none."""
        journal = self._before.journal if self._before is not None else None
        if journal is None or journal.tracker.run_id is None or not self.mlflow:
            journal = None
        if journal is not None:
            tracker = journal.tracker
        else:
            name = f"heal-{type(model).__name__}"
            tracker = start_tracking(enabled=self.mlflow, run_name=name)
            tracker.log_params(self._recipe)
            tracker.log_text(yaml.safe_dump(self._recipe, sort_keys=False), "recipe.yaml")
        try:
            yield tracker
        except BaseException as error:
            if journal is not None:
                journal.fail(error)
            else:
                tracker.finish(error=error)
            raise
        if journal is None:
            tracker.finish()

    def _release(self) -> None:
        for container in self._teachers:
            container.drop_teacher()
        self._teachers = []
        self._containers = {}
        self._samples = []


def _healable(model: nn.Module) -> dict[str, FactoredLinear]:
    """The factored modules by name.

    Raises:
        ValueError: there are none; some are quantized; some have no dense layer to learn from.
    """
    found = factored_layers(model)
    if not found:
        raise ValueError(
            "CURHealModifier finds no factored modules to heal. Put it behind the CURModifier "
            "stage in the recipe."
        )
    quantized = [
        f"{name}.{child}"
        for name, module in found.items()
        for child, factor in module.factors.items()
        if getattr(factor, "quantization_scheme", None) is not None
    ]
    if quantized:
        raise ValueError(
            f"{quantized[:4]} are already quantized, and training would leave their grids. Heal "
            "first: put CURHealModifier between CURModifier and the quantization stage."
        )
    alone = [name for name, module in found.items() if module.dense is None]
    if alone:
        raise ValueError(
            f"{alone[:4]} were factored in an earlier run, and their dense layers, which would "
            "teach them, are gone. Put CURModifier and CURHealModifier into one recipe, on the "
            "dense model."
        )
    return found


def _stagnation(
    run: Loop, moments: Mapping[str, Moments], containers: Mapping[str, FactoredLinear]
) -> str:
    worst = sorted(moments, key=lambda name: -moments[name].floor)[:3]
    floors = ", ".join(
        f"{name} (rank {containers[name].rank}) {moments[name].floor:.1%}" for name in worst
    )
    steps = [step for step, _, _ in run.history.validation]
    return (
        f"healing stagnates: the best validation loss went from {run.history.validation[0][1]:.4f} "
        f"to {run.plateau.best:.4f}, and the second half of {steps[-1]} steps gained less than "
        f"{LEAST_GAIN:.0%}. The subspace is too small: rows, columns and skeletons are frozen, and "
        "the best cores for them still miss these shares of the dense layers' output energy: "
        f"{floors}. Raise the rank, use form 'id', whose rank is larger at equal size, or factor "
        "fewer layers; if the loss still fell steeply before it stopped, raise `steps` or "
        "`learning_rate`."
    )
