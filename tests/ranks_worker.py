"""What one of several training processes does, for tests/unit/test_ranks.py.

Usage: ranks_worker.py TASK DIRECTORY [COUNT], with the environment of torchrun.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from learn_helpers import bare_schema, trajectories

from simlab.core.config import build
from simlab.learn.ranks import Ranks
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Trainer


def settings_with(**changes):
    plain = {
        "operator": {"kind": "mlp", "hidden": (8,)},
        "n_batches": 100,
        "threads": 1,
        "pilot": 8,
        "log_every": 1,
    }
    return build(TrainSettings, plain | changes)


def equal(ranks, directory):
    """100 deterministic batches; the losses of rank 0 and the weights of all go to files."""
    schema = bare_schema(4)
    settings = settings_with(
        buffer={"kind": "fifo", "capacity": 40},
        batch=8 // ranks.size,
        lanes=8 // ranks.size,
        mode="deterministic",
    )
    losses = []
    trainer = Trainer(
        settings, schema, observers=[lambda kind, **v: losses.append(v["loss"])], ranks=ranks
    )
    trainer.run(MemoryStream(trajectories(schema, 40), schema, 11))
    weights = {name: value.numpy().tolist() for name, value in trainer.model.tensors().items()}
    ranges = [trainer.model.ranges.lower.tolist(), trainer.model.ranges.upper.tolist()]
    text = json.dumps({"losses": losses, "weights": weights, "ranges": ranges})
    (directory / f"equal-{ranks.size}-{ranks.rank}.json").write_text(text)


class Pausing(MemoryStream):
    """Comes in small portions, and often with nothing at all."""

    def __init__(self, *args, rng):
        self.rng = rng
        super().__init__(*args)

    def poll(self, at_most):
        return [] if self.rng.random() < 0.3 else super().poll(int(self.rng.integers(1, 6)))


def uneven(ranks, directory):
    """Trainings in which every rank has another amount of data, arriving at its own pace."""
    counts, begun = [], time.monotonic()
    for case in range(int(sys.argv[3])):
        rng = np.random.default_rng([case, ranks.rank])
        schema = bare_schema(3)
        data = trajectories(schema, int(rng.integers(2, 13)))
        kind = ["fifo", "firo", "reservoir"][case % 3]
        settings = settings_with(buffer={"kind": kind, "capacity": 8}, n_batches=4, batch=3)
        trainer = Trainer(settings, schema, ranks=ranks)
        limit = case % 7
        trainer.run(
            Pausing(data, schema, 7, rng=rng),
            stop=lambda t=trainer, n=limit: ranks.rank == 1 and n == 0 and t.batch >= 2,
        )
        counts.append(trainer.batch)
    text = json.dumps({"counts": counts, "seconds": time.monotonic() - begun})
    (directory / f"uneven-{ranks.rank}.json").write_text(text)


def resume(ranks, directory):
    """To 20, stopped, on to 40, and 40 in one go: the same weights on every rank."""
    schema = bare_schema(4)
    settings = settings_with(
        operator={"kind": "podnet", "modes": 2, "hidden": (8,)},  # its basis is made on the way
        buffer={"kind": "reservoir", "capacity": 20},
        batch=4,
        n_batches=40,
        ema=0.9,
    )
    data, found = trajectories(schema, 11), []
    for folder, stops in (("straight", [40]), ("parts", [20, 40])):
        for last in stops:
            trainer = Trainer(settings, schema, directory / folder, ranks=ranks)
            stream = MemoryStream(data, schema, 5)
            resumed = trainer.resume(stream)
            assert resumed == (len(stops) == 2 and last == 40)
            trainer.run(stream, stop=lambda t=trainer, n=last: t.batch >= n)
        found.append({n: v.numpy().tolist() for n, v in trainer.model.tensors().items()})
    assert found[0] == found[1]
    (directory / f"resume-{ranks.rank}.json").write_text(json.dumps(found[0]))


if __name__ == "__main__":
    task = {"equal": equal, "uneven": uneven, "resume": resume}[sys.argv[1]]
    with Ranks.join(60.0) as joined:
        task(joined, Path(sys.argv[2]))
