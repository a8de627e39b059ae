#!/usr/bin/env bash
# Bring .venv to what `diffoundry[EXTRAS]` needs, at the versions of constraints.txt.
#   tools/install.sh EXTRAS [PYTHON]
# An install that was interrupted left .venv/.installing behind: such a folder is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=$1
python=${2:-}
venv=.venv

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer was not found; install it, or say where: make PYTHON=/path/to/python3 ..." >&2
    exit 3
}

if [ -e "$venv/.installing" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    [ -n "$python" ] || python=$(find_python)
    echo "set-up: making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

touch "$venv/.installing"
# PyPI's torch for Linux brings gigabytes of CUDA; a machine without a GPU sets
# PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds, which these pins also match.
echo "set-up: installing diffoundry[$extras] into $venv (the first time: minutes, 2 GB)"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
pip install --constraint constraints.txt setuptools
pip install --constraint constraints.txt --no-build-isolation --editable ".[$extras]"
# The tests hold our code against TensorRT 10 as well as the 11 of constraints.txt.
case ",$extras,$(uname -s)" in
*,dev,*Linux)
    pip install --no-deps --upgrade --target "$venv/tensorrt10" --requirement tools/tensorrt10.txt ||
        echo "set-up: TensorRT 10's bindings did not install; their tests will be skipped" >&2
    ;;
esac
rm "$venv/.installing"
