"""The measurement of ingress counts every sample once, on every channel."""

from simlab.bench.ingress import CHANNELS, ingress_rate


def test_rates_of_all_channels():
    rows = ingress_rate(side=8, n_samples=120, at_most=40)
    assert [row["channel"] for row in rows] == list(CHANNELS)
    for row in rows:
        assert row["samples"] == 150  # whole trajectories
        assert row["samples_s"] > 100
        assert row["follower_us"] > 0
        assert abs(row["gb_s"] - 256e-9 * row["samples_s"]) < 1e-12
    assert rows[0]["server_us"] == 0
