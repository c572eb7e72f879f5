#!/usr/bin/env bash
# The tests of nemo_skymoe/moe, and of the names in checkpoints, with the other Megatron-Cores that it supports: tests/versions.sh [VERSION...]
# Each is downloaded once into a folder of its own, which hides the installed one for the run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[ $# -gt 0 ] || set -- 0.14.0 0.16.1
for version in "$@"; do
    folder=build/versions/megatron-core-$version
    if [ ! -d "$folder" ]; then
        rm -rf "$folder.part"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps ${PIP_ARGS:-} \
            --target "$folder.part" "megatron-core==$version"
        mv "$folder.part" "$folder"
    fi
    echo "megatron-core $version"
    export PYTHONPATH=$PWD/$folder OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
    found=$("$python" -c "from megatron.core.package_info import __version__ as v; print(v)")
    [ "$found" = "$version" ] || { echo "megatron-core $version is not what is imported, but $found" >&2; exit 1; }
    "$python" -m pytest tests/moe tests/test_config.py tests/checkpoint/torch_dist/test_names.py -m "${MARKERS:-not long}"
done
