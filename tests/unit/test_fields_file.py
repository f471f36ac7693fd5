"""The user's own fields: formats, checks, resampling."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import io

from simlab.core.errors import ConfigError
from simlab.problems.darcy import Darcy
from simlab.problems.family import families
from simlab.problems.fields_file import FileFields, resample

RNG = np.random.default_rng(20617)
VALUES = np.exp(RNG.standard_normal((6, 5, 4)))  # no two axes of one length
FLAGS = RNG.random((6, 5, 4)) < 0.4


def write(path, values, name="coeff"):
    """Write one array under ``name`` in the format that the suffix says; 7.3 by ``v73.mat``."""
    if path.name.endswith("v73.mat"):
        with h5py.File(path, "w", userblock_size=512) as file:
            item = file.create_dataset(
                name, data=values.T.astype("u1" if values.dtype == bool else values.dtype)
            )
            item.attrs["MATLAB_class"] = np.bytes_("logical" if values.dtype == bool else "double")
            file.create_dataset("#refs#/a", data=np.zeros(3))
    elif path.suffix == ".mat":
        io.savemat(path, {name: values})
    elif path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, **{name: values})
    elif path.suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(values)}, path)
    else:
        with h5py.File(path, "w") as file:
            file[name] = values
    return path


FORMATS = ["a.npy", "a.npz", "a.h5", "a.hdf5", "v5.mat", "v73.mat", "a.pt"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_fields(tmp_path, name):
    source = FileFields(file=write(tmp_path / name, VALUES))
    source.validate((5, 4))
    draws = source.draw((5, 4), 6, seed=77)
    np.testing.assert_array_equal([draw.values for draw in draws], VALUES)
    (third,) = source.draw((5, 4), 1, seed=1, start=3)
    np.testing.assert_array_equal(third.values, VALUES[3])
    assert third.values.dtype == np.float64
    assert source.contains(third.values, {})


@pytest.mark.parametrize("name", FORMATS)
def test_flags_need_phase_values_in_every_format(tmp_path, name):
    path = write(tmp_path / name, FLAGS)
    with pytest.raises(ConfigError, match="phase_values"):
        FileFields(file=path).validate((5, 4))
    source = FileFields(file=path, phase_values=(3.0, 12.0))
    source.validate((5, 4))
    (draw,) = source.draw((5, 4), 1, seed=0, start=2)
    np.testing.assert_array_equal(draw.values, np.where(FLAGS[2], 12.0, 3.0))


def test_bare_tensor_and_half_precision(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.from_numpy(VALUES).to(torch.bfloat16), tmp_path / "bare.pt")
    (draw,) = FileFields(file=tmp_path / "bare.pt").draw((5, 4), 1, seed=3)
    np.testing.assert_allclose(draw.values, VALUES[0], rtol=2e-2)
    with pytest.raises(ConfigError, match="leave dataset out"):
        FileFields(file=tmp_path / "bare.pt", dataset="x").validate((5, 4))


def test_code_in_a_pt_file_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"coeff": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ConfigError, match="cannot be read"):
        FileFields(file=tmp_path / "trap.pt").validate((5, 4))
    assert not (tmp_path / "sprung").exists()


def test_a_rewritten_file_is_read_again(tmp_path):
    source = FileFields(file=write(tmp_path / "a.npz", VALUES))
    source.draw((5, 4), 1, seed=0)
    write(tmp_path / "a.npz", 2 * VALUES)
    os.utime(tmp_path / "a.npz", ns=(1, 1))
    np.testing.assert_array_equal(source.draw((5, 4), 1, seed=0)[0].values, 2 * VALUES[0])


def test_start_skips_rows_and_running_out_is_an_error(tmp_path):
    source = FileFields(file=write(tmp_path / "a.npy", VALUES), start=4)
    np.testing.assert_array_equal(source.draw((5, 4), 2, seed=9)[1].values, VALUES[5])
    with pytest.raises(
        ConfigError, match="holds 6 fields, but 7 are asked for; there are enough for n = 2"
    ):
        source.draw((5, 4), 3, seed=9)
    with pytest.raises(ConfigError, match="start = 6 skips all 6"):
        FileFields(file=tmp_path / "a.npy", start=6).validate((5, 4))


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".mat", ".pt"])
def test_dataset_names_are_listed_on_a_miss(tmp_path, suffix):
    path = tmp_path / f"two{suffix}"
    both = {"coeff": VALUES, "sol": VALUES}
    if suffix == ".npz":
        np.savez(path, **both)
    elif suffix == ".mat":
        io.savemat(path, both)
    elif suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(values) for name, values in both.items()}, path)
    else:
        with h5py.File(path, "w") as file:
            file.update(both)
    with pytest.raises(ConfigError, match=r"no dataset 'coef'; did you mean 'coeff'.*coeff, sol"):
        FileFields(file=path, dataset="coef").validate((5, 4))
    with pytest.raises(ConfigError, match="choose one with dataset: coeff, sol"):
        FileFields(file=path).validate((5, 4))
    FileFields(file=path, dataset="sol").validate((5, 4))


def test_nested_hdf5_names(tmp_path):
    write(tmp_path / "a.h5", VALUES, "deep/er/nu")
    FileFields(file=tmp_path / "a.h5", dataset="deep/er/nu").validate((5, 4))
    with pytest.raises(ConfigError, match="deep/er/nu"):
        FileFields(file=tmp_path / "a.h5", dataset="deep").validate((5, 4))


def spoiled(value):
    values = VALUES.copy()
    values[4, 2, 1] = value
    return values


@pytest.mark.parametrize("name", ["a.npy", "a.h5", "v73.mat"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (spoiled(np.nan), r"sample 4 holds nan at cell \(2, 1\).*finite"),
        (spoiled(-2.5), r"sample 4 holds -2.5 at cell \(2, 1\).*positive"),
        (spoiled(np.inf), "sample 4 holds inf"),
        (FLAGS.astype("i4"), "phase_values"),
        (VALUES.astype("c16"), "expected real numbers"),
        (VALUES[0], "expected.*samples, 5, 4"),
        (VALUES[:, :3], "on a grid of"),
        (VALUES[:0], "is empty"),
    ],
)
def test_bad_values_and_shapes_are_named(tmp_path, name, values, message):
    source = FileFields(file=write(tmp_path / name, values))
    with pytest.raises(ConfigError, match=message) as caught:
        source.validate((5, 4))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_values_are_caught_when_drawing_too(tmp_path):
    source = FileFields(file=write(tmp_path / "a.npy", spoiled(-1.0)))
    source.draw((5, 4), 4, seed=0)
    with pytest.raises(ConfigError, match=r"sample 4 holds -1\.0"):
        source.draw((5, 4), 1, seed=0, start=4)


def test_phase_values_refuse_what_is_no_flag(tmp_path):
    path = write(tmp_path / "a.npy", spoiled(-1.0))
    with pytest.raises(ConfigError, match="must be 0 or 1"):
        FileFields(file=path, phase_values=(1.0, 2.0)).validate((5, 4))


@pytest.mark.parametrize("name", FORMATS)
def test_broken_files_give_one_clear_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"this is not what the suffix says")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        FileFields(file=path).validate((5, 4))
    assert "\n" not in str(caught.value)


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        FileFields(file=tmp_path / "nothing.npy").validate((5, 4))
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ConfigError, match=r"known: .npy"):
        FileFields(file=tmp_path / "a.csv").validate((5, 4))
    with pytest.raises(ConfigError, match="not a file"):
        FileFields(file=tmp_path).validate((5, 4))
    np.save(tmp_path / "a.npy", VALUES)
    with pytest.raises(ConfigError, match="leave dataset out"):
        FileFields(file=tmp_path / "a.npy", dataset="x").validate((5, 4))


def test_pickled_objects_are_refused(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        FileFields(file=tmp_path / "o.npy").validate((5, 4))


def test_resampling_only_on_request(tmp_path):
    path = write(tmp_path / "a.npy", VALUES)
    with pytest.raises(ConfigError, match='resample = "nearest"'):
        FileFields(file=path).draw((10, 8), 1, seed=0)
    source = FileFields(file=path, resample="nearest")
    source.validate((10, 8))
    (draw,) = source.draw((10, 8), 1, seed=0)
    np.testing.assert_array_equal(draw.values, VALUES[0].repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("method", ["nearest", "linear", "area"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_resampling_averages(method, data):
    size = st.integers(1, 9)
    old = data.draw(st.tuples(size, size))
    new = data.draw(st.tuples(size, size))
    values = np.random.default_rng(data.draw(st.integers(0, 999))).random((2, *old))
    out = resample(values, new, method)
    assert out.shape == (2, *new)
    assert out.min() >= values.min() - 1e-14
    assert out.max() <= values.max() + 1e-14
    np.testing.assert_allclose(resample(np.full((1, *old), 3.5), new, method), 3.5, rtol=1e-14)
    np.testing.assert_array_equal(resample(values, old, method), values)
    if method == "area":
        np.testing.assert_allclose(out.mean((1, 2)), values.mean((1, 2)), rtol=1e-12)


def test_resampling_knows_where_centres_are():
    x = (np.arange(40) + 0.5) / 40
    fine = (np.arange(75) + 0.5) / 75
    line = resample((1 + 2 * x)[None], (75,), "linear")[0]
    inside = (fine > x[0]) & (fine < x[-1])
    np.testing.assert_allclose(line[inside], 1 + 2 * fine[inside], rtol=1e-13)
    assert line[0] == 1 + 2 * x[0]
    assert np.array_equal(resample(x[None], (8,), "nearest")[0], x[2::5])
    np.testing.assert_allclose(resample(x[None], (8,), "area")[0], x.reshape(8, 5).mean(1))


def test_darcy_reads_the_users_file_without_a_kind(tmp_path):
    path = write(tmp_path / "a.h5", VALUES[:, :4], "nu")
    family = Darcy(cells=4, fields={"file": str(path), "dataset": "nu"})
    family.validate()
    assert isinstance(family.fields, FileFields)
    np.testing.assert_array_equal(family.space.sample(1, 5, start=2)[0].fields["a"], VALUES[2, :4])
    with pytest.raises(ConfigError, match="asked for"):
        family.space.sample(7, seed=5)
    with pytest.raises(ConfigError, match="did you mean 'dataset'"):
        families.build({"kind": "darcy", "fields": {"file": str(path), "datset": "nu"}})


def test_torch_is_loaded_only_for_pt_files(tmp_path):
    write(tmp_path / "a.npz", VALUES)
    code = (
        "import sys; from simlab.problems.fields_file import FileFields;"
        f"FileFields(file={str(tmp_path / 'a.npz')!r}).validate((5, 4));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
