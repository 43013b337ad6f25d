"""One candidate's factors, fitted to second moments and loaded, with the record of it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import nn

from cur_modifier.factored import FactoredLinear, InterpolativeLinear, load_shared
from cur_modifier.linalg import CUR, RowID, damped, shrunk, split_rows
from cur_modifier.modifiers.config import Fit
from cur_modifier.modifiers.factorize import Recipe, factorize, fitted_gram, relative_error
from cur_modifier.modifiers.journal import Journal
from cur_modifier.modifiers.plan import Candidate
from cur_modifier.modifiers.sensitivity import Sensitivity

__all__ = ["Fitting", "Waiting", "named"]

# Tokens an input feature below which a Gram matrix is called badly known.
ENOUGH_TOKENS = 16
# Shrinkage of a Gram matrix towards its diagonal at one token a feature; it falls with the tokens.
SHRINKAGE = 0.5


@dataclass(frozen=True)
class Waiting:
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


@dataclass(frozen=True)
class Fitting:
    """How one stage fits.

    Attributes:
        recipe: the choices.
        journal: where the records are.
        sensitivity: what the loss thinks of each module, where it was measured.
        damping: of that metric, see ``SensitivityConfig``.
        shrink: shrink every second moment, not only those of too few tokens.
        seed: of every random choice.
    """

    recipe: Recipe
    journal: Journal
    sensitivity: Sensitivity | None
    damping: float
    shrink: bool
    seed: int

    def fit(
        self,
        waiting: Waiting,
        second_moment: torch.Tensor | None,
        target: torch.Tensor | None = None,
    ) -> None:
        """Fit a candidate's factors to ``second_moment (n, n)``, load them, write the records.

        Args:
            target: ``(m, n)``, what they approximate in place of the stacked weight.
        """
        started = time.perf_counter()
        candidate, containers = waiting.candidate, list(waiting.containers.values())
        assert candidate.rank is not None
        records = [self.journal.records[name] for name in candidate.members]
        W = candidate.weight
        if second_moment is not None:
            W = W.to(second_moment.device)
        outputs = self.outputs_metric(candidate)
        with named(candidate.name):
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
        gram = fitted_gram(self.recipe.fit, second_moment)
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
        self.journal.fitted(candidate.name, records, W, mean_square)

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
        elif not self.shrink:
            return gram
        return shrunk(gram, SHRINKAGE * features / tokens)

    def outputs_metric(self, candidate: Candidate) -> torch.Tensor | None:
        """The metric of a candidate's stacked outputs that the fit minimises in, if any."""
        by_loss = self.recipe.fit is Fit.LOSS
        return self.metric(candidate.name, candidate.sizes) if by_loss else None

    def metric(self, name: str, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """What the loss makes of errors in the outputs of a candidate or a decoder layer."""
        assert self.sensitivity is not None
        return damped(self.sensitivity.outputs[name], self.damping, sizes)


@contextmanager
def named(name: str) -> Iterator[None]:
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
