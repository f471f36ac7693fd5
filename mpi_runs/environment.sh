# Read by the scripts beside it, or by your shell (source, do not run): what launchers want on a laptop, in a
# container and as root. On a cluster none of it is needed, and none of it does harm.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1   # Open MPI as root (containers)
export OMPI_MCA_rmaps_base_oversubscribe=1                         # more ranks than cores, 4.x
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe        # the same, 5.x
export OMPI_MCA_hwloc_base_binding_policy=none                     # two jobs must not share a core
export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}"  # waiting ranks give way
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"                     # ranks are the parallelism
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"                 # waiting threads sleep

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
simlab="${SIMLAB:-$root/.venv/bin/simlab}"
mpirun="${SIMLAB_MPIRUN:-mpirun}"
if [ ! -x "$simlab" ]; then
    echo "no $simlab: run \`make setup\` first, or set SIMLAB to the simlab command" >&2
    return 1 2>/dev/null || exit 1
fi
