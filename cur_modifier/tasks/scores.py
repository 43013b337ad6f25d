"""The metrics of GLUE and SQuAD, from 0 to 1, correlations from -1 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cur_modifier.tasks.examples import Question
from cur_modifier.tasks.table import Task

__all__ = ["Score", "score_answers", "score_labels"]


@dataclass(frozen=True)
class Score:
    """A metric of one task.

    Attributes:
        stderr: the standard error, where the metric is a mean over examples.
    """

    name: str
    value: float
    stderr: float | None = None


def score_labels(task: Task, predicted: Sequence[float], labels: Sequence[float]) -> list[Score]:
    """The task's metrics of classes, or of scores, by scikit-learn and SciPy.

    A correlation of constant predictions is not defined; it counts as 0.
    """
    found, given = np.asarray(predicted), np.asarray(labels)
    return [_LABEL_SCORES[name](name, found, given) for name in task.scores]


def score_answers(questions: Sequence[Question], answers: Sequence[str]) -> list[Score]:
    """Exact match and F1 of answers, each the best over a question's reference answers.

    Texts are normalized as SQuAD's official script does (lower case, no articles, no punctuation),
    by transformers' copy of it.
    """
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, normalize_answer

    exact, f1 = [], []
    for question, answer in zip(questions, answers, strict=True):
        said = [given.text for given in question.answers if normalize_answer(given.text)] or [""]
        exact.append(max(compute_exact(text, answer) for text in said))
        f1.append(max(compute_f1(text, answer) for text in said))
    return [_mean("exact_match", np.asarray(exact)), _mean("f1", np.asarray(f1))]


def _mean(name: str, values: np.ndarray) -> Score:
    """With the sample's standard error, as lm-eval gives it; of one example there is none."""
    count = len(values)
    stderr = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return Score(name, float(values.mean()), stderr)


def _accuracy(name: str, found: np.ndarray, given: np.ndarray) -> Score:
    return _mean(name, (found == given).astype(float))


def _f1(name: str, found: np.ndarray, given: np.ndarray) -> Score:
    from sklearn.metrics import f1_score

    return Score(name, float(f1_score(given, found, zero_division=0.0)))


def _correlation(name: str, found: np.ndarray, given: np.ndarray) -> Score:
    from scipy import stats

    if len(set(found)) < 2 or len(set(given)) < 2:
        return Score(name, 0.0)
    measure = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
    return Score(name, float(measure(found, given).statistic))


_LABEL_SCORES: dict[str, Callable[[str, np.ndarray, np.ndarray], Score]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "pearson": _correlation,
    "spearman": _correlation,
}
