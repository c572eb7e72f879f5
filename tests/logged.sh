#!/usr/bin/env bash
# Runs a command and keeps what it printed, with the machine and the commit, to be committed: tests/logged.sh NAME COMMAND...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=tests/logs/$1.log
shift
mkdir -p tests/logs
{
    echo "$(date -u +%F) $(git rev-parse --short HEAD)$(git diff --quiet HEAD -- . ':!tests/logs' || echo ' with changes'), $(uname -sm), $(getconf _NPROCESSORS_ONLN) cores"
    echo "$*"
    status=0
    "$@" 2>&1 || status=$?
    echo "ended with $status"
    exit "$status"
} | tee "$log"
