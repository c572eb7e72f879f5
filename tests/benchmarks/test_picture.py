"""The committed picture of the imports shows those that there are; lines are counted by folder."""

from collections import Counter

from benchmarks.imports import PICTURE, drawn, picture, room_pairs
from benchmarks.lines import Count


def test_the_picture_shows_the_imports_that_there_are() -> None:
    assert drawn(PICTURE.read_text()) == room_pairs().keys(), "draw it again: make imports"


def test_a_picture_says_what_it_shows() -> None:
    pairs = Counter({("moe", "config"): 8, ("config", "durable"): 1})
    assert drawn(picture(pairs)) == pairs.keys()
    assert ">8</text>" in picture(pairs)


def test_folders_are_summed_with_those_in_them() -> None:
    count = Count({"nemo_skymoe": 1, "nemo_skymoe/moe": 2, "nemo_skymoe_other": 4, "tests/moe": 8})
    assert count.below(("nemo_skymoe",)) == 3
    assert count.below(("nemo_skymoe/moe", "tests")) == 10
