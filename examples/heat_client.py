"""A heat solver of its own, which stores its steps through simlab's client.

The solver is plain numpy and knows nothing of simlab; the lines with ``c.`` are all there is to
add. It computes one trajectory, the one that its environment names:

    export SIMLAB_STORE=runs/heat SIMLAB_N=2 SIMLAB_SEED=71
    SIMLAB_TRAJ=0 SIMLAB_PARAMETERS='{"left": 400, "right": 150}' python examples/heat_client.py
    SIMLAB_TRAJ=1 SIMLAB_PARAMETERS='{"left": 200, "right": 350}' python examples/heat_client.py

Killed and started again, it computes the steps anew and stores those that are missing. After the
last trajectory the store is sealed: `simlab store status runs/heat`.
"""

import argparse
import time

import numpy as np

from simlab.client import Client


def main() -> None:
    """Solve u_t = u_xx on (0, 1) by implicit Euler, u = 300 K at first, the ends held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each step")
    words = parser.parse_args()

    h, dt = 1 / words.cells, 1e-3
    x = (np.arange(words.cells) + 0.5) * h
    r = dt / h**2
    matrix = (1 + 2 * r) * np.eye(words.cells)
    matrix -= r * (np.eye(words.cells, k=1) + np.eye(words.cells, k=-1))
    matrix[[0, -1], [0, -1]] += r  # the end is half a cell away
    inverse = np.linalg.inv(matrix)
    times = dt * np.arange(1, words.steps + 1)

    with Client.from_env() as c:
        c.declare({"u": "K"}, {"x": x}, times, units={"left": "K", "right": "K"})
        u = np.full(words.cells, 300.0)
        for step in range(words.steps):
            ends = np.zeros(words.cells)
            ends[[0, -1]] = 2 * r * c.parameters["left"], 2 * r * c.parameters["right"]
            u = inverse @ (u + ends)
            c.send(step, times[step], {"u": u})
            time.sleep(words.pause)


if __name__ == "__main__":
    main()
