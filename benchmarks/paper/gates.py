"""Gate distributions of a trained model on held-out text, for Figure 2."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from benchmarks.paper import text
from benchmarks.paper.runs import HELD_OUT, Run, Workshop

TOKENS = 4096


def record(workshop: Workshop, run: Run) -> None:
    """Write what `distribution` finds beside the curves of `run`: a row a layer, largest probability first."""
    output = gates_csv(workshop, run)
    if output.is_file():
        return
    from nemo_skymoe.ranks import run_ranks

    checkpoint = workshop.checkpoint(run, 1.0, print)
    (rows,) = run_ranks(distribution, 1, workshop.recipe(run, None), checkpoint)
    temporary = output.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["layer", *(f"max{n}" for n in range(1, len(rows[0]) + 1))])
        table.writerows([layer, *(f"{p:.6g}" for p in row)] for layer, row in enumerate(rows, start=1))
    temporary.replace(output)


def gates_csv(workshop: Workshop, run: Run) -> Path:
    """Its place."""
    return workshop.csv(run).with_name(f"{run.name}.gates.csv")


def distribution(recipe: Any, checkpoint: Path) -> list[list[float]]:
    """[layers][experts]: each token's gate probabilities, sorted, averaged over `TOKENS` held-out tokens."""
    import fiddle as fdl
    import torch

    from nemo_skymoe.moe.router import SkyworkRouter
    from nemo_skymoe.nemo.evaluate import load_model, start_single_rank

    start_single_rank()
    model = load_model(fdl.build(recipe.model.config), checkpoint, text.VOCABULARY)
    found: list[list[float]] = []

    class Observed(SkyworkRouter):
        def gating(self, input: torch.Tensor) -> torch.Tensor:
            logits = super().gating(input)
            probabilities = logits.flatten(0, 1).softmax(-1).sort(-1, descending=True).values
            found.append(probabilities.mean(0).tolist())
            return logits

    for module in model.modules():
        if isinstance(module, SkyworkRouter):
            module.__class__ = Observed
    tokens = torch.from_numpy(text.held_out("en", HELD_OUT, TOKENS)).view(-1, recipe.data.seq_length)
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens, position_ids=places, attention_mask=None)
    return found
