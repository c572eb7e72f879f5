"""Make a generated script readable for people: comments say why a line is there, and long commands take several lines.

To bash it is the same script.
"""

import re

from nemo_skymoe.recipes.executors import VARIABLES

WHY = {
    "#SBATCH --exclusive": "Whole nodes: NCCL rings and pinned memory do not share.",
    "#SBATCH --gpus-per-node": "All GPUs of a node.",
    "#SBATCH --kill-on-invalid-dep": "Leave the queue, should the job before fail.",
    "#SBATCH --ntasks-per-node": "Lightning takes its ranks from SLURM's tasks, one a GPU.",
    "#SBATCH --mem": "All memory of a node.",
    "#SBATCH --open-mode": "A requeued job goes on in the same log.",
    "#SBATCH --signal": "SIGTERM (15) to every rank so many seconds before the end: save and stop.",
    "export TORCHX_MAX_RETRIES": "Requeued at most so often after a failure.",
    "requeue_if_stopped": "Stopped by its time limit or a preemption it has saved and left with exit code 0: it goes on after a requeue.",
    "srun --output": "One failed task ends all (--kill-on-bad-exit) instead of leaving them in a collective.",
} | {f"export {variable.name}": variable.why for variable in VARIABLES}
_LONG = 110
_QUOTED = r"\$'(?:[^'\\]|\\.)*'|'[^']*'|\"(?:[^\"\\]|\\.)*\"|\\."
_BREAKS = re.compile(rf"(?P<quoted>{_QUOTED})| (?=--|python )|(?<!python) (?=-m )")


def commented(script: str) -> str:
    """Return `script` with a comment above every line that `WHY` knows, single blank lines, and long lines folded."""
    lines: list[str] = []
    for line in re.sub(r"\n{3,}", "\n\n", script).splitlines():
        why = [reason for start, reason in WHY.items() if re.match(rf"{re.escape(start)}\b", line)]
        lines += [f"# {reason}" for reason in why]
        lines.append(_folded(line) if line.startswith(("srun --output", "torchrun")) else line)
    return "\n".join(lines)


def _folded(line: str) -> str:
    """Put one option on each line, and leave quoted text as it is."""
    if len(line) <= _LONG:
        return line
    return _BREAKS.sub(lambda found: found["quoted"] or " \\\n    ", line)
