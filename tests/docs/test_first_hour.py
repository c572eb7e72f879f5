"""The page's recipe for one node, as far as it goes without a GPU."""

from pathlib import Path

import pytest

from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.docs.pages import PAGES
from tests.recipes.commands import _nemo

MARKER = "covered-by: tests/docs/test_first_hour.py::test_the_recipe_fits_one_node"


def test_the_recipe_fits_one_node(tmp_path: Path) -> None:
    """It has four nodes of its own, which torchrun on one machine refuses."""
    [page] = [page for page in PAGES if page.name == "first-hour"]
    [command] = [words for block in page.blocks if block.marker == MARKER for words in block.commands]
    build_corpus(tmp_path / "runs/corpus", 512, 0.3, files=["argparse.py", "typing.py", "inspect.py"])
    run_ranks(_nemo, 1, tmp_path, command)
    assert "Dry run for pretrain" in (tmp_path / "rank0.log").read_text()
    *command, last = command  # a list of its own: other tests read the page's
    assert last == "trainer.num_nodes=1"
    with pytest.raises(RankFailed, match=r"trainer\.num_nodes is 4, expected 1"):
        run_ranks(_nemo, 1, tmp_path, command)


def test_a_start_that_is_not_there_is_refused_by_the_dry_run(tmp_path: Path) -> None:
    """torchrun starts its ranks on this machine, so that the checkpoint has to be here."""
    command = ["nemo", "llm", "pretrain", "--factory", "skywork_moe_tiny(resume_path=nowhere)", "--dryrun"]
    with pytest.raises(RankFailed, match="the checkpoint to start from, 'nowhere', has no weights"):
        run_ranks(_nemo, 1, tmp_path, [*command, "run.executor=torchrun"])
