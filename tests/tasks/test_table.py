"""The table of tasks names what transformers and the hub have."""

from __future__ import annotations

import pytest

from cur_modifier.tasks.table import TASKS, Head, Task, find_task


def test_a_name_finds_its_task() -> None:
    assert all(find_task(name) is task and task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize(("name", "near"), [("sst-2", "near it: sst2"), ("squadv2", "squad")])
def test_an_unknown_name_is_answered_with_those_there_are(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"no task '{name}'.*{near}.*Name one of sst2, mrpc"):
        find_task(name)


@pytest.mark.parametrize("head", Head)
def test_transformers_has_the_class(head: Head) -> None:
    transformers = pytest.importorskip("transformers")
    assert hasattr(transformers, head.auto_class)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_is_whole(task: Task) -> None:
    assert task.scores
    if task.head is Head.QUESTION_ANSWERING:
        assert not task.labels and task.outputs == 2 and not task.is_regression
    else:
        assert task.texts and task.outputs == max(1, len(task.labels))
        assert task.is_regression == (task.name == "stsb")
