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
from torch import nn

from cur_modifier.factored import FactoredLinear, InterpolativeLinear, load_shared
from cur_modifier.linalg import CUR, RowID, damped, shrunk, split_rows
from cur_modifier.modifiers.config import Fit
from cur_modifier.modifiers.factorize import (
    Recipe,
    factorize,
    factorize_aligned,
    fitted_gram,
    relative_error,
)
from cur_modifier.modifiers.journal import Journal
from cur_modifier.modifiers.neurons import Neurons
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
        neurons: of which candidates the outputs are to come in one order.
        seed: of every random choice.
    """

    recipe: Recipe
    journal: Journal
    sensitivity: Sensitivity | None
    damping: float
    shrink: bool
    neurons: Sequence[Neurons]
    seed: int

    def fit(
        self,
        group: Sequence[Waiting],
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
        gram = fitted_gram(self.recipe.fit, second_moment)
        mean_square = None if second_moment is None else second_moment.diagonal()
        for together in self._by_neurons(group):
            started = time.perf_counter()
            weights = [_wide(waiting.candidate.weight, second_moment) for waiting in together]
            found = self._factors(together, weights, second_moment, targets)
            for waiting, W, factors in zip(together, weights, found, strict=True):
                dense = list(waiting.candidate.members.values())
                _load(list(waiting.containers.values()), factors, dense)
                self._compare(waiting, W, gram)
            records = [self.journal.records[n] for w in together for n in w.candidate.members]
            for record in records:
                record.seconds = (time.perf_counter() - started) / len(records)
            for waiting, W in zip(together, weights, strict=True):
                own = [self.journal.records[name] for name in waiting.candidate.members]
                self.journal.fitted(waiting.candidate.name, own, W, mean_square)

    def _by_neurons(self, group: Sequence[Waiting]) -> list[list[Waiting]]:
        together: dict[object, list[Waiting]] = {}
        for waiting in group:
            name = waiting.candidate.name
            key = next((each for each in self.neurons if name in each.producers), name)
            together.setdefault(key, []).append(waiting)
        return list(together.values())

    def _factors(
        self,
        together: Sequence[Waiting],
        weights: Sequence[torch.Tensor],
        second_moment: torch.Tensor | None,
        targets: Mapping[str, torch.Tensor],
    ) -> Sequence[CUR | RowID]:
        candidates = [waiting.candidate for waiting in together]
        ranks = [c.rank for c in candidates if c.rank is not None]
        noise = [self.journal.records[next(iter(c.members))].expected_noise for c in candidates]
        metrics = [self.outputs_metric(c) for c in candidates]
        outputs = [
            None if H is None else H.to(W.device) for H, W in zip(metrics, weights, strict=True)
        ]
        wanted = [targets.get(c.name) for c in candidates]
        first = candidates[0]
        if len(candidates) > 1:
            with named(" and ".join(c.name for c in candidates)):
                return factorize_aligned(
                    self.recipe,
                    weights,
                    second_moment,
                    ranks,
                    noise=noise,
                    outputs=outputs,
                    targets=wanted,
                )
        with named(first.name):
            return [
                factorize(
                    self.recipe,
                    weights[0],
                    second_moment,
                    ranks[0],
                    seed=self.seed ^ zlib.crc32(first.name.encode()),
                    noise=noise[0],
                    outputs=outputs[0],
                    target=wanted[0],
                    blocks=first.blocks,
                )
            ]

    def _compare(self, waiting: Waiting, W: torch.Tensor, gram: torch.Tensor | None) -> None:
        """Put into the records how far the loaded factors are from ``W``, and how large."""
        for (name, container), block in zip(
            waiting.containers.items(), W.split(waiting.candidate.sizes), strict=True
        ):
            record = self.journal.records[name]
            record.relative_error = relative_error(block, container.dense_weight().to(W), gram)
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


def _wide(W: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """The weight in float32 or wider, where the second moment is."""
    W = W if like is None else W.to(like.device)
    return W.to(torch.promote_types(W.dtype, torch.float32))


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
