#!/usr/bin/env bash
# Set simlab up in .venv, installing what is missing on a Debian or Ubuntu machine.
#
#   tools/setup.sh            PETSc, MPI, a clean .venv, petsc4py built for that PETSc, the rest
#   tools/setup.sh --browser  also a Chromium, with which the tests look at the report
#
# Read from the environment:
#   PETSC_DIR, PETSC_ARCH     use this PETSc, and the MPI it was built with, not the distribution's
#   PYTHON                    the Python that .venv is made from (default: a python3 >= 3.11 on PATH)
#   PIP_EXTRA_INDEX_URL       a further package index, e.g. the one with torch's CPU builds
#
# A second run compares two hashes and ends. Other words for the same: docs/install.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly WORK=.setup VENV=.venv LOG=.setup/log.txt
readonly DEBIAN_PETSC=/usr/lib/petsc
# petsc4py's build scripts stumble over later setuptools ('list' object has no attribute
# 'startswith', petsc4py 3.18.5 with setuptools 84), while torch asks for later ones at run time:
# petsc4py is therefore built in an environment of its own.
readonly BUILD_SETUPTOOLS=69.5.1

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
digest() { sha256sum | cut -c1-16; }

# Run a command with its output in the log only, and show the end of the log when it fails.
quietly() {
    printf '\n== %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 </dev/null && return
    grep -v "is ignored" "$LOG" | tail -n 25 >&2
    die "failed: $* (everything is in $LOG)"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Install Debian packages, refreshing the package lists once when they are empty or too old.
apt_install() {
    command -v apt-get >/dev/null ||
        die "missing here: $*; there is no apt-get, so install their like or set PETSC_DIR (docs/install.md)"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
        die "missing here: $*; run as root or have sudo, or install them and run this again"
    say "apt packages: $*"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300
        install -y -q --no-install-recommends "$@")
    printf '\n== %s\n' "${install[*]}" >>"$LOG"
    as_root "${install[@]}" >>"$LOG" 2>&1 </dev/null && return
    quietly as_root apt-get -o DPkg::Lock::Timeout=300 update
    quietly as_root "${install[@]}"
}

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            PYTHON=$name
            return
        fi
    done
    die "needs Python 3.11 or later, found ${PYTHON:-$(python3 --version 2>&1 || true)}; name one with PYTHON=..."
}

# What the chosen Python lacks to make an environment and to compile against it.
python_packages() {
    "$PYTHON" - <<'PY'
import importlib.util, os, sys, sysconfig
name = f"python{sys.version_info.major}.{sys.version_info.minor}"
lacking = []
if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
    lacking.append(f"{name}-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    lacking.append(f"{name}-dev")
if lacking and sys.base_prefix != "/usr":
    sys.exit(f"setup: {sys.executable} lacks its {' and '.join(lacking)} part; name another PYTHON")
print(*lacking)
PY
}

# Fill PETSC_VERSION and PETSC_CC from the files of the PETSc at PETSC_DIR.
read_petsc() {
    local header=$PETSC_DIR/include/petscversion.h
    local build=$PETSC_DIR${PETSC_ARCH:+/$PETSC_ARCH}
    PETSC_CONF=$build/include/petscconf.h
    [ -f "$header" ] || die "no $header: PETSC_DIR=$PETSC_DIR is not a PETSc"
    [ -f "$PETSC_CONF" ] || die "no $PETSC_CONF: set PETSC_ARCH to one of the builds in $PETSC_DIR"
    PETSC_VERSION=$(awk '$2 ~ /^PETSC_VERSION_(MAJOR|MINOR|SUBMINOR)$/ { v = v dot $3; dot = "." }
                         END { print v }' "$header")
    PETSC_CC=$(awk '$1 == "CC" { print $3; exit }' "$build/lib/petsc/conf/petscvariables")
    ! grep -q 'define PETSC_VERSION_RELEASE *0' "$header" ||
        die "PETSc at $PETSC_DIR is a development version, for which there is no petsc4py release"
    [ "$(printf '%s\n' 3.18 "$PETSC_VERSION" | sort -V | head -n 1)" = 3.18 ] ||
        die "PETSc $PETSC_VERSION at $PETSC_DIR is older than 3.18"
    ! grep -q 'define PETSC_USE_COMPLEX' "$PETSC_CONF" ||
        die "PETSc at $PETSC_DIR uses complex scalars; simlab needs a build with real double ones"
}

# Build petsc4py (and, for a PETSc that is not the distribution's, mpi4py) into $WHEELS.
build_wheels() {
    if compgen -G "$WHEELS/petsc4py-*.whl" >/dev/null; then
        return
    fi
    say "building petsc4py $PETSC_VERSION against $PETSC_DIR (a few minutes, once)"
    local tools=("setuptools==$BUILD_SETUPTOOLS" wheel "$(grep -i '^numpy==' constraints.txt)")
    case $PETSC_VERSION in 3.18.*) ;; *) tools+=("cython>=3") ;; esac  # 3.18 ships the C sources
    rm -rf "$WORK/build" "$WHEELS.part"
    quietly "$PYTHON" -m venv "$WORK/build"
    quietly "$WORK/build/bin/pip" install -q "${tools[@]}"
    quietly env PETSC_DIR="$PETSC_DIR" PETSC_ARCH="${PETSC_ARCH:-}" CFLAGS="${CFLAGS:--O1 -g0}" \
        "$WORK/build/bin/pip" wheel -q --no-deps --no-build-isolation --no-cache-dir \
        --no-binary petsc4py -w "$WHEELS.part" "petsc4py==$PETSC_VERSION"
    if [ "$ROUTE" = own ]; then
        say "building mpi4py with $PETSC_CC"
        quietly env MPICC="$PETSC_CC" "$WORK/build/bin/pip" wheel -q --no-deps --no-cache-dir \
            --no-binary mpi4py -w "$WHEELS.part" "$(grep -i '^mpi4py==' constraints.txt)"
    fi
    mv "$WHEELS.part" "$WHEELS"
    rm -rf "$WORK/build"
}

install_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    (apt_install chromium fonts-dejavu-core) || say "no Chromium could be installed: the test that renders the report is skipped"
}

mkdir -p "$WORK/wheels"
# Two makes at once: the second waits, then finds everything done.
[ -n "${_SETUP_LOCKED:-}" ] || exec env _SETUP_LOCKED=1 flock -o "$WORK/lock" tools/setup.sh "$@"
SECONDS=0
if [ "${1:-}" = --browser ]; then install_browser; fi

find_python
export PIP_DISABLE_PIP_VERSION_CHECK=1
lacking=$(python_packages)
if [ -n "${PETSC_DIR:-}" ]; then
    ROUTE=own
else
    ROUTE=distribution PETSC_DIR=$DEBIAN_PETSC PETSC_ARCH=
    [ -f "$PETSC_DIR/include/petscversion.h" ] || lacking+=" petsc-dev"
    command -v mpicc >/dev/null || lacking+=" libopenmpi-dev"
    command -v mpirun >/dev/null || lacking+=" openmpi-bin"
    [ -f /usr/include/stdio.h ] || lacking+=" libc6-dev"
fi
# shellcheck disable=SC2086  # a list of words
[ -z "${lacking# }" ] || apt_install $lacking
read_petsc
command -v "$PETSC_CC" >/dev/null || die "the compiler wrapper $PETSC_CC that built PETSc is not on PATH"

base=$({
    "$PYTHON" -c 'import sys; print(sys.version, sys.base_prefix)'
    echo "$ROUTE $(realpath "$PETSC_DIR") ${PETSC_ARCH:-} $PETSC_VERSION $PETSC_CC $BUILD_SETUPTOOLS"
    cat "$PETSC_CONF"
} | digest)
whole=$(cat <(echo "$base") constraints.txt pyproject.toml | digest)
if [ "$(cat "$VENV/.simlab-setup" 2>/dev/null)" = "$base $whole" ]; then
    exit 0
fi

say "PETSc $PETSC_VERSION at $PETSC_DIR, $("$PYTHON" --version)"
WHEELS=$WORK/wheels/$base
build_wheels
if [ "$(cut -d' ' -f1 "$VENV/.simlab-setup" 2>/dev/null)" != "$base" ]; then
    say "a clean $VENV"
    rm -rf "$VENV"
    quietly "$PYTHON" -m venv "$VENV"
fi
say "Python packages from constraints.txt"
rm -f "$VENV/.simlab-setup"
quietly "$VENV/bin/python" -m pip install -q -c constraints.txt pip setuptools
quietly "$VENV/bin/python" -m pip install -q -c constraints.txt "$WHEELS"/*.whl -e ".[test,dev]"
echo "$base $whole" >"$VENV/.simlab-setup"
say "ready after $SECONDS s; \`$VENV/bin/simlab doctor\` checks it"
