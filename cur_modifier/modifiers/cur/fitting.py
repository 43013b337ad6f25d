"""One candidate's factors, fitted to second moments and loaded, with the record of it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger

from cur_modifier.linalg import Problem, relative_error, shrunk
from cur_modifier.modifiers.cur.config import Fit
from cur_modifier.modifiers.cur.install import Installed
from cur_modifier.modifiers.cur.journal import FactoringJournal
from cur_modifier.modifiers.cur.plan import Plan

__all__ = ["Fitting", "named"]

# Tokens an input feature below which a Gram matrix is called badly known.
ENOUGH_TOKENS = 16
# Shrinkage of a Gram matrix towards its diagonal at one token a feature; it falls with the tokens.
SHRINKAGE = 0.5


@dataclass(frozen=True)
class Fitting:
    """How one stage fits.

    Attributes:
        plan: of the stage.
        journal: where the records are.
    """

    plan: Plan
    journal: FactoringJournal

    def fit(
        self,
        group: Sequence[Installed],
        second_moment: torch.Tensor | None,
        targets: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Fit the factors of candidates that read one tensor to its ``second_moment (n, n)``, load
        them, and write the records.

        Candidates that produce the same neurons are fitted together, to one order of them.

        Args:
            targets: by the candidate's name ``(m, n)``, what its factors approximate in place of
                the stacked weight.
        """
        targets = targets or {}
        form = self.plan.settings.storage
        mean_square = None if second_moment is None else second_moment.diagonal()
        for together in self._by_neurons(group):
            started = time.perf_counter()
            problems = [
                self._problem(each, second_moment, targets.get(each.candidate.name))
                for each in together
            ]
            with named(" and ".join(each.candidate.name for each in together)):
                found = form.solve_together(problems)
            for each, problem, factors in zip(together, problems, found, strict=True):
                dense = each.candidate.members.values()
                biases = [None if d.bias is None else d.bias.detach() for d in dense]
                containers = list(each.containers.values())
                form.load(containers, factors, biases, write=update_offload_parameter)
                self._compare(each, problem)
            records = [self.journal.records[n] for each in together for n in each.containers]
            for record in records:
                record.seconds = (time.perf_counter() - started) / len(records)
            for each, problem in zip(together, problems, strict=True):
                own = [self.journal.records[name] for name in each.containers]
                self.journal.fitted(each.candidate.name, own, problem.W, mean_square)

    def _by_neurons(self, group: Sequence[Installed]) -> list[list[Installed]]:
        together: dict[object, list[Installed]] = {}
        for each in group:
            name = each.candidate.name
            key = next((n for n in self.plan.neurons if name in n.producers), name)
            together.setdefault(key, []).append(each)
        return list(together.values())

    def _problem(
        self,
        each: Installed,
        second_moment: torch.Tensor | None,
        target: torch.Tensor | None,
    ) -> Problem:
        settings, candidate = self.plan.settings, each.candidate
        assert candidate.rank is not None
        W = _wide(candidate.weight, second_moment)
        metric = self.plan.outputs_metric(candidate)
        return Problem(
            W=W,
            rank=candidate.rank,
            gram=_fitted_gram(settings.fit, second_moment),
            outputs=None if metric is None else metric.to(W.device),
            target=target,
            selection=settings.resolved_selection,
            scores=settings.resolved_scores,
            second_moment=second_moment,
            noise=self.journal.records[next(iter(candidate.members))].expected_noise,
            blocks=candidate.blocks,
            seed=settings.seed ^ zlib.crc32(candidate.name.encode()),
        )

    def _compare(self, each: Installed, problem: Problem) -> None:
        """Put into the records how far the loaded factors are from the weight, and how large."""
        blocks = problem.W.split(each.candidate.sizes)
        for (name, container), block in zip(each.containers.items(), blocks, strict=True):
            record = self.journal.records[name]
            dense = container.dense_weight().to(problem.W)
            record.relative_error = relative_error(block, dense, problem.gram)
            factor_entries = [f.weight.detach().abs().max() for f in container.factors.values()]
            # None where all its outputs are in the skeleton of another module.
            record.max_factor_entry = max(map(float, factor_entries), default=None)

    def regularized(self, names: Sequence[str], gram: torch.Tensor, tokens: int) -> torch.Tensor:
        """The Gram matrix of what the modules ``names`` read, with what its tokens leave open
        filled in from its diagonal."""
        features = gram.shape[0]
        for name in names:
            self.journal.records[name].tokens = tokens
        if tokens < features:
            logger.warning(
                f"{names[0]}: {tokens} tokens calibrate {features} inputs, so their second moment "
                f"has no full rank and is shrunk towards its diagonal. Give at least {features} "
                f"tokens, better {ENOUGH_TOKENS * features}."
            )
        elif not self.plan.settings.layerwise:
            return gram
        return shrunk(gram, SHRINKAGE * features / tokens)


def _wide(W: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """The weight in float32 or wider, where the second moment is."""
    W = W if like is None else W.to(like.device)
    return W.to(torch.promote_types(W.dtype, torch.float32))


@contextmanager
def named(name: str) -> Iterator[None]:
    """Prefix any ``ValueError`` raised inside with the module's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _fitted_gram(fit: Fit, second_moment: torch.Tensor | None) -> torch.Tensor | None:
    """The ``gram`` of a problem for a norm of fit."""
    if fit is Fit.WEIGHT or second_moment is None:
        return None
    return second_moment.diagonal() if fit is Fit.DIAG else second_moment
