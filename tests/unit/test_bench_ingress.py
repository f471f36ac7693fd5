"""The measurement of ingress counts every sample once, on every channel and in every buffer."""

from simlab.bench.ingress import BUFFERS, CHANNELS, buffer_times, ingress_rate


def test_rates_of_all_channels():
    rows = ingress_rate(side=8, n_samples=120, at_most=40)
    assert [row["channel"] for row in rows] == list(CHANNELS)
    for row in rows:
        assert row["samples"] == 150  # whole trajectories
        assert row["samples_s"] > 100
        assert row["follower_us"] > 0
        assert abs(row["gb_s"] - 256e-9 * row["samples_s"]) < 1e-12
        slower = max(row["follower_us"], row["server_us"])
        assert abs(row["busy_samples_s"] * slower / 1e6 - 1) < 1e-9
    assert rows[0]["server_us"] == 0


def test_buffers_hand_out_as_many_as_they_took():
    rows = buffer_times(800)
    assert [row["buffer"] for row in rows] == list(BUFFERS)
    for row in rows:
        assert row["samples"] == 800
        assert row["put_get_us"] == row["us"] - row["copy_us"]
        assert row["copy_us"] > 0
