"""``CURModifier``: the stage of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from compressed_tensors.offload import set_onload_device
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from pydantic import Field, PrivateAttr, field_serializer, model_validator
from torch import nn
from tqdm import tqdm

from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.factored import InterpolativeLinear
from cur_modifier.linalg import (
    Form,
    GramAccumulator,
    Score,
    Selection,
    dense_parameters,
    energy_rank,
    stored_parameters,
)
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.by_layers import run_layers
from cur_modifier.modifiers.config import (
    Fit,
    LayersConfig,
    RankConfig,
    RefineConfig,
    SensitivityConfig,
)
from cur_modifier.modifiers.distill import collect_samples
from cur_modifier.modifiers.factorize import (
    Recipe,
    quantization_noise,
    weighted_spectrum,
)
from cur_modifier.modifiers.fitting import Fitting, Waiting, named
from cur_modifier.modifiers.journal import Journal
from cur_modifier.modifiers.layers import (
    candidate_layers,
    check_count,
    choose_layers,
    decoder_layers,
    survey,
)
from cur_modifier.modifiers.neurons import Neurons, find_neurons, put_in_order
from cur_modifier.modifiers.plan import (
    Candidate,
    check_followers,
    check_weights,
    expected_growth,
    find_candidates,
    follower_bits,
    with_budget,
    with_ranks,
)
from cur_modifier.modifiers.report import ModuleRecord
from cur_modifier.modifiers.sensitivity import Sensitivity, load_or_measure
from cur_modifier.modifiers.sharing import joined, with_direct_outputs
from cur_modifier.modifiers.training import split

__all__ = ["CURModifier"]


class CURModifier(Modifier):
    """Replaces Linear layers by CUR or interpolative factors, guided by activations.

    Defaults are those of CURing (Park and Moon 2025): q, k and gate projections of the ten layers
    that turn the hidden state least, rows and columns by DEIM on WANDA scores, the largest rank
    that still saves parameters but at most 256. The core ``U`` is fitted to the activations;
    ``fit: weight`` gives the paper's ``C⁺ W R⁺``.

    Sample yaml:

    ```yaml
    compress_stage:
      cur_modifiers:
        CURModifier:
          targets: ["re:.*(q|k|v|o|gate|up|down)_proj$"]
          form: id
          fit: loss
          anchor: 0.25
          rank: {ratio: 0.8, budget: sensitivity}
          refine: {epochs: 4}
          multiple_of: 128
          layers: {select: all}
      quantization_modifiers:
        GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head]}
    ```

    Lifecycle:

    - on_initialize
        - check the whole stage against model, data and later stages
        - survey the dense model, where layers or ranks are chosen by data, and measure what the
          loss thinks of each module, where the fit or the budget asks for it
        - swap factored modules in; they answer with their dense weight until fitted, so that later
          stages attach to the factors at once
    - on_calibration_start
        - register Gram hooks; or, with ``anchor`` or ``refine``, run the layers one after another
          with the dense model beside the compressed one, fitting and refining each
    - on_sequential_epoch_end
        - fit the factors of the finished layer; the next layers see its compressed output
    - on_calibration_end
        - remove hooks; put the neurons of MLPs in the order in which row IDs compute them
    - on_finalize
        - report, with the losses of later stages; close the MLflow run

    :param targets: Linears inside the decoder layers to factor, by class name, module name, or
        regular expression behind ``re:``
    :param ignore: modules to leave dense although a target matches
    :param form: ``cur`` (real rows and columns) or ``id`` (row interpolative decomposition)
    :param scores: what a row or column is worth to the selection; ``wanda`` for CUR
    :param selection: how rows and columns are picked; ``deim`` for CUR. ``greedy`` picks those that
        lower the error in the norm of the fit most, and takes no scores. A row ID without a
        selection is the compact form of the optimal approximation
    :param share_skeleton: factor the targets that read one tensor (q, k and v; gate and up) as one
        row ID ``[W_q; W_k; W_v]`` whose skeleton they share, with one rank, that of the stacked
        weight. Better at equal size where their rows are alike, and one first product in place of
        several. Which modules read one tensor is seen in a short forward pass of the dense model.
        Only for form ``id`` without a selection
    :param fit: norm in which the free factors are fitted. Where a later stage quantizes a row ID,
        its interpolation also expects the noise that the bits bring
    :param anchor: the dense model's share in the targets. Behind layers that are already factored
        a module reads ``x̃`` where the dense model has ``x``: its factors are fitted to
        ``W (anchor · x + (1 − anchor) · x̃)``, and modules of one layer see the factors of those
        before them. None fits each to its own inputs
    :param refine: train the factors of each layer after the fit, see ``RefineConfig``
    :param sensitivity: how fit ``loss`` and budget ``sensitivity`` are measured, see
        ``SensitivityConfig``
    :param rank: how the rank is chosen, see ``RankConfig``
    :param layers: which decoder layers, see ``LayersConfig``
    :param multiple_of: every rank is a multiple of this. The rank is the number of inputs of the
        second factor: a later stage's group size must divide it. By default 8, which kernels for
        16-bit numbers want; any with a fixed rank
    :param seed: of every random choice
    :param mlflow: log the run to MLflow where it is installed
    """

    targets: list[str] = Field(
        default_factory=lambda: ["re:.*q_proj$", "re:.*k_proj$", "re:.*gate_proj$"], min_length=1
    )
    ignore: list[str] = Field(default_factory=list)
    form: Form = Form.CUR
    scores: Score | None = None
    selection: Selection | None = None
    share_skeleton: bool = False
    fit: Fit = Fit.GRAM
    anchor: float | None = Field(default=None, ge=0, le=1)
    refine: RefineConfig | None = None
    sensitivity: SensitivityConfig = Field(default_factory=SensitivityConfig)
    rank: RankConfig = Field(default_factory=lambda: RankConfig(max=256))
    layers: LayersConfig = Field(default_factory=LayersConfig)
    multiple_of: int | None = Field(default=None, ge=1)
    seed: int = 0
    mlflow: bool = True

    _pending: list[Waiting] = PrivateAttr(default_factory=list)
    _grams: dict[nn.Module, GramAccumulator] = PrivateAttr(default_factory=dict)
    _latest: tuple[torch.Tensor, GramAccumulator] | None = PrivateAttr(default=None)
    _journal: Journal | None = PrivateAttr(default=None)
    _fitting: Fitting | None = PrivateAttr(default=None)
    _neurons: list[Neurons] = PrivateAttr(default_factory=list)
    _complete: bool = PrivateAttr(default=False)

    @field_serializer("form", "scores", "selection", "fit")
    def _plain(self, value: str | None) -> str | None:
        # llm-compressor dumps recipes with python tags for enums, which then do not load.
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.form is Form.ID and self.selection is None and self.scores is not None:
            raise ValueError(
                f"scores '{self.scores}' guide a selection, and form 'id' without one takes the "
                "optimal approximation. Give `selection` as well (e.g. qdeim), or drop `scores`."
            )
        if self.selection is Selection.GREEDY and self.scores is not None:
            raise ValueError(
                f"scores '{self.scores}' mean nothing to selection 'greedy', which weighs rows and "
                "columns in the norm of the fit. Drop `scores`, or choose another selection."
            )
        if self.layers.select == "sensitivity" and self.rank.energy is not None:
            raise ValueError(
                f"layers are selected by sensitivity at their ranks, but energy {self.rank.energy} "
                "gives ranks after the layers are known. Give fixed, max or ratio, or select "
                "layers otherwise."
            )
        if self.share_skeleton and (self.form is not Form.ID or self.selection is not None):
            given = f"selection '{self.selection}'" if self.form is Form.ID else "form 'cur'"
            raise ValueError(
                f"share_skeleton is set with {given}; only a row ID of the optimal approximation "
                "can share its skeleton. Write `form: id` without `selection` and `scores`, or "
                "drop `share_skeleton`."
            )
        # Upstream runs its sequential pipeline for a stage that requires data. A stage that runs
        # the layers itself takes the data and leaves the pipeline out.
        self.requires_calibration_data = self.recipe.needs_activations and not self.by_layers
        return self

    @property
    def by_layers(self) -> bool:
        """Whether the stage runs the layers itself, dense beside compressed."""
        return self.anchor is not None or self.refine is not None

    @property
    def rank_unit(self) -> int:
        """What every rank is a multiple of."""
        if self.multiple_of is not None:
            return self.multiple_of
        return 1 if self.rank.fixed is not None else 8

    @property
    def needs_gradients(self) -> bool:
        """Whether the loss's curvature is measured."""
        by_curvature = "sensitivity" in (self.rank.budget, self.layers.select)
        return self.fit is Fit.LOSS or by_curvature or self.refine is not None

    @property
    def recipe(self) -> Recipe:
        """The choices with their defaults by form."""
        scores, selection = self.scores, self.selection
        if self.form is Form.CUR:
            selection = selection or Selection.DEIM
        if selection is not None and selection is not Selection.GREEDY:
            scores = scores or Score.WANDA
        return Recipe(form=self.form, scores=scores, selection=selection, fit=self.fit)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything, choose layers and ranks, and swap the factored modules in."""
        model = state.model
        upstream.refuse_distributed()
        layers = decoder_layers(model)
        candidates = find_candidates(
            model,
            layers,
            candidate_layers(self.layers, len(layers)),
            self.targets,
            self.ignore,
        )
        check_count(self.layers, {candidate.layer for candidate in candidates})
        if self.share_skeleton:
            candidates = joined(model, layers, candidates)
            if not any(candidate.shared for candidate in candidates):
                logger.warning(
                    "share_skeleton changes nothing: no two targets read one tensor. Add targets, "
                    "e.g. q, k and v together."
                )
        planned = with_ranks(candidates, self.form, self.rank, self.rank_unit)
        if self.rank.budget == "sensitivity":
            with_budget(planned, self.form, self.rank, self.rank_unit, spectra=None)
        self._check_data(state.data.calib)
        check_weights(planned)
        check_followers(model, self, planned, self.form, self.rank_unit)

        self._journal = Journal(model, enabled=self.mlflow)
        with self._failing_run():
            for candidate in self._choose(model, layers, planned, state.data.calib):
                self._swap(model, candidate)
            wrap_save_pretrained(model, self._journal.files)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register the Gram hooks.

        Raises:
            ValueError: another stage shares this calibration pass.
        """
        with self._failing_run():
            sharing = [m for m in upstream.modifiers_of_this_pass() if m is not self]
            if sharing:
                names = [type(m).__name__ for m in sharing]
                raise ValueError(
                    f"CURModifier shares its calibration pass with {names}, which would calibrate "
                    "on factors that are not fitted yet. Call oneshot with its default "
                    "`pipeline='independent'`."
                )
            if torch.accelerator.is_available():
                for waiting in self._pending:
                    for container in waiting.containers.values():
                        if container.dense is not None:
                            set_onload_device(container.dense, get_main_device())
            if self.by_layers:
                run_layers(
                    state.model,
                    decoder_layers(state.model),
                    self._pending,
                    state.data.calib,
                    self._open_fitting,
                    anchor=self.anchor,
                    refine=self.refine,
                )
                return
            if self.recipe.needs_activations:
                for waiting in self._pending:
                    self.register_hook(waiting.first, self._observe, "forward_pre")  # type: ignore[arg-type]

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Fit the factors of the modules that have seen all of their data."""
        with self._failing_run(), torch.no_grad():
            self._latest = None
            done = set(modules)
            finished = [waiting for waiting in self._pending if waiting.last in done]
            reading: dict[object, list[Waiting]] = {}  # by the tensor that they read
            for waiting in finished:
                # Without activations there is nothing to tell them apart by, and no need to.
                key = self._grams.get(waiting.first)
                reading.setdefault(key, []).append(waiting)
            for group in reading.values():
                self._fit_alone(group)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Remove the hooks.

        Raises:
            ValueError: a module was never reached by the calibration.
        """
        self.remove_hooks()
        with self._failing_run():
            if self._pending:
                names = [waiting.candidate.name for waiting in self._pending]
                raise ValueError(
                    f"the calibration never ran {names[:6]}, so they have no factors. Put them on "
                    "`ignore`, or calibrate with inputs that reach them."
                )
            moved = put_in_order(state.model, self._neurons)
            if moved:
                logger.info(f"the neurons of {moved} MLPs stand in the order of their row IDs")
        self._fitting = None  # it holds what the loss thinks of every module
        self._complete = True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Report and close the run; also called by upstream for a stage that never finished."""
        journal, self._journal = self._journal, None
        if journal is None:
            return True
        if self._complete:
            journal.finish(state.model)
        else:
            journal.fail("the compression was interrupted before every module was factored")
        return True

    # -- steps ---------------------------------------------------------------------------------

    def _check_data(self, batches: Any) -> None:
        reasons = []
        scores = self.recipe.scores
        if scores is not None and scores.needs_activations:
            reasons.append(f"scores '{scores}'")
        if self.fit.needs_activations:
            reasons.append(f"fit '{self.fit}'")
        if self.layers.select == "angular":
            reasons.append("layers selected by angular distance")
        if self.layers.select == "sensitivity":
            reasons.append("layers selected by sensitivity")
        if self.rank.energy is not None and self.fit.needs_activations:
            reasons.append("a rank by energy")
        if self.by_layers:
            reasons.append("anchor and refine")
        if self.rank.budget == "sensitivity":
            reasons.append("a budget by sensitivity")
        if reasons and batches is None:
            raise ValueError(
                f"no calibration data, but {', '.join(reasons)} need it. Pass `dataset=` to "
                "oneshot, or set `scores: weight`, `fit: weight` and `layers: {select: all}`."
            )
        if self.refine is not None:
            split(len(collect_samples(batches)), self.refine.validation_share, self.seed)

    def _choose(
        self,
        model: nn.Module,
        layers: list[tuple[str, nn.Module]],
        planned: list[Candidate],
        batches: Any,
    ) -> list[Candidate]:
        by_energy = self.rank.energy is not None
        costs: list[float] | None = None
        squares: dict[str, torch.Tensor] = {}
        sensitivity: Sensitivity | None = None
        if self.layers.select == "angular" or (by_energy and self.fit.needs_activations):
            watched = {c.name: c.first for c in planned} if by_energy else {}
            costs, squares = survey(model, batches, [m for _, m in layers], watched)
        if self.layers.select == "sensitivity":
            sensitivity = self._measure(model, layers, planned, batches)
            costs = expected_growth(
                planned, self.form, self.rank, self.rank_unit, sensitivity.spectra, len(layers)
            )
        chosen = choose_layers(self.layers, {c.layer for c in planned}, self.seed, costs)
        planned = [c for c in planned if c.layer in chosen]
        if self.rank.energy is not None:
            energies = {
                c.name: energy_rank(
                    weighted_spectrum(c.weight, squares.get(c.name)), self.rank.energy
                )
                for c in planned
            }
            planned = with_ranks(planned, self.form, self.rank, self.rank_unit, energies)
        if self.form is Form.ID and self.recipe.selection is None:
            free = [c for c in planned if not c.shared and c.rank is not None]
            self._neurons = find_neurons(model, layers, free)
        if sensitivity is None and self.needs_gradients:
            sensitivity = self._measure(model, layers, planned, batches)
        if self.rank.budget == "sensitivity":
            assert sensitivity is not None
            planned = with_budget(
                planned, self.form, self.rank, self.rank_unit, sensitivity.spectra
            )
        self._fitting = Fitting(
            self.recipe,
            self._open_journal,
            sensitivity,
            damping=self.sensitivity.damping,
            shrink=self.by_layers,
            neurons=self._neurons,
            seed=self.seed,
        )
        if self.share_skeleton:
            planned = [
                with_direct_outputs(c, self.rank_unit, self._fitting.outputs_metric(c))
                for c in tqdm(planned, desc="Sharing skeletons")
            ]
        modules = sum(len(c.members) for c in planned)
        logger.info(f"CURModifier factors {modules} modules in layers {chosen}")
        self._open_journal.layers_chosen(self.layers.select, costs, chosen)
        return planned

    def _measure(
        self,
        model: nn.Module,
        layers: list[tuple[str, nn.Module]],
        planned: list[Candidate],
        batches: Any,
    ) -> Sensitivity:
        return load_or_measure(
            model,
            {c.name: list(c.members.values()) for c in planned},
            layers,
            [sample.inputs for sample in collect_samples(batches)],
            samples=self.sensitivity.samples,
            seed=self.seed,
            cache=Path(self.sensitivity.cache) if self.sensitivity.cache else None,
        )

    def _swap(self, model: nn.Module, candidate: Candidate) -> None:
        records = [
            ModuleRecord(
                name=name,
                layer=candidate.layer,
                form=str(self.form),
                out_features=linear.out_features,
                in_features=linear.in_features,
                parameters_before=dense_parameters(
                    linear.out_features, linear.in_features, bias=linear.bias is not None
                ),
            )
            for name, linear in candidate.members.items()
        ]
        self._open_journal.records |= {record.name: record for record in records}
        if candidate.rank is None:
            why = (
                f"the rank that holds energy {self.rank.energy} would store no less than"
                if self.rank.energy is not None
                else "the budget gives it all of"
            )
            before = sum(record.parameters_before for record in records)
            logger.warning(f"{candidate.name} stays dense: {why} its {before} parameters")
            return
        noise = 0.0
        if self.form is Form.ID:
            # Followers are known only now; the pass that fits the factors runs without them.
            noise = quantization_noise(follower_bits(self, candidate, self.form))
        containers = candidate.skeletons(self.form)
        for record, container in zip(records, containers.values(), strict=True):
            linear = candidate.members[record.name]
            m, n, bias = linear.out_features, linear.in_features, linear.bias is not None
            record.rank = candidate.rank
            record.expected_noise = noise
            record.parameters_after = stored_parameters(self.form, m, n, candidate.rank, bias=bias)
            if candidate.shared:  # each counts the rows of the skeleton that are its own outputs
                assert isinstance(container, InterpolativeLinear)
                c = record.direct_outputs = container.direct_outputs
                record.shared_skeleton = None if container.leader is None else records[0].name
                record.parameters_after = c * n + (m - c) * candidate.rank + m * bias
            container.stand_in(linear)
            container.train(linear.training)
            parent, _, child = record.name.rpartition(".")
            setattr(model.get_submodule(parent), child, container)
        self._pending.append(Waiting(candidate, containers))

    def _observe(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        own = self._grams.get(module)
        if self._latest is not None and self._latest[0] is x and own in (None, self._latest[1]):
            # q, k and v read one tensor: one Gram matrix serves all three.
            self._grams[module] = self._latest[1]
            return
        if own is None:
            own = self._grams[module] = GramAccumulator(x.shape[-1], device=x.device)
        own.update(x)
        self._latest = (x, own)

    def _fit_alone(self, group: Sequence[Waiting]) -> None:
        """Fit candidates that read one tensor to what the hooks saw of it."""
        second_moment = None
        first = group[0]
        if self.recipe.needs_activations:
            accumulator = self._grams.get(first.first)
            if accumulator is None:
                raise ValueError(
                    f"{first.candidate.name}: no token reached this module. Calibrate with "
                    "inputs that reach it, or put it on `ignore`"
                )
            with named(first.candidate.name):
                second_moment = accumulator.second_moment()
            names = [name for waiting in group for name in waiting.containers]
            second_moment = self._open_fitting.regularized(names, second_moment, accumulator.tokens)
        self._open_fitting.fit(group, second_moment)
        for waiting in group:
            self._pending.remove(waiting)
            self._grams.pop(waiting.first, None)

    @property
    def journal(self) -> Journal | None:
        """The stage's record while its run is open; a healing stage goes on with it."""
        return self._journal

    @property
    def _open_journal(self) -> Journal:
        assert self._journal is not None
        return self._journal

    @property
    def _open_fitting(self) -> Fitting:
        assert self._fitting is not None
        return self._fitting

    @contextmanager
    def _failing_run(self) -> Iterator[None]:
        """Mark the run as failed, with its error, on the way out of one of our own steps."""
        try:
            yield
        except BaseException as error:
            if self._journal is not None:
                self._journal.fail(error)
                self._journal = None
            raise
