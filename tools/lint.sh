#!/usr/bin/env bash
# Run every static check, report all of them, and fail if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

status=0
check() {
    printf '\n== %s\n' "$*"
    if ! ".venv/bin/$@"; then status=1; fi
}

check ruff check .
check ruff format --check .
check mypy
check lint-imports
exit "$status"
