"""A hundred steps of the MoE and of the dense model, by the recipes for a model of one's own, on two CPU ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_model import function, generation
from benchmarks.real_model.commands import Workplace
from benchmarks.real_model.conversions import EXPERTS, NEMO, TOPK, exported, nemo, upcycle, verified
from benchmarks.real_model.corpus import CORPUS, DOMAIN, HELD_OUT, SEQUENCE, held_out
from benchmarks.real_model.published import DENSE
from nemo_skymoe.report.curves import TRAIN_LOSS, Curve, layer_curves, read_curves

STEPS, SPECIALIST_STEPS = 100, 20
BATCH = 4
"""Sequences of an optimizer step."""
RANKS = 2
RUNS, WIDE = "runs", "dense-float32"
RECIPES = {
    "dense": ("skywork_dense", NEMO, {}),
    "moe": ("skywork_moe", "copy-nemo", {"expert_capacity_factor": None}),
}
"""The recipe of each training, the checkpoint that it starts from, and arguments of its own: the MoE drops no token."""
NAMES, BEFORE = {"dense": "dense", "moe": "MoE"}, {"dense": "dense loss", "moe": "loss"}
"""The two models that are trained, and how their losses before that are called."""
_DIGITS = 5


def command(
    recipe: str, name: str, start: str, steps: int, own: Mapping[str, Any], **settings: Any
) -> list[str]:
    """Return the command line of a training, with arguments and settings of its own.

    Two pipeline stages share the optimizer's memory. The weights alone are saved, at the end.
    """
    given = {
        "resume_path": start,
        "corpus": CORPUS,
        "mixture": f"'{DOMAIN}:1'",
        "dir": RUNS,
        "name": name,
        "precision": "32",
        "num_gpus_per_node": RANKS,
        "pipeline_parallelism": RANKS,
        "max_steps": steps,
        "seq_length": SEQUENCE,
        "global_batch_size": BATCH,
        "warmup_steps": steps // 10,
        **own,
    }
    factory = f"{recipe}({','.join(f'{option}={value}' for option, value in given.items())})"
    shared = {
        "data.held_out": HELD_OUT,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 1,
        "log.ckpt.save_optim_on_train_end": "false",
    }
    words = [f"{option}={value}" for option, value in (shared | settings).items()]
    return ["nemo", "llm", "pretrain", "--factory", factory, "--yes", "run.executor=torchrun", *words]


def train(place: Workplace, name: str) -> dict[str, Any]:
    """Train the MoE or the dense model, and return how long it took, and its curves."""
    recipe, start, own = RECIPES[name]
    done = place.run(*command(recipe, name, start, STEPS, own))
    return {
        "seconds": round(done.seconds),
        "processor_seconds": round(done.processor_seconds),
        "curves": curves(place.folder / RUNS / "tensorboard" / name),
    }


def export(place: Workplace, name: str) -> dict[str, Any]:
    """Export a trained model, and return what it then computes: its loss on held-out text, and its texts."""
    run, folder = f"{RUNS}/{name}", exported(f"trained-{name}")
    place.run("skymoe", "convert", run, folder, "--to", "hf")
    return {
        "verified": verified(place, run, folder),
        "loss": function.loss(function.load(place.folder / folder), held_out(place)),
        "text": generation.generate(place.folder / folder),
    }


def specialists(place: Workplace) -> dict[str, Any]:
    """Continue the dense model in nothing but its MLPs, and make experts of both."""
    name = "specialist"
    only_mlps = {"model.config.train_only_ffn": "true"}
    done = place.run(*command("skywork_dense", name, NEMO, SPECIALIST_STEPS, {}, **only_mlps))
    # The training was in float32, and the sources of one MoE have one data type.
    function.load(place.folder / DENSE).save_pretrained(place.folder / exported(WIDE))
    place.run("skymoe", "convert", exported(WIDE), nemo(WIDE), "--to", "nemo")
    sources = [f"base={nemo(WIDE)}", f"code={RUNS}/{name}"]
    options = ("--moe-router-topk", f"{TOPK}", "--expert-source", f"code:{EXPERTS // 2},base:{EXPERTS // 2}")
    rows = upcycle(place, "specialized", sources, options)
    model = function.load(place.folder / exported("specialized"))
    return {"seconds": round(done.seconds), "verified": rows, "loss": function.loss(model, held_out(place))}


def curves(logs: Path) -> dict[str, Any]:
    """Return losses by step, and over the MoE layers the mean, least and largest drop rate and coefficient."""
    found = read_curves(logs)
    # NeMo logs a step's loss under the number of the step before, ours under the number of the steps done.
    kept = {TRAIN_LOSS: _points(found[TRAIN_LOSS], 1)}
    for metric in ("virtual_drop_rate", "aux_loss_coefficient"):
        layers = list(layer_curves(found, metric).values())
        if layers:
            values, steps = np.array([layer.values for layer in layers]), layers[0].steps
            for name, summary in (("mean", np.mean), ("least", np.min), ("largest", np.max)):
                kept[f"{metric}, {name}"] = _points(Curve(steps, summary(values, axis=0)), 0)
    return kept


def _points(curve: Curve, later: int) -> dict[str, float]:
    return {
        str(step + later): float(f"{value:.{_DIGITS}g}")
        for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
    }
