"""The heat case of the papers on online training, small: what the buffer is for."""

import numpy as np
import pytest
from scipy.sparse import diags, eye, kron
from scipy.sparse.linalg import splu

from simlab.core.config import build
from simlab.core.samples import Sample, Trajectory, generator
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Trainer
from simlab.store.schema import Axis, FieldSpec, Schema

pytestmark = pytest.mark.slow

N, T, DT, CLIENTS = 12, 50, 0.01, 16
SIDES = ("left", "right", "bottom", "top")
SCHEMA = Schema(
    "heat",
    tuple(Axis(name, tuple((np.arange(1, N + 1) / (N + 1)).tolist())) for name in "xy"),
    (FieldSpec("u", units="K"),),
    times=tuple((DT * np.arange(1, T + 1)).tolist()),
    parameters=dict.fromkeys(("initial", *SIDES), "K"),
)


@pytest.fixture(scope="module")
def runs():
    """220 runs of u_t = lap u, five temperatures in 100 to 500 K, implicit Euler."""
    line = diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(N, N)) * (N + 1) ** 2
    laplace = kron(line, eye(N)) + kron(eye(N), line)
    factor = splu((eye(N * N) + DT * laplace).tocsc())
    made = []
    for index in range(220):
        values = generator(40427, index).uniform(100.0, 500.0, 5)
        wall = np.zeros((N, N))
        for side, edge in zip(
            values[1:], (wall[0], wall[-1], wall[:, 0], wall[:, -1]), strict=True
        ):
            edge += side * (N + 1) ** 2
        u, steps = np.full(N * N, values[0]), []
        for _ in range(T):
            u = factor.solve(u + DT * wall.ravel())
            steps.append(u.reshape(N, N).astype(np.float32))
        parameters = dict(zip(SCHEMA.parameters, values.tolist(), strict=True))
        made.append(
            Trajectory(Sample(index, 40427, parameters), np.array(SCHEMA.times), np.stack(steps))
        )
    return [Trajectory(t.sample, t.times, {"u": t.outputs}) for t in made]


class LockStep(MemoryStream):
    """Sixteen solvers that march in step: items arrive in waves of equal time."""

    def _shuffle(self):
        waves = np.arange(len(self._trajectories)).reshape(-1, CLIENTS)
        self._order = np.concatenate(
            [(wave[None] * T + np.arange(T)[:, None]).ravel() for wave in waves]
        )


def rmse(buffer, runs):
    settings = build(
        TrainSettings,
        {
            "operator": {"kind": "mlp", "hidden": (128, 128)},
            "buffer": buffer,
            "n_batches": 1920,
            "batch": 5,
            "learning_rate": 1e-3,
            "schedule": "halving",
            "loss": "mse",
            "threads": 1,
            "seed": 8087,
        },
    )
    model = Trainer(settings, SCHEMA).run(LockStep(runs[:192], SCHEMA, 3))
    test = runs[192:]
    truth = np.stack([t.outputs["u"] for t in test])
    return float(np.sqrt(np.mean((model.predict([t.sample for t in test])["u"] - truth) ** 2)))


def test_a_reservoir_mixes_what_arrives_in_waves(runs):
    """Equal batches and data, each item drawn once on average: the buffer makes the difference."""
    reservoir = rmse({"kind": "reservoir", "capacity": 1500, "threshold": 400}, runs)
    fifo = rmse({"kind": "fifo", "capacity": 1500}, runs)
    assert reservoir < 20.0  # K, of temperatures between 100 and 500 K
    assert reservoir < 0.9 * fifo
