"""The cluster, and what is trained on it. `make test-slurm` runs this folder; nothing else collects it."""

import getpass
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.patches import unified_memory
from tests.slurm.cluster import Cluster, missing, running
from tests.slurm.doors import BRIDGE_PYTHON

FILES = ("argparse", "typing", "inspect", "pydoc", "shutil", "uuid", "ast", "pickle")


def pytest_sessionstart() -> None:
    """Say in one sentence what is not there; let an end by SIGTERM or a closed terminal clean up as Ctrl-C does."""
    if commands := missing():
        pytest.exit(
            f"make test-slurm needs {', '.join(commands)}: apt-get install --no-install-recommends slurm-wlm munge",
            2,
        )
    if os.geteuid() != 0:
        pytest.exit(
            f"make test-slurm starts slurmd, which needs root: it was started by {getpass.getuser()}", 2
        )
    if not BRIDGE_PYTHON.is_file():
        pytest.exit(f"make test-slurm needs {BRIDGE_PYTHON}: make test-bridge installs it", 2)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """On a disk that all nodes see, as a cluster's would be: corpus, runs, scripts and logs."""
    with TemporaryDirectory(prefix="skymoe-slurm-") as name:
        build_corpus(Path(name, "corpus"), 512, 0.3, files=[f"{file}.py" for file in FILES])
        yield Path(name)


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    """A SLURM of two nodes, and the environment of somebody who submits to it."""
    (folder / "slurm").mkdir()
    with running(folder / "slurm") as started:
        commands = Path(sys.executable).parent
        assert shutil.which("nemo", path=str(commands)) is not None
        started.environment |= unified_memory.ENVIRONMENT | {
            "PATH": f"{commands}:{started.environment['PATH']}",
            "MASTER_ADDR": "127.0.0.1",  # names of nodes have no address here
            "SKYMOE_SLURM_ACCOUNT": "llm",
            "SKYMOE_SLURM_PARTITION": "a800",
            "SKYMOE_SLURM_IMAGE": "none",
        }
        yield started
