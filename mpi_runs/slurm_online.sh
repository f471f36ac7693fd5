#!/usr/bin/env bash
# An online run in one SLURM allocation: solvers as an array of job steps, the trainer beside them.
#
#   sbatch --ntasks=9 mpi_runs/slurm_online.sh cases/darcy_online.toml runs/online
#   PARTS=4 CHANNEL=stream sbatch --ntasks=10 mpi_runs/slurm_online.sh CASE RUN_DIRECTORY [options for both]
#
# PARTS solver steps (default 2) share the tasks that the trainer leaves, and with CHANNEL=stream the
# server beside the store; each solves its own part of the samples. A step that dies is started again,
# RESTARTS times (default 3). Two minutes before the time is up all are asked to stop; the same
# command goes on from there, as it does after a failure of any kind. Data alone: slurm_array.sh.
#SBATCH --job-name=simlab-online
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
set -euo pipefail
# SLURM runs a copy of this file, so the project is found from where sbatch was called.
source "${SLURM_SUBMIT_DIR:-.}/mpi_runs/environment.sh"

usage="usage: sbatch --ntasks=N slurm_online.sh CASE RUN_DIRECTORY [simlab options for both]"
case=${1:?$usage} run=${2:?$usage}
shift 2
parts=${PARTS:-2} channel=${CHANNEL:-tail} restarts=${RESTARTS:-3}
set -- --out "$run" --resume --set "train.channel=$channel" "$@" # the same case for both
others=1
[ "$channel" = tail ] || others=2
ranks=$(((${SLURM_NTASKS:?$usage} - others) / parts))
if [ "$ranks" -lt 1 ]; then
    echo "$SLURM_NTASKS tasks are too few for $parts solver steps and $others more: raise --ntasks" >&2
    exit 2
fi

# keep NAME COMMAND...: start it again when it dies; not after a stop, nor when its input is wrong.
keep() {
    local name=$1 n=0 code
    shift
    while true; do
        code=0
        "$@" </dev/null || code=$?
        case $code in 0 | 2 | 3) return "$code" ;; esac
        if [ -e "$run/STOP" ] || [ "$n" -ge "$restarts" ]; then return "$code"; fi
        n=$((n + 1))
        echo "$name ended with $code: restart $n of $restarts" >&2
        sleep "$n"
    done
}

# finish PID: wait for it, signals or not, and return its exit code.
finish() {
    local code
    while true; do
        code=0
        wait "$1" || code=$?
        kill -0 "$1" 2>/dev/null || return "$code"
    done
}

step="srun --exact --label"
solvers=()
set -m # a process group for each, to be ended as one
trap 'touch "$run/STOP"' USR1 TERM
rm -f "$run/STOP" # of an earlier start
for ((part = 0; part < parts; part++)); do
    keep "solvers $part" $step -n "$ranks" "$simlab" generate "$case" \
        --shard "$part/$parts" "$@" &
    solvers+=($!)
done
# The solvers make run directory and store; server and trainer join them.
until [ -f "$run/store/campaign.json" ]; do
    kill -0 "${solvers[0]}" 2>/dev/null || { finish "${solvers[0]}"; exit; }
    sleep 0.5
done
server=
if [ "$channel" = stream ]; then
    keep server $step -n 1 "$simlab" store serve "$run/store" --address 'tcp://0.0.0.0:*' &
    server=$!
fi
keep trainer $step -n 1 "$simlab" train "$case" "$@" &
trained=0 solved=0
finish $! || trained=$?
for pid in "${solvers[@]}"; do
    finish "$pid" || { code=$?; [ "$code" -le "$solved" ] || solved=$code; }
done
[ -z "$server" ] || kill -- "-$server" 2>/dev/null || true

[ "$trained" = 0 ] || exit "$trained"
if [ -e "$run/STOP" ]; then
    echo "stopped; the same command goes on" >&2
    exit "$solved"
fi
"$simlab" store seal "$run"
"$simlab" evaluate "$run"
"$simlab" report "$run"
exit "$solved"
