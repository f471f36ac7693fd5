"""Small problems with known answers, for the tests of learning."""

import numpy as np

from simlab.core.samples import Sample, Trajectory, generator
from simlab.store.schema import Axis, Boundary, FieldSpec, Schema

SEED = 60913

# Settings that learn these problems in seconds, and what the kinds cannot do.
SMALL = {
    "fno": {"modes": 8, "width": 12, "layers": 2},
    "points": {"points": 64, "width": 32, "layers": 2},
    "tfno": {"modes": 8, "width": 20, "layers": 2, "rank": 0.2},
    "uno": {"modes": 8, "width": 8, "levels": 1},
    "gino": {"latent": 8, "modes": 6, "width": 12, "layers": 2},
    "mppde": {"bundle": 2, "width": 24, "layers": 2},
    "podnet": {"modes": 12, "hidden": [64, 64], "snapshots": 200},
    "unet": {"width": 16, "levels": 2},
}
ONE_GRID = ("mlp", "mppde", "podnet", "unet")  # they belong to the grid they were trained on


def centres(n):
    return (np.arange(n) + 0.5) / n


def field_schema(n=16, dims=2):
    """A stationary problem: a coefficient field and a scalar in, one scalar field out."""
    axes = tuple(Axis(name, tuple(centres(n).tolist())) for name in "xyz"[:dims])
    fields = (FieldSpec("a", "input"), FieldSpec("u", units="K"))
    return Schema("smoothing", axes, fields, parameters={"gain": "1"})


def heat_schema(n=12, n_times=4):
    """Scalars and time in, a scalar and a vector field out."""
    axes = tuple(Axis(name, tuple(centres(n).tolist())) for name in "xy")
    fields = (FieldSpec("u", units="K"), FieldSpec("flux", order=1))
    times = tuple((0.1 * np.arange(1, n_times + 1)).tolist())
    return Schema("heat", axes, fields, times=times, parameters={"left": "K", "right": "K"})


def bare_schema(n_times=1, n=4):
    """The cheapest data there is: one scalar in, a line of values out."""
    axes = (Axis("x", tuple(centres(n).tolist())),)
    times = tuple(float(k) for k in range(n_times))
    return Schema("line", axes, (FieldSpec("u"),), times=times, parameters={"mu": "1"})


def marching_schema(n=16, n_times=4):
    """An initial field on a ring and a scalar in, the same field at several times out."""
    axes = (Axis("x", tuple(centres(n).tolist())),)
    fields = (FieldSpec("u0", "input"), FieldSpec("u"))
    return Schema(
        "spreading",
        axes,
        fields,
        times=tuple((0.5 * np.arange(n_times)).tolist()),
        parameters={"rate": "1"},
        boundaries=(Boundary("x", "periodic"),),
    )


def sample_of(schema, index):
    rng = generator(SEED, index)
    parameters = {name: float(rng.uniform(1.0, 3.0)) for name in schema.parameters}
    fields = {}
    for spec in schema.inputs:
        waves = np.zeros(schema.shape)
        for k in range(1, 4):
            for axis, x in enumerate(np.meshgrid(*map(centres, schema.shape), indexing="ij")):
                waves += rng.standard_normal() * np.sin(k * np.pi * x + axis) / k
        fields[spec.name] = np.exp(0.5 * waves) if spec.name == "a" else 1.0 + waves
    return Sample(index, SEED, parameters, fields)


def solve(schema, sample):
    """Return the trajectory of a sample: closed formulas, float32 as a store keeps them."""
    grid = np.meshgrid(*map(centres, schema.shape), indexing="ij")
    mu = sample.parameters
    outputs = {}
    if schema.name == "smoothing":
        smooth = sample.fields["a"]
        for axis in range(schema.n_dims):
            smooth = np.cumsum(smooth, axis=axis) / schema.shape[axis]
        outputs["u"] = (2.0 + mu["gain"] * smooth)[None]
    elif schema.name == "spreading":
        u = sample.fields["u0"]
        steps = []
        for _ in schema.times:
            u = u + 0.05 * mu["rate"] * (np.roll(u, 1) - 2.0 * u + np.roll(u, -1))
            steps.append(u)
        outputs["u"] = np.stack(steps)
    elif schema.name == "heat":
        decay = np.exp(-np.array(schema.times))[:, None, None]
        bump = np.sin(np.pi * grid[0]) * np.sin(np.pi * grid[1])
        outputs["u"] = mu["left"] + (mu["right"] - mu["left"]) * grid[0] + decay * bump
        slope = np.pi * decay * np.cos(np.pi * grid[0]) * np.sin(np.pi * grid[1])
        flux = [mu["right"] - mu["left"] + slope, 0.1 * slope + mu["left"]]
        outputs["flux"] = np.stack(flux, axis=-1)
    else:
        times = np.array(schema.times)[:, None]
        outputs["u"] = mu["mu"] + times + grid[0]
    kept = {name: values.astype(np.float32) for name, values in outputs.items()}
    return Trajectory(sample, np.array(schema.times), kept)


def trajectories(schema, n, start=0):
    return [solve(schema, sample_of(schema, index)) for index in range(start, start + n)]
