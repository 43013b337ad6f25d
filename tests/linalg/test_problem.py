"""What a problem asks a decomposition for."""

from __future__ import annotations

import pytest
import torch

from cur_modifier.linalg import Problem, Score, score

from .strategies import full_gram, gaussian, seeded


def test_the_weight_is_wanted_and_looked_at_by_default():
    problem = Problem(W=gaussian(4, 3, seeded(0)), rank=2)
    assert problem.wanted is problem.W and problem.scored is problem.W


def test_a_target_is_wanted_in_the_weight_s_dtype():
    W = gaussian(4, 3, seeded(0)).float()
    problem = Problem(W=W, rank=2, target=2 * W.double())
    assert problem.wanted.dtype == torch.float32
    assert torch.equal(problem.wanted, 2 * W)
    assert problem.scored is W  # rows and columns are those of the weight all the same


@pytest.mark.parametrize("kind", Score)
def test_a_selection_looks_at_the_scores(kind):
    W, gram = gaussian(4, 3, seeded(0)), full_gram(3, seeded(1))
    problem = Problem(W=W, rank=2, scores=kind, second_moment=gram)
    assert torch.equal(problem.scored, score(kind, W, gram))


def test_scores_without_activations_say_what_they_lack():
    problem = Problem(W=torch.eye(3), rank=1, scores=Score.WANDA)
    with pytest.raises(ValueError, match=r"score 'wanda' needs the second moment"):
        _ = problem.scored
