"""The demo: its folder, and the whole story in twenty steps a phase."""

from pathlib import Path

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.demo import story
from tests.demo.told import check_told


def test_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(ConfigurationError, match="holds other files"):
        story.run(tmp_path)
    assert (tmp_path / "logs").is_dir()


def test_refuses_a_front_door_that_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="frontdoor is 'window', expected nemo or bridge"):
        story.run(tmp_path, frontdoor="window")


@pytest.mark.long
def test_the_whole_story_quickly(tmp_path: Path) -> None:
    check_told(tmp_path, "nemo")
