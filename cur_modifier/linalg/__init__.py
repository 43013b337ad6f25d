"""Linear algebra of structured compression: tensors in, tensors out, no ``torch.nn``."""

from cur_modifier.linalg.anchor import anchored_target
from cur_modifier.linalg.budget import (
    RankCurve,
    allocate_ranks,
    apportion,
    skeleton_shares,
    truncation_tail,
)
from cur_modifier.linalg.cur import CUR, cur
from cur_modifier.linalg.low_rank import LowRank, low_rank
from cur_modifier.linalg.metric import (
    apply_gram,
    curvature_spectrum,
    damped,
    gram_norm,
    gram_sqrt,
    relative_error,
    shrunk,
    weighted_spectrum,
)
from cur_modifier.linalg.moments import GramAccumulator, PairedMoments
from cur_modifier.linalg.problem import Problem
from cur_modifier.linalg.rank import energy_rank, round_rank_down, round_rank_up
from cur_modifier.linalg.row_id import (
    RowID,
    interpolative,
    interpolative_aligned,
    row_id_of_pair,
    row_ids_in_one_order,
    split_rows,
)
from cur_modifier.linalg.scores import Score, score
from cur_modifier.linalg.selection import (
    Selection,
    deim,
    greedy,
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
    "GramAccumulator",
    "LowRank",
    "PairedMoments",
    "Problem",
    "RankCurve",
    "RowID",
    "Score",
    "Selection",
    "Subspace",
    "allocate_ranks",
    "anchored_target",
    "apply_gram",
    "apportion",
    "cur",
    "curvature_spectrum",
    "damped",
    "deim",
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
    "relative_error",
    "round_rank_down",
    "round_rank_up",
    "row_id_of_pair",
    "row_ids_in_one_order",
    "score",
    "select_rows",
    "select_rows_and_columns",
    "shrunk",
    "singular_values",
    "skeleton_shares",
    "split_rows",
    "truncation_tail",
    "weighted_spectrum",
]
