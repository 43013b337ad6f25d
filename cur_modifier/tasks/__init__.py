"""Tasks that models with a head are trained and measured on: GLUE and SQuAD, from files or the hub.

``task_dataset`` gives labelled calibration data, ``measure_task`` the metrics.
"""

from cur_modifier.tasks.calibration import task_dataset
from cur_modifier.tasks.load import Split, training_split, validation_split
from cur_modifier.tasks.measure import measure_task
from cur_modifier.tasks.scores import Score
from cur_modifier.tasks.table import TASKS, Head, Task, find_task

__all__ = [
    "TASKS",
    "Head",
    "Score",
    "Split",
    "Task",
    "find_task",
    "measure_task",
    "task_dataset",
    "training_split",
    "validation_split",
]
