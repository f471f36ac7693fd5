"""The POD basis of a training on two processes is one basis, of what both draw."""

import subprocess
import sys

import numpy as np
import torch

from simlab.learn.podnet import PODNetwork

WORKER = """
import sys
import torch
import torch.distributed as dist
from simlab.learn.podnet import PODNetwork

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
torch.manual_seed(733)
network = PODNetwork(1, 0, 1, (20,), modes=4, hidden=(8,), pool=1, snapshots=16)
data = torch.load(f"{path}/data.pt", weights_only=True)
for step in range(4):  # the last one comes after the basis is complete
    network.observe(data[step, rank])
torch.save(network.state_dict(), f"{path}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_have_one_basis(tmp_path):
    generator = torch.Generator().manual_seed(9103)
    data = torch.randn(4, 2, 3, 1, 20, generator=generator) * torch.arange(1.0, 21.0)
    torch.save(data, tmp_path / "data.pt")
    running = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["seen"] == 18
    for name, values in first.items():
        torch.testing.assert_close(second[name], values, rtol=0, atol=0)
    torch.manual_seed(733)
    alone = PODNetwork(1, 0, 1, (20,), modes=4, hidden=(8,), pool=1, snapshots=16)
    for step in range(4):
        alone.observe(data[step].flatten(0, 1))
    np.testing.assert_allclose(alone.singular, first["singular"], rtol=1e-5)
    torch.testing.assert_close(alone.basis, first["basis"], rtol=1e-4, atol=1e-5)
