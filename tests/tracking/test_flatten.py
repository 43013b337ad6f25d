"""Keys and values that MLflow takes."""

import enum
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.tracking import flatten as flat


class Form(enum.StrEnum):
    CUR = "cur"


def test_nested_settings_become_dotted_keys():
    settings = {
        "rank": {"max": 256, "ratio": None},
        "targets": ["q_proj", "k_proj"],
        "stages": [{"form": Form.CUR}, {"mlflow": True}],
        "indices": [[1, 2], [3]],
        "empty": {},
        "layers": (),
        "dampening": 0.01,
    }
    assert flat.flatten(settings) == {
        "rank.max": "256",
        "rank.ratio": "null",
        "targets": '["q_proj", "k_proj"]',
        "stages.0.form": "cur",
        "stages.1.mlflow": "true",
        "indices.0": "[1, 2]",
        "indices.1": "[3]",
        "empty": "{}",
        "layers": "[]",
        "dampening": "0.01",
    }
    assert flat.flatten({}) == {}


@given(st.dictionaries(st.text(max_size=400), st.integers(), max_size=8))
def test_every_entry_has_its_own_key_and_mlflow_takes_it(settings):
    validation = pytest.importorskip("mlflow.utils.validation")
    flattened = flat.flatten(settings)
    assert sorted(flattened.values()) == sorted(str(value) for value in settings.values())
    for key, value in flattened.items():
        assert key
        validation._validate_param(key, value)


def test_keys_that_clash_are_told_apart():
    flattened = flat.flatten({"a.b": 1, "a": {"b": 2}, "a?b": 3, "a*b": 4})
    assert len(flattened) == 4
    assert flattened["a.b"] == "1"
    assert sorted(flattened.values()) == ["1", "2", "3", "4"]


def test_long_keys_stay_distinct():
    stem = "x" * 300
    keys = list(flat.unique_keys([(stem + "a", 1), (stem + "b", 2)]))
    assert len(set(keys)) == 2
    assert all(len(key) == flat.MAX_KEY_LENGTH for key in keys)


def test_a_cut_value_says_so():
    assert flat.cut("abc", 3, key="k") == "abc"
    shortened = flat.cut("x" * 100, 50, key="k")
    assert len(shortened) == 50
    assert shortened.endswith("[cut]")


def test_characters_that_databases_refuse_are_replaced():
    assert flat.cut("a\0b\ud800c", 10, key="k") == "a?b?c"


def test_batches_keep_order_count_and_size():
    items = ["é" * 6000 for _ in range(250)] + ["a"]
    batched = list(flat.batches(items, count=100, text=str))
    assert [item for batch in batched for item in batch] == items
    assert all(len(batch) <= 100 for batch in batched)
    assert all(len(json.dumps(batch)) < 1_000_000 for batch in batched)
    assert list(flat.batches([], count=100, text=str)) == []


def test_our_limits_are_within_those_of_the_installed_mlflow():
    validation = pytest.importorskip("mlflow.utils.validation")
    assert validation.MAX_ENTITY_KEY_LENGTH >= flat.MAX_KEY_LENGTH
    assert validation.MAX_PARAM_VAL_LENGTH >= flat.MAX_PARAM_VALUE_LENGTH
    assert validation.MAX_TAG_VAL_LENGTH >= flat.MAX_TAG_VALUE_LENGTH
    assert validation.MAX_PARAMS_TAGS_PER_BATCH >= flat.MAX_PARAMS_PER_BATCH
    assert validation.MAX_METRICS_PER_BATCH >= flat.MAX_METRICS_PER_BATCH
    assert validation.MAX_BATCH_LOG_REQUEST_SIZE > flat.MAX_BATCH_CHARACTERS
