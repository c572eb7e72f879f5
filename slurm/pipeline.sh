#!/usr/bin/env bash
# Upcycle and pretrain, the second job once the first has succeeded. The last argument is the front door, NeMo by default:
#
#   SBATCH_ACCOUNT=A SBATCH_PARTITION=P slurm/pipeline.sh /data/skywork-13b /data/upcycled /data/runs [nemo|bridge]

set -eu
dense=${1:?expected a dense checkpoint} upcycled=${2:?expected a folder to write} runs=${3:?expected a folder of runs}
door=${4:-nemo}
for folder in "$upcycled" "$runs"; do
    # NeMo-Run reads a recipe's arguments between brackets, and has no quotes for them.
    if [[ $folder == *[,\'\"]* || $folder == *[[:cntrl:]]* || $folder != "${folder#[[:space:]]}" || $folder != "${folder%[[:space:]]}" ]]; then
        printf '%q: expected a path without commas, quotes and line breaks\n' "$folder" >&2
        exit 2
    fi
done
case $door in
    nemo) recipe=("skywork_moe_146b(dir=$runs,resume_path=$upcycled)") ;;
    bridge) recipe=(skywork_moe_146b_pretrain_config "dir=$runs" "resume_path=$upcycled") ;;
    *)
        printf '%q: expected nemo or bridge\n' "$door" >&2
        exit 2
        ;;
esac
here=$(dirname "${BASH_SOURCE[0]}")

upcycle=$(sbatch --parsable "$here/skymoe.sbatch" upcycle "$dense" "$upcycled" --to "$door")
sbatch --dependency="afterok:${upcycle%%;*}" --kill-on-invalid-dep=yes "$here/pretrain.sbatch" "${recipe[@]}"
