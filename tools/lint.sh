#!/usr/bin/env bash
# Run every static check, report all of them, and fail if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

status=0
check() {
    printf '\n== %s\n' "$*"
    if ! ".venv/bin/$1" "${@:2}"; then status=1; fi
}

check ruff check --no-cache .  # its cache forgets that a module moved between packages
check ruff format --check .
check mypy
check lint-imports
exit "$status"
