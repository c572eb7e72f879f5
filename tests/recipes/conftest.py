"""The corpus that the recipes are run on."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from nemo_skymoe.data.corpus import build_corpus

FILES = ("argparse", "typing", "inspect", "pydoc", "shutil", "uuid", "ast", "pickle")


@pytest.fixture(scope="session")
def workplace() -> Iterator[Path]:
    """A folder to run in, with a small corpus where the recipes look for it."""
    with TemporaryDirectory() as name:
        build_corpus(Path(name, "runs", "corpus"), 512, 0.3, files=[f"{file}.py" for file in FILES])
        yield Path(name)
