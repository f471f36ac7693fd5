"""Campaigns for the tests of the store: schemas, values to be computed again, a writer loop."""

import numpy as np

from simlab.core.reports import Provenance
from simlab.core.samples import Sample
from simlab.store.follow import Begin, End, StepRecord
from simlab.store.schema import Axis, Boundary, FieldSpec, Mesh, Schema

SEED = 71093


def make_schema(dims=2, n_steps=3, name="toy", mesh=None, tensor=False):
    """A schema with scalar and vector fields on a small grid, and what else is asked for."""
    letters, lengths = "xyz"[:dims], (7, 5, 4)[:dims]
    axes = tuple(
        Axis(letter, tuple(np.linspace(0.5, 1.5 + i, n).tolist()), "m")
        for i, (letter, n) in enumerate(zip(letters, lengths, strict=True))
    )
    fields = [
        FieldSpec("k", role="input", units="m^2"),
        FieldSpec("u", units="K", long_name="temperature"),
        FieldSpec("q", order=1),
    ]
    if tensor:
        fields.append(FieldSpec("s", order=2))
    if mesh is not None:
        fields.append(FieldSpec("w", location="vertex"))
    return Schema(
        name,
        axes,
        tuple(fields),
        times=tuple(0.25 * k for k in range(n_steps)),
        parameters={"mu": "1", "nu": "m"},
        constants={"rho": 2.5},
        boundaries=tuple(
            Boundary(letter, kind)
            for letter, kind in zip(letters, ("wall", "periodic", "open"), strict=False)
        ),
        mesh=mesh,
    )


def make_mesh():
    points = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [2, 0], [2, 1]], dtype=float)
    cells = {"triangle": np.array([[0, 1, 2], [0, 2, 3]]), "quad": np.array([[1, 4, 5, 2]])}
    return Mesh(points, cells)


def sample_of(schema, traj):
    rng = np.random.default_rng([SEED, traj])
    return Sample(
        traj,
        SEED,
        {name: float(rng.random()) for name in schema.parameters},
        {spec.name: rng.standard_normal(schema.field_shape(spec)) for spec in schema.inputs},
    )


def step_of(schema, traj, step):
    rng = np.random.default_rng([SEED, traj, 1 + step])
    return {spec.name: rng.standard_normal(schema.field_shape(spec)) for spec in schema.outputs}


def solve_of(traj, step):
    return Provenance(order=traj, iterations=10 + step, solver="by hand")


def write(writer, schema, traj, n_steps=None, note=None, solved=False):
    """Write one trajectory up to ``n_steps``, finish it when whole; note what was acknowledged."""
    attempt = writer.begin(sample_of(schema, traj))
    total = len(schema.times)
    for step in range(total if n_steps is None else n_steps):
        solve = solve_of(traj, step) if solved else Provenance()
        writer.append(traj, step, schema.times[step], step_of(schema, traj, step), solve=solve)
        if note is not None:
            note("step", traj, step)
    if n_steps is None:
        writer.finish(traj)
        if note is not None:
            note("done", traj, total)
    return attempt


def assert_split_is_exact(schema, split):
    """Every value of a split equals what was written, bit for bit in the stored type."""
    for traj, found in zip(split.ids.tolist(), split, strict=True):
        sample = sample_of(schema, traj)
        assert found.sample.index == traj
        assert found.sample.parameters == dict(sample.parameters)
        for spec in schema.inputs:
            expected = sample.fields[spec.name].astype(np.float32)
            assert np.array_equal(found.sample.fields[spec.name], expected)
        for step in range(len(schema.times)):
            for name, values in step_of(schema, traj, step).items():
                assert np.array_equal(
                    found.outputs[name][step], values.astype(found.outputs[name].dtype)
                )


class Reader:
    """A follower that checks what it is given: order, values, nothing twice."""

    def __init__(self, schema):
        self.schema = schema
        self.position = None
        self.steps = {}
        self.attempts = {}
        self.ends = {}

    def pull(self, store, at_most):
        events, self.position = store.follow(self.position, at_most)
        assert len(events) <= at_most
        for event in events:
            self.take(event)
        return len(events)

    def drain(self, store, at_most=1000):
        while self.pull(store, at_most):
            pass

    def take(self, event):
        traj = event.traj
        if isinstance(event, Begin):
            assert event.attempt > self.attempts.get(traj, 0), "an attempt came twice"
            assert event.sample.parameters == dict(sample_of(self.schema, traj).parameters)
            self.attempts[traj], self.steps[traj] = event.attempt, 0
            self.ends.pop(traj, None)
            return
        assert event.attempt == self.attempts[traj]
        assert traj not in self.ends, "an event after the end"
        if isinstance(event, End):
            self.ends[traj] = event.status
            return
        assert isinstance(event, StepRecord)
        assert event.step == self.steps[traj], "a step was lost or came twice"
        self.steps[traj] += 1
        for name, values in step_of(self.schema, traj, event.step).items():
            assert np.array_equal(event.fields[name], values.astype(event.fields[name].dtype))

    def done(self):
        return {traj for traj, status in self.ends.items() if status == "done"}
