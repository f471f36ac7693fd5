"""Every registered network: shapes, gradients, overfitting, resolution, settings as tables."""

import tomllib

import numpy as np
import pytest
import tomli_w
import torch
from learn_helpers import (
    ONE_GRID,
    SMALL,
    bare_schema,
    field_schema,
    heat_schema,
    marching_schema,
    trajectories,
)

from simlab.core.config import as_table
from simlab.core.errors import ConfigError
from simlab.learn.encoding import Encoding
from simlab.learn.operators import FNO, MLP, DeepONet, Operator, operators
from simlab.learn.settings import TrainSettings
from simlab.learn.stream import MemoryStream
from simlab.learn.trainer import Trainer
from simlab.store.schema import Axis, FieldSpec, Schema

KINDS = sorted(operators.kinds())
SCHEMAS = {
    "field": field_schema,
    "heat": heat_schema,
    "line": bare_schema,
    "marching": marching_schema,
}


def small(kind):
    return operators.build({"kind": kind, **SMALL.get(kind, {})})


def learnable(kind):
    """Return the schemas this kind does not refuse."""
    found = []
    for name, make in SCHEMAS.items():
        try:
            small(kind).check(make())
        except ConfigError:
            continue
        found.append(name)
    return found


PAIRS = [(kind, name) for kind in KINDS for name in learnable(kind)]


def inputs_for(schema, batch=3, seed=811):
    encoding = Encoding(schema)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return (
        draw(batch, encoding.n_parameters),
        draw(batch, encoding.n_inputs, *schema.shape),
        draw(batch, encoding.n_time),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_answers_the_protocol(kind):
    assert isinstance(small(kind), Operator)
    assert learnable(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_toml_round_trip(kind):
    text = tomli_w.dumps(as_table(small(kind)))
    assert operators.build(tomllib.loads(text)) == small(kind)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_shape_and_gradient(kind, name):
    schema = SCHEMAS[name]()
    network = small(kind).build(schema)
    made = network(*inputs_for(schema))
    assert made.shape == (3, Encoding(schema).n_outputs, *schema.shape)
    assert made.dtype == torch.float32
    torch.square(made - 1.0).mean().backward()
    for weight_name, weight in network.named_parameters():
        assert weight.grad is not None, weight_name
        assert torch.isfinite(torch.view_as_real(weight.grad.to(torch.complex64))).all()
        assert weight.grad.abs().max() > 0, weight_name


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_items_of_a_batch_do_not_mix(kind, name):
    schema = SCHEMAS[name]()
    network = small(kind).build(schema).eval()
    inputs = inputs_for(schema, batch=4)
    with torch.no_grad():
        together = network(*inputs)
        alone = torch.cat([network(*(part[i : i + 1] for part in inputs)) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def _quick_or_slow(kind, name):
    """Two problems per kind are enough for every day."""
    is_one_more = name in ("heat", "line") and (kind, "field") in PAIRS
    return pytest.param(kind, name, marks=pytest.mark.slow if is_one_more else ())


@pytest.mark.parametrize(("kind", "name"), [_quick_or_slow(*pair) for pair in PAIRS])
def test_overfits_four_samples(kind, name):
    schema = SCHEMAS[name]()
    data = trajectories(schema, 4)
    losses = []
    settings = TrainSettings(
        operator=small(kind), batch=4, n_batches=200, learning_rate=5e-3, log_every=1, threads=1
    )
    trainer = Trainer(settings, schema, observers=[lambda _, **v: losses.append(v["loss"])])
    trainer.run(MemoryStream(data, schema, 7))
    assert np.mean(losses[-10:]) < 0.1 * losses[0]
    assert trainer.model.errors(data).max() < 0.1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ONE_GRID])
def test_resolution_can_change(kind):
    """Cell averages of the answer on a grid twice as fine agree with the coarse answer."""

    def fields_on(n):
        x = (torch.arange(n) + 0.5) / n
        waves = [torch.sin(2 * torch.pi * (x[:, None] * (i + 1) + x[None] * i)) for i in range(3)]
        return torch.stack(waves)[:, None]

    torch.manual_seed(5521)
    coarse = field_schema(32)
    network = small(kind).build(coarse).eval()
    parameters, _, time = inputs_for(coarse)
    with torch.no_grad():
        low = network(parameters, fields_on(32), time)
        high = network(parameters, fields_on(64), time)
    assert high.shape[2:] == (64, 64)
    averaged = torch.nn.functional.avg_pool2d(high, 2)
    assert (averaged - low).norm() < 0.05 * (low - low.mean()).norm()


def test_mlp_is_tied_to_scalars():
    with pytest.raises(
        ConfigError, match=r"'mlp' learns from scalar parameters only.* a; use 'fno'"
    ):
        MLP().build(field_schema())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_learn_from_is_refused(kind):
    schema = Schema("empty", (Axis("x", (0.0, 0.5, 1.0)),), (FieldSpec("u"),))
    with pytest.raises(ConfigError, match="no parameter"):
        small(kind).check(schema)


def test_fno_modes_fit_the_grid():
    assert FNO(modes=12).modes_along(field_schema(8)) == (8, 8)
    assert FNO(modes=(4, 6)).modes_along(field_schema(8)) == (4, 6)
    with pytest.raises(ConfigError, match="modes: 3 numbers for a grid of 2 dimensions"):
        FNO(modes=(4, 4, 4)).check(field_schema(8))


def test_fno_in_three_dimensions():
    schema = field_schema(6, dims=3)
    made = FNO(modes=4, width=6, layers=2).build(schema)(*inputs_for(schema))
    assert made.shape == (3, 1, 6, 6, 6)


def test_deeponet_sees_its_input_fields():
    schema = field_schema(16)
    network = DeepONet().build(schema)
    parameters, fields, time = inputs_for(schema)
    with torch.no_grad():
        assert not torch.allclose(
            network(parameters, fields, time), network(parameters, -fields, time)
        )


def test_podnet_learns_the_pod_basis():
    """Batch by batch, the basis becomes the singular vectors of all outputs; then it stays."""
    schema, rng = field_schema(8), np.random.default_rng(4409)
    left, right = np.linalg.qr(rng.standard_normal((60, 5)))[0], rng.standard_normal((5, 64))
    snapshots = torch.from_numpy((left * [9.0, 7.0, 4.0, 2.0, 1.0]) @ right).float()
    network = operators.build({"kind": "podnet", "modes": 5, "snapshots": 60}).build(schema)
    inputs = inputs_for(schema)
    network.observe(snapshots[:30].reshape(-1, 1, 8, 8))
    with torch.no_grad():
        before = network(*inputs)
        network.observe(snapshots[:30].reshape(-1, 1, 8, 8)[:0])
        torch.testing.assert_close(network(*inputs), before, rtol=1e-4, atol=1e-4)
    network.observe(snapshots[30:].reshape(-1, 1, 8, 8))
    expected = np.linalg.svd(snapshots.numpy(), full_matrices=False)
    np.testing.assert_allclose(network.singular.numpy(), expected[1][:5], rtol=1e-4)
    overlap = np.abs(network.basis.numpy() @ expected[2][:5].T)
    np.testing.assert_allclose(overlap, np.eye(5), atol=1e-3)
    with torch.no_grad():
        shown = network(*inputs).flatten(1)
    torch.testing.assert_close(shown @ network.basis.T @ network.basis, shown, rtol=1e-3, atol=1e-4)
    basis = network.basis.clone()
    network.observe(torch.randn(9, 1, 8, 8))
    torch.testing.assert_close(network.basis, basis, rtol=0, atol=0)
    assert "basis" in network.state_dict()


def test_mppde_wants_a_line_in_time():
    mppde = operators.build("mppde")
    with pytest.raises(ConfigError, match="'mppde' marches in time, but 'line' has one time"):
        mppde.check(bare_schema())
    with pytest.raises(ConfigError, match="'mppde': 2 dimensions, expected 1"):
        mppde.check(heat_schema())
    mppde.check(bare_schema(3))


def test_mppde_hears_only_its_neighbours_and_wraps_around():
    schema = marching_schema(40, 5)  # two bundles before the last time
    kinds = {"kind": "mppde", "bundle": 3, "width": 8, "layers": 2, "reach": 3}
    torch.manual_seed(5519)
    network = operators.build(kinds).build(schema).double()
    parameters, fields, _ = (part.double() for part in inputs_for(schema, batch=1))
    changed = fields.clone()
    changed[..., 1] += 1.0
    for time, reach in ((-1.4, 6), (1.4, 12)):
        when = torch.full((1, 1), time, dtype=torch.float64)
        with torch.no_grad():
            moved = network(parameters, fields, when) != network(parameters, changed, when)
        heard = torch.nonzero(moved[0, 0])[:, 0]
        distance = torch.minimum((heard - 1) % 40, (1 - heard) % 40)
        assert distance.max() == reach
        assert 39 in heard


def test_mppde_is_linear_between_stored_times():
    schema = marching_schema(10, 7)
    network = operators.build({"kind": "mppde", "bundle": 3, "width": 8, "layers": 1}).build(schema)
    parameters, fields, _ = inputs_for(schema, batch=1)
    times = np.asarray(schema.times)
    scaled = torch.from_numpy((times - times.mean()) / times.std()).float()
    with torch.no_grad():
        stored = [network(parameters, fields, t.reshape(1, 1)) for t in scaled]
        for k in range(6):
            between = network(parameters, fields, scaled[k : k + 2].mean().reshape(1, 1))
            torch.testing.assert_close(between, (stored[k] + stored[k + 1]) / 2)
            assert not torch.allclose(stored[k], stored[k + 1])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_points_fill_the_box(dims):
    from simlab.learn.points import spread_points

    points = spread_points(64, dims)
    assert points.shape == (64, dims)
    assert np.abs(points).max() < 1.0
    for axis in range(dims):
        counts = np.histogram(points[:, axis], bins=8, range=(-1.0, 1.0))[0]
        assert counts.min() >= 4
        assert counts.max() <= 12


def test_points_reads_only_its_points():
    from simlab.learn.points import spread_points

    schema = field_schema(32)
    network = operators.build({"kind": "points", "points": 20, "width": 8}).build(schema)
    parameters, fields, time = inputs_for(schema)
    cells = (spread_points(20, 2) + 1.0) * 16.0 - 0.5  # a value is read from the cells around
    read = np.zeros((32, 32), dtype=bool)
    for corner in np.ndindex(2, 2):
        read[tuple(np.clip(np.floor(cells) + corner, 0, 31).astype(int).T)] = True
    outside = torch.where(torch.from_numpy(read), fields, 7.0)
    inside = torch.where(torch.from_numpy(read), 7.0, fields)
    with torch.no_grad():
        made = network(parameters, fields, time)
        torch.testing.assert_close(network(parameters, outside, time), made)
        assert not torch.allclose(network(parameters, inside, time), made, atol=1e-3)


def test_points_decodes_without_jumps():
    """Between neighbouring cells of a fine line the answer changes little: weights end at 0."""
    schema = bare_schema(n=64)
    network = operators.build({"kind": "points", "points": 12, "width": 16}).build(schema)
    largest = []
    for n in (500, 4000):
        with torch.no_grad():
            made = network(torch.ones(1, 1), torch.zeros(1, 0, n), torch.zeros(1, 0))
        largest.append(float(made.diff().abs().max() / (made.max() - made.min())))
    assert largest[1] < 0.2 * largest[0]


def test_gino_sums_as_neuraloperator_does():
    """The same kernel integrals, with the weights at hand, as its loop over points."""
    from neuralop.layers.integral_transform import IntegralTransform
    from neuralop.layers.neighbor_search import NeighborSearch

    torch.manual_seed(5527)
    kinds = {"kind": "gino", "latent": 5, "modes": 3, "width": 6, "layers": 1}
    network = operators.build(kinds).build(field_schema(9))
    network(*inputs_for(field_schema(9)))  # says which grids the pairs are of
    centres = [
        torch.stack(torch.meshgrid(*2 * [(torch.arange(n) + 0.5) / n], indexing="ij"), -1)
        for n in (9, 5)
    ]
    fine, latent = (points.reshape(-1, 2) for points in centres)
    for block, y, x, reduction in (
        (network.operator.gno_in, fine, latent, "mean"),
        (network.operator.gno_out, latent, fine, "sum"),
    ):
        ours = block.integral_transform
        theirs = IntegralTransform(
            channel_mlp=ours.channel_mlp,
            transform_type="linear",
            use_torch_scatter=False,
            weighting_fn=ours._weigh,
            reduction=reduction,
        )
        f = torch.randn(2, len(y), 6)
        search = NeighborSearch(use_open3d=False, return_norm=ours._weigh is not None)
        with torch.no_grad():
            at_y, at_x = block.pos_embedding(y), block.pos_embedding(x)
            expected = theirs(at_y, search(y, x, block.radius), at_x, f)
            made = ours(at_y, block.neighbor_search.pairs, at_x, f)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def low_pass(layer, x):
    """What a spectral layer is: full transform, a channel matrix for each kept mode, and back."""
    grid, d = x.shape[2:], x.ndim - 2
    weight = next(p for p in layer.parameters() if p.is_complex()).detach().numpy()
    transformed = np.fft.fftn(x.detach().numpy(), axes=range(2, 2 + d))
    made = np.zeros((len(x), weight.shape[1], *grid), dtype=complex)
    for index in np.ndindex(*weight.shape[2:]):
        k = [i - m // 2 for i, m in zip(index[:-1], weight.shape[2:-1], strict=True)] + [index[-1]]
        leading = zip(k[:-1], grid[:-1], strict=True)
        if all(-(n // 2) <= j < n - n // 2 for j, n in leading) and 2 * k[-1] <= grid[-1]:
            twice = 1 if k[-1] == 0 or 2 * k[-1] == grid[-1] else 2
            at = (slice(None), slice(None), *k)
            made[at] = twice * transformed[at] @ weight[(slice(None), slice(None), *index)]
    return np.fft.ifftn(made, axes=range(2, 2 + d)).real + layer.bias.detach().numpy()


GRIDS = [
    ((24,), (9,)),
    ((16, 16), (8, 8)),
    ((15, 12), (7, 12)),
    ((13, 9), (13, 9)),
    ((8, 6, 10), (8, 6, 10)),
    ((8, 8), (12, 12)),
    ((9, 7), (12, 12)),
]


@pytest.mark.parametrize(("grid", "modes"), GRIDS)
def test_spectral_layer_by_definition(grid, modes):
    from simlab.learn.spectral import MatrixSpectralConv

    torch.manual_seed(5501)
    layer, x = MatrixSpectralConv(3, 4, modes), torch.randn(2, 3, *grid)
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), low_pass(layer, x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("grid", "modes"), [pair for pair in GRIDS if pair[0][0] % 2 == 0])
def test_spectral_layer_is_neuraloperators(grid, modes):
    """The same map and the same gradients, to rounding, where theirs is right."""
    from neuralop.layers.spectral_convolution import SpectralConv

    from simlab.learn.spectral import MatrixSpectralConv

    torch.manual_seed(5501)
    theirs = SpectralConv(3, 4, modes)
    ours = MatrixSpectralConv(3, 4, modes)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(17)
        x = torch.randn(2, 3, *grid, requires_grad=True)
        y = layer(x)
        (y * torch.randn(y.shape)).sum().backward()
        weight = next(p for p in layer.parameters() if p.is_complex())
        results.append((y.detach(), x.grad, torch.view_as_real(weight.grad), layer.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("grid", "to"), [((9, 12), (5, 6)), ((5, 7), (9, 14)), ((11,), (6,))])
def test_spectral_layer_to_another_grid(grid, to):
    """What both grids hold is the same function there, on an odd number of points too."""
    from simlab.learn.spectral import MatrixSpectralConv

    torch.manual_seed(5503)
    layer = MatrixSpectralConv(2, 3, (4,) * len(grid), bias=False)

    def wave(shape):
        axes = [2 * torch.pi * torch.arange(n) / n for n in shape]
        x = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        return torch.stack([torch.cos(x.sum(0)), 1.0 + torch.sin(x[-1])])[None]

    with torch.no_grad():
        here = layer(wave(grid), output_shape=to)
        there = layer(wave(to))
        assert layer.transform(wave(grid), output_shape=to).shape[2:] == here.shape[2:]
    assert there.abs().max() > 0.01
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_tfno_has_a_fraction_of_the_weights():
    def n_weights(**settings):
        network = operators.build({"modes": 12, "width": 24} | settings).build(field_schema(32))
        return sum(weight.numel() for weight in network.parameters())

    dense = n_weights(kind="fno")
    assert n_weights(kind="tfno", rank=0.05) < n_weights(kind="tfno", rank=0.2) < 0.4 * dense


def test_uno_halves_modes_with_the_grid():
    uno = operators.build({"kind": "uno", "modes": 12, "levels": 2})
    assert uno.modes_along(field_schema(64)) == [[12, 12], [6, 6], [4, 4]]
    assert uno.modes_along(field_schema(8)) == [[8, 8], [4, 4], [2, 2]]


def test_uno_on_an_odd_grid(capsys):
    schema = field_schema(15)
    network = operators.build({"kind": "uno", "modes": 6, "width": 6}).build(schema)
    made = network(*inputs_for(schema))
    assert made.shape == (3, 1, 15, 15)
    assert capsys.readouterr().out == ""


def test_pointwise_products_are_convolutions():
    from simlab.learn.spectral import with_matrix_products

    torch.manual_seed(5507)
    for bias in (True, False):
        network = torch.nn.Sequential(torch.nn.Conv1d(3, 5, 1, bias=bias), torch.nn.GELU())
        x = torch.randn(4, 3, 11)
        before, names = network(x), list(network.state_dict())
        changed = with_matrix_products(network)
        assert type(changed[0]) is not torch.nn.Conv1d
        assert list(changed.state_dict()) == names
        torch.testing.assert_close(changed(x), before)


def test_encoding_round_trip():
    schema = heat_schema()
    encoding, trajectory = Encoding(schema), trajectories(heat_schema(), 1)[0]
    rows = encoding.rows(trajectory)
    parts = encoding.split(rows)
    assert rows.shape == (4, encoding.row_size)
    np.testing.assert_array_equal(parts.time[:, 0], np.float32(trajectory.times))
    names = list(schema.parameters)
    np.testing.assert_array_equal(
        parts.parameters[2], np.float32([trajectory.sample.parameters[n] for n in names])
    )
    fields = encoding.decode(parts.outputs)
    for name, values in trajectory.outputs.items():
        np.testing.assert_array_equal(fields[name], values)
