"""The bench of online training: its arms, its ratios, and a study small enough for every day."""

import json

import numpy as np
import pytest

from simlab.bench import _online_studies, online, runner
from simlab.bench._online_studies import STUDIES, Arm, Study
from simlab.core.errors import ConfigError


@pytest.mark.parametrize("name", STUDIES)
def test_arms_are_paired_and_every_ratio_has_both_of_its_arms(name):
    study = STUDIES[name]
    arms = {(arm.name, arm.runs) for arm in study.arms}
    assert len(arms) == len(study.arms)
    for _, _, over, under, _ in online._RATIOS[name]:
        assert {over, under} <= arms
    assert not set(study.seeds["explore"]) & set(study.seeds["confirm"])
    assert len(study.seeds["confirm"]) >= 6
    settings = [study.settings(arm, 5) for arm in study.arms]
    assert len({(s.n_batches, s.batch, s.seed, repr(s.operator)) for s in settings}) == 1
    for arm, s in zip(study.arms, settings, strict=True):
        if arm.is_online:  # a pass over all runs fills the budget, neither more nor less
            items = arm.runs * len(study.case(1, 5, "train").family.schema.times)
            assert items == s.fresh * s.n_batches


def test_a_small_look_keeps_the_shape():
    study = STUDIES["e1"]
    small = study.smaller()
    assert [arm.name for arm in small.arms] == [arm.name for arm in study.arms]
    assert small.train["n_batches"] == 800
    assert all(small.settings(arm, 3) for arm in small.arms)


def test_wrong_part():
    with pytest.raises(ConfigError, match="--experiment e4"):
        online.run(experiment="e4")


def test_a_part_replaces_its_own_in_a_recorded_result(tmp_path):
    feeds, wall = {"study": "e1", "feed": "fifo"}, {"study": "e1", "run": "reservoir"}
    active = {"study": "e6", "draws": "breed"}
    old = {
        "machine": {"load": 1.5},
        "rows": [feeds, wall, active | {"mean_K": 3.0}],
        "ratios": {"a": 1.0, "b": 2.0},
    }
    runner.save(old, tmp_path / "online.json")
    new = {"name": "online", "machine": {"load": 9.0}, "rows": [active], "ratios": {"b": 5.0}}
    made = online.joined(tmp_path / "online.json", new)
    assert made["rows"] == [feeds, active, wall]
    assert made["ratios"] == {"a": 1.0, "b": 5.0}
    assert made["machine"] == {"load": 1.5}
    made = online.joined(tmp_path / "online.json", {**new, "rows": [feeds | {"runs": 1}]})
    assert made["rows"] == [feeds | {"runs": 1}, active | {"mean_K": 3.0}, wall]


@pytest.mark.slow
def test_feeds_of_a_tiny_study(tmp_path, capsys, monkeypatch):
    """Real campaigns, trainings in processes of their own, the coupled run's weights equal."""
    tiny = Study(
        name="e1",
        title="tiny",
        family={"kind": "heat", "cells": 4, "n_steps": 5},
        train={"operator": {"kind": "mlp", "hidden": [8]}, "n_batches": 40, "pilot": 2},
        arms=(
            Arm("offline", 4),
            Arm("reservoir", 8, {"kind": "reservoir", "capacity": 20, "threshold": 4}, fresh=1),
        ),
        n_valid={"explore": 2, "confirm": 2},
        seeds={"explore": (3,), "confirm": (5, 7)},
        measures=_online_studies._heat_errors,
    )
    monkeypatch.setitem(STUDIES, "e1", tiny)
    ratio = ("over", "rmse_K", ("reservoir", 8), ("offline", 4), "")
    monkeypatch.setitem(online._RATIOS, "e1", (ratio,))
    result = online.run(experiment="e1", figures=tmp_path)
    runner.save(result, tmp_path / "online.json")
    rows = json.loads((tmp_path / "online.json").read_text())["rows"]
    assert [(row["seeds"], row["feed"], row["n"]) for row in rows] == [
        ("explore", "offline", 1),
        ("explore", "reservoir", 1),
        ("confirm", "offline", 2),
        ("confirm", "reservoir", 2),
    ]
    assert rows[3]["coupled_equal"] == "2 of 2"
    assert rows[3]["rmse_K"] == pytest.approx(np.mean(rows[3]["rmse_K_values"]))
    assert result["ratios"]["over"] == pytest.approx(rows[3]["rmse_K"] / rows[2]["rmse_K"])
    assert (tmp_path / "online_feeds.png").stat().st_size > 5000
    assert "coupled_equal" in capsys.readouterr().out
