#!/usr/bin/env bash
# Upcycle and pretrain, the second job once the first has succeeded:
#
#   SBATCH_ACCOUNT=A SBATCH_PARTITION=P slurm/pipeline.sh /data/skywork-13b /data/upcycled /data/runs

set -eu
dense=${1:?expected a dense checkpoint} upcycled=${2:?expected a folder to write} runs=${3:?expected a folder of runs}
for folder in "$upcycled" "$runs"; do
    # NeMo-Run reads a recipe's arguments between brackets, and has no quotes for them.
    if [[ $folder == *[,\'\"]* || $folder == *[[:cntrl:]]* || $folder != "${folder#[[:space:]]}" || $folder != "${folder%[[:space:]]}" ]]; then
        printf '%q: expected a path without commas, quotes and line breaks\n' "$folder" >&2
        exit 2
    fi
done
here=$(dirname "${BASH_SOURCE[0]}")

upcycle=$(sbatch --parsable "$here/skymoe.sbatch" upcycle "$dense" "$upcycled" --to nemo)
sbatch --dependency="afterok:${upcycle%%;*}" --kill-on-invalid-dep=yes \
    "$here/pretrain.sbatch" "skywork_moe_146b(dir=$runs,resume_path=$upcycled)"
