"""Linear algebra of structured compression: tensors in, tensors out, no ``torch.nn``."""

from cur_modifier.linalg.aligned import aligned
from cur_modifier.linalg.anchor import anchored_target
from cur_modifier.linalg.budget import RankCurve, allocate_ranks, truncation_tail
from cur_modifier.linalg.compact import compact
from cur_modifier.linalg.decomposition import cur, interpolative, interpolative_aligned, low_rank
from cur_modifier.linalg.forms import CUR, LowRank, RowID
from cur_modifier.linalg.gram import (
    GramAccumulator,
    PairedMoments,
    apply_gram,
    curvature_spectrum,
    damped,
    gram_norm,
    gram_sqrt,
    shrunk,
)
from cur_modifier.linalg.greedy import greedy
from cur_modifier.linalg.joint import apportion, skeleton_shares, split_rows
from cur_modifier.linalg.rank import (
    Form,
    break_even_rank,
    dense_parameters,
    energy_rank,
    ratio_rank,
    round_rank_down,
    round_rank_up,
    stored_parameters,
)
from cur_modifier.linalg.scores import Score, score
from cur_modifier.linalg.selection import (
    Selection,
    deim,
    leverage_sampled,
    leverage_scores,
    leverage_top,
    norm,
    qdeim,
    random,
    select_rows,
    select_rows_and_columns,
)
from cur_modifier.linalg.subspace import Subspace, leading_subspace, lstsq, singular_values

__all__ = [
    "CUR",
    "Form",
    "GramAccumulator",
    "LowRank",
    "PairedMoments",
    "RankCurve",
    "RowID",
    "Score",
    "Selection",
    "Subspace",
    "aligned",
    "allocate_ranks",
    "anchored_target",
    "apply_gram",
    "apportion",
    "break_even_rank",
    "compact",
    "cur",
    "curvature_spectrum",
    "damped",
    "deim",
    "dense_parameters",
    "energy_rank",
    "gram_norm",
    "gram_sqrt",
    "greedy",
    "interpolative",
    "interpolative_aligned",
    "leading_subspace",
    "leverage_sampled",
    "leverage_scores",
    "leverage_top",
    "low_rank",
    "lstsq",
    "norm",
    "qdeim",
    "random",
    "ratio_rank",
    "round_rank_down",
    "round_rank_up",
    "score",
    "select_rows",
    "select_rows_and_columns",
    "shrunk",
    "singular_values",
    "skeleton_shares",
    "split_rows",
    "stored_parameters",
    "truncation_tail",
]
