#!/usr/bin/env bash
# The tests of what needs neither NeMo nor Megatron-Bridge, with every Megatron-Core that it supports: tests/versions.sh [VERSION...]
# Each is downloaded once into a folder of its own, which hides the installed one for the run. 0.17 and later need Python 3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- 0.14.0 0.15.3 0.16.1 0.17.1 0.18.2 0.19.2
tests=(tests/moe tests/pipeline tests/checkpoint tests/patches --ignore=tests/patches/nemo)
tests+=(tests/test_config.py tests/test_unfit_options.py tests/test_ranks.py)
# Without it megatron-core from 0.18 on adds the commit of this repository to its version.
export NO_VCS_VERSION=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
failed=()
for version in "$@"; do
    case $version in
        0.14.* | 0.15.* | 0.16.*) python=${PYTHON:-.venv/bin/python} ;;
        *) python=${PYTHON312:-.venv-bridge/bin/python} ;;
    esac
    folder=build/versions/megatron-core-$version
    if [ ! -d "$folder" ]; then
        rm -rf "$folder.part"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps ${PIP_ARGS:-} \
            --target "$folder.part" "megatron-core==$version"
        mv "$folder.part" "$folder"
    fi
    export PYTHONPATH=$PWD/$folder:$PWD
    found=$("$python" -c "import megatron.core as m; print(m.__version__, m.__file__)" 2>/dev/null)
    [ "$found" = "${version} $PWD/$folder/megatron/core/__init__.py" ] ||
        { echo "megatron-core $version is not what is imported, but $found" >&2; exit 1; }
    "$python" -c "import platform, torch; print('megatron-core $version, Python', platform.python_version() + ', torch', torch.__version__)"
    "$python" -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile "${tests[@]}" -m "${MARKERS:-not long}" || failed+=("$version")
done
[ ${#failed[@]} -eq 0 ] || { echo "tests failed with megatron-core ${failed[*]}" >&2; exit 1; }
