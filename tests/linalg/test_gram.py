import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import GramAccumulator, apply_gram, gram_norm, gram_sqrt

from .strategies import DTYPES, GRAMS, SEEDS, full_gram, gaussian, grams, matrices, seeded


@given(SEEDS, st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=6), DTYPES)
def test_streaming_equals_one_product_whatever_the_batching(seed, n, batches, dtype):
    x = gaussian(sum(batches) + 1, n, seeded(seed)).to(dtype)
    accumulator = GramAccumulator(n, dtype=torch.float64)
    for batch in x.split([*batches, 1]):
        accumulator.update(batch)
    assert accumulator.tokens == x.shape[0]
    torch.testing.assert_close(accumulator.second_moment(), x.double().T @ x.double() / x.shape[0])


@given(SEEDS)
def test_leading_dimensions_are_tokens(seed):
    x = gaussian(24, 5, seeded(seed)).float()
    flat, batched = GramAccumulator(5), GramAccumulator(5)
    flat.update(x)
    batched.update(x.reshape(2, 3, 4, 5))
    torch.testing.assert_close(flat.second_moment(), batched.second_moment())
    assert flat.tokens == batched.tokens


@given(SEEDS, st.integers(1, 40))
def test_second_moment_is_symmetric_and_positive_semidefinite(seed, n):
    accumulator = GramAccumulator(n)
    accumulator.update(gaussian(17, n, seeded(seed)))
    gram = accumulator.second_moment()
    torch.testing.assert_close(gram, gram.T)
    values = torch.linalg.eigvalsh(gram.double())
    assert values[0] >= -1e-5 * values[-1]


def test_accumulator_refuses_what_it_cannot_use():
    accumulator = GramAccumulator(4)
    with pytest.raises(ValueError, match="no token"):
        accumulator.second_moment()
    with pytest.raises(ValueError, match=r"5 features.* 4"):
        accumulator.update(torch.zeros(2, 5))
    accumulator.update(torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match=r"activations.*NaN.*calibration data"):
        accumulator.second_moment()


@given(st.integers(1, 20).flatmap(grams))
def test_square_root_squares_back(gram):
    root = gram_sqrt(gram)
    full = torch.diag(gram) if gram.ndim == 1 else gram
    full_root = torch.diag(root) if root.ndim == 1 else root
    assert root.dtype == torch.float64
    torch.testing.assert_close(full_root @ full_root, full)
    torch.testing.assert_close(full_root, full_root.T)


@given(st.integers(1, 20).flatmap(grams))
def test_inverse_root_is_a_pseudo_inverse_on_the_range(gram):
    root, inverse = gram_sqrt(gram), gram_sqrt(gram, inverse=True)
    if gram.ndim == 1:
        root, inverse, gram = torch.diag(root), torch.diag(inverse), torch.diag(gram)
    projector = inverse @ root
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(projector, projector.T, **close)
    torch.testing.assert_close(projector @ projector, projector, **close)
    torch.testing.assert_close(projector @ gram, gram, **close)


def test_inverse_root_of_nothing_is_nothing():
    for gram in (torch.zeros(3, 3), torch.zeros(3)):
        assert not gram_sqrt(gram, inverse=True).any()


@given(st.data(), matrices())
def test_norms_agree_with_their_definition(data, W):
    gram = data.draw(grams(W.shape[1]))
    root = gram_sqrt(gram)
    image = W * root if root.ndim == 1 else W @ root
    # The trace sums squares of size ‖W‖² max(G): this is what rounding leaves of it.
    slack = 1e-7 * float(W.norm() * gram.abs().max().sqrt())
    expected = float(torch.linalg.matrix_norm(image))
    assert gram_norm(W, gram) == pytest.approx(expected, rel=1e-6, abs=slack)
    assert gram_norm(W) == pytest.approx(float(torch.linalg.matrix_norm(W)))


@given(SEEDS, st.integers(1, 12))
def test_diagonal_means_the_full_matrix_with_that_diagonal(seed, n):
    generator = seeded(seed)
    W, gram = gaussian(4, n, generator), torch.rand(n, generator=generator).double()
    torch.testing.assert_close(apply_gram(W, gram), apply_gram(W, torch.diag(gram)))
    torch.testing.assert_close(torch.diag(gram_sqrt(gram)), gram_sqrt(torch.diag(gram)))
    assert gram_norm(W, gram) == pytest.approx(gram_norm(W, torch.diag(gram)))


@given(SEEDS, DTYPES)
def test_inputs_are_not_mutated(seed, dtype):
    generator = seeded(seed)
    x = gaussian(6, 6, generator).to(dtype)
    for gram in (make(6, generator).to(dtype) for make in GRAMS):
        before, x_before = gram.clone(), x.clone()
        accumulator = GramAccumulator(6)
        accumulator.update(x)
        accumulator.second_moment()
        apply_gram(x, gram)
        gram_norm(x, gram)
        gram_sqrt(gram)
        gram_sqrt(gram, inverse=True)
        assert torch.equal(gram, before)
        assert torch.equal(x, x_before)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_nan_in_the_gram_matrix_is_named(shape, inverse):
    with pytest.raises(ValueError, match=r"Gram matrix.*NaN"):
        gram_sqrt(torch.full(shape, torch.nan), inverse=inverse)


@pytest.mark.parametrize("gram", [torch.eye(4), torch.ones(4), torch.ones(3, 4)])
def test_gram_of_the_wrong_size_is_named(gram):
    with pytest.raises(ValueError, match=r"Gram matrix.*4.*3"):
        gram_norm(torch.ones(2, 3), gram)


def test_norm_of_nan_is_named():
    with pytest.raises(ValueError, match=r"matrix.*NaN"):
        gram_norm(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match=r"Gram matrix.*NaN"):
        gram_norm(torch.ones(2, 3), torch.full((3,), torch.nan))
    assert gram_norm(torch.ones(2, 3), full_gram(3, seeded(0))) > 0
