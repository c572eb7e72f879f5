"""The Python on the pages runs as it stands, and does what the page says."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_skymoe.dispatchers import DISPATCHERS
from nemo_skymoe.ranks import run_ranks
from tests.docs.pages import PAGES, Page

RANKS = 2
IN_NEMO = ("data", "monitor", "pretrain", "resume")
PYTHON = [page.name for page in PAGES if any(b.language == "python" and not b.needs for b in page.blocks)]


def page(name: str) -> Page:
    (found,) = [page for page in PAGES if page.name == name]
    return found


def execute(name: str) -> dict[str, Any]:
    """All Python of a page as one script; its names."""
    names: dict[str, Any] = {"__name__": name}
    for block in page(name).blocks:
        if block.language == "python" and block.needs is None:
            exec(compile("\n" * (block.line - 1) + block.text, page(name).path, "exec"), names)
    return names


def on_ranks(function: Callable[[], Any]) -> list[Any]:
    return run_ranks(function, RANKS)


def test_every_page_with_python_is_run_here() -> None:
    elsewhere = "your-own-llama"  # test_your_own_llama.py
    assert sorted(PYTHON) == sorted([*IN_NEMO, "megatron-core", "extend", elsewhere])


def plain_megatron() -> tuple[list[float], dict[int, float], dict[int, float]]:
    names = execute("megatron-core")
    rates = {layer: metrics.drop_rate for layer, metrics in names["controller"].metrics.items()}
    return names["losses"], rates, names["checkpoint"]["controller"]["aux_loss_coefficients"]


def test_plain_megatron_core_trains_and_adapts() -> None:
    for losses, rates, coefficients in on_ranks(plain_megatron):
        assert losses[-1] < losses[0] / 2
        assert rates.keys() == coefficients.keys() == {1, 2}
        assert all(0 <= rate < 1 for rate in rates.values())
        assert all(0.009 < coefficient < 0.01 for coefficient in coefficients.values())


def layers(*kinds: str) -> list[Any]:
    """The first MoE layers of models with the same weights: the page's specs, "" for the one without changes."""
    from megatron.core.models.gpt import GPTModel

    names = execute("megatron-core") | execute("extend")
    names["config"].edp_dispatcher = "alltoall"
    specs = {
        "": names["get_skywork_block_spec"],
        "noisy": names["noisy_layer_spec"],
        "half": names["half_wire_layer_spec"],
    }
    made = []
    for kind in kinds:
        torch.manual_seed(0)
        model = GPTModel(
            names["config"], specs[kind](names["config"]), 256, 32, position_embedding_type="rope"
        )
        made.append(model.decoder.layers[0].mlp)
    return made


def noisy_router() -> None:
    stock, noisy = (layer.router for layer in layers("", "noisy"))
    assert type(noisy).__name__ == "NoisyRouter" and torch.equal(stock.weight, noisy.weight)
    x = torch.randn(64, 8, 64)
    difference = noisy.gating(x) - stock.gating(x)
    assert 0.08 < difference.std() < 0.12
    stock.eval(), noisy.eval()
    assert torch.equal(stock.gating(x), noisy.gating(x))


def test_the_router_is_noisy_in_training_alone() -> None:
    on_ranks(noisy_router)


def half_wire() -> None:
    from nemo_skymoe.moe import dispatch_alltoall

    stock, half = layers("", "half")
    assert type(half.token_dispatcher).__name__ == "HalfWireDispatcher"
    sent: list[torch.dtype] = []
    exchange = dispatch_alltoall.begin_all_to_all

    def watched(rows: torch.Tensor, *args: Any) -> Any:
        if rows.shape[-1] == 64:  # hidden rows
            sent.append(rows.dtype)
        return exchange(rows, *args)

    dispatch_alltoall.begin_all_to_all = watched  # type: ignore[assignment]
    torch.manual_seed(torch.distributed.get_rank())
    x, results = torch.randn(16, 2, 64), []
    for layer in (stock, half):
        given = x.clone().requires_grad_()
        output, _ = layer(given)
        output.square().sum().backward()
        results.append((output.detach(), given.grad))
    assert sent == [torch.float32] * 2 + [torch.bfloat16] * 2
    for full, rounded in zip(*results, strict=True):
        assert full.dtype == rounded.dtype == torch.float32
        error = (full - rounded).norm() / full.norm()
        assert 1e-4 < error < 1e-2  # bfloat16's precision is 2^-8


def test_the_dispatcher_sends_half_as_much() -> None:
    on_ranks(half_wire)


def test_the_table_of_dispatchers_is_the_programs() -> None:
    rows = [
        f"| `{one.name}` | {_yes(one.needs_sequence_parallel)} | {_yes(one.sees_the_group)} | {one.moves} |"
        for one in DISPATCHERS.values()
    ]
    assert "|---|---|---|---|\n" + "\n".join(rows) + "\n\n" in page("extend").path.read_text()


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `recipe` is at the end of each page."""
    folder, before = tmp_path_factory.mktemp("docs"), Path.cwd()
    os.chdir(folder)
    try:
        page("data").write_files()
        return {name: execute(name)["recipe"] for name in IN_NEMO}
    finally:
        os.chdir(before)


def test_the_recipes_have_what_is_set(recipes: dict[str, Any]) -> None:
    staged = recipes["data"]
    assert staged.data.mixtures == ["en:7 zh:2 code:1", "en:5 zh:2 code:3"]
    assert staged.trainer.max_steps == sum(staged.data.steps) > 1000
    changed = recipes["pretrain"]
    assert changed.trainer.num_nodes == 96 and changed.trainer.max_steps == 1000
    assert changed.resume.restore_config.path == "/data/upcycled"
    assert recipes["monitor"].trainer.callbacks[0].__fn_or_cls__.__name__ == "SkyworkMoECallback"
    assert recipes["resume"].trainer.callbacks[0].__fn_or_cls__.__name__ == "SkyworkMoECallback"
