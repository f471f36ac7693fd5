"""A campaign with evenly spread parameters: the same samples after a kill, and in a longer run."""

from __future__ import annotations

from commands import simlab

from simlab.problems.heat import Heat
from simlab.problems.samplers import samplers
from simlab.problems.spaces import sampled_by
from simlab.store.store import SnapshotStore

CASE = """
[family]
kind = "heat"
cells = 4
n_steps = 2
[campaign]
n = 16
seed = 3307
sampler = "sobol"
"""


def test_resumed_campaigns_draw_the_same_points(tmp_path) -> None:
    path = tmp_path / "case.toml"
    path.write_text(CASE)
    out = tmp_path / "run"
    for words in (["--shard", "0/2"], ["--resume", "--shard", "1/2"]):
        done = simlab("generate", path, "--out", out, *words)
        assert done.returncode in (0, 3), done.stderr
    store = SnapshotStore.open(out / "store")
    assert store.is_complete()
    space = sampled_by(Heat(cells=4, n_steps=2).space, samplers.build("sobol"))
    found = {
        item.sample.index: dict(item.sample.parameters)
        for name in ("train", "valid", "test")
        for item in store.split(name)
    }
    assert found == {mu.index: dict(mu.parameters) for mu in space.sample(16, 3307)}
    again = simlab("generate", path, "--out", out, "--resume", "--set", "campaign.sampler=halton")
    assert again.returncode == 2
    assert "campaign.sampler" in again.stderr
