"""One small training that both front doors run: text, checkpoint and options, the same whatever Python runs it.

Neither NeMo nor Megatron-Bridge is imported here.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face import exported_files
from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE, Upcycling
from nemo_skymoe.data import corpus
from nemo_skymoe.experiments.demonstration import SKYWORK_TINY
from nemo_skymoe.ranks import run_ranks

RANKS, STEPS = 2, 3
LAYOUTS: dict[str, dict[str, int]] = {
    "edp": {"edp": 2, "micro_batch_size": 8},
    "data parallel": {"edp": 1, "micro_batch_size": 2},
}
"""Arguments of the recipe: two ranks that share every layer, or two that share the batch and take it in two parts."""
VOCABULARY, LENGTH = 512, 64
ARCHITECTURE = replace(SKYWORK_TINY, vocab_size=VOCABULARY)
TRACES = Path(__file__).with_name("traces.json")
"""What both front doors computed, by layout, to the last bit. They are written by `tests.doors.through_nemo`."""
SAME_CPU, ANY_CPU = 5e-7, 5e-6
"""Differences of losses that count as none. A CPU with other instructions was seen to move the third loss by 5e-7."""
OPTIONS: dict[str, Any] = {
    # The coefficients follow the drop rate fast and far enough to tell steps and layers apart.
    "moe_adaptive_aux_loss_smoothing": 0.5,
    "moe_adaptive_aux_loss_initial": 0.01,
    "moe_adaptive_aux_loss_maximum": 1.0,
    "moe_expert_capacity_factor": 1.0,
}


@dataclass
class Trace:
    """What a training computed in every step: loss, norm of the gradients, and each layer's coefficient after it."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    coefficients: list[dict[str, float]] = field(default_factory=list)

    def step(self, loss: float, gradient_norm: float, coefficients: Mapping[int, float]) -> None:
        self.losses.append(loss)
        self.gradient_norms.append(gradient_norm)
        self.coefficients.append({str(layer): value for layer, value in coefficients.items()})


def read(file: Path) -> dict[str, Trace]:
    """Traces by layout."""
    return {layout: Trace(**trace) for layout, trace in json.loads(file.read_text()).items()}


def write(traces: Mapping[str, Trace], file: Path) -> None:
    file.write_text(json.dumps({layout: asdict(trace) for layout, trace in traces.items()}, indent=1) + "\n")


def check_equal(found: Mapping[str, Trace], expected: Mapping[str, Trace], difference: float) -> None:
    """Coefficients are equal, losses up to `difference`, and norms of gradients up to that share of them."""
    assert found.keys() == expected.keys()
    for layout, trace in found.items():
        other = expected[layout]
        assert trace.coefficients == other.coefficients, layout
        assert trace.losses == pytest.approx(other.losses, abs=difference, rel=0), layout
        assert trace.gradient_norms == pytest.approx(other.gradient_norms, rel=difference), layout


def traces_through(
    door: str, recipe: Callable[..., Any], train: Callable[[Any], Trace], layouts: Iterable[str] = LAYOUTS
) -> dict[str, Trace]:
    """Train with every layout.

    Args:
        door: The format of the front door's checkpoints.
        recipe: The front door's `skywork_moe_tiny`.
        train: Runs a recipe on one rank.
        layouts: Names from `LAYOUTS`.
    """
    traces = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        upcycle(folder, to=door)
        for layout in layouts:
            made = recipe(**_arguments(folder, folder / door), **LAYOUTS[layout])
            first, second = run_ranks(train, RANKS, made)
            assert first == second, "the ranks do not agree"
            shutil.rmtree(folder / "run")
            traces[layout] = first
    return traces


def _arguments(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Arguments of the recipe, which both front doors call the same."""
    return {
        "dir": str(folder),
        "name": "run",
        "corpus": str(folder / "corpus"),
        "resume_path": str(checkpoint),
        "devices": RANKS,
        "max_steps": STEPS,
        "seq_length": LENGTH,
        "warmup_steps": 1,
        "val_check_interval": STEPS,
        "limit_val_batches": 1,
    }


def prepare(folder: Path) -> None:
    """Write `corpus` and the dense checkpoint `dense` into a folder."""
    texts = {f"{number}.txt": _text(number) for number in range(40)}
    with mock.patch.object(corpus, "read_sources", lambda files: texts):
        corpus.build_corpus(folder / "corpus", VOCABULARY, 0.2)
    (folder / "dense").mkdir()
    save_file(_weights(), folder / "dense" / "model.safetensors", {"format": "pt"})
    config = exported_files.to_hf_config(Description(ARCHITECTURE, dtype="float32"))
    (folder / "dense" / "config.json").write_text(json.dumps(config))


def upcycle(folder: Path, *, to: str) -> Path:
    """Upcycle `dense` to 16 experts in the format `to`, and return the folder."""
    options = Upcycling(num_experts=16, moe_router_topk=2, router_std=0.5)
    convert.plan({BASE: open_source(folder / "dense")}, TargetOptions(to), options).run(folder / to)
    return folder / to


def _text(number: int) -> str:
    """Words of a small language, a few hundred of them, drawn with random.random alone, which no Python changes."""
    draw = random.Random(number).random
    words = [
        f"{chr(97 + first)}{chr(97 + second)}{'aeiou'[(first + second) % 5]}"
        for first in range(20)
        for second in range(20)
    ]
    return " ".join(words[int(draw() ** 2 * len(words))] for _ in range(400))


def _weights() -> dict[str, torch.Tensor]:
    draw = np.random.Generator(np.random.PCG64(0))
    weights = {}
    for chunk in hugging_face_names.chunks(ARCHITECTURE):
        norm = len(chunk.shape) == 1
        values = np.ones(chunk.shape) if norm else (draw.random(chunk.shape) - 0.5) * 0.2
        weights[chunk.tensor] = torch.from_numpy(values.astype(np.float32))
    return weights
