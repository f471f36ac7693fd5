"""Plots: what is drawn is what was given, on the axis that was given, without side effects."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import LogNorm

from simlab.core.errors import SchemaError
from simlab.core.samples import Sample, Trajectory
from simlab.pipeline import curves
from simlab.pipeline.evaluate import Evaluation, FieldErrors
from simlab.pipeline.pictures import Comparison, gallery, new_axes, panels, show, views
from simlab.store.schema import Axis, FieldSpec, Mesh, Schema

SEED = 18211


def schema(n_dims=2, n=6, times=(0.0,), order=0, stretch=False):
    points = (np.arange(n) + 0.5) / n
    points = points**2 if stretch else points
    axes = tuple(Axis(name, tuple(points), "m") for name in "xyz"[:n_dims])
    fields = (
        FieldSpec("permeability", "input", units="m^2"),
        FieldSpec("pressure", order=order, units="Pa"),
    )
    return Schema("darcy", axes, fields, times=times)


def data(schema, n=3):
    rng = np.random.default_rng(SEED)
    made = []
    for i in range(n):
        fields = {s.name: np.exp(rng.normal(size=schema.field_shape(s))) for s in schema.inputs}
        outputs = {
            s.name: rng.normal(size=(len(schema.times), *schema.field_shape(s))).astype("f4")
            for s in schema.outputs
        }
        sample = Sample(40 + i, SEED, {"alpha": 0.1 * i}, fields)
        made.append(Trajectory(sample, np.array(schema.times), outputs))
    return made


def image(axis):
    return np.asarray((axis.images or axis.collections)[0].get_array()).squeeze()


def metrics(n=60):
    train = [
        {
            "kind": "train",
            "batch": k,
            "seconds": 10.0 + k,
            "loss": 1.0 / (k + 1),
            "samples_per_s": 900.0,
            "buffer": {"unseen": 5, "seen": k},
        }
        for k in range(n)
    ]
    valid = [
        {"kind": "validation", "batch": k, "rel_l2": {"median": 0.1, "p95": 0.2, "max": 0.5}}
        for k in (10, 20)
    ]
    solve = [
        {
            "kind": "campaign",
            "seconds": 1.0 * k,
            "done": 3 * k,
            "failed": k // 30,
            "total": 200,
            "samples_per_s": 3.0,
        }
        for k in range(n)
    ]
    return train + valid + solve


def test_an_image_shows_the_first_axis_to_the_right_at_its_coordinates():
    described = schema(n=4)
    values = np.arange(16.0).reshape(4, 4)
    axis = show(values, described, described.fields[1])
    np.testing.assert_array_equal(image(axis), values.T)
    np.testing.assert_allclose(axis.images[0].get_extent(), [0, 1, 0, 1])
    assert axis.images[0].origin == "lower"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("x [m]", "y [m]")
    assert axis.figure.axes[1].get_ylabel() == "Pa"


def test_an_uneven_grid_keeps_its_spacing():
    described = schema(n=5, stretch=True)
    axis = show(np.ones((5, 5)), described, described.fields[1])
    corners = axis.collections[0].get_coordinates()
    widths = np.diff(corners[0, :, 0])
    assert widths[-1] > 2 * widths[0]


@pytest.mark.parametrize(("normal", "index"), [(0, (3,)), (1, (slice(None), 3)), (-1, (..., 3))])
def test_three_dimensions_show_the_middle_slice(normal, index):
    described = schema(3)
    values = np.random.default_rng(SEED).normal(size=(6, 6, 6))
    axis = show(values, described, described.fields[1], normal=normal)
    np.testing.assert_allclose(image(axis), values[index].T)


def test_one_dimension_is_a_line_and_vectors_show_their_length():
    described = schema(1)
    axis = show(np.arange(6.0), described, described.fields[1])
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), np.arange(6.0))
    assert axis.get_ylabel() == "pressure [Pa]"
    described = schema(2, order=1)
    values = np.zeros((6, 6, 2))
    values[..., 0], values[..., 1] = 3.0, 4.0
    np.testing.assert_allclose(image(show(values, described, described.fields[1])), 5.0)


def test_scales_are_symmetric_where_the_sign_matters_and_logarithmic_for_wide_inputs():
    described = schema()
    values = np.linspace(-1.0, 3.0, 36).reshape(6, 6)
    norm = show(values, described, described.fields[1]).images[0].norm
    assert (norm.vmin, norm.vmax) == (-3.0, 3.0)
    norm = show(values + 2, described, described.fields[1]).images[0].norm
    assert (norm.vmin, norm.vmax) == (1.0, 5.0)
    wide = np.logspace(-2, 2, 36).reshape(6, 6)
    assert isinstance(show(wide, described, described.fields[0]).images[0].norm, LogNorm)
    constant = show(np.full((6, 6), 7.0), described, described.fields[1])
    assert constant.images[0].norm.vmax > constant.images[0].norm.vmin


def test_vertex_fields_are_drawn_on_their_triangles():
    points = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    mesh = Mesh(points, {"quad": np.array([[0, 1, 2, 3]])})
    spec = FieldSpec("u", location="vertex")
    axes = (Axis("x", (0.0, 1.0)), Axis("y", (0.0, 1.0)))
    described = Schema("p", axes, (spec,), mesh=mesh)
    axis = show(np.array([0.0, 1.0, 2.0, 3.0]), described, spec)
    np.testing.assert_array_equal(axis.collections[0].get_array(), [0, 1, 2, 3])


def test_panels_share_the_scale_of_the_truth_and_give_the_error_its_own():
    described = schema()
    trajectory = data(described)[0]
    truth = trajectory.outputs["pressure"]
    rows = [Comparison("worst: #40", trajectory, {"pressure": truth + 0.01})]
    axes = panels(rows, described, "pressure")
    assert axes.shape == (1, 4)
    source, left, right, error = axes[0]
    np.testing.assert_allclose(image(source), trajectory.sample.fields["permeability"].T)
    np.testing.assert_allclose(image(left), truth[0].T)
    np.testing.assert_allclose(image(right), truth[0].T + 0.01, rtol=1e-6)
    np.testing.assert_allclose(image(error), 0.01, rtol=1e-4)
    limits = [(a.images[0].norm.vmin, a.images[0].norm.vmax) for a in (left, right, error)]
    assert limits[0] == limits[1]
    assert limits[2] == pytest.approx((-0.01, 0.01), rel=1e-4)
    assert [axis.get_title() for axis in axes[0]] == [
        "permeability",
        "pressure: truth",
        "prediction",
        "prediction - truth",
    ]
    assert "worst: #40" in source.get_ylabel()


def test_a_trajectory_in_time_is_shown_at_first_middle_and_last_time():
    described = schema(times=(0.0, 0.1, 0.2, 0.3, 0.4))
    assert [view.step for view in views(described)] == [0, 2, 4]
    trajectory = data(described)[0]
    axes = panels([Comparison("", trajectory, trajectory.outputs)], described, "pressure")
    assert axes.shape == (3, 4)
    for row, step in zip(axes, (0, 2, 4), strict=True):
        np.testing.assert_allclose(image(row[1]), trajectory.outputs["pressure"][step].T)


def test_one_dimensional_panels_overlay_truth_and_prediction():
    described = schema(1)
    trajectory = data(described)[0]
    guess = {"pressure": trajectory.outputs["pressure"] * 2}
    axes = panels([Comparison("a", trajectory, guess)], described, "pressure")
    assert axes.shape == (1, 3)
    truth, predicted = (line.get_ydata() for line in axes[0, 1].lines)
    np.testing.assert_allclose(predicted, 2 * truth)
    np.testing.assert_allclose(axes[0, 2].lines[0].get_ydata(), truth, rtol=1e-6)


def test_the_gallery_has_a_column_per_sample_and_one_scale_per_row():
    described = schema(times=(0.0, 1.0))
    few = data(described, 4)
    axes = gallery(few, described)
    assert axes.shape == (3, 4)  # the input, then the output at two times
    for row in axes:
        assert len({(a.images[0].norm.vmin, a.images[0].norm.vmax) for a in row}) == 1
    np.testing.assert_allclose(image(axes[2, 3]), few[3].outputs["pressure"][1].T)
    assert axes[0, 1].get_title() == "sample 41\nalpha = 0.1"
    assert gallery(data(schema(1), 3), schema(1)).shape == (1, 2)
    assert len(gallery(data(schema(1), 3), schema(1))[0, 0].lines) == 3
    assert gallery(data(schema(3), 2), schema(3)).shape == (2, 2)


def test_an_unknown_field_is_named():
    described = schema()
    with pytest.raises(
        SchemaError, match="no field 'heat' in darcy; it has permeability, pressure"
    ):
        panels([], described, "heat")


def test_curves_draw_the_logged_numbers():
    lines = metrics(8)
    loss = curves.loss_curve(lines)
    np.testing.assert_allclose(loss.lines[0].get_ydata(), 1.0 / np.arange(1, 9))
    assert loss.get_yscale() == "log"
    check = curves.validation_curve(lines)
    assert [line.get_label() for line in check.lines] == ["median", "p95", "max"]
    np.testing.assert_array_equal(check.lines[1].get_ydata(), [0.2, 0.2])
    rates = curves.throughput_curves(lines)
    assert {line.get_label() for line in rates.lines} == {"solvers", "trainer"}
    assert rates.get_yscale() == "log"
    done = curves.progress_curve(lines)
    np.testing.assert_array_equal(done.lines[0].get_ydata(), 3.0 * np.arange(8))
    assert done.get_xlabel() == "time since start [s]"


def test_the_running_median_ignores_spikes_and_missing_values():
    values = np.ones(21)
    values[[5, 12]] = 1e6
    values[8] = np.nan
    np.testing.assert_array_equal(curves._running_median(values, 5), np.ones(21))


def test_the_distribution_counts_infinite_errors_and_leaves_out_undefined_ones():
    errors = np.array([0.3, np.nan, 0.1, 0.2, np.inf])
    axis = curves.error_distribution({"u": errors}, {"u": np.ones(4)})
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [0.1, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0.0, 0.25, 0.5, 0.75])
    assert axis.get_legend_handles_labels()[1] == ["u", "u: mean output"]
    quantiles = [tuple(float(v[0]) for v in line.get_data()) for line in axis.lines[1:-1]]
    assert quantiles == [(0.2, 0.5)]  # p95 and p99 are infinite: no dot is drawn


def test_histograms_hold_every_value():
    iterations = np.array([1, 7, 7, 300])
    assert sum(p.get_height() for p in curves.iterations_histogram(iterations).patches) == 4
    residuals = np.array([1e-9, 2e-9, 5e-12])
    axis = curves.residual_histogram(residuals, 1e-8)
    assert sum(p.get_height() for p in axis.patches) == 3
    assert axis.lines[0].get_xdata()[0] == 1e-8
    axis = curves.error_histogram({"u": np.array([0.1, 0.1, 0.1]), "v": np.array([0.0, 0.2, 1.0])})
    assert sum(p.get_height() for p in axis.patches) == 6


def test_trust_counts_covered_and_underestimated_samples():
    estimates, errors = np.array([0.2, 0.1, np.inf]), np.array([0.1, 0.2, 0.3])
    labels = curves.calibration_plot(estimates, errors).get_legend_handles_labels()[1]
    assert labels == ["covered (1)", "underestimated (1)", "error = estimate"]


def test_error_in_time_shows_medians():
    per_time = np.array([[0.0, 0.2], [0.1, 0.4], [np.inf, np.nan]])
    item = FieldErrors(np.zeros(3), np.zeros(3), per_time)
    found = Evaluation({"u": item}, np.arange(3), np.array([0.0, 1.0]), np.full(3, np.inf))
    np.testing.assert_allclose(curves.error_in_time(found).lines[0].get_ydata(), [0.05, 0.3])


@pytest.mark.parametrize(
    "draw",
    [
        curves.loss_curve,
        curves.validation_curve,
        curves.progress_curve,
        curves.throughput_curves,
        curves.buffer_curves,
    ],
)
def test_curves_draw_on_the_axis_given_and_stand_an_empty_log(draw):
    axis = new_axes()[0, 0]
    assert draw(metrics(), axis) is axis
    assert axis.get_xlabel()
    assert axis.get_ylabel()
    empty = draw([])
    empty.figure.savefig("/dev/null", format="png")


def test_chains_are_drawn_in_the_order_of_solving():
    order, chain = np.array([3, 0, 5, 1, 2, 4]), np.array([0, 0, 7, 0, 0, 7])
    axis = curves.along_chains(order, chain, 10.0 * order, "iterations per solve")
    assert [line.get_label() for line in axis.lines] == ["chain 0", "chain 7"]
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), [0, 1, 2, 3])
    np.testing.assert_array_equal(axis.lines[1].get_ydata(), [40, 50])
    n = 1000
    values = np.full(n, 7.0)
    values[::50] = 100.0
    axis = curves.along_chains(np.arange(n)[::-1], np.zeros(n), values, "iterations per solve")
    raw, median = (set(line.get_ydata().tolist()) for line in axis.lines)
    assert (raw, median) == ({7.0, 100.0}, {7.0})
    assert axis.get_legend() is None


def test_a_torn_metrics_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert curves.read_metrics(path) == []
    path.write_text('{"kind": "train", "batch": 1}\n{"kind": "tra')
    assert curves.read_metrics(path) == [{"kind": "train", "batch": 1}]


def test_the_users_style_is_left_alone():
    before = dict(matplotlib.rcParams)
    curves.loss_curve(metrics())
    assert dict(matplotlib.rcParams) == before


def test_importing_plots_loads_no_matplotlib_and_drawing_no_pyplot():
    code = """
import sys
import simlab.pipeline.plots, simlab.pipeline.report
assert not {"matplotlib", "jinja2", "torch", "petsc4py", "mpi4py"} & set(sys.modules), sys.modules
from simlab.pipeline.curves import loss_curve
loss_curve([]).figure.savefig("/dev/null", format="png")
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
