"""``simlab doctor``: is everything here that simlab needs, does it fit together, how to mend it.

Most trouble on a new machine is two MPIs (library and launcher, or PETSc and mpi4py), a petsc4py
built for another PETSc, or a launcher that refuses root or more ranks than cores. Each has a check
here, and each fault comes with what to do. Exit code 1 when something needed is wrong.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated, Any, Literal

import typer

from simlab.cli import probes
from simlab.core import comm, environment
from simlab.core.errors import DependencyError
from simlab.pipeline.online import launch_environment, refusal

__all__ = [
    "Finding",
    "add_to",
    "check_handshake",
    "check_mpi",
    "check_packages",
    "check_petsc",
    "check_threads",
    "check_torch",
    "diagnose",
    "doctor",
]

_PROBE = (sys.executable, "-P", str(probes.__file__))  # as a file: it must not need the other verbs
_SETUP = "run `make setup` (docs/install.md)"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_FAMILIES = ("open mpi", "intel", "mpich")
_WORLD_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes
    ----------
    name, value : str
        What it is, what was found.
    state : {"ok", "note", "fault"}
        A note is worth knowing; a fault stops simlab from working.
    remedy : str
        What to do about a note or a fault.
    """

    name: str
    value: str
    state: Literal["ok", "note", "fault"] = "ok"
    remedy: str = ""


def check_packages() -> list[Finding]:
    """Compare the installed Python packages with what simlab asks for."""
    versions = [Finding("python", f"{platform.python_version()} at {sys.executable}")]
    for requirement in metadata.requires("simlab") or ():
        spec, _, condition = requirement.partition(";")
        if "extra" in condition:
            continue
        name, _, least = (part.strip() for part in spec.partition(">="))
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions.append(Finding(name, f"missing, needs >= {least}", "fault", _SETUP))
            continue
        is_old = _numbers(found) < _numbers(least)
        value = f"{found}, needs >= {least}" if is_old else found
        versions.append(Finding(name, value, "fault" if is_old else "ok", _SETUP if is_old else ""))
    return versions


def check_mpi(timeout: float = 60.0) -> list[Finding]:
    """Compare the MPI library that mpi4py loads with the launcher on the path."""
    found = _probe("mpi", timeout)
    library = found.get("library", "the MPI library")
    findings = [
        Finding("MPI library", found["error"], "fault", _SETUP)
        if "error" in found
        else Finding("MPI library", library)
    ]
    command = environment.read("SIMLAB_MPIRUN", "mpirun").split()[0]
    path = shutil.which(command)
    if path is None:
        remedy = (
            f"install the launcher of {library} (Debian: openmpi-bin), or put its directory on "
            "PATH, or set SIMLAB_MPIRUN; Open MPI wants it even for one process"
        )
        return [*findings, Finding("MPI launcher", f"no {command} on the path", "fault", remedy)]
    _, text = _run([path, "--version"], timeout)
    launcher = _launcher_version(text)
    value = f"{launcher or 'unknown'} at {path}"
    if launcher and ("error" in found or _family(launcher) == _family(library)):
        findings.append(Finding("MPI launcher", value))
    elif launcher:
        findings.append(
            Finding(
                "MPI launcher",
                value,
                "fault",
                f"library and launcher differ: every rank would be rank 0 of 1. Put the mpirun of "
                f"{library} first on PATH, or set SIMLAB_MPIRUN to it",
            )
        )
    else:
        findings.append(
            Finding("MPI launcher", value, "note", "its version is not known; see the handshake")
        )
    return findings


def check_petsc(timeout: float = 60.0) -> list[Finding]:
    """Check PETSc's version, build and packages, and that it shares its MPI with mpi4py."""
    found = _probe("petsc", timeout)
    if "error" in found:
        return [Finding("PETSc", found["error"], "fault", _SETUP)]
    version, binding = found["version"], metadata.version("petsc4py")
    findings = [Finding("PETSc", f"{version} at {found['directory']}")]
    if _numbers(version)[:2] != _numbers(binding)[:2]:
        findings.append(
            Finding(
                "petsc4py",
                f"{binding} runs on PETSc {version}",
                "fault",
                f"remove .venv and {_SETUP}: petsc4py must be of PETSc's own version",
            )
        )
    if found["scalar"] != "float64":
        findings.append(
            Finding(
                "PETSc scalars",
                found["scalar"],
                "fault",
                "simlab needs real double scalars; set PETSC_DIR and PETSC_ARCH to such a PETSc",
            )
        )
    packages = found["packages"]
    lacking = {
        "hypre": "`auto` uses GAMG instead of BoomerAMG",
        "mumps": "no direct solves on several ranks",
    }
    notes = [f"without {name}: {loss}" for name, loss in lacking.items() if name not in packages]
    findings.append(
        Finding(
            "PETSc packages",
            ", ".join(packages) or "none",
            "note" if notes else "ok",
            "; ".join(notes),
        )
    )
    findings.append(Finding("PETSc integers", found["integer"]))
    if len(found["mpi_files"]) > 1:
        findings.append(
            Finding(
                "one MPI",
                " and ".join(found["mpi_files"]),
                "fault",
                "PETSc and mpi4py load different MPI libraries: set PETSC_DIR, remove .venv and "
                "run `make setup`, which builds mpi4py with PETSc's own mpicc",
            )
        )
    return findings


def check_hdf5(timeout: float = 60.0) -> list[Finding]:
    """Check that h5py loads, and say which HDF5 it has."""
    found = _probe("h5py", timeout)
    if "error" in found:
        return [Finding("HDF5", found["error"], "fault", _SETUP)]
    kind = "with MPI (not used)" if found["mpi"] else "serial, all that simlab needs"
    return [Finding("HDF5", f"{found['hdf5']}, {kind}")]


def check_torch(timeout: float = 120.0) -> list[Finding]:
    """Check that torch loads, and count its devices."""
    found = _probe("torch", timeout)
    if "error" in found:
        return [Finding("torch devices", found["error"], "fault", _SETUP)]
    devices = f"{found['devices']} GPU" if found["devices"] else "CPU only"
    return [Finding("torch devices", devices)]


def check_threads() -> list[Finding]:
    """Say how many threads each rank may start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = ", ".join(f"{name}={os.environ[name]}" for name in _THREADS if name in os.environ)
    value = f"{words or 'OMP_NUM_THREADS not set'}; {cores} cores"
    if words or cores == 1:
        return [Finding("threads", value)]
    remedy = "set OMP_NUM_THREADS=1 under mpirun, or the ranks fight for cores; `make` does"
    return [Finding("threads", value, "note", remedy)]


def check_handshake(timeout: float = 60.0) -> list[Finding]:
    """Let ranks add up their numbers: the ranks at hand under mpirun, else two new ones."""
    if comm.launched_by_mpi():
        started = int(next((os.environ[name] for name in _WORLD_SIZE if name in os.environ), "0"))
        return [_judged(probes.handshake(), started or comm.world().size)]
    launcher = environment.read("SIMLAB_MPIRUN", "mpirun").split()
    if shutil.which(launcher[0]) is None:
        return [
            Finding("handshake", "not tried, no launcher", "fault", "see the launcher's remedy")
        ]
    command = [*launcher, "-n", "2", *_PROBE, "handshake"]
    code, text = _run(command, timeout)
    if code is None:
        return [
            Finding(
                "handshake",
                f"two ranks did not answer within {timeout:g} s",
                "fault",
                "try `mpirun -n 2 hostname`; then look for a firewall, a busy machine, or a "
                "network MPI should not use (Open MPI: OMPI_MCA_btl=self,vader)",
            )
        ]
    answer = _last_json(text)
    if answer is None or "error" in answer or code != 0:
        remedy = refusal(text)
        if remedy:
            return [Finding("handshake", "the launcher refuses", "fault", remedy)]
        last = answer.get("error") if answer else (text.strip().splitlines() or ["no output"])[-1]
        return [Finding("handshake", f"exit code {code}: {last}", "fault", _SETUP)]
    return [_judged(answer, 2)]


def _judged(answer: Mapping[str, Any], started: int) -> Finding:
    if answer["size"] != started:
        return Finding(
            "handshake",
            f"{started} ranks started, each sees a world of {answer['size']}",
            "fault",
            "the launcher belongs to another MPI than the library: put the matching mpirun first "
            "on PATH, or set SIMLAB_MPIRUN",
        )
    if answer["ranks"] != list(range(started)) or answer["petsc_sum"] != float(started):
        return Finding(
            "handshake",
            f"the ranks disagree: {dict(answer)}",
            "fault",
            f"remove .venv and {_SETUP}",
        )
    return Finding("handshake", f"{started} ranks agree, through MPI and through PETSc")


def diagnose() -> list[Finding]:
    """Run every check. Collective under mpirun."""
    checks = (
        check_packages,
        check_mpi,
        check_petsc,
        check_hdf5,
        check_torch,
        check_threads,
        check_handshake,
    )
    return [Finding("simlab", metadata.version("simlab")), *(f for c in checks for f in c())]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Print versions, check that the parts fit together, and say how to mend what does not."""
    findings = diagnose()
    is_well = all(finding.state != "fault" for finding in findings)
    if comm.launched_by_mpi():
        is_well = all(comm.world().allgather(is_well))
        if comm.world().rank > 0:
            return 0 if is_well else 1
    if as_json:
        print(json.dumps({"ok": is_well, "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        print("\n".join(_lines(findings)))
    return 0 if is_well else 1


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(doctor)


def _lines(findings: Iterable[Finding]) -> list[str]:
    findings = list(findings)
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = {"ok": "  ", "note": "- ", "fault": "! "}[finding.state]
        lines.append(f"{mark}{finding.name:{width}}  {finding.value}")
        if finding.remedy:
            lines.append(f"{'':{width + 4}}-> {finding.remedy}")
    n_faults = sum(finding.state == "fault" for finding in findings)
    return [*lines, "all is well" if not n_faults else f"{n_faults} thing(s) to mend, marked !"]


def _probe(name: str, timeout: float) -> dict[str, Any]:
    """Return a probe's findings, or ``{"error": ...}``: in a child, or here under mpirun."""
    if comm.launched_by_mpi():
        try:
            return probes.PROBES[name]()
        except (ImportError, DependencyError) as error:
            return {"error": str(error)}
    code, text = _run([*_PROBE, name], timeout)
    found = _last_json(text)
    if found is None:
        end = (text.strip().splitlines() or ["it printed nothing"])[-1]
        how = f"did not answer within {timeout:g} s" if code is None else f"ended with code {code}"
        return {"error": f"a process that loads {name} {how}: {end}"}
    return found


def _run(command: list[str], timeout: float) -> tuple[int | None, str]:
    """Run a command; return its exit code (None: stopped at the timeout) and all it printed."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=launch_environment(),
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return None, text


def _last_json(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def _launcher_version(text: str) -> str:
    """Return ``"Open MPI 4.1.4"`` and the like from what ``mpirun --version`` prints."""
    for pattern, name in (
        (r"\(Open MPI\) (\S+)", "Open MPI"),
        (r"Intel\(R\) MPI Library.*?Version (\S+)", "Intel MPI"),
        (r"HYDRA build details:\s*Version:\s*(\S+)", "MPICH"),
    ):
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return f"{name} {match[1]}"
    return ""


def _family(version: str) -> tuple[str, tuple[int, ...]]:
    """Return name and series: launcher and library must agree in both."""
    name = next((name for name in _FAMILIES if name in version.lower()), version.lower())
    return name, _numbers(version)[:2]


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``"Open MPI v4.1.4rc1"`` gives (4, 1, 4)."""
    match = re.search(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
