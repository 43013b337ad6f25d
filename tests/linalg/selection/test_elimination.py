"""Units given up one after another, against trying all of them at every step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import eliminate, elimination, shrunk

from ..strategies import SEEDS, assert_selection, decaying, full_gram, gaussian, pick, seeded
from .test_greedy import left_over, problems


def missed(gram: torch.Tensor, metric: torch.Tensor, gone: torch.Tensor) -> float:
    """``min_X E‖H^{1/2} W (h − X h_J)‖²`` without the features ``gone``: normal equations."""
    J = torch.ones(len(gram), dtype=torch.bool)
    J[gone.flatten()] = False
    if not bool(J.any()):
        return float((metric * gram).sum())
    left = gram - gram[:, J] @ torch.linalg.solve(gram[J][:, J], gram[J])
    return float((metric * left).sum())


def activation(units: int, width: int, others: int, seed: int):
    """``G``, ``M = Wᵀ H W`` and units, whose features lie anywhere among ``others`` of no unit."""
    generator = seeded(seed)
    n = units * width + others
    W, H = gaussian(n // 2 + 1, n, generator), full_gram(n // 2 + 1, generator)
    scales = torch.randn(n, generator=generator).double().exp()
    G = scales * full_gram(n, generator) * scales[:, None]
    return G, W.mT @ H @ W, pick(n, units * width, seed).view(units, width)


ACTIVATIONS = st.builds(
    activation, st.integers(2, 7), st.sampled_from([1, 2, 4]), st.integers(0, 3), SEEDS
)


@given(ACTIVATIONS, st.data())
def test_every_unit_is_the_one_that_is_missed_least(problem, data):
    G, M, units = problem
    steps = data.draw(st.integers(0, len(units)))
    found = eliminate(G, M, units, steps)
    order = found.order.tolist()
    assert len(set(order)) == steps and found.growth.shape == (steps + 1,)
    whole = float((M * G).sum())
    for step in range(steps + 1):
        assert float(found.growth[step]) == pytest.approx(
            missed(G, M, units[order[:step]]), abs=1e-9 * whole
        )
    for step in range(steps):
        best = min(
            missed(G, M, units[[*order[:step], unit]])
            for unit in range(len(units))
            if unit not in order[:step]
        )
        assert float(found.growth[step + 1]) <= best + 1e-9 * whole


@given(ACTIVATIONS)
def test_choices_are_nested_and_the_input_is_left_alone(problem):
    before = [part.clone() for part in problem]
    whole = eliminate(*problem, len(problem[2]))
    for steps in range(len(problem[2])):
        part = eliminate(*problem, steps)
        assert torch.equal(part.order, whole.order[:steps])
        assert torch.equal(part.growth, whole.growth[: steps + 1])
    assert all(torch.equal(part, old) for part, old in zip(problem, before, strict=True))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_many_steps_stay_exact(width):
    """Beyond the features after which the matrices are written anew."""
    G, M, units = activation(300 // width, width, 4, seed=0)
    steps = 290 // width
    found = eliminate(G, M, units, steps)
    order = found.order.tolist()
    assert len(set(order)) == steps
    around = {k // width for k in (126, 128, 130, 256, 289)}
    for step in sorted(around | {k + 1 for k in around if k < steps}):
        error = missed(G, M, units[order[:step]])
        assert float(found.growth[step]) == pytest.approx(error, rel=1e-8)
        left = [unit for unit in range(len(units)) if unit not in order[: step - 1]]
        best = min(missed(G, M, units[[*order[: step - 1], unit]]) for unit in left[::5])
        assert error <= best * (1 + 1e-9)


@given(st.integers(4, 9), st.integers(0, 3), st.integers(0, 3), SEEDS)
def test_copies_and_dead_features_go_first_at_no_cost(distinct, copies, dead, seed):
    generator = seeded(seed)
    source = torch.cat([torch.arange(distinct), torch.randperm(distinct)[:copies]])
    n = len(source) + dead
    G = torch.zeros(n, n, dtype=torch.float64)
    G[: len(source), : len(source)] = full_gram(distinct, generator)[source][:, source]
    M = full_gram(n, generator)
    found = eliminate(shrunk(G, 0.0), M, torch.arange(n)[:, None], n - 1)
    free = copies + dead
    left = [i for i in range(n) if i not in found.order[:free].tolist()]
    assert sorted(source[left].tolist()) == list(range(distinct))
    whole = float((M * G).sum())
    assert float(found.growth[free]) <= 1e-5 * whole < float(found.growth[free + 1])


@given(ACTIVATIONS, st.floats(-3, 3))
def test_scales_of_features_choose_nothing(problem, exponent):
    """What a feature is measured in says nothing: its column of ``W`` makes up for it."""
    G, M, units = problem
    scale = torch.ones(len(G), dtype=torch.float64)
    scale[0] = 10**exponent
    one = eliminate(G, M, units, len(units) - 1)
    other = eliminate(scale * G * scale[:, None], M / scale / scale[:, None], units, len(units) - 1)
    torch.testing.assert_close(one.growth, other.growth, rtol=1e-6, atol=1e-9)


@given(problems())
def test_every_row_is_the_best_to_give_up(problem):
    A, metric = problem
    chosen = elimination(A, len(A), metric).tolist()
    assert sorted(chosen) == list(range(len(A)))
    whole = left_over(A, [], metric)
    for count in range(1, len(A)):
        found = left_over(A, chosen[:count], metric)
        open_ = chosen[: count + 1]
        best = min(left_over(A, [i for i in open_ if i != gone], metric) for gone in open_)
        assert found <= best + 1e-6 * whole


@given(problems(), st.data())
def test_fewer_rows_are_the_first_of_more(problem, data):
    A, metric = problem
    before = A.clone()
    count = data.draw(st.integers(1, len(A)))
    rows = elimination(A, count, metric)
    assert_selection(rows, count, len(A))
    assert torch.equal(rows, elimination(A, len(A), metric)[:count])
    assert torch.equal(A, before)


@given(st.integers(4, 24), st.integers(4, 24), SEEDS, st.data())
def test_it_leaves_less_than_random_rows(m, n, seed, data):
    generator = seeded(seed)
    A = gaussian(m, m, generator) @ decaying(m, n, generator)
    count = data.draw(st.integers(1, min(m, n) - 1))
    by_chance = [left_over(A, pick(m, count, seed + k).tolist(), None) for k in range(1, 21)]
    found = left_over(A, elimination(A, count).tolist(), None)
    assert found <= sum(by_chance) / len(by_chance)


@given(problems())
def test_the_rank_is_enough(problem):
    A, metric = problem
    rank = int(torch.linalg.matrix_rank(A))
    rows = elimination(A, rank, metric).tolist()
    assert left_over(A, rows, metric) <= 1e-6 * left_over(A, [], metric)


def test_bad_input_is_refused():
    eye, units = torch.eye(3), torch.arange(3)[:, None]
    with pytest.raises(ValueError, match=r"metric of the units has shape \(2, 2\); it takes 3"):
        eliminate(eye, torch.eye(2), units, 1)
    with pytest.raises(ValueError, match=r"the metric of the units contains NaN"):
        eliminate(eye, eye * torch.nan, units, 1)
    with pytest.raises(ValueError, match=r"the Gram matrix contains NaN or infinity"):
        eliminate(eye / 0, eye, units, 1)
    with pytest.raises(ValueError, match=r"Gram matrix is singular\. Calibrate on more tokens"):
        eliminate(torch.ones(3, 3), eye, units, 1)
    with pytest.raises(ValueError, match=r"the Gram matrix has shape"):
        eliminate(torch.ones(3), eye, units, 1)
    for steps in (-1, 4):
        with pytest.raises(ValueError, match=rf"{steps} of 3 units can't be given up"):
            eliminate(eye, eye, units, steps)
    with pytest.raises(ValueError, match="a matrix of 3 rows"):
        elimination(eye, 4)
    with pytest.raises(ValueError, match="metric of the units has shape"):
        elimination(eye, 1, torch.eye(2))
    with pytest.raises(ValueError, match="Gram matrix contains NaN"):
        elimination(eye * torch.nan, 1)
