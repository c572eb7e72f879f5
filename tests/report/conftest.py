"""Event files as NeMo's TensorBoardLogger writes them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

Points = Mapping[str, Mapping[int, float]]


@pytest.fixture
def write_events(tmp_path: Path) -> Callable[[str, Points], Path]:
    """write_events(folder, {tag: {step: value}}): one event file in the run directory, which is returned."""
    run_dir = tmp_path / "run"

    def write(folder: str, scalars: Points) -> Path:
        with SummaryWriter(str(run_dir / folder)) as writer:
            for tag, points in scalars.items():
                for step, value in points.items():
                    writer.add_scalar(tag, value, step)
        return run_dir

    return write
