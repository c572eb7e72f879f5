"""The sizes at which any experiment trains on CPU ranks: "toy" to see that it works, "miniature" to learn something."""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments.runs import Demonstration, Finetuning, Pretraining, PretrainingRun
from nemo_skymoe.experiments.runs import steps as steps_of

Run = TypeVar("Run", Pretraining | Demonstration, Finetuning)
CORPUS = "runs/corpus"
"""The folder of the corpus on which every scale trains, unless another is given."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of model and data, with `token_share` of the experiment's tokens, or else `steps` steps."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    seq_length: int
    batch: int
    ranks: int
    steps: int = 0
    token_share: float = 0.0
    least_warmup: int = 1
    log_interval: int = 1
    validations: int = 1
    validation_batches: int = 1
    float32: bool = False
    """Whether to train in float32 instead of the recipe's bf16. A CPU computes it faster, and small differences survive
    in it."""


SCALES = {
    "toy": Scale(
        layers=2, hidden_size=64, ffn_hidden_size=96, heads=4, seq_length=64, batch=4, ranks=2, steps=4
    ),
    # 1B tokens become 10,000. A warm-up does not shrink below what Adam's second moment remembers (beta 0.95), except
    # in a run that is too short for both.
    "miniature": Scale(
        layers=4,
        hidden_size=64,
        ffn_hidden_size=176,
        heads=4,
        seq_length=128,
        batch=16,
        ranks=1,
        token_share=1e-5,
        least_warmup=20,
        log_interval=10,
        validations=5,
        validation_batches=32,
        float32=True,
    ),
}


def at_scale(run: Run, scale: str | None) -> Run:
    """Return `run` itself or, at a scale of `SCALES`, a smaller one.

    Width, depth, sequence, batch, steps and devices are smaller. Model-parallel sizes shrink with the devices: EDP to
    at most as many ranks, or else the pipeline to as many stages; otherwise the ranks are data-parallel. Learning rates
    stay. A pipeline's layout goes, because it is for so many layers and stages.

    Raises:
        ConfigurationError: There is no such scale.
    """
    if scale is None:
        return run
    if scale not in SCALES:
        raise ConfigurationError(
            f"scale is {scale!r}, expected {' or '.join(SCALES)}, or nothing for the size of the report"
        )
    sizes = SCALES[scale]
    steps = _steps(run, sizes)
    smaller: dict[str, Any] = _model_and_ranks(run, sizes) | {
        "val_check_interval": max(1, steps // sizes.validations),
        "limit_val_batches": sizes.validation_batches,
        "log_interval": sizes.log_interval,
        "precision": "32" if sizes.float32 else run.precision,
        "max_steps": steps,
    }
    warmup = min(_shrunk(run.warmup_steps, run, steps, sizes.least_warmup), steps // 4)
    if isinstance(run, Finetuning):
        return cast(Run, replace(run, **smaller, given_warmup_steps=warmup))
    saved = _shrunk(run.save_interval, run, steps, 1) if sizes.token_share else steps
    kept = {field.name: getattr(run, field.name) for field in fields(PretrainingRun)}
    smaller |= {"warmup_steps": warmup, "saved_steps": saved, "pipeline_recompute": None}
    return cast(Run, Demonstration(**kept | smaller, decay_steps=_shrunk(run.decay_steps, run, steps, 1)))


def _model_and_ranks(run: Pretraining | Demonstration | Finetuning, sizes: Scale) -> dict[str, Any]:
    edp = min(sizes.ranks, run.edp)
    return {
        "architecture": replace(
            run.architecture,
            num_layers=sizes.layers,
            hidden_size=sizes.hidden_size,
            ffn_hidden_size=sizes.ffn_hidden_size,
            num_attention_heads=sizes.heads,
        ),
        "seq_length": sizes.seq_length,
        "global_batch_size": sizes.batch,
        "micro_batch_size": sizes.batch // sizes.ranks,
        "num_nodes": 1,
        "num_gpus_per_node": sizes.ranks,
        "edp": edp,
        "pipeline_parallelism": sizes.ranks // edp if run.pipeline_parallelism > 1 else 1,
        "pipeline_layout": None,
    }


def _steps(run: Pretraining | Demonstration | Finetuning, sizes: Scale) -> int:
    if not sizes.token_share:
        return sizes.steps
    tokens = run.max_steps * run.seq_length * run.global_batch_size
    return steps_of(tokens * sizes.token_share, sizes.seq_length, sizes.batch)


def _shrunk(count: int, run: Pretraining | Demonstration | Finetuning, steps: int, least: int) -> int:
    return min(count, max(least, round(count * steps / run.max_steps)))
