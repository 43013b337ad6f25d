"""Units that are kept, and the others interpolated from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    RemovalProblem,
    Selection,
    growth_by_count,
    interpolation,
    kept_features,
    shrunk,
    solve_removal,
)

from .strategies import (
    SEEDS,
    assert_selection,
    diagonal_gram,
    full_gram,
    gaussian,
    metric_loss,
    pick,
    seeded,
)

OF_BLOCKS = [Selection.ELIMINATION, Selection.NORM, Selection.LEVERAGE, Selection.RANDOM]
OF_SINGLES = [kind for kind in Selection if kind not in OF_BLOCKS]


@st.composite
def problems(draw, width=None):
    """A consumer of units whose features lie anywhere among some of no unit; each form of ``H``."""
    generator = seeded(seed := draw(SEEDS))
    width = width or draw(st.sampled_from([1, 2, 4]))
    units, others, m = draw(st.integers(2, 6)), draw(st.integers(0, 3)), draw(st.integers(1, 8))
    n = units * width + others
    H = draw(st.sampled_from([None, full_gram, diagonal_gram]))
    return RemovalProblem(
        W=gaussian(m, n, generator),
        gram=full_gram(n, generator),
        units=pick(n, units * width, seed).view(units, width),
        count=draw(st.integers(1, units)),
        outputs=H and H(m, generator),
    )


def features_of(problem: RemovalProblem, kept: torch.Tensor) -> torch.Tensor:
    return kept_features(problem.units, kept, problem.W.shape[1])


def spread(problem: RemovalProblem, kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight in the columns of the features that are kept, zeros in the others."""
    whole = torch.zeros(problem.W.shape, dtype=torch.float64)
    whole[:, features_of(problem, kept)] = weight
    return whole


def error(problem: RemovalProblem) -> float:
    """``E‖H^{1/2} (T h − W' h_J)‖²`` of the solution."""
    solved = solve_removal(problem)
    H = torch.ones(len(problem.W)).double() if problem.outputs is None else problem.outputs
    H = torch.diag(H) if H.ndim == 1 else H
    return metric_loss(problem.wanted, spread(problem, solved.kept, solved.weight), problem.gram, H)


def whole(problem: RemovalProblem) -> float:
    return error(replace(problem, W=0 * problem.W, target=problem.wanted, corrected=False))


@given(problems(), st.sampled_from(OF_BLOCKS))
def test_every_selection_of_blocks_keeps_its_number(problem, kind):
    before = (problem.W.clone(), problem.gram.clone(), problem.units.clone())
    solved = solve_removal(replace(problem, selection=kind))
    assert_selection(solved.kept, problem.count, len(problem.units))
    assert solved.kept.tolist() == sorted(solved.kept.tolist())
    k = len(features_of(problem, solved.kept))
    assert k == problem.W.shape[1] - (len(problem.units) - problem.count) * problem.units.shape[1]
    assert solved.weight.shape == (len(problem.W), k) and solved.weight.dtype == torch.float64
    after = (problem.W, problem.gram, problem.units)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@given(problems(width=1), st.sampled_from(OF_SINGLES))
def test_so_does_every_selection_of_single_features(problem, kind):
    solved = solve_removal(replace(problem, selection=kind))
    assert_selection(solved.kept, problem.count, len(problem.units))
    assert solved.kept.tolist() == sorted(solved.kept.tolist())


@pytest.mark.parametrize("kind", OF_SINGLES)
def test_a_selection_of_single_features_refuses_heads(kind):
    problem = RemovalProblem(torch.eye(4), torch.eye(4), torch.arange(4).view(2, 2), 1)
    with pytest.raises(ValueError, match=rf"selection '{kind}' chooses single features.* has 2\."):
        solve_removal(replace(problem, selection=kind))


@given(problems(), st.sampled_from(OF_BLOCKS))
def test_a_correction_never_costs_anything(problem, kind):
    problem = replace(problem, selection=kind)
    dropped = replace(problem, corrected=False)
    solved, kept = solve_removal(problem), solve_removal(dropped).kept
    assert torch.equal(solved.kept, kept)
    assert torch.equal(
        solve_removal(dropped).weight, problem.W[:, features_of(problem, kept)].double()
    )
    assert error(problem) <= error(dropped) + 1e-9 * whole(problem)
    # At the minimum what is missed is uncorrelated with what is read.
    missed = problem.wanted - spread(problem, kept, solved.weight)
    read = (missed @ problem.gram)[:, features_of(problem, kept)]
    torch.testing.assert_close(read, torch.zeros_like(read), rtol=0, atol=1e-8)


@given(problems())
def test_keeping_all_changes_nothing(problem):
    solved = solve_removal(replace(problem, count=len(problem.units)))
    torch.testing.assert_close(solved.weight, problem.W, rtol=0, atol=1e-12)
    assert solved.max_entry == 0.0


@given(problems())
def test_growth_by_count_is_what_elimination_reaches(problem):
    growth = growth_by_count(problem.W, problem.gram, problem.outputs, problem.units)
    assert growth.shape == (len(problem.units) + 1,) and growth[0] == torch.inf
    assert bool((growth.diff() <= 0).all()) and growth[-1] == 0
    for count in range(1, len(growth)):
        assert float(growth[count]) == pytest.approx(
            error(replace(problem, count=count)), abs=1e-8 * whole(problem)
        )


@given(problems(), st.sampled_from(OF_BLOCKS), st.integers(0, 99))
def test_nothing_misses_less_than_elimination_where_one_unit_goes(problem, kind, seed):
    problem = replace(problem, count=len(problem.units) - 1)
    other = error(replace(problem, selection=kind, seed=seed))
    assert error(problem) <= other + 1e-9 * whole(problem)


@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2), SEEDS)
def test_copies_and_dead_units_are_made_up_for(distinct, width, copies, dead, seed):
    generator = seeded(seed)
    source = torch.cat([torch.arange(distinct), torch.randint(distinct, (copies,))])
    features = (source[:, None] * width + torch.arange(width)).flatten()
    n = (len(source) + dead) * width
    G = torch.zeros(n, n, dtype=torch.float64)
    alive = full_gram(distinct * width, generator)[features][:, features]
    G[: len(alive), : len(alive)] = alive
    units = torch.arange(n).view(-1, width)
    problem = RemovalProblem(gaussian(5, n, generator), shrunk(G, 0.0), units, distinct)
    assert sorted(source[solve_removal(problem).kept].tolist()) == list(range(distinct))
    assert error(problem) <= 1e-5 * whole(problem)


@given(st.integers(2, 8), st.integers(1, 5), SEEDS, st.sampled_from(OF_BLOCKS), st.data())
def test_the_bias_takes_the_means_of_what_is_gone(n, m, seed, kind, data):
    """Of features that tell nothing of each other all that can be made up for is their mean."""
    generator = seeded(seed)
    mean = torch.cat([gaussian(1, n, generator)[0], torch.ones(1).double()])
    variance = torch.cat([diagonal_gram(n, generator), torch.zeros(1).double()])
    W = gaussian(m, n + 1, generator)
    problem = RemovalProblem(
        W,
        torch.diag(variance) + torch.outer(mean, mean),
        torch.arange(n)[:, None],
        data.draw(st.integers(1, n)),
        selection=kind,
    )
    solved = solve_removal(problem)
    gone = [i for i in range(n) if i not in solved.kept.tolist()]
    torch.testing.assert_close(solved.weight[:, :-1], W[:, solved.kept], rtol=0, atol=1e-8)
    torch.testing.assert_close(
        solved.weight[:, -1], W[:, -1] + W[:, gone] @ mean[gone], rtol=0, atol=1e-8
    )


@given(st.integers(2, 8), st.integers(1, 5), SEEDS, st.floats(0.1, 3))
def test_the_bias_makes_up_for_a_constant(n, m, seed, value):
    generator = seeded(seed)
    h = gaussian(4 * n, n + 1, generator)
    h[:, 0], h[:, -1] = value, 1
    W = gaussian(m, n + 1, generator)
    gram = shrunk(h.mT @ h / len(h), 0.0)
    problem = RemovalProblem(W, gram, torch.arange(n)[:, None], n - 1)
    solved = solve_removal(problem)
    assert solved.kept.tolist() == list(range(1, n))
    assert solved.max_entry == pytest.approx(value, rel=1e-3)
    torch.testing.assert_close(solved.weight @ h[:, 1:].mT, W @ h.mT, rtol=0, atol=1e-3)


@given(st.integers(1, 12), SEEDS, st.data())
def test_an_interpolation_reproduces_what_it_reads(n, seed, data):
    count = data.draw(st.integers(1, n))
    G, J = full_gram(n, seeded(seed)), pick(n, count, seed).sort().values
    X = interpolation(G, J)
    assert X.shape == (n, count) and torch.equal(X[J], torch.eye(count).double())
    torch.testing.assert_close(X @ G[J][:, J], G[:, J])
    # Features that are made of those that are read come out as they are.
    made = gaussian(n, count, seeded(seed + 1))
    made[J] = torch.eye(count).double()
    torch.testing.assert_close(interpolation(made @ G[J][:, J] @ made.mT, J), made)


@given(problems(), SEEDS)
def test_a_target_is_what_is_approximated(problem, seed):
    target = gaussian(*problem.W.shape, seeded(seed))
    solved = solve_removal(replace(problem, target=target))
    other = solve_removal(replace(problem, W=target))
    assert torch.equal(solved.kept, other.kept)
    torch.testing.assert_close(solved.weight, other.weight)
    X = interpolation(problem.gram, features_of(problem, solved.kept))
    torch.testing.assert_close(solved.weight, target @ X)
    assert solved.max_entry == other.max_entry


@given(problems(), st.integers(0, 99))
def test_chance_follows_the_seed(problem, seed):
    by_chance = replace(problem, selection=Selection.RANDOM)
    kept = solve_removal(replace(by_chance, seed=seed)).kept
    assert torch.equal(kept, solve_removal(replace(by_chance, seed=seed)).kept)
    found = {tuple(solve_removal(replace(by_chance, seed=k)).kept.tolist()) for k in range(30)}
    assert len(found) > 1 or problem.count == len(problem.units)


@given(problems(width=1), st.sampled_from(Selection), st.sampled_from([1.01, 2.0]))
def test_max_entry_bounds_what_units_are_multiplied_by(problem, kind, bound):
    solved = solve_removal(replace(problem, selection=kind, max_entry=bound))
    assert_selection(solved.kept, problem.count, len(problem.units))
    X = interpolation(problem.gram, J := features_of(problem, solved.kept))
    own, others = torch.isin(J, problem.units), ~torch.isin(torch.arange(len(X)), J)
    entries = X[others].abs()
    assert max(entries[:, own].flatten().tolist(), default=0.0) <= bound * (1 + 1e-6)
    assert max(entries.flatten().tolist(), default=0.0) == pytest.approx(solved.max_entry)


@given(st.integers(4, 30), SEEDS, st.data())
def test_max_entry_holds_far_from_independence(n, seed, data):
    generator = seeded(seed)
    h = gaussian(2 * n, max(n // 2, 1), generator) @ gaussian(max(n // 2, 1), n, generator)
    scale = torch.logspace(-2, 2, n, dtype=torch.float64)
    G = shrunk(scale * (h.mT @ h) * scale[:, None], 1e-4)
    count = data.draw(st.integers(1, n - 1))
    problem = RemovalProblem(
        gaussian(3, n, generator),
        G,
        torch.arange(n)[:, None],
        count,
        selection=Selection.RANDOM,
        max_entry=2.0,
    )
    assert solve_removal(problem).max_entry <= 2 * (1 + 1e-6)


@given(problems(width=1), st.sampled_from(Selection))
def test_a_bound_that_is_kept_anyway_exchanges_nothing(problem, kind):
    free = solve_removal(replace(problem, selection=kind))
    bound = max(free.max_entry, 1.0) + 1
    bounded = solve_removal(replace(problem, selection=kind, max_entry=bound))
    assert torch.equal(free.kept, bounded.kept) and torch.equal(free.weight, bounded.weight)


@pytest.mark.parametrize(("width", "bound"), [(2, 2.0), (1, 1.0), (1, 0.5)])
def test_a_bound_that_exchanges_without_end_is_refused(width, bound):
    units = torch.arange(4).view(-1, width)
    problem = RemovalProblem(torch.eye(4), torch.eye(4), units, 1, max_entry=bound)
    with pytest.raises(ValueError, match=rf"max_entry {bound} with units of {width} features"):
        solve_removal(problem)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), SEEDS, st.data())
def test_kept_features_are_those_of_kept_units_and_of_none(units, width, others, seed, data):
    total = units * width + others
    features = pick(total, units * width, seed).view(units, width)
    kept = pick(units, data.draw(st.integers(0, units)), seed)
    gone = [k for k in range(units) if k not in kept.tolist()]
    found = kept_features(features, kept, total).tolist()
    assert found == sorted(set(range(total)) - set(features[gone].flatten().tolist()))


def test_bad_input_is_refused():
    eye, units = torch.eye(3), torch.arange(3)[:, None]
    for count in (0, 4):
        with pytest.raises(ValueError, match=rf"{count} units are to be kept of 3\. Keep at least"):
            solve_removal(RemovalProblem(eye, eye, units, count))
    with pytest.raises(ValueError, match="the Gram matrix has shape"):
        solve_removal(RemovalProblem(eye, torch.eye(2), units, 1))
    with pytest.raises(ValueError, match="the Gram matrix has shape"):
        solve_removal(RemovalProblem(eye, torch.ones(3), units, 1))
    with pytest.raises(ValueError, match="the consumer's weight has shape"):
        solve_removal(RemovalProblem(torch.ones(3), eye, units, 1))
    singular = RemovalProblem(eye, torch.ones(3, 3), units, 2)
    for kind in (Selection.ELIMINATION, Selection.NORM):
        with pytest.raises(ValueError, match=r"singular\. Calibrate on more tokens than"):
            solve_removal(replace(singular, selection=kind))
