import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import Score, gram_norm, score

from .strategies import DTYPES, SEEDS, gaussian, grams, matrices, seeded


@given(st.data(), matrices())
def test_norm_of_a_signed_score_is_the_gram_norm_of_the_weight(data, W):
    gram = data.draw(grams(W.shape[1]))
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    slack = 1e-7 * float(W.norm() * gram.abs().max().sqrt())
    for kind, moment in [(Score.WEIGHT, None), (Score.DIAG, diagonal), (Score.GRAM, gram)]:
        expected = gram_norm(W, moment)
        assert float(score(kind, W, gram).norm()) == pytest.approx(expected, rel=1e-6, abs=slack)


@given(st.data(), matrices())
def test_wanda_is_diag_without_the_signs(data, W):
    gram = data.draw(grams(W.shape[1]))
    signed = score(Score.DIAG, W, gram)
    torch.testing.assert_close(score(Score.WANDA, W, gram), signed.abs())
    assert torch.equal(torch.sign(signed) * (signed != 0), torch.sign(W) * (signed != 0))


@given(SEEDS, st.integers(1, 12))
def test_a_diagonal_gram_needs_no_root(seed, n):
    generator = seeded(seed)
    W, diagonal = gaussian(5, n, generator), torch.rand(n, generator=generator).double()
    expected = score(Score.DIAG, W, diagonal)
    for kind in (Score.DIAG, Score.GRAM):
        torch.testing.assert_close(score(kind, W, torch.diag(diagonal)), expected)
        torch.testing.assert_close(score(kind, W, diagonal), expected)


@given(SEEDS, st.sampled_from(Score), DTYPES)
def test_a_score_has_the_weight_s_shape_and_leaves_it_alone(seed, kind, dtype):
    generator = seeded(seed)
    W, gram = gaussian(4, 6, generator).to(dtype), torch.eye(6, dtype=dtype)
    before, gram_before = W.clone(), gram.clone()
    scored = score(kind, W, gram)
    assert scored.shape == W.shape
    assert scored.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(W, before)
    assert torch.equal(gram, gram_before)


@pytest.mark.parametrize("kind", Score)
def test_only_activations_scores_ask_for_them(kind):
    W = torch.ones(2, 3)
    if not kind.needs_activations:
        assert torch.equal(score(kind, W, None), W)
        return
    with pytest.raises(ValueError, match=rf"score '{kind}'.*[Pp]ass calibration data"):
        score(kind, W, None)


@pytest.mark.parametrize("kind", Score)
def test_bad_input_is_named(kind):
    with pytest.raises(ValueError, match=r"weight.*NaN"):
        score(kind, torch.full((2, 3), torch.nan), torch.eye(3))
    with pytest.raises(ValueError, match="weight has shape"):
        score(kind, torch.ones(3), torch.eye(3))
    if kind.needs_activations:
        with pytest.raises(ValueError, match=r"Gram matrix.*NaN"):
            score(kind, torch.ones(2, 3), torch.full((3, 3), torch.nan))
        with pytest.raises(ValueError, match=r"Gram matrix.*4.*3"):
            score(kind, torch.ones(2, 3), torch.eye(4))
