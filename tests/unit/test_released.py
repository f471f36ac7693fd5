"""The released matrices, entry for entry, and that nobody makes data of them."""

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spla

from simlab.core.comm import self_comm
from simlab.core.errors import ConfigError
from simlab.linalg.system import Traits
from simlab.pipeline.campaign import check_case, generate
from simlab.pipeline.case import Case
from simlab.problems.released import ReleasedDarcy

SEED = 2711


def matrix(family, mu):
    workspace = family.setup(self_comm())
    system = family.assemble(mu, workspace)
    n = family.side**2
    rows, columns, values = system.A.getValuesCSR()
    A = sp.csr_matrix((values.copy(), columns, rows), shape=(n, n))
    b = system.b.getArray().copy()
    workspace.destroy()
    return A, b


def laplacian(side):
    one = sp.diags([-np.ones(side - 1), 2 * np.ones(side), -np.ones(side - 1)], [-1, 0, 1])
    return sp.csr_matrix(sp.kronsum(one, one))


@pytest.mark.parametrize("side", [3, 6, 20])
def test_without_the_slip_it_is_a_laplacian_times_a_diagonal_to_the_last_bit(side):
    family = ReleasedDarcy(side=side, slip=False)
    (mu,) = family.space.sample(1, SEED)
    A, b = matrix(family, mu)
    a = mu.fields["w"][1:-1, 1:-1].ravel()
    assert abs(A - laplacian(side) @ sp.diags(a)).max() == 0
    assert A.nnz == side**2 + 4 * side * (side - 1)
    np.testing.assert_array_equal(b, np.full(side**2, (1 / (side - 1)) ** 2))


@pytest.mark.parametrize("side", [3, 6, 20])
def test_the_slip_changes_the_coupling_to_the_row_above_and_nothing_else(side):
    (mu,) = ReleasedDarcy(side=side).space.sample(1, SEED)
    slipped, straight = (matrix(ReleasedDarcy(side=side, slip=slip), mu)[0] for slip in (1, 0))
    w = mu.fields["w"]
    a = w[1:-1, 1:-1].ravel()
    expected = straight.toarray()
    for j in range(side**2 - side):
        expected[j + side, j] = -(a[j - 2] if j >= 2 else w[0, side - 1 + j])
    np.testing.assert_array_equal(slipped.toarray(), expected)
    changed = (slipped != straight).tocoo()
    assert np.all(changed.row - changed.col == side)
    assert len(changed.row) == side**2 - side


def test_the_matrix_is_not_symmetric_and_claims_nothing():
    family = ReleasedDarcy(side=12)
    (mu,) = family.space.sample(1, SEED)
    A, _ = matrix(family, mu)
    assert abs(A - A.T).max() > 0.05
    workspace = family.setup(self_comm())
    assert family.assemble(mu, workspace).traits == Traits()
    workspace.destroy()


def test_the_slip_moves_eigenvalues_across_zero_at_the_smallest_published_size():
    family, straight = ReleasedDarcy(side=50), ReleasedDarcy(side=50, slip=False)
    lowest = []
    for mu in family.space.sample(4, SEED):
        A, _ = matrix(family, mu)
        lowest.append(spla.eigs(A.tocsc(), k=6, sigma=-0.02, return_eigenvectors=False).real.min())
        B, _ = matrix(straight, mu)
        near_zero = spla.eigs(B.tocsc(), k=3, sigma=0.0, return_eigenvectors=False)
        assert near_zero.real.min() > 0
    assert np.count_nonzero(np.array(lowest) < 0) >= 2
    assert -0.1 < min(lowest) < -0.001


def test_helmholtz_is_a_small_shift_of_the_diagonal():
    family = ReleasedDarcy(side=50, helmholtz=True)
    samples = family.space.sample(30, SEED)
    k = np.array([mu.parameters["k"] for mu in samples])
    assert 0 <= k.min() < 0.2 < 0.8 < k.max() <= 1
    shifted, _ = matrix(family, samples[0])
    plain, _ = matrix(ReleasedDarcy(side=50), samples[0])
    difference = (plain - shifted).toarray()
    np.testing.assert_allclose(np.diag(difference), (k[0] / 49) ** 2, rtol=1e-9)
    np.testing.assert_array_equal(difference - np.diag(np.diag(difference)), 0)
    assert np.diag(difference).max() < 4.2e-4


def test_fields_have_the_released_range():
    w = np.array([mu.fields["w"] for mu in ReleasedDarcy().space.sample(20, SEED)])
    assert w.shape == (20, 52, 52)
    assert 0.15 < np.log(w).std() < 0.21
    assert 0.4 < w.min() < w.max() < 2.4


def test_campaigns_refuse_it_in_one_line(tmp_path):
    case = Case(family={"kind": "released_darcy"})
    with pytest.raises(ConfigError, match=r"released_darcy.*refused as data") as caught:
        check_case(case)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="refused as data"):
        generate(ReleasedDarcy(), out=tmp_path / "run", n=4)
