"""The demo's whole story in twenty steps a phase, through Megatron-Bridge."""

from pathlib import Path

from tests.demo.told import check_told


def test_the_whole_story_quickly(tmp_path: Path) -> None:
    check_told(tmp_path, "bridge")
