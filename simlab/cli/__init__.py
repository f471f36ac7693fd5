"""The command line: ``simlab VERB CASE [options] [-- PETSc words]``.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 finished but some samples failed,
130 stopped on request.
"""

from __future__ import annotations

import errno
import sys
import traceback

import typer

from simlab.cli import bench, cases, doctor, verbs
from simlab.cli.store import app as store_app
from simlab.core import comm
from simlab.core.errors import ConfigError, SimlabError
from simlab.linalg import petsc

__all__ = ["app", "main"]

_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

app = typer.Typer(
    name="simlab",
    help="Solve sequences of PDE systems, keep the data safe, train surrogates as they arrive.\n\n"
    "Our options stand before `--`, PETSc's after it: "
    "`mpirun -n 2 simlab generate cases/darcy.toml -- -ksp_monitor`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
verbs.add_to(app)
cases.add_to(app)
doctor.add_to(app)
bench.add_to(app)
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line and exit. The words after ``--`` go to PETSc."""
    words = sys.argv[1:]
    if "--" in words:
        cut = words.index("--")
        petsc.set_arguments(words[cut + 1 :])
        words = words[:cut]
    comm.install_abort_hook()
    try:
        code = app(args=words, standalone_mode=False)
    except SimlabError as error:
        _fail(error, 2 if isinstance(error, ConfigError) else 1)
    except typer.Exit as end:
        code = end.exit_code
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command-line library
            _fail(error, 2, error.format_message())
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT:  # no bug of ours
            _fail(error, 1, f"{error.filename or 'a file'}: {error.strerror}")
        traceback.print_exc()
        _fail(error, 1, f"{type(error).__name__}: {error} (a bug in simlab, or in your plug-in)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, code: int, text: str = "") -> None:
    """Print one message and end: this rank where all know of the error, else the whole job."""
    n_ranks = comm.world().size if comm.is_initialised() else 1
    is_known_everywhere = n_ranks == 1 or getattr(error, "is_agreed", False)
    if is_known_everywhere and comm.launch_rank() == 0:
        sys.stderr.write(f"error: {text or error}\n")
    elif not is_known_everywhere:
        sys.stderr.write(f"error: rank {comm.launch_rank()} of {n_ranks}: {text or error}\n")
        sys.stderr.flush()
        comm.world().Abort(code)
    sys.stderr.flush()
    sys.exit(code)
