"""The table for those who come from NeMo names options that NeMo's recipe has; tests/bridge looks at Bridge's side."""

import inspect
import re

import fiddle as fdl

from nemo_skymoe.recipes import skywork_moe_146b
from tests.docs.pages import PAGES

[PAGE] = [page for page in PAGES if page.name == "bridge"]
ROWS = PAGE.text.partition("|---|---|\n")[2].partition("\n\n")[0].splitlines()
SECTIONS = ("trainer", "data", "model", "optim", "pipeline", "log", "resume")


def test_the_options_of_nemo_in_the_table_exist() -> None:
    recipe = skywork_moe_146b.pretrain_recipe(corpus="/data/corpus")
    found = 0
    for row in ROWS:
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", row.strip("|").split("|")[0]):
            *parents, option = name.split(".")
            if parents[0] not in SECTIONS:
                continue
            part = recipe
            for parent in parents:
                part = getattr(part, parent)
            made = fdl.get_callable(part)
            assert option in inspect.signature(made).parameters, f"{name} of {made}"
            found += 1
    assert found > 20
