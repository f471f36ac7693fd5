"""What shards of a mesh campaign say of their resampled fields: method and error estimate."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from simlab.core.errors import SchemaError
from simlab.core.samples import Sample
from simlab.store.resampling import BackInterpolation
from simlab.store.schema import Axis, FieldSpec, Mesh, Resampling, Schema
from simlab.store.store import SnapshotStore

ROOT = Path(__file__).parents[2]
METHOD = "evaluated at the grid points"
SAID = Resampling("u_mesh", METHOD, inside="inside")


def disc(n, dims=2):
    """Vertices in a ball of radius 1, a grid over its box, and where that is inside."""
    rng = np.random.default_rng(8)
    points = rng.uniform(-1, 1, (3000, dims))
    points = points[np.linalg.norm(points, axis=1) < 1]
    axis = -1 + (np.arange(n) + 0.5) * 2 / n
    grid = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"), axis=-1)
    return points, axis, grid, np.linalg.norm(grid, axis=-1) < 1


def sealed(path, n, function, order=0, dims=2, said=SAID):
    points, axis, grid, inside = disc(n, dims)
    axes = tuple(Axis(name, tuple(axis.tolist())) for name in "xyz"[:dims])
    fields = (
        FieldSpec("inside", "input"),
        FieldSpec("u", order=order, resampling=said),
        FieldSpec("u_mesh", order=order, location="vertex"),
    )
    mesh = Mesh(points, {"vertex": np.arange(len(points))[:, None]})
    schema = Schema("disc", axes, fields, times=(0.0, 1.0), mesh=mesh)
    store = SnapshotStore.create(path, schema, n=3, seed=8, split={"train": 1.0})
    mask = inside.reshape(*inside.shape, *[1] * order)
    with store.writer() as writer:
        for traj in range(3):
            writer.begin(Sample(traj, 8, {}, {"inside": inside.astype(float)}))
            for step in range(2):
                u = (1 + traj) * function(grid, step) * mask
                writer.append(
                    traj, step, step, {"u": u, "u_mesh": (1 + traj) * function(points, step)}
                )
            writer.finish(traj)
    store.seal(final=True)
    (path,) = (store.path / "data" / "train").glob("*.h5")
    with h5py.File(path) as file:
        return dict(file["t1_fields/u" if order else "t0_fields/u"].attrs), dict(file.attrs)


def waves(x, step):
    return np.sin(3 * x[..., 0] + step) * np.cos(2 * x[..., 1])


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_linear_has_no_error(tmp_path, dims):
    said, root = sealed(tmp_path / "s", 12, lambda x, step: 2 + x.sum(-1) + step, dims=dims)
    assert said["resampled_from"] == "mesh/fields/u_mesh"
    assert said["resampling_method"] == root["resampling_method"] == METHOD
    assert 0 < said["resampling_error"] < 1e-6
    assert said["resampling_vertices"] > 500
    assert root["resampled"]


def test_the_estimate_is_the_error_and_falls_with_the_square_of_the_spacing(tmp_path):
    errors = []
    for n in (10, 20, 40):
        said, root = sealed(tmp_path / str(n), n, waves)
        assert root["resampling_error"] == said["resampling_error"]
        errors.append(said["resampling_error"])
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert rates == pytest.approx([2, 2], abs=0.25)


def test_the_estimate_against_scipy(tmp_path):
    from scipy.interpolate import RegularGridInterpolator

    points, axis, grid, inside = disc(14)
    values = waves(grid, 0)
    back = BackInterpolation([axis, axis], points, inside)
    reference = RegularGridInterpolator([axis, axis], values)(points[back.reached])
    assert back(values.reshape(1, -1, 1))[0, :, 0] == pytest.approx(reference, abs=1e-13)
    covered = RegularGridInterpolator([axis, axis], inside.astype(float), bounds_error=False)
    assert np.array_equal(np.flatnonzero(covered(points) > 1 - 1e-12), back.reached)


def test_vectors(tmp_path):
    said, _ = sealed(
        tmp_path / "s", 40, lambda x, step: np.stack([waves(x, step), x[..., 0]], -1), order=1
    )
    alone, _ = sealed(tmp_path / "a", 40, waves)
    assert 0 < said["resampling_error"] < alone["resampling_error"]


def test_without_a_mask_the_outside_counts(tmp_path):
    masked, _ = sealed(tmp_path / "a", 20, waves)
    bare, _ = sealed(tmp_path / "b", 20, waves, said=Resampling("u_mesh", METHOD))
    assert bare["resampling_error"] > 3 * masked["resampling_error"]


def test_a_store_made_before_the_statement_is_the_same_campaign(tmp_path):
    points, axis, *_ = disc(4)
    mesh = Mesh(points, {"vertex": np.arange(len(points))[:, None]})

    def schema(said):
        fields = (
            FieldSpec("inside", "input"),
            FieldSpec("u", resampling=said),
            FieldSpec("u_mesh", location="vertex"),
        )
        axes = (Axis("x", tuple(axis.tolist())), Axis("y", tuple(axis.tolist())))
        return Schema("disc", axes, fields, mesh=mesh)

    assert "resampling" not in schema(None).to_json()["fields"][1]
    assert Schema.from_json(schema(SAID).to_json()).fields == schema(SAID).fields
    SnapshotStore.create(tmp_path / "s", schema(None), n=3, seed=8)
    again = SnapshotStore.create(tmp_path / "s", schema(SAID), n=3, seed=8)
    assert again.schema.fields[1].resampling is None


def test_statements_about_what_is_not_there_are_refused():
    axes = (Axis("x", (0.0, 1.0)),)
    with pytest.raises(SchemaError, match="resampled from 'v'"):
        Schema("a", axes, (FieldSpec("u", resampling=Resampling("v", METHOD)),))


def test_the_poisson_family_says_how():
    from simlab.pipeline.case import load_case

    schema = load_case(ROOT / "cases" / "poisson_square.toml").family.schema
    (said,) = [spec.resampling for spec in schema.fields if spec.resampling]
    assert (said.source, said.inside) == ("u_mesh", "inside")
