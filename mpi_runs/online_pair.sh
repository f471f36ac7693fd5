#!/usr/bin/env bash
# Start the two halves of an online run by hand: solvers under mpirun, the trainer beside them, as
# one would in two terminals or two jobs that share a file system. `simlab run` does this for you.
#
#   mpi_runs/online_pair.sh CASE RANKS RUN_DIRECTORY [simlab options for both]
#   mpi_runs/online_pair.sh cases/darcy_online.toml 1 runs/pair --smoke
#
# Either half may be killed and started again with --resume; the other goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage="usage: online_pair.sh CASE RANKS RUN_DIRECTORY [simlab options for both]"
case=${1:?$usage} ranks=${2:?$usage} run=${3:?$usage}
shift 3

$mpirun -n "$ranks" "$simlab" generate "$case" --out "$run" "$@" &
solvers=$!
trap 'kill "$solvers" 2>/dev/null || true' EXIT

# The solvers make the run directory; the trainer joins it.
until [ -f "$run/manifest.json" ]; do
    kill -0 "$solvers" 2>/dev/null || { wait "$solvers"; exit; }
    sleep 0.2
done
trained=0
"$simlab" train "$case" --out "$run" --solver-ranks "$ranks" "$@" || trained=$?

trap - EXIT
solved=0
wait "$solvers" || solved=$?
[ "$trained" = 0 ] || exit "$trained"
"$simlab" evaluate "$run"
"$simlab" report "$run"
exit "$solved"
