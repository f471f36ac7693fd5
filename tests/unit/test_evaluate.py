"""Evaluation against numbers worked out by hand, and on truths and predictions gone wrong."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from simlab.core.errors import ConfigError, SchemaError, StoreError
from simlab.core.metrics import relative_l2, summary
from simlab.core.samples import Sample, Trajectory
from simlab.core.surrogate import Surrogate
from simlab.pipeline.evaluate import Evaluation, evaluate, mean_outputs

SEED = 60317
VALUES = st.floats(-1e3, 1e3).map(lambda value: value if abs(value) > 1e-100 else 0.0)


class Scaled:
    """A surrogate that knows the truth and multiplies it by one factor per sample."""

    def __init__(self, truths, factors, estimates=None):
        self.truths, self.factors, self.estimates = truths, factors, estimates
        self.batches = []

    def fit(self, samples):
        return self

    def predict(self, samples):
        self.batches.append(len(samples))
        return {
            name: np.stack(
                [self.truths[s.index][name] * self.factors[s.index] for s in samples]
            ).astype(np.float32)
            for name in self.truths[samples[0].index]
        }

    def estimate(self, samples):
        if self.estimates is None:
            return np.full(len(samples), np.inf)
        return np.array([self.estimates[s.index] for s in samples])

    def save(self, directory):
        raise NotImplementedError


def make(n=7, times=(0.0,), grid=(5, 4), names=("pressure",), seed=SEED):
    rng = np.random.default_rng(seed)
    return [
        Trajectory(
            Sample(100 + i, seed),
            np.array(times),
            {name: rng.normal(size=(len(times), *grid)).astype(np.float32) for name in names},
        )
        for i in range(n)
    ]


def scaled(trajectories, factors, estimates=None):
    truths = {t.sample.index: t.outputs for t in trajectories}
    keyed = dict(zip(truths, factors, strict=True))
    guesses = estimates and dict(zip(truths, estimates, strict=True))
    return Scaled(truths, keyed, guesses)


def test_the_error_of_a_scaled_truth_is_the_scaling_error():
    trajectories = make()
    errors = np.array([0.01, 0.5, 0.02, 0.03, 0.0, 0.04, 0.1])
    surrogate = scaled(trajectories, 1 + errors)
    assert isinstance(surrogate, Surrogate)
    found = evaluate(surrogate, trajectories, batch=3)
    assert surrogate.batches == [3, 3, 1]
    np.testing.assert_allclose(found.fields["pressure"].errors, errors, atol=2e-7)
    plain = found.as_dict()
    assert plain["n_test"] == 7
    rel = plain["fields"]["pressure"]["rel_l2"]
    assert rel == pytest.approx(
        {
            "mean": errors.mean(),
            "median": 0.03,
            "p95": np.quantile(errors, 0.95),
            "p99": np.quantile(errors, 0.99),
            "max": 0.5,
        },
        abs=1e-6,
    )
    assert plain["fields"]["pressure"]["samples"] == {"best": 104, "median": 103, "worst": 101}


def test_the_error_is_taken_over_all_times_and_grid_points_and_per_time():
    trajectory = Trajectory(
        Sample(3, SEED), np.array([0.0, 0.5]), {"u": np.array([[3.0, 0.0], [0.0, 4.0]])}
    )

    class Shifted(Scaled):
        def predict(self, samples):
            return {"u": np.array([[[3.0, 1.0], [0.0, 2.0]]])}

    found = evaluate(Shifted({}, {}), [trajectory])
    assert found.fields["u"].errors == pytest.approx([math.sqrt(5) / 5])
    np.testing.assert_allclose(found.fields["u"].per_time, [[1 / 3, 1 / 2]])
    assert found.fields["u"].rms == pytest.approx([math.sqrt(5 / 4)])
    per_time = found.as_dict()["fields"]["u"]["per_time"]
    assert [entry["time"] for entry in per_time] == [0.0, 0.5]
    assert per_time[1]["mean"] == pytest.approx(0.5)


def test_the_mean_output_baseline_is_that_of_the_training_set():
    train, test = make(40, seed=SEED + 1), make(5)
    surrogate = scaled(test, np.full(5, 1.25))
    found = evaluate(surrogate, test, baseline=iter(train))
    mean = np.mean([t.outputs["pressure"].astype(float) for t in train], axis=0)
    for trajectory, error in zip(test, found.fields["pressure"].baseline, strict=True):
        truth = trajectory.outputs["pressure"].astype(float)
        assert error == pytest.approx(np.linalg.norm(mean - truth) / np.linalg.norm(truth))
    same = evaluate(surrogate, test, baseline=mean_outputs(train))
    np.testing.assert_array_equal(
        same.fields["pressure"].baseline, found.fields["pressure"].baseline
    )
    entry = found.as_dict()["fields"]["pressure"]
    assert entry["times_better"] == pytest.approx(entry["baseline"]["mean"] / 0.25, rel=1e-5)


def test_no_baseline_is_reported_when_none_is_given():
    trajectories = make(2)
    assert (
        "baseline"
        not in evaluate(scaled(trajectories, [1, 1]), trajectories).as_dict()["fields"]["pressure"]
    )


def test_calibration_counts_errors_below_the_estimate_and_leaves_out_infinite_ones():
    trajectories = make(5)
    errors = [0.1, 0.2, 0.3, 0.4, 0.5]
    estimates = [0.2, 0.1, 0.6, 0.8, math.inf]
    found = evaluate(scaled(trajectories, 1 + np.array(errors), estimates), trajectories)
    calibration = found.calibration()
    assert calibration["n"] == 4
    assert calibration["covered"] == 0.75
    assert calibration["median_ratio"] == pytest.approx(2.0, rel=1e-5)
    assert calibration["rank_correlation"] == pytest.approx(0.8)  # ranks 2 1 3 4 against 1 2 3 4


def test_without_estimates_there_is_no_calibration():
    trajectories = make(3)
    found = evaluate(scaled(trajectories, [1.1, 1.2, 1.3]), trajectories)
    assert found.calibration()["n"] == 0
    assert found.as_dict()["calibration"]["covered"] is None
    assert "estimate" not in str(found)


def test_zero_truth_is_no_error_when_matched_and_undefined_when_missed():
    zero = np.zeros((1, 3))
    trajectories = [
        Trajectory(Sample(i, SEED), np.zeros(1), {"u": values})
        for i, values in enumerate([zero, zero, zero + 2.0])
    ]

    class Fixed(Scaled):
        def predict(self, samples):
            return {"u": np.array([[[0.0, 0.0, 0.0]], [[0.1, 0.0, 0.0]], [[2.0, 2.0, 3.0]]])}

    found = evaluate(Fixed({}, {}), trajectories)
    errors = found.fields["u"].errors
    assert errors[0] == 0
    assert math.isnan(errors[1])
    assert errors[2] == pytest.approx(1 / math.sqrt(12))
    entry = found.as_dict()["fields"]["u"]
    assert entry["n_undefined"] == 1
    assert entry["rel_l2"]["max"] == pytest.approx(errors[2])
    assert entry["rel_l2"]["mean"] == pytest.approx(errors[2] / 2)
    assert entry["samples"]["worst"] == 2
    assert "1 samples with zero truth left out" in str(found)


def test_a_prediction_that_is_not_finite_is_an_infinite_error_never_a_dropped_sample():
    trajectories = make(4)
    found = evaluate(scaled(trajectories, [1.0, np.nan, 1.1, np.inf]), trajectories)
    entry = found.as_dict()["fields"]["pressure"]
    assert entry["n_not_finite"] == 2
    assert entry["rel_l2"]["max"] is None
    assert entry["rel_l2"]["mean"] is None
    assert entry["samples"]["worst"] in (101, 103)
    assert found.fields["pressure"].errors[1] == math.inf
    assert "2 predictions with NaN or Inf" in str(found)
    assert summary(found.fields["pressure"].errors)["median"] > 1


def test_what_is_written_is_strict_json_and_reads_back(tmp_path):
    trajectories = make(4, times=(0.0, 0.1, 0.2), names=("a", "b"))
    surrogate = scaled(trajectories, [1.0, 1.5, np.nan, 1.1], [0.1, math.inf, 0.2, 0.3])
    found = evaluate(surrogate, trajectories, baseline=trajectories)
    path = found.write(tmp_path / "evaluation.json")
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))
    again = Evaluation.read(path)
    assert again.as_dict() == found.as_dict()
    assert str(again) == str(found)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    trajectories = make(2)
    found = evaluate(scaled(trajectories, [1, 1]), trajectories)
    path = found.write(tmp_path / "evaluation.json")
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        found.write(path)
    assert path.read_bytes() == before


def test_reading_something_else_is_one_clear_error(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"fields": {}}')
    with pytest.raises(StoreError, match=r"evaluation\.json: not an evaluation"):
        Evaluation.read(tmp_path / "evaluation.json")


def test_faulty_input_is_named():
    trajectories = make(2)
    surrogate = scaled(trajectories, [1, 1])
    with pytest.raises(ConfigError, match="no test trajectories"):
        evaluate(surrogate, [])
    with pytest.raises(ConfigError, match="batch = 0"):
        evaluate(surrogate, trajectories, batch=0)
    with pytest.raises(ConfigError, match="no training trajectories"):
        evaluate(surrogate, trajectories, baseline=[])
    other = [Trajectory(t.sample, t.times, {"heat": np.ones((1, 2))}) for t in trajectories]
    with pytest.raises(SchemaError, match=r"sample 100.*'pressure' is predicted but"):
        evaluate(surrogate, other)
    other = [Trajectory(t.sample, t.times, {"pressure": np.ones((1, 3, 3))}) for t in trajectories]
    with pytest.raises(SchemaError, match=r"shape \(1, 3, 3\), the prediction \(1, 5, 4\)"):
        evaluate(surrogate, other)
    with pytest.raises(SchemaError, match="baseline has shape"):
        evaluate(surrogate, trajectories, baseline={"pressure": np.zeros((1, 2))})
    broken = make(2)
    broken[1].outputs["pressure"][0, 0, 0] = np.nan
    with pytest.raises(SchemaError, match=r"sample 101.*not finite"):
        evaluate(surrogate, broken)


def test_a_surrogate_that_loses_samples_is_caught():
    trajectories = make(3)

    class Short(Scaled):
        def predict(self, samples):
            return {"pressure": super().predict(samples)["pressure"][:-1]}

    truths = {t.sample.index: t.outputs for t in trajectories}
    with pytest.raises(SchemaError, match="3 samples went in, 2 predictions"):
        evaluate(Short(truths, dict.fromkeys(truths, 1.0)), trajectories)


def test_fields_without_prediction_are_named_not_forgotten():
    trajectories = make(2, names=("a", "b"))

    class Half(Scaled):
        def predict(self, samples):
            return {"a": super().predict(samples)["a"]}

    truths = {t.sample.index: t.outputs for t in trajectories}
    found = evaluate(Half(truths, dict.fromkeys(truths, 1.0)), trajectories)
    assert found.missing == ("b",)
    assert "not predicted: b" in str(found)


def test_the_table_shows_surrogate_and_baseline():
    trajectories = make(4)
    text = str(evaluate(scaled(trajectories, [1.25] * 4), trajectories, baseline=trajectories))
    assert "25.000%" in text
    assert "mean output" in text


@given(
    arrays(np.float64, (3, 2, 4), elements=VALUES),
    arrays(np.float64, (3, 2, 4), elements=VALUES),
    st.sampled_from([2.0**k for k in range(-8, 9)]),
)
def test_relative_error_does_not_depend_on_units(prediction, truth, factor):
    plain = relative_l2(prediction, truth)
    known = ~np.isnan(plain)
    np.testing.assert_allclose(
        relative_l2(factor * prediction, factor * truth)[known], plain[known], rtol=1e-12
    )


@given(arrays(np.float64, 23, elements=st.floats(0, 10)))
def test_the_summary_is_ordered_and_inside_the_data(errors):
    found = summary(errors)
    assert errors.min() <= found["median"] <= found["p95"] <= found["p99"] <= found["max"]
    assert found["max"] == errors.max()
    assert errors.min() - 1e-12 <= found["mean"] <= errors.max() + 1e-12
