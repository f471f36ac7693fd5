#!/usr/bin/env bash
# Generate a case's data as a SLURM job array: each task solves its own part of the samples.
#
#   sbatch --array=0-7 mpi_runs/slurm_array.sh cases/darcy.toml runs/darcy
#
# Every task is idempotent: a lost or killed one is submitted again, alone, and solves what is
# missing of its part. The number of parts must then be given, because the array is smaller:
#
#   PARTS=8 sbatch --array=3 mpi_runs/slurm_array.sh cases/darcy.toml runs/darcy
#
# When all are done, `simlab store seal RUN` seals what is left and `simlab store verify RUN` checks.
#SBATCH --job-name=simlab
#SBATCH --nodes=1
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
# SLURM runs a copy of this file, so the project is found from where sbatch was called.
source "${SLURM_SUBMIT_DIR:-.}/mpi_runs/environment.sh"

usage="usage: sbatch --array=0-N slurm_array.sh CASE RUN_DIRECTORY [simlab options]"
case=${1:?$usage} run=${2:?$usage}
shift 2
part=${SLURM_ARRAY_TASK_ID:?$usage}
parts=${PARTS:-${SLURM_ARRAY_TASK_COUNT:?$usage}}

exec $mpirun -n "${SLURM_NTASKS:-1}" "$simlab" generate "$case" --out "$run" \
    --shard "$part/$parts" --resume "$@"
