"""The doctor finds the faults it is for; each one is planted, then looked for."""

import json
import os
import stat
import subprocess
import sys
from importlib import metadata

import pytest

from simlab.cli import doctor


@pytest.fixture(autouse=True)
def launcher_settings(monkeypatch):
    """What `make` sets, so that the healthy checks are healthy as root and on one core."""
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    monkeypatch.setenv("OMPI_MCA_rmaps_base_oversubscribe", "1")
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    monkeypatch.delenv("SIMLAB_MPIRUN", raising=False)


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Return a function that puts a launcher of our making first on the path."""

    def plant(script: str) -> None:
        path = tmp_path / "mpirun"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return plant


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that puts a package of our making before the installed one."""

    def plant(name: str, code: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return plant


def only(findings, name):
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_healthy_library_and_launcher_match():
    findings = doctor.check_mpi()
    assert [finding.state for finding in findings] == ["ok", "ok"]
    assert only(findings, "MPI launcher").value.endswith("mpirun")


def test_healthy_handshake_counts_two_ranks():
    (found,) = doctor.check_handshake()
    assert found.state == "ok", found
    assert found.value.startswith("2 ranks")


def test_healthy_petsc_names_its_packages_and_has_one_mpi():
    findings = doctor.check_petsc()
    assert all(finding.state != "fault" for finding in findings), findings
    binding = metadata.version("petsc4py")
    assert only(findings, "PETSc").value.split(".")[:2] == binding.split(".")[:2]


def test_no_launcher_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = only(doctor.check_mpi(), "MPI launcher")
    assert found.state == "fault"
    assert found.value == "no mpirun on the path"
    assert "openmpi-bin" in found.remedy
    assert only(doctor.check_handshake(), "handshake").state == "fault"


@pytest.mark.parametrize(
    "banner",
    [
        "echo HYDRA build details:; echo '    Version:                                 4.0.2'",
        "echo 'mpirun (Open MPI) 1.2.3'",
        "echo 'Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307'",
    ],
)
def test_launcher_of_another_mpi(launcher, banner):
    launcher(banner)
    found = only(doctor.check_mpi(), "MPI launcher")
    assert found.state == "fault"
    assert "differ" in found.remedy


def test_launcher_whose_ranks_do_not_meet(launcher):
    launcher('shift 2\n"$@"\n"$@"')
    found = only(doctor.check_handshake(), "handshake")
    assert found.state == "fault"
    assert found.value == "2 ranks started, each sees a world of 1"


@pytest.mark.parametrize(
    ("words", "variable"),
    [
        ("mpirun has detected an attempt to run as root.", "OMPI_ALLOW_RUN_AS_ROOT"),
        ("There are not enough slots available", "rmaps_base_oversubscribe"),
    ],
)
def test_launcher_that_refuses(launcher, words, variable):
    launcher(f"echo '{words}'; exit 1")
    found = only(doctor.check_handshake(), "handshake")
    assert found.state == "fault"
    assert variable in found.remedy


def test_launcher_that_hangs_is_left_after_the_timeout(launcher):
    launcher("sleep 60")
    found = only(doctor.check_handshake(timeout=0.5), "handshake")
    assert found.state == "fault"
    assert "did not answer within 0.5 s" in found.value


def test_launcher_from_the_environment_variable(launcher, monkeypatch, tmp_path):
    launcher("echo HYDRA build details:; echo Version: 4.0.2")
    (tmp_path / "mpirun").rename(tmp_path / "mylauncher")
    monkeypatch.setenv("SIMLAB_MPIRUN", f"{tmp_path}/mylauncher --flag")
    assert "MPICH 4.0.2" in only(doctor.check_mpi(), "MPI launcher").value


def test_petsc4py_that_cannot_be_imported(package):
    package("petsc4py", "raise ImportError('libpetsc_real.so.3.18: cannot open shared object')")
    found = only(doctor.check_petsc(), "PETSc")
    assert found.state == "fault"
    assert "libpetsc_real.so.3.18" in found.value
    assert "make setup" in found.remedy


def test_library_that_ends_the_process(package):
    package("torch", "import os; os._exit(77)")
    found = only(doctor.check_torch(), "torch devices")
    assert found.state == "fault"
    assert "ended with code 77" in found.value


def test_petsc4py_of_another_petsc(monkeypatch):
    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "3.99.0" if name == "petsc4py" else installed(name)
    )
    found = only(doctor.check_petsc(), "petsc4py")
    assert found.state == "fault"
    assert found.value.startswith("3.99.0 runs on PETSc")


def test_package_missing_or_too_old(monkeypatch):
    installed = metadata.version

    def version(name):
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "h5py" else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    findings = doctor.check_packages()
    assert only(findings, "scipy").value.startswith("missing")
    assert only(findings, "h5py").value.startswith("0.1, needs >=")
    assert {f.name for f in findings if f.state == "fault"} == {"scipy", "h5py"}


def test_unset_threads_are_a_note(monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS=3" in only(doctor.check_threads(), "threads").value
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert only(doctor.check_threads(), "threads").state == "note"


def test_verb_prints_json_and_its_exit_code_tells(tmp_path):
    command = [sys.executable, "-m", "simlab", "doctor", "--json"]
    well = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert well.returncode == 0, well.stdout + well.stderr
    assert json.loads(well.stdout)["ok"] is True
    ill = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, PATH=str(tmp_path))
    )
    assert ill.returncode == 1
    answer = json.loads(ill.stdout)
    faults = {f["name"] for f in answer["findings"] if f["state"] == "fault"}
    assert answer["ok"] is False
    assert {"MPI launcher", "handshake"} <= faults
