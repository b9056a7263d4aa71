from pathlib import Path

import pytest

from context_pythia.config.same import check_same, mismatches
from context_pythia.errors import UsageError


def test_settings_differ_by_value_and_not_by_how_json_writes_them():
    recorded = {"seed": 0, "data": {"data": "a.txt", "sizes": [1, 2]}, "gone": 3, "train": {}}
    wanted = {"seed": 0, "data": {"data": Path("a.txt"), "sizes": (1, 2)}, "train": {"epochs": 2}, "new": None}
    assert mismatches(recorded, wanted) == {"train.epochs": (None, 2), "gone": (3, None)}


def test_the_first_difference_is_one_line():
    check_same({"a": 1}, {"a": 1}, "runs/x holds a run", "choose another folder")
    with pytest.raises(UsageError, match=r"^runs/x holds a run with a.b 1, not 2: choose another folder$"):
        check_same({"a": {"b": 1}, "c": 1}, {"a": {"b": 2}, "c": 2}, "runs/x holds a run", "choose another folder")
