"""``CURModifier``: the stage of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from llmcompressor.core import Event, State
from loguru import logger
from pydantic import PrivateAttr
from torch import nn

from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.cur.engine import Engine
from cur_modifier.modifiers.cur.fitting import Fitting
from cur_modifier.modifiers.cur.hooks import HookEngine
from cur_modifier.modifiers.cur.install import install
from cur_modifier.modifiers.cur.journal import FactoringJournal
from cur_modifier.modifiers.cur.layerwise import LayerwiseEngine
from cur_modifier.modifiers.cur.plan import Plan, check, make_plan
from cur_modifier.modifiers.cur.settings import CURSettings
from cur_modifier.modifiers.journal import failing_run
from cur_modifier.passes.context import trial
from cur_modifier.structure.neurons import put_in_order

__all__ = ["CURModifier"]


class CURModifier(CURSettings):
    """Replaces Linear layers by CUR, interpolative or plain factors, guided by activations.

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
        regular expression after ``re:``
    :param ignore: modules to leave dense although a target matches
    :param form: a name in :data:`cur_modifier.forms.sizes.FORMS`: ``cur`` (real rows and columns),
        ``id`` (row interpolative decomposition), ``low_rank`` (a plain pair, ``r²`` numbers more)
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

    _plan: Plan | None = PrivateAttr(default=None)
    _engine: Engine | None = PrivateAttr(default=None)
    _journal: FactoringJournal | None = PrivateAttr(default=None)

    def check_ahead(self, model: nn.Module, batches: Any) -> None:
        """Check the stage before an earlier one's work; see ``ChecksAhead``.

        Raises:
            ValueError: as :func:`check`.
        """
        check(self, model, batches)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything, choose layers and ranks, and put the factored modules in."""
        model, batches = state.model, state.data.calib
        upstream.refuse_distributed()
        draft = check(self, model, batches)
        upstream.check_later(self, model, batches)
        self._journal = journal = FactoringJournal(model, enabled=self.mlflow)
        with failing_run(self):
            self._plan = plan = make_plan(draft, model, batches)
            journal.planned(self.layers.select, plan.costs, plan.chosen)
            installed, journal.records = install(model, plan, self)
            fitting = Fitting(plan, journal)
            self._engine = (
                LayerwiseEngine(installed, fitting)
                if self.layerwise
                else HookEngine(installed, fitting, self.register_hook)
            )
            # Upstream runs its sequential pipeline for a stage that requires data.
            self.requires_calibration_data = self._engine.needs_pipeline
            wrap_save_pretrained(model, journal.files)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Start the engine.

        Raises:
            ValueError: another stage shares this calibration pass.
        """
        with failing_run(self):
            upstream.refuse_shared_pass(self)
            assert self._engine is not None
            self._engine.start(state.model, state.data.calib)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Fit the factors of the modules that have seen all of their data."""
        with failing_run(self), torch.no_grad():
            if self._engine is not None:
                self._engine.layer_done(modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Remove the hooks, and put neurons in order.

        Raises:
            ValueError: a module was never reached by the calibration.
        """
        self.remove_hooks()
        assert self._engine is not None and self._plan is not None and self._journal is not None
        with failing_run(self):
            if names := self._engine.unfitted():
                raise ValueError(
                    f"the calibration never ran {names[:6]}, so they have no factors. Put them on "
                    "`ignore`, or calibrate with inputs that reach them."
                )
            if self._plan.neurons:
                with trial(state.model) as run:
                    moved = put_in_order(state.model, self._plan.neurons, run)
                if moved:
                    logger.info(f"the neurons of {moved} MLPs stand in the order of their row IDs")
        self._journal.complete = True
        self._plan = self._engine = None  # they hold what the loss thinks of every module

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Report and close the run; also called by upstream for a stage that never finished."""
        journal, self._journal = self._journal, None
        if journal is None:
            return True
        if journal.complete:
            journal.finish(state.model)
        else:
            journal.fail("the compression was interrupted before every module was factored")
        return True

    @property
    def journal(self) -> FactoringJournal | None:
        """The stage's record while its run is open; a healing stage goes on with it."""
        return self._journal
