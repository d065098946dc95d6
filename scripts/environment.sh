# shellcheck shell=bash
# Sourced by the other scripts. Makes the virtual environment .venv with the pinned versions, once.
#
#   install_package EXTRA   installs the package with an extra ("" or "dev"), unless that is done already
#   $python                 the environment's Python
#   $root                   the repository; the script goes on there, wherever it was started

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1
cd "$root"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The Python that $PYTHON names, else the first on the path that is new enough.
find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    if [[ -n "${PYTHON:-}" ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.10 or later is needed, but ${PYTHON:-python3} is missing or older;" \
        "install one, or name it: PYTHON=/path/to/python3 $0"
}

make_venv() {
    if "$python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local base
    base="$(find_python)"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"
    echo "== Making .venv with $("$base" --version)"
    "$base" -m venv --clear .venv
}

install_package() {
    local extra="$1" wanted stamp=".venv/.l2l_scale-${1:-base}"
    make_venv
    # The editable install holds this folder's path, so a moved clone is installed anew.
    wanted="$(cat pyproject.toml scripts/constraints.txt - <<<"$root" | cksum)"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "== Installing the pinned versions into .venv (about a minute; longer where PyTorch brings CUDA)"
    "$python" -m pip install --editable ".${extra:+[$extra]}" --constraint scripts/constraints.txt | show_large
    printf '%s\n' "$wanted" | tee "$stamp" >.venv/.l2l_scale-base  # every extra brings the base as well
}

# Of pip's hundreds of lines, those that one waits for.
show_large() {
    awk '/(Downloading|Using cached) .*\([0-9.]+ [MG]B\)/ { sub(/^ +/, "   "); print; fflush() }
         /^Installing collected packages/ { print "   Unpacking"; fflush() }'
}

# Seconds as "3 min 07 s".
minutes() {
    printf '%d min %02d s' $(($1 / 60)) $(($1 % 60))
}
