"""The record of a check, and the limits it is held against."""

import math

import pytest

from distill.circuits.faithfulness import Check, Limits, skipped
from distill.circuits.faithfulness.check import said, verdict_of


def test_a_record_as_json():
    check = Check(name="necessity", value=0.7, control=(0.1, 0.3, math.inf), threshold=0.5, verdict="pass",
                  reason="because", n=8, seed=1, p=0.01, details={"scale": math.nan, "p_specific": 0.2})  # fmt: skip
    record = check.to_json()
    assert record["value"] == 0.7 and record["control"] == 0.3 and record["controls"] == [0.1, 0.3, None]
    assert record["details"] == {"scale": None, "p_specific": 0.2}
    assert {"name", "value", "control", "threshold", "verdict", "n", "seed"} <= set(record)
    assert check.chances == {"necessity": 0.01, "necessity, specific": 0.2}
    assert not check.flagged


def test_a_skipped_check_flags_nothing():
    check = skipped("shift", "no shifted split")
    assert not check.flagged and check.to_json()["value"] is None and check.chances == {}
    assert check.typical_control is None


def test_what_is_no_number_can_only_be_skipped():
    for verdict in ("pass", "flag", "artefact"):
        with pytest.raises(ValueError, match="value: got nan in check 'role'; allowed .* skipped"):
            Check(name="role", value=math.nan, threshold=0.1, verdict=verdict, reason="", n=4)


def test_verdicts_and_numbers_in_words():
    assert verdict_of(["one", "two"], "fine") == ("flag", "one; two")
    assert verdict_of([], "fine") == ("pass", "fine")
    assert [said(value) for value in (0.123456, 1e-9, -2.0)] == ["0.123", "0", "-2"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("sets", 0), ("draw_pairs", 0), ("control_pairs", 0),
     ("seeds", 1), ("percentile", 101), ("agreement", 1.5), ("shares", (0.5,)), ("shares", (0.0, 2.0)),
     ("curve_edges", (0,)), ("control_suspicious", 1.0), ("sharp", 0.01), ("tail_ratio", -1.0), ("other_tasks", -1)],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: got .* allowed are"):
        Limits(**{field: value})
