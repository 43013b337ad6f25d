import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import leading_subspace, lstsq, singular_values

from .strategies import (
    AWKWARD,
    DTYPES,
    REGULAR,
    SEEDS,
    gaussian,
    matrices,
    matrices_and_ranks,
    seeded,
    with_spectrum,
)


def assert_orthonormal(Q: torch.Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=Q.dtype), rtol=0, atol=atol)


@given(matrices_and_ranks(), st.booleans())
def test_factors_are_orthonormal_and_ordered(case, exact):
    A, rank = case
    U, s, V = leading_subspace(A, rank, exact=exact)
    assert U.shape == (A.shape[0], rank)
    assert V.shape == (A.shape[1], rank)
    assert_orthonormal(U)
    assert_orthonormal(V)
    assert (s >= 0).all()
    assert (s.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(case=matrices_and_ranks())
def test_exact_triplets_are_those_of_the_svd(dtype, case):
    A, rank = case
    A = A.to(dtype)
    U, s, V = leading_subspace(A, rank, exact=True)
    values = torch.linalg.svdvals(A.double())
    slack = 10 * max(A.shape) * torch.finfo(dtype).eps * float(values[0])  # backward stable
    torch.testing.assert_close(s.double(), values[:rank], rtol=0, atol=slack)
    tail = float(torch.linalg.vector_norm(values[rank:]))
    error = float((A.double() - U.double() * s.double() @ V.double().T).norm())
    assert error == pytest.approx(tail, rel=1e-6, abs=slack)
    assert_orthonormal(U, atol=100 * torch.finfo(dtype).eps)
    assert_orthonormal(V, atol=100 * torch.finfo(dtype).eps)


@given(SEEDS, st.integers(1, 8), st.integers(8, 60), st.integers(8, 60))
def test_a_sketch_recovers_a_matrix_of_its_rank(seed, rank, m, n):
    generator = seeded(seed)
    A = gaussian(m, rank, generator) @ gaussian(rank, n, generator)
    U, s, V = leading_subspace(A, rank, exact=False, generator=generator)
    torch.testing.assert_close(U * s @ V.T, A)


@given(SEEDS, st.integers(1, 20), st.integers(40, 90), st.integers(40, 90))
def test_a_sketch_obeys_its_expected_error(seed, rank, m, n):
    generator = seeded(seed)
    spectrum = torch.arange(1, min(m, n) + 1).double() ** -0.5
    A = with_spectrum(m, n, spectrum, generator)
    tail = float(torch.linalg.vector_norm(spectrum[rank:]))
    # Halko, Martinsson, Tropp 2011, theorem 10.5: E‖A − QQᵀA‖ ≤ √(1 + r/(p − 1)) · tail; the
    # truncation back to rank r costs at most another tail. Power iterations drive the first to 1.
    U, s, V = leading_subspace(A, rank, exact=False, generator=generator)
    assert float((A - U * s @ V.T).norm()) <= (1 + (1 + rank / 15) ** 0.5) * tail
    U, s, V = leading_subspace(A, rank, exact=False, generator=generator, power_iterations=4)
    assert float((A - U * s @ V.T).norm()) <= 1.02 * tail


@given(matrices_and_ranks(), SEEDS)
def test_a_sketch_depends_on_its_seed_alone(case, seed):
    A, rank = case
    first, second = (
        leading_subspace(A, rank, exact=False, generator=seeded(seed)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(matrices())
def test_singular_values_are_those_of_the_svd(A):
    expected = torch.linalg.svdvals(A)
    torch.testing.assert_close(singular_values(A), expected, rtol=0, atol=1e-7 * float(expected[0]))


@given(st.data(), matrices(makers=REGULAR, tall=True), st.integers(1, 6), SEEDS)
def test_lstsq_solves_the_normal_equations(data, A, columns, seed):
    B = gaussian(A.shape[0], columns, seeded(seed))
    residual = A @ lstsq(A, B) - B
    torch.testing.assert_close(A.T @ residual, torch.zeros_like(A.T @ B), rtol=0, atol=1e-10)


@given(
    matrices(makers=[m for m in AWKWARD if m.__name__ not in ("hilbert", "badly_scaled")]), SEEDS
)
def test_lstsq_is_the_pseudo_inverse_on_dependent_columns(A, seed):
    B = gaussian(A.shape[0], 3, seeded(seed))
    torch.testing.assert_close(lstsq(A, B), torch.linalg.pinv(A) @ B, rtol=1e-8, atol=1e-8)


@given(SEEDS, DTYPES)
def test_any_float_goes_in_and_stays_as_it_was(seed, dtype):
    A = gaussian(8, 5, seeded(seed)).to(dtype)
    before, wide = A.clone(), torch.promote_types(dtype, torch.float32)
    for exact in (True, False):
        assert all(part.dtype == wide for part in leading_subspace(A, 3, exact=exact))
    assert lstsq(A, A).dtype == wide
    assert singular_values(A).dtype == torch.float64
    assert torch.equal(A, before)


def test_bad_input_is_named():
    nan = torch.full((3, 2), torch.nan)
    for routine in (lambda A: leading_subspace(A, 1), singular_values):
        with pytest.raises(ValueError, match=r"matrix.*NaN.*6 of 6"):
            routine(nan)
        with pytest.raises(ValueError, match=r"matrix has shape \(3,\)"):
            routine(torch.ones(3))
        with pytest.raises(ValueError, match=r"matrix has dtype torch\.int64.*float"):
            routine(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"left.*NaN"):
        lstsq(nan, torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"right.*NaN"):
        lstsq(torch.ones(3, 2), nan)
    for rank in (0, 3):
        with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.2.*Choose"):
            leading_subspace(torch.ones(3, 2), rank)
