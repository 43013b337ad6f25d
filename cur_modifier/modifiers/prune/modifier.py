"""``IDPruningModifier``: the stage of a recipe."""

from __future__ import annotations

from typing import Any

from llmcompressor.core import State
from pydantic import PrivateAttr
from torch import nn

from cur_modifier.checkpoint.resized import mark_resized
from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.journal import failing_run
from cur_modifier.modifiers.prune.engine import remove_units
from cur_modifier.modifiers.prune.journal import PruningJournal
from cur_modifier.modifiers.prune.magnitude import remove_by_weight
from cur_modifier.modifiers.prune.plan import Plan, check, make_plan, put_counts
from cur_modifier.modifiers.prune.settings import PruneSettings

__all__ = ["IDPruningModifier"]


class IDPruningModifier(PruneSettings):
    """Removes neurons of MLPs, heads of attention and channels of convolutions; what is left is a
    smaller dense model.

    An interpolative decomposition of each hidden activation keeps real units, and the module that
    reads them absorbs the interpolation of the others (Chee et al. 2022, "Model preserving
    compression"; STAT, 2024). Nothing is trained, unless ``refine`` asks for it. With
    ``shapes: uniform`` the checkpoint is an ordinary one, which needs no plugin anywhere.

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        IDPruningModifier:
          units: [neurons]
          budget: {ratio: 0.8}
          shapes: uniform
      quantization_modifiers:
        GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head]}
    ```

    Lifecycle:

    - on_initialize
        - check the whole stage against model, data and later stages
        - measure what the loss thinks of each consumer, and spend the budget
        - remove and correct, layer by layer. llm-compressor initializes all stages of a recipe
          before it calibrates the first one: only so do later stages find the smaller layers
    - on_finalize
        - report, with the losses of later stages; close the MLflow run

    :param units: kinds of units: ``neurons``, ``heads`` (a key/value head goes with its queries),
        ``channels`` between convolutions, which take ``shapes: free`` and data with
        ``pixel_values``
    :param targets: modules that read units (``down_proj``, ``o_proj``), by name, class name, or
        regular expression after ``re:``; all by default
    :param ignore: such modules whose units all stay although a target matches
    :param budget: what may be left, see ``BudgetConfig``
    :param shapes: ``uniform`` keeps as many units of a kind in every layer, as config.json's own
        fields can say: any engine loads that. ``free`` lets each layer keep what it needs; the
        checkpoint then needs cur_modifier, or the reader that it ships
    :param selection: how units are chosen. ``elimination`` gives up one after another, each the one
        whose loss the others mend best; ``greedy`` builds up from none; ``qdeim``, ``deim``,
        ``leverage``, ``norm`` and ``random`` as for rows
    :param correct: ``consumers`` absorb the interpolation; with ``layers`` all matrices of a layer
        are also fitted, by least squares, to what they answer in the dense model, since behind a
        removal they read something else; with ``none`` consumers keep their columns
    :param max_entry: exchange neurons until no entry of an interpolation is larger; STAT's is 2
    :param fit: ``loss`` chooses units in the metric of the loss's curvature, ``gram`` by the plain
        error of the consumer's output, ``weight`` by the norm of all weights of a unit, without
        data: magnitude pruning, a baseline. It takes ``selection: norm``, ``correct: none`` and a
        budget ``by: uniform``
    :param anchor: the dense model's share in what modules are fitted to, as in ``CURModifier``;
        null fits each to its own weight, so ``layers`` is then ``consumers``. For channels 1 is
        better: images give many patches for every feature
    :param refine: train each layer's weights on its output after the removal, see ``RefineConfig``
    :param sensitivity: how the loss's curvature is measured, see ``SensitivityConfig``
    :param multiple_of: counts of neurons and channels are multiples of this: group sizes of later
        stages must divide it, and kernels want it
    :param tensor_parallel: ranks that will serve the model together: what is left of every kind
        divides by it, also in the groups of later stages
    :param served: refuse what vLLM can't serve. ``false`` for models that transformers alone runs
    :param seed: of every random choice
    :param mlflow: log the run to MLflow where it is installed
    """

    _plan: Plan | None = PrivateAttr(default=None)
    _journal: PruningJournal | None = PrivateAttr(default=None)

    def check_ahead(self, model: nn.Module, batches: Any) -> None:
        """Check the stage before an earlier one's work; see ``ChecksAhead``.

        Raises:
            ValueError: as :func:`check`.
        """
        check(self, model, batches)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything, choose units, remove them, and correct what reads them."""
        model, batches = state.model, state.data.calib
        upstream.refuse_distributed()
        draft = check(self, model, batches)
        upstream.check_later(self, model, batches)
        self._journal = journal = PruningJournal(model, enabled=self.mlflow)
        with failing_run(self):
            plan = make_plan(draft, model, batches)
            if self.needs_data:
                remove_units(model, plan, batches, journal)
            else:
                remove_by_weight(model, plan, journal)
            put_counts(model, plan)
            mark_resized(model, plan.fields)
            wrap_save_pretrained(model, journal.files)
        journal.complete = True
        self._plan = draft  # without what the loss thinks of every module
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Report and close the run."""
        journal, self._journal = self._journal, None
        plan, self._plan = self._plan, None
        if journal is not None and plan is not None:
            kept = {record.name: record.after for record in journal.records.values()}
            left = plan.costs.left(plan.units, kept)
            journal.finish(state.model, plan.counted, plan.costs.total, left)
        return True
