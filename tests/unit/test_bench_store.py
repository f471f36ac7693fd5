"""The bench of the store: the agreed keys, every contestant, the same values read by all."""

import json

import pytest

from simlab.bench import runner, store

pytest.importorskip("the_well")


def test_the_store_table_has_the_agreed_keys(tmp_path, capsys):
    result = store.run(quick=True)
    runner.save(result, tmp_path / "store.json")
    saved = json.loads((tmp_path / "store.json").read_text())
    assert saved["name"] == "store"
    rows = [(row.get("profile"), row["contestant"]) for row in saved["rows"]]
    assert len(set(rows)) == len(rows)
    assert {(None, "append"), (None, "seal")} <= set(rows)
    names = ("loader", "loader, in memory", "loader, first pass", "h5py", "WellDataset")
    assert {(profile, name) for profile in ("default", "fast") for name in names} <= set(rows)
    assert set(saved["ratios"]) == set(store.GOALS)
    assert all(value > 0 for value in saved["ratios"].values())
    assert saved["ratios"]["loader_over_welldataset"] >= 3
    shown = capsys.readouterr().out
    assert ">= 30000" in shown
    assert "loader_over_welldataset" in shown
