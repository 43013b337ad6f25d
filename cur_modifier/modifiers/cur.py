"""``CURModifier``: the stage of a recipe."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from compressed_tensors.offload import set_onload_device, update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from pydantic import Field, PrivateAttr, field_serializer, model_validator
from torch import nn
from tqdm import tqdm

from cur_modifier.checkpoint import wrap_save_pretrained
from cur_modifier.factored import FactoredLinear, InterpolativeLinear, load_shared
from cur_modifier.linalg import (
    CUR,
    Form,
    GramAccumulator,
    RowID,
    Score,
    Selection,
    anchored_target,
    damped,
    dense_parameters,
    energy_rank,
    shrunk,
    split_rows,
    stored_parameters,
)
from cur_modifier.modifiers import upstream
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
    factorize,
    fitted_gram,
    quantization_noise,
    relative_error,
    weighted_spectrum,
)
from cur_modifier.modifiers.journal import Journal
from cur_modifier.modifiers.layers import (
    candidate_layers,
    choose_layers,
    decoder_layers,
    survey,
)
from cur_modifier.modifiers.plan import (
    Candidate,
    check_followers,
    check_weights,
    find_candidates,
    follower_bits,
    with_budget,
    with_ranks,
)
from cur_modifier.modifiers.refine import Surroundings, refine_layer
from cur_modifier.modifiers.report import ModuleRecord
from cur_modifier.modifiers.sensitivity import Sensitivity, load_or_measure
from cur_modifier.modifiers.sharing import joined, with_direct_outputs
from cur_modifier.modifiers.streams import LayerStreams, frozen

__all__ = ["CURModifier"]

# Tokens an input feature below which a Gram matrix is called badly known.
ENOUGH_TOKENS = 16
# Shrinkage of a Gram matrix towards its diagonal at one token a feature; it falls with the tokens.
SHRINKAGE = 0.5


@dataclass(frozen=True)
class _Waiting:
    """A candidate whose factored modules, by name, are in the model and not fitted yet."""

    candidate: Candidate
    containers: dict[str, FactoredLinear]

    @property
    def first(self) -> FactoredLinear:
        """The module that runs first: what it reads, all of them read."""
        return next(iter(self.containers.values()))

    @property
    def last(self) -> FactoredLinear:
        """The module that runs last: behind it all of them are done."""
        return next(reversed(self.containers.values()))


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
          multiple_of: 64
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
        - remove hooks
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
        second factor: a later stage's group size must divide it
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
    multiple_of: int = Field(default=1, ge=1)
    seed: int = 0
    mlflow: bool = True

    _pending: list[_Waiting] = PrivateAttr(default_factory=list)
    _grams: dict[nn.Module, GramAccumulator] = PrivateAttr(default_factory=dict)
    _latest: tuple[torch.Tensor, GramAccumulator] | None = PrivateAttr(default=None)
    _journal: Journal | None = PrivateAttr(default=None)
    _sensitivity: Sensitivity | None = PrivateAttr(default=None)
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
    def needs_gradients(self) -> bool:
        """Whether the loss's curvature is measured."""
        by_budget = self.rank.budget == "sensitivity"
        return self.fit is Fit.LOSS or by_budget or self.refine is not None

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
        if self.share_skeleton:
            candidates = joined(model, layers, candidates)
            if not any(candidate.shared for candidate in candidates):
                logger.warning(
                    "share_skeleton changes nothing: no two targets read one tensor. Add targets, "
                    "e.g. q, k and v together."
                )
        planned = with_ranks(candidates, self.form, self.rank, self.multiple_of)
        if self.rank.budget == "sensitivity":
            with_budget(planned, self.form, self.rank, self.multiple_of, spectra=None)
        self._check_data(state.data.calib)
        check_weights(planned)
        check_followers(model, self, planned, self.form, self.multiple_of)

        self._journal = Journal(model, enabled=self.mlflow)
        with self._failing_run():
            for candidate in self._choose(model, layers, planned, state.data.calib):
                self._swap(model, candidate)
            wrap_save_pretrained(model, {"recipe_as_given.yaml": self._journal.recipe_text})
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
            if self.by_layers:
                self._run_layers(state.model, state.data.calib)
                return
            for waiting in self._pending:
                for container in waiting.containers.values():
                    if torch.accelerator.is_available() and container.dense is not None:
                        set_onload_device(container.dense, get_main_device())
                if self.recipe.needs_activations:
                    self.register_hook(waiting.first, self._observe, "forward_pre")  # type: ignore[arg-type]

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Fit the factors of the modules that have seen all of their data."""
        with self._failing_run(), torch.no_grad():
            self._latest = None
            done = set(modules)
            for waiting in [w for w in self._pending if w.last in done]:
                self._fit_alone(waiting)

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

    def _choose(
        self,
        model: nn.Module,
        layers: list[tuple[str, nn.Module]],
        planned: list[Candidate],
        batches: Any,
    ) -> list[Candidate]:
        by_energy = self.rank.energy is not None
        distances: list[float] | None = None
        squares: dict[str, torch.Tensor] = {}
        if self.layers.select == "angular" or (by_energy and self.fit.needs_activations):
            watched = {c.name: c.first for c in planned} if by_energy else {}
            distances, squares = survey(model, batches, [m for _, m in layers], watched)
        chosen = choose_layers(self.layers, len(layers), self.seed, distances)
        planned = [c for c in planned if c.layer in chosen]
        if self.rank.energy is not None:
            energies = {
                c.name: energy_rank(
                    weighted_spectrum(c.weight, squares.get(c.name)), self.rank.energy
                )
                for c in planned
            }
            planned = with_ranks(planned, self.form, self.rank, self.multiple_of, energies)
        if self.needs_gradients:
            self._sensitivity = load_or_measure(
                model,
                {c.name: list(c.members.values()) for c in planned},
                layers,
                [sample.inputs for sample in collect_samples(batches)],
                samples=self.sensitivity.samples,
                seed=self.seed,
                cache=Path(self.sensitivity.cache) if self.sensitivity.cache else None,
            )
            if self.rank.budget == "sensitivity":
                planned = with_budget(
                    planned, self.form, self.rank, self.multiple_of, self._sensitivity.spectra
                )
        if self.share_skeleton:
            planned = [
                with_direct_outputs(c, self.multiple_of, self._outputs_metric(c))
                for c in tqdm(planned, desc="Sharing skeletons")
            ]
        modules = sum(len(c.members) for c in planned)
        logger.info(f"CURModifier factors {modules} modules in layers {chosen}")
        self._open_journal.layers_chosen(distances, chosen)
        return planned

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
        self._pending.append(_Waiting(candidate, containers))

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

    def _fit_alone(self, waiting: _Waiting) -> None:
        """Fit one candidate to the inputs that the hooks saw."""
        second_moment = None
        if self.recipe.needs_activations:
            accumulator = self._grams.get(waiting.first)
            if accumulator is None:
                raise ValueError(
                    f"{waiting.candidate.name}: no token reached this module. Calibrate with "
                    "inputs that reach it, or put it on `ignore`"
                )
            with _named(waiting.candidate.name):
                second_moment = accumulator.second_moment()
            names = list(waiting.containers)
            second_moment = self._regularized(names, second_moment, accumulator.tokens)
        self._fit(waiting, second_moment)
        self._grams.pop(waiting.first, None)

    def _run_layers(self, model: nn.Module, batches: Any) -> None:
        """Fit, and refine, one layer after another, with the dense model beside it."""
        layers = decoder_layers(model)
        by_layer: dict[int, dict[str, _Waiting]] = {}
        for waiting in self._pending:
            candidate = waiting.candidate
            by_layer.setdefault(candidate.layer, {})[candidate.name] = waiting
        last = max(by_layer, default=-1)
        with upstream.evaluation_forward(model, logits=False) as device, frozen(model):
            samples = [sample.inputs for sample in collect_samples(batches)]
            streams = LayerStreams(model, [layer for _, layer in layers], samples, device)
            for index in tqdm(range(last + 1), desc="Factoring layers", disable=last < 0):
                by_name = by_layer.get(index, {})
                readers = {name: waiting.first for name, waiting in by_name.items()}
                outputs, inputs, groups = streams.run_dense(readers)
                around: dict[str, Surroundings] = {}
                for group in groups:
                    waiting_group = [by_name[name] for name in group]
                    gram = self._fit_group(streams, waiting_group, inputs[group[0]])
                    if self.refine is not None and gram is not None:
                        for waiting in waiting_group:
                            around |= self._surroundings(waiting, gram)
                if self.refine is not None and around:
                    name = layers[index][0]
                    fitted = {n: c for w in by_name.values() for n, c in w.containers.items()}
                    containers = {n: c for n, c in fitted.items() if n in around}
                    refined = refine_layer(
                        streams,
                        outputs,
                        containers,
                        around,
                        self._metric(name),
                        self.refine,
                        seed=self.seed ^ index,
                    )
                    self._open_journal.refined(name, index, refined)
                streams.advance(outputs)

    def _fit_group(
        self,
        streams: LayerStreams,
        group: Sequence[_Waiting],
        dense_inputs: Sequence[torch.Tensor],
    ) -> torch.Tensor | None:
        """Fit the candidates that read one tensor to what both models put into it; the second
        moment of what the compressed model puts, where it was asked for."""
        first = group[0].first
        gram = drift = None
        if self.recipe.needs_activations or self.anchor or self.refine is not None:
            moments = streams.moments(first, dense_inputs, first.in_features)
            with _named(group[0].candidate.name):
                gram, drift = moments.moments()
            names = [name for waiting in group for name in waiting.containers]
            gram = self._regularized(names, gram, moments.tokens)
        for waiting in group:
            target = None
            if self.anchor:
                assert gram is not None and drift is not None
                dense = waiting.candidate.weight
                target = anchored_target(dense, gram, drift.to(gram), self.anchor)
            self._fit(waiting, gram, target)
        return gram

    def _surroundings(self, waiting: _Waiting, gram: torch.Tensor) -> dict[str, Surroundings]:
        """What each container of a fitted candidate reads, and what its outputs are worth."""
        candidate = waiting.candidate
        metric = self._metric(candidate.name, candidate.sizes).to(gram.device)
        found, start = {}, 0
        for (name, _), size in zip(waiting.containers.items(), candidate.sizes, strict=True):
            own = slice(start, start + size)
            block = metric[own] if metric.ndim == 1 else metric[own, own]
            found[name] = Surroundings(gram, block)
            start += size
        return found

    def _regularized(self, names: Sequence[str], gram: torch.Tensor, tokens: int) -> torch.Tensor:
        """The Gram matrix, with what its tokens leave open filled in from its diagonal."""
        features = gram.shape[0]
        for name in names:
            self._open_journal.records[name].tokens = tokens
        if tokens < features:
            logger.warning(
                f"{names[0]}: {tokens} tokens calibrate {features} inputs, so their second moment "
                f"has no full rank and is shrunk towards its diagonal. Give at least {features} "
                f"tokens, better {ENOUGH_TOKENS * features}."
            )
        elif not self.by_layers:
            return gram
        return shrunk(gram, SHRINKAGE * features / tokens)

    def _fit(
        self,
        waiting: _Waiting,
        second_moment: torch.Tensor | None,
        target: torch.Tensor | None = None,
    ) -> None:
        """Fit a candidate's factors to a second moment, load them, and write the records."""
        started = time.perf_counter()
        candidate, containers = waiting.candidate, list(waiting.containers.values())
        assert candidate.rank is not None
        records = [self._open_journal.records[name] for name in candidate.members]
        W = candidate.weight
        if second_moment is not None:
            W = W.to(second_moment.device)
        outputs = self._outputs_metric(candidate)
        with _named(candidate.name):
            factors = factorize(
                self.recipe,
                W,
                second_moment,
                candidate.rank,
                seed=self.seed ^ zlib.crc32(candidate.name.encode()),
                noise=records[0].expected_noise,
                outputs=None if outputs is None else outputs.to(W.device),
                target=target,
                blocks=candidate.blocks,
            )
        _load(containers, factors, list(candidate.members.values()))
        gram = fitted_gram(self.fit, second_moment)
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        for record, container, block in zip(
            records, containers, W.split(candidate.sizes), strict=True
        ):
            record.relative_error = relative_error(block, container.dense_weight().to(W), gram)
            factor_entries = [f.weight.detach().abs().max() for f in container.factors.values()]
            # None where all its outputs are in the skeleton of another module.
            record.max_factor_entry = max(map(float, factor_entries), default=None)
        for record in records:
            record.seconds = (time.perf_counter() - started) / len(records)
        mean_square = None if second_moment is None else second_moment.diagonal()
        self._open_journal.fitted(candidate.name, records, W, mean_square)
        self._pending.remove(waiting)

    def _outputs_metric(self, candidate: Candidate) -> torch.Tensor | None:
        """The metric of a candidate's stacked outputs that the fit minimises in, if any."""
        return self._metric(candidate.name, candidate.sizes) if self.fit is Fit.LOSS else None

    def _metric(self, name: str, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """What the loss makes of errors in the outputs of a candidate or a layer."""
        assert self._sensitivity is not None
        return damped(self._sensitivity.outputs[name], self.sensitivity.damping, sizes)

    @property
    def journal(self) -> Journal | None:
        """The stage's record while its run is open; a healing stage goes on with it."""
        return self._journal

    @property
    def _open_journal(self) -> Journal:
        assert self._journal is not None
        return self._journal

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


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What the algebra finds wrong inside is said of the module ``name``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _load(
    containers: Sequence[FactoredLinear], factors: CUR | RowID, dense: Sequence[nn.Linear]
) -> None:
    """Store factors of the stacked weight in the containers, with the dense modules' biases."""
    biases = [None if linear.bias is None else linear.bias.detach() for linear in dense]
    if len(containers) == 1:
        containers[0].load_factors(factors, biases[0], write=update_offload_parameter)
        return
    sharing = [c for c in containers if isinstance(c, InterpolativeLinear)]
    assert isinstance(factors, RowID)
    parts = split_rows(factors, [linear.out_features for linear in dense])
    load_shared(sharing, parts, biases, write=update_offload_parameter)
