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
from cur_modifier.linalg.removal import (
    OF_BLOCKS,
    Removal,
    RemovalProblem,
    growth_by_count,
    interpolation,
    kept_features,
)
from cur_modifier.linalg.removal import solve as solve_removal
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
    Elimination,
    Selection,
    deim,
    eliminate,
    elimination,
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
    "OF_BLOCKS",
    "Elimination",
    "GramAccumulator",
    "LowRank",
    "PairedMoments",
    "Problem",
    "RankCurve",
    "Removal",
    "RemovalProblem",
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
    "eliminate",
    "elimination",
    "energy_rank",
    "gram_norm",
    "gram_sqrt",
    "greedy",
    "growth_by_count",
    "interpolation",
    "interpolative",
    "interpolative_aligned",
    "kept_features",
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
    "solve_removal",
    "split_rows",
    "truncation_tail",
    "weighted_spectrum",
]
