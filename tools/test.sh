#!/usr/bin/env bash
# Run the serial tests, then the parallel ones under 1, 2 and 3 ranks; fail if any part failed. Without
# words the serial tests run in two processes: whole runs, which start processes of their own, in one.
#
#   tools/test.sh [pytest words]     e.g. tools/test.sh -x
#
# Called by `make test`, which sets the environment (ranks as root, more ranks than cores).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

readonly PYTEST=(.venv/bin/python -m pytest)
readonly RANK_LOG=.setup/ranks.txt
readonly RUN_LOG=.setup/runs.txt
readonly WHOLE_RUNS=(tests/pipeline)
readonly LIMIT=900  # seconds for one parallel part: a rank that hangs must not hang the machine

status=0
part() {
    printf '\n== %s\n' "$1"
    shift
    if ! "$@"; then status=1; fi
}

# One rank talks; what the others say is shown when the part fails, the test they hang in included.
on_ranks() {
    local ranks=$1 colour=no others=()
    shift
    if [ -t 1 ]; then colour=yes; fi
    local words=(-p no:cacheprovider -o faulthandler_timeout=300 -m "parallel and parallel[$ranks] and not slow" tests/parallel "$@")
    if [ "$ranks" -gt 1 ]; then
        # shellcheck disable=SC2016  # $0 and $@ are the inner shell's
        others=(: -n $((ranks - 1)) env PYTHONUNBUFFERED=1 bash -c 'exec "$@" >>"$0" 2>&1'
            "$RANK_LOG" "${PYTEST[@]}" -v --color=no "${words[@]}")
    fi
    : >"$RANK_LOG"
    # shellcheck disable=SC2086  # the launcher may come with words of its own
    timeout --kill-after=10 "$LIMIT" ${SIMLAB_MPIRUN:-mpirun} \
        -n 1 "${PYTEST[@]}" --color=$colour "${words[@]}" "${others[@]}" </dev/null && return
    if [ $? = 124 ]; then printf '\n== stopped after %s s\n' "$LIMIT"; fi
    printf '== the other ranks said\n'
    tail -n 60 "$RANK_LOG"
    return 1
}

serially() {
    if [ $# -gt 0 ]; then
        "${PYTEST[@]}" -m "not parallel and not slow" "$@"
        return
    fi
    "${PYTEST[@]}" -p no:cacheprovider --color=no -m "not parallel and not slow" "${WHOLE_RUNS[@]}" \
        </dev/null >"$RUN_LOG" 2>&1 &
    local runs=$! failed=0
    "${PYTEST[@]}" -m "not parallel and not slow" "${WHOLE_RUNS[@]/#/--ignore=}" || failed=1
    wait "$runs" || failed=1
    printf '\n== whole runs\n'
    cat "$RUN_LOG"
    return $failed
}

mkdir -p .setup
part "serial tests" serially "$@"
for ranks in 1 2 3; do
    part "parallel tests, $ranks rank(s)" on_ranks "$ranks" "$@"
done
if [ "$status" = 0 ]; then printf '\nall parts passed\n'; else printf '\nsome parts failed\n'; fi
exit "$status"
