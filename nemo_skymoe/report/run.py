"""Make the report of a single run from nothing but its logs."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nemo_skymoe.report.curves import (
    LEARNING_RATES,
    TRAIN_LOSSES,
    VALIDATION_LOSSES,
    Curve,
    LossCurve,
    curve_of,
    layer_curves,
    read_logs,
)
from nemo_skymoe.report.page import Table, write_report

logger = logging.getLogger(__name__)

ROUTER_METRICS = {
    "drop_rate": "Token drop rate",
    "aux_loss_coefficient": "Auxiliary-loss coefficient",
    "aux_loss": "Auxiliary loss",
    "load_max_over_mean": "Largest / mean expert load",
    "gate_entropy": "Gate entropy",
    "max1_over_max2": "Max1 / Max2",
    "max2_over_max3": "Max2 / Max3",
    "expert_similarity": "Expert similarity",
}


def report_run(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page for the logs below `run_dir` into `output` (by default RUN_DIR/report), and return its path.

    The page, and warnings in the log, say what was left out of damaged files and how the files of a resumed run were
    put together.

    Raises:
        ConfigurationError: There are no logs below `run_dir`, or `output` cannot be a folder.
    """
    run_dir = Path(run_dir)
    logs = read_logs(_logs(run_dir))
    curves = logs.curves
    for remark in logs.remarks:
        logger.warning(remark)
    name = run_dir.resolve().name
    return write_report(
        output=Path(output) if output is not None else run_dir / "report",
        title=f"Training run {name}",
        lead="\n\n".join([_lead(name, curves), *logs.remarks]),
        losses=[LossCurve.of_run(name, curves)],
        telemetry=curves,
        tables=[table for table in (_loss_table(curves), _router_table(curves)) if table.rows],
    )


def _logs(run_dir: Path) -> Path:
    """Return the folder of a run's logs: the recipes keep those of `runs/NAME` in `runs/tensorboard/NAME`."""
    beside = run_dir.parent / "tensorboard" / run_dir.name
    return beside if beside.is_dir() and not any(run_dir.rglob("*tfevents*")) else run_dir


def _lead(name: str, curves: Mapping[str, Curve]) -> str:
    first = min(int(curve.steps[0]) for curve in curves.values())
    last = max(int(curve.steps[-1]) for curve in curves.values())
    layers = {layer for metric in ROUTER_METRICS for layer in layer_curves(curves, metric)}
    sentences = [f"The logs of {name} cover the optimizer steps {first:,} to {last:,}."]
    if (samples := curves.get("consumed_samples")) and samples.last is not None:
        sentences.append(f"The run consumed {samples.last:,.0f} sequences.")
    if (rate := curve_of(curves, LEARNING_RATES)) and rate.last is not None:
        sentences.append(
            f"The last learning rate is {rate.last:.3g}, the highest {np.nanmax(rate.values):.3g}."
        )
    sentences.append(
        f"The router was observed in {len(layers)} MoE layer{'s' if len(layers) > 1 else ''}."
        if layers
        else "The logs hold no router telemetry."
    )
    return " ".join(sentences)


def _loss_table(curves: Mapping[str, Curve]) -> Table:
    rows = []
    for label, tags in (("Training", TRAIN_LOSSES), ("Validation", VALIDATION_LOSSES)):
        curve = curve_of(curves, tags)
        if curve is not None and curve.last is not None:
            lowest = int(np.nanargmin(np.where(np.isfinite(curve.values), curve.values, np.nan)))
            rows.append(
                (
                    label,
                    int(curve.steps[0]),
                    float(curve.values[0]),
                    int(curve.steps[lowest]),
                    float(curve.values[lowest]),
                    int(curve.steps[-1]),
                    float(curve.values[-1]),
                )
            )
    columns = ("Loss", "First step", "loss", "Lowest at step", "loss", "Last step", "loss")
    return Table("Losses", columns, rows, "Nats per token, single logged values, not smoothed.")


def _router_table(curves: Mapping[str, Curve]) -> Table:
    rows = []
    for metric, label in ROUTER_METRICS.items():
        last = {layer: curve.last for layer, curve in layer_curves(curves, metric).items()}
        values = {layer: value for layer, value in last.items() if value is not None}
        if values:
            low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
            rows.append(
                (label, values[low], low, float(np.median(list(values.values()))), values[high], high)
            )
    columns = ("Last logged value", "Lowest", "in layer", "Median", "Highest", "in layer")
    return Table("The router at the end of the run", columns, rows, "Over the MoE layers, counted from 1.")
