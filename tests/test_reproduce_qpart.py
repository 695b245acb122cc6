"""`gossipfl reproduce qpart`, its smallest arm for real."""

from __future__ import annotations

import json

import pytest

from gossipfl.errors import ConfigError
from gossipfl.scenario.reproduce import REPRODUCTIONS, find_data


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    reproduction = REPRODUCTIONS.get("qpart")()
    folder = tmp_path_factory.mktemp("qpart")
    arms, missing = find_data(reproduction.arms(False), folder)
    assert list(arms) == ["mlp-digits"] and missing == ["cifar10", "mnist"]
    return folder, reproduction, reproduction.run("mlp-digits", arms["mlp-digits"], folder)


def test_every_plan_keeps_within_the_loss_that_was_allowed(measured):
    _, _, found = measured
    assert found.accuracy > 0.85
    for row in found.rows:
        assert row.predicted_loss <= row.level
        # On so many test samples the loss that is seen has this standard error at most.
        assert row.measured_loss <= row.level + 3 * (row.level / found.tested) ** 0.5


def test_the_tables_set_what_was_saved_beside_what_was_published(measured):
    _, reproduction, found = measured
    plans, alone = reproduction.tables({"mlp-digits": found}, False)
    assert all(row.published == (0.8188, 0.8812) and row.verdict for row in (*plans.rows, *alone.rows))
    assert [row.values["for"] for row in alone.rows] == ["1.0%", "2.0%", "5.0%"]


def test_the_record_holds_every_row(measured):
    folder, _, found = measured
    assert len(json.loads((folder / "mlp-digits.json").read_text())["rows"]) == len(found.rows)


def test_an_arm_that_was_measured_is_found_again_and_no_other_in_its_place(measured):
    folder, reproduction, found = measured
    arm = reproduction.arms(False)["mlp-digits"]
    assert reproduction.finished("mlp-digits", arm, folder) == found
    assert reproduction.finished("mlp-mnist", arm, folder) is None
    with pytest.raises(ConfigError, match="holds a run of another scenario; pass --force to begin again"):
        reproduction.finished("mlp-digits", arm | {"training": {"local_steps": 1}}, folder)
    record = folder / "mlp-digits.json"
    (folder / "cut.json").write_text(record.read_text()[:-100])
    assert reproduction.finished("cut", arm, folder) is None
    (folder / "old.json").write_text(json.dumps(json.loads(record.read_text()) | {"version": "0.0.1"}))
    with pytest.raises(ConfigError, match=r"holds a run of gossipfl 0\.0\.1"):
        reproduction.finished("old", arm, folder)
