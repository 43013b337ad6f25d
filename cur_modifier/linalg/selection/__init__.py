"""Which rows to keep: selections on an orthonormal basis or on the scored matrix itself.

All return ``r`` distinct row indices as an int64 tensor, in the order of choice. For columns pass
the transpose. One function a method, chosen by the enum :class:`Selection`.
"""

from cur_modifier.linalg.selection.deim import deim
from cur_modifier.linalg.selection.elimination import Elimination, eliminate, elimination
from cur_modifier.linalg.selection.greedy import greedy
from cur_modifier.linalg.selection.leverage import leverage_sampled, leverage_scores, leverage_top
from cur_modifier.linalg.selection.norm import norm
from cur_modifier.linalg.selection.qdeim import qdeim
from cur_modifier.linalg.selection.random import random
from cur_modifier.linalg.selection.table import Selection, select_rows, select_rows_and_columns

__all__ = [
    "Elimination",
    "Selection",
    "deim",
    "eliminate",
    "elimination",
    "greedy",
    "leverage_sampled",
    "leverage_scores",
    "leverage_top",
    "norm",
    "qdeim",
    "random",
    "select_rows",
    "select_rows_and_columns",
]
