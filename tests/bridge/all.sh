#!/usr/bin/env bash
# Types and tests of what needs Megatron-Bridge, in its environment: tests/bridge/all.sh [ARGUMENTS OF PYTEST...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bin=$PWD/.venv-bridge/bin
"$bin/pyright" --project tests/bridge/pyrightconfig.json
"$bin/pytest" --disable-warnings tests/bridge "$@"
