"""Upcycling on tensors: what is copied, what is drawn, what is refused; the files round trip."""

from pathlib import Path

import pytest
import torch

from nemo_skymoe.checkpoint import torch_dist
from nemo_skymoe.checkpoint.upcycle import EXPERTS, KEPT, ROUTER, check_dense, moe_extra_states, upcycle
from nemo_skymoe.config import ConfigurationError

LAYERS, HIDDEN, FFN, VOCABULARY, NUM_EXPERTS = 3, 8, 12, 32, 4
FC1, FC2 = EXPERTS


def dense() -> dict[str, torch.Tensor]:
    shapes = {name: (LAYERS, HIDDEN) if "layer_norm" in name else (VOCABULARY, HIDDEN) for name in KEPT}
    shapes |= {
        name: (LAYERS, HIDDEN, HIDDEN) for name in KEPT if "linear_qkv.weight" in name or "proj" in name
    }
    shapes |= {FC1: (LAYERS, 2 * FFN, HIDDEN), FC2: (LAYERS, HIDDEN, FFN)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_every_expert_is_the_dense_mlp() -> None:
    source = dense()
    moe = upcycle(source, NUM_EXPERTS)
    for name, target in EXPERTS.items():
        assert moe[target].shape == (LAYERS, NUM_EXPERTS, *source[name].shape[1:])
        for expert in range(NUM_EXPERTS):
            assert torch.equal(moe[target][:, expert], source[name])


def test_everything_else_is_kept_and_nothing_more() -> None:
    source = dense()
    moe = upcycle(source, NUM_EXPERTS)
    assert set(moe) == {*KEPT, *EXPERTS.values(), ROUTER}
    assert all(torch.equal(moe[name], source[name]) for name in KEPT)


def test_routers_are_drawn_by_seed_and_never_zero() -> None:
    routers = [upcycle(dense(), NUM_EXPERTS, router_std=0.5, seed=seed)[ROUTER] for seed in (0, 0, 1)]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])
    assert routers[0].shape == (LAYERS, NUM_EXPERTS, HIDDEN)
    assert routers[0].std().item() == pytest.approx(0.5, rel=0.3)


def test_refuses_an_moe() -> None:
    moe = upcycle(dense(), NUM_EXPERTS)
    with pytest.raises(ConfigurationError, match="is an MoE already"):
        check_dense({name: tensor.shape for name, tensor in moe.items()})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (FC2, "lacks"),
        ("module.output_layer.weight", "lacks"),
        ("module.decoder.layers.mlp.linear_fc1.bias", "has"),
    ],
)
def test_refuses_another_architecture_naming_the_tensor(name: str, kind: str) -> None:
    shapes = {key: tensor.shape for key, tensor in dense().items()}
    if kind == "lacks":
        del shapes[name]
    else:
        shapes[name] = torch.Size([LAYERS, 2 * FFN])
    with pytest.raises(ConfigurationError, match=f"{kind} '{name}'"):
        check_dense(shapes)


def test_refuses_one_expert() -> None:
    with pytest.raises(ConfigurationError, match="num_experts is 1"):
        upcycle(dense(), 1)


def test_written_weights_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    moe = upcycle(dense(), NUM_EXPERTS)
    torch_dist.write_weights(tmp_path / "moe", {**moe, **moe_extra_states(LAYERS, NUM_EXPERTS)})
    read = torch_dist.read_weights(tmp_path / "moe")
    assert set(read) == set(moe)
    assert all(torch.equal(read[name], tensor) for name, tensor in moe.items())
    assert torch_dist.read_shapes(tmp_path / "moe") == {name: tensor.shape for name, tensor in moe.items()}


def test_unfinished_weights_are_refused(tmp_path: Path) -> None:
    torch_dist.write_weights(tmp_path / "dense", dense())
    (tmp_path / "dense" / "weights" / "metadata.json").unlink()
    with pytest.raises(ConfigurationError, match="no torch_dist checkpoint"):
        torch_dist.read_shapes(tmp_path / "dense")
