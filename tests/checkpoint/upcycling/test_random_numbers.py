"""Random numbers depend on the seed and the place alone: not on order, threads, processes or NumPy's version."""

import hashlib
import os
from unittest import mock

import numpy as np
import pytest
import torch

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.model import MLP_KINDS, Key
from nemo_skymoe.checkpoint.upcycling import random_numbers
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.upcycling.random_numbers import BLOCK, Stream, add_normal, normal
from nemo_skymoe.checkpoint.upcycling.statistics import mean_and_std
from nemo_skymoe.checkpoint.upcycling.upcycled import Upcycled
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint.fakes import random_weights

STREAM = Stream(7, "gate", 3, 5)
SHAPE = (700, 4001)  # three blocks, the last one short
OPTIONS = (
    Upcycling(4, init="noise", noise=0.1, seed=3),
    Upcycling(4, init="drop", drop_ratio=0.5, seed=3),
)
KEYS = [Key(kind, layer, expert) for layer in range(2) for expert in range(4) for kind in MLP_KINDS]
KEYS += [Key("router", layer) for layer in range(2)]


def digests(order: list[int], options: Upcycling) -> dict[int, str]:
    moe = Upcycled({"base": random_weights(Architecture(2, 64, 96, 4, 8), torch.bfloat16)}, options)
    return {
        number: hashlib.sha256(moe.read(KEYS[number]).view(torch.uint8).numpy().tobytes()).hexdigest()
        for number in order
    }


def test_numbers_are_the_documented_ones():
    drawn = normal(STREAM, SHAPE, 0.0, 1.0, "float32").flatten().numpy()
    for block in range(3):
        philox = np.random.Philox(
            key=np.array([7, 1 << 48 | 3 << 24 | 5], dtype=np.uint64),
            counter=np.array([0, 0, 0, block], dtype=np.uint64),
        )
        part = drawn[block * BLOCK : (block + 1) * BLOCK]
        assert np.array_equal(part, np.random.Generator(philox).standard_normal(part.size, dtype=np.float32))


def test_bytes_do_not_depend_on_numpys_version():
    drawn = normal(STREAM, (1 << 16,), 0.0, 1.0, "float32")
    order = STREAM.generator().permutation(1000)
    assert (
        hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
        == "ad688c62fd47b09717514d76c44f9ec8bea83250b0d27060cbfd150f28ca0743"
    )
    assert (
        hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
        == "95dad5b9ff85db29b904f25328d19d1e57474f7bfa447f92e552ddb8d03eade6"
    )


def test_threads_do_not_change_the_bytes():
    results = []
    for cores in (1, 2, 5):
        with mock.patch.object(random_numbers, "available_processors", return_value=cores):
            tensor = torch.ones(SHAPE)
            add_normal(STREAM, tensor, 0.5)
            results.append((normal(STREAM, SHAPE, 0.1, 0.5, "bfloat16"), tensor))
    for drawn, added in results[1:]:
        assert torch.equal(drawn, results[0][0]) and torch.equal(added, results[0][1])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.init)
def test_order_does_not_change_the_bytes(options: Upcycling):
    forwards = list(range(len(KEYS)))
    shuffled = np.random.default_rng(0).permutation(len(KEYS)).tolist()
    assert digests(forwards, options) == digests(shuffled, options)


def test_processes_do_not_change_the_bytes():
    def share(options: Upcycling) -> dict[int, str]:
        return digests(list(range(len(KEYS)))[int(os.environ["RANK"]) :: 3], options)

    for options in OPTIONS:
        together: dict[int, str] = {}
        for part in run_ranks(share, 3, options):
            together |= part
        assert together == digests(list(range(len(KEYS))), options)


def test_every_place_has_its_own_numbers():
    streams = [
        Stream(seed, kind, layer, expert)
        for seed in (0, 1)
        for kind in ("gate", "up", "down", "router")
        for layer in (0, 1, 2)
        for expert in (0, 1, 2)
    ]
    drawn = torch.stack([normal(stream, (20000,), 0.0, 1.0, "float32") for stream in streams])
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.04  # 5.6 sigma


def test_statistics_are_those_of_double_precision():
    matrix = (torch.randn(1500, 1000) * 0.02 + 1000).to(torch.float32)
    mean, std = mean_and_std(matrix)
    assert mean == pytest.approx(matrix.double().mean().item(), rel=1e-14)
    assert std == pytest.approx(matrix.double().std(correction=0).item(), rel=1e-10)
