#!/usr/bin/env bash
# Generate a case's data with several ranks on this machine.
#
#   mpi_runs/local_ranks.sh CASE RANKS [simlab options] [-- PETSc words]
#   mpi_runs/local_ranks.sh cases/darcy.toml 2 --smoke --fresh -- -log_view
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case=${1:?usage: local_ranks.sh CASE RANKS [simlab options] [-- PETSc words]}
ranks=${2:?usage: local_ranks.sh CASE RANKS [simlab options] [-- PETSc words]}
shift 2
exec $mpirun -n "$ranks" "$simlab" generate "$case" "$@"
