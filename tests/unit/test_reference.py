"""The reference sample: means as the module says, and a system that can be made of it."""

from __future__ import annotations

import numpy as np
import pytest

from simlab.core.comm import self_comm
from simlab.core.errors import ConfigError
from simlab.core.samples import Sample
from simlab.problems.darcy import Darcy
from simlab.problems.heat import Heat
from simlab.problems.reference import reference


def test_positive_fields_take_the_mean_of_the_logarithm_others_the_mean() -> None:
    values = [np.array([1.0, 2.0, -4.0]), np.array([4.0, 8.0, 2.0])]
    samples = [
        Sample(i, 17, {"k": 10.0 * i - 3.0}, {"a": np.abs(v), "f": v}) for i, v in enumerate(values)
    ]
    mean = reference(iter(samples))
    assert mean.parameters == {"k": 2.0}
    np.testing.assert_allclose(mean.fields["a"], [2.0, 4.0, np.sqrt(8.0)])
    np.testing.assert_allclose(mean.fields["f"], [2.5, 5.0, -1.0])
    assert mean.index < 0


def test_a_zero_late_in_the_study_makes_a_field_one_without_a_logarithm() -> None:
    fields = ([1.0], [4.0], [0.0], [3.0])
    mean = reference(Sample(i, 5, {}, {"a": np.array(v)}) for i, v in enumerate(fields))
    np.testing.assert_allclose(mean.fields["a"], [2.0])


def test_the_mean_of_an_exponential_family_is_the_field_of_the_mean_parameters() -> None:
    family = Darcy(cells=9, fields={"kind": "four_parameter"})
    samples = family.space.sample(12, 733)
    mean = reference(samples)
    assert set(mean.parameters) == set(samples[0].parameters)
    assert family.space.contains(mean)


@pytest.mark.parametrize(
    "family", [Darcy(cells=8), Heat(cells=6, n_steps=3)], ids=["darcy", "heat"]
)
def test_families_assemble_the_reference(family) -> None:
    workspace = family.setup(self_comm())
    system = family.assemble(reference(family.space.sample(5, 733)), workspace)
    x = system.b.duplicate()
    assert 0 < system.residual(x) < np.inf
    assert system.A.norm() > 0
    x.destroy()
    workspace.destroy()


def test_samples_of_different_studies_are_refused() -> None:
    one = Sample(0, 5, {"k": 1.0}, {"a": np.ones(3)})
    with pytest.raises(ConfigError, match="sample 1"):
        reference([one, Sample(1, 5, {"k": 1.0}, {"a": np.ones(4)})])
    with pytest.raises(ConfigError, match="sample 1"):
        reference([one, Sample(1, 5, {}, {"a": np.ones(3)})])
    with pytest.raises(ConfigError, match="at least one"):
        reference([])
