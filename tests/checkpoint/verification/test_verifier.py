"""`verify` passes what was written rightly, and finds every bit and every mistake of a writer."""

import itertools
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import Plan, TargetOptions
from nemo_skymoe.checkpoint.hugging_face.target import HuggingFaceTarget
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.tensors.mapping import Chunk, Part
from nemo_skymoe.checkpoint.tensors.model import Key, TensorInfo, Weights
from nemo_skymoe.checkpoint.tensors.target import stored_dtypes
from nemo_skymoe.checkpoint.torch_dist.target import TorchDistTarget
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.receipt import RECEIPT
from tests.checkpoint import hf_models
from tests.checkpoint.hugging_face.test_fp8 import fp8_release
from tests.checkpoint.hugging_face.test_names import authors
from tests.checkpoint.verification.test_recomputed import INITIALISATIONS

NOISE = Upcycling(4, init="noise", noise=0.1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense base, and a specialist that differs in its MLPs."""
    folder = tmp_path_factory.mktemp("sources")
    tensors = hf_models.skywork_dense(folder / "base")
    other = hf_models.skywork_dense(folder / "other", seed=1)
    mixed = {name: other[name] if ".mlp." in name else tensor for name, tensor in tensors.items()}
    shutil.rmtree(folder / "other")
    shutil.copytree(folder / "base", folder / "other")
    for shard in (folder / "other").glob("*.safetensors"):
        held = load_file(shard)
        save_file({name: mixed[name] for name in held}, shard, metadata={"format": "pt"})
    return {name: folder / name for name in ("base", "other")}


def plan(sources: dict[str, Path], to: str, upcycling: Upcycling | None = NOISE) -> Plan:
    opened = {name: open_source(folder) for name, folder in sources.items()}
    return convert.plan(opened, TargetOptions(to), upcycling)


@pytest.fixture(scope="module", params=["hf", "nemo", "bridge"])
def written(
    request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], Path]:
    """The base, and an MoE with noise made of it."""
    base = {"base": sources["base"]}
    output = tmp_path_factory.mktemp("written") / request.param
    plan(base, request.param).run(output)
    return base, output


@pytest.mark.parametrize("to", ["hf", "nemo"])
@pytest.mark.parametrize("options", INITIALISATIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_initialisation_is_verified(
    options: dict[str, Any], to: str, sources: dict[str, Path], tmp_path: Path
):
    given = sources if options["init"] == "specialized" else {"base": sources["base"]}
    plan(given, to, Upcycling(4, seed=5, **options)).run(tmp_path / "moe")
    result = verify(given, tmp_path / "moe")
    experts = 8 if options["init"] == "granular" else 4
    assert (result.problems, result.tensors) == ([], 3 + 2 * (7 + 3 * experts))


def test_conversions_are_verified_there_and_back(sources: dict[str, Path], tmp_path: Path):
    hf_models.mistral(tmp_path / "mistral", dtype=torch.bfloat16, tie_word_embeddings=True)
    hf_models.skywork_moe(tmp_path / "moe")
    for source in (sources["base"], tmp_path / "mistral", tmp_path / "moe"):
        made = [source]
        for to in ("nemo", "bridge", "nemo", "hf"):
            plan({"base": made[-1]}, to, None).run(tmp_path / f"{source.name}.{len(made)}.{to}")
            made.append(tmp_path / f"{source.name}.{len(made)}.{to}")
        for given, result in itertools.combinations(made, 2):
            assert verify({"base": given}, result).problems == [], (given, result)
        first, last = made[1], made[3]
        weights = [path.relative_to(first) for path in first.glob("[wc]*/**/*") if path.is_file()]
        assert weights and all((first / name).read_bytes() == (last / name).read_bytes() for name in weights)


def test_eight_bits_and_the_authors_names_are_verified(tmp_path: Path):
    fp8_release(tmp_path / "fp8")
    config = hf_models.SIZES | hf_models.SKYWORK | hf_models.SKYWORK_MOE
    fused = authors(hf_models.moe_tensors(config, seed=0))
    hf_models.save(tmp_path / "authors", fused, config)
    for name in ("fp8", "authors"):
        for to in ("hf", "nemo"):
            made = tmp_path / f"{name}.{to}"
            plan({"base": tmp_path / name}, to, None).run(made)
            result = verify({"base": tmp_path / name}, made)
            assert (result.problems, result.tensors) == ([], 3 + 2 * 19), made


def test_a_flipped_bit_is_found_anywhere(written: tuple[dict[str, Path], Path], tmp_path: Path):
    given, output = written
    rng = random.Random(0)
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != RECEIPT)
    largest = sorted(files, key=lambda path: path.stat().st_size)[-12:]
    for file in [*files, *largest]:
        content = bytearray(file.read_bytes())
        position, bit = rng.randrange(len(content)), rng.randrange(8)
        content[position] ^= 1 << bit
        original = file.rename(tmp_path / "original")
        file.write_bytes(content)
        problems = verify(given, output).problems
        assert problems, f"bit {bit} of byte {position} of {file.name}"
        assert not [one for one in problems if len(one.splitlines()) != 1 or "weights_only" in one], problems
        original.replace(file)
    assert verify(given, output).problems == []


def test_other_files_are_found(written: tuple[dict[str, Path], Path]):
    given, output = written
    stray = output / "model-00009-of-00009.bin"
    stray.write_bytes(b"stray")
    assert verify(given, output).problems == [f"'{stray.name}' was not written with the rest"]
    stray.unlink()


class Changed:
    """A writer's mistake: weights that read something else than they should."""

    def __init__(self, weights: Weights, change: Callable[[Weights, Key], Tensor]):
        self.weights, self.architecture, self.change = weights, weights.architecture, change

    def keys(self) -> tuple[Key, ...]:
        return self.weights.keys()

    def info(self, key: Key) -> TensorInfo:
        return self.weights.info(key)

    def read(self, key: Key) -> Tensor:
        return self.change(self.weights, key)


def swapped_experts(weights: Weights, key: Key) -> Tensor:
    others = {1: 2, 2: 1}
    return weights.read(replace(key, expert=others.get(key.expert or 0, key.expert)))


def transposed(weights: Weights, key: Key) -> Tensor:
    tensor = weights.read(key)
    return tensor.T.contiguous() if key == Key("attention_output", 1) else tensor


def another_router(weights: Weights, key: Key) -> Tensor:
    tensor = weights.read(key)
    return tensor.flip(0) if key == Key("router", 0) else tensor


def rounded(weights: Weights, key: Key) -> Tensor:
    tensor = weights.read(key)
    return tensor + 0.0 if key.kind != "final_norm" else tensor.float().add_(0.004).to(tensor.dtype)


@pytest.mark.parametrize("to", ["hf", "nemo"])
@pytest.mark.parametrize(
    "change, kinds",
    [
        (swapped_experts, {"gate", "up", "down"}),
        (transposed, {"attention_output"}),
        (another_router, {"router"}),
        (rounded, {"final_norm"}),
    ],
)
def test_a_writers_mistake_is_found(
    change: Callable[[Weights, Key], Tensor],
    kinds: set[str],
    to: str,
    sources: dict[str, Path],
    tmp_path: Path,
):
    given = {"base": sources["base"]}
    right = plan(given, to)
    replace(right, weights=Changed(right.weights, change)).run(tmp_path / "moe")
    assert {problem.split()[0].rstrip(":") for problem in verify(given, tmp_path / "moe").problems} == kinds


def heads_in_another_order(chunk: Chunk) -> Chunk:
    """All queries, all keys, all values, as a format would have them that does not interleave."""
    if not chunk.tensor.endswith("linear_qkv.weight"):
        return chunk
    kinds = ("query", "key", "value")
    parts = sorted(chunk.parts, key=lambda part: kinds.index(part.key.kind) if part.key else 0)
    return replace(chunk, parts=tuple(parts))


def gate_below_up(chunk: Chunk) -> Chunk:
    return replace(chunk, parts=chunk.parts[::-1]) if "linear_fc1.weight" in chunk.tensor else chunk


def padding_before(chunk: Chunk) -> Chunk:
    return replace(chunk, parts=chunk.parts[::-1]) if "embedding" in chunk.tensor else chunk


def names_of_gate_and_up(chunk: Chunk) -> Chunk:
    others = {".w1.": ".w3.", ".w3.": ".w1."}
    for ours, theirs in others.items():
        if ours in chunk.tensor:
            return replace(chunk, tensor=chunk.tensor.replace(ours, theirs))
    return chunk


@pytest.mark.parametrize(
    "to, change, kinds",
    [
        ("nemo", heads_in_another_order, {"query", "key", "value"}),
        ("nemo", gate_below_up, {"gate", "up"}),
        ("nemo", padding_before, {"embedding"}),
        ("hf", names_of_gate_and_up, {"gate", "up"}),
    ],
)
def test_a_wrong_table_is_found(
    to: str, change: Callable[[Chunk], Chunk], kinds: set[str], sources: dict[str, Path], tmp_path: Path
):
    given = {"base": sources["base"]}
    right = plan(given, to)
    chunks = [change(chunk) for chunk in right.target.chunks]
    dtypes, extras = stored_dtypes(chunks, right.weights), right.target.extras
    target: Any = (
        HuggingFaceTarget(chunks, dtypes, extras=extras)
        if isinstance(right.target, HuggingFaceTarget)
        else TorchDistTarget(chunks, dtypes, right.target.extra_states, extras=extras)  # type: ignore[attr-defined]
    )
    replace(right, target=target).run(tmp_path / "moe")
    assert {problem.split()[0].rstrip(":") for problem in verify(given, tmp_path / "moe").problems} == kinds


def test_padding_that_is_not_zero_is_found(sources: dict[str, Path], tmp_path: Path):
    given = {"base": sources["base"]}
    right = plan(given, "nemo")
    output = tmp_path / "moe"
    padded = TensorInfo((512, 64), "bfloat16")

    class Padded(Changed):
        """Claims the padded vocabulary as its own."""

        def info(self, key: Key) -> TensorInfo:
            return padded if key.kind == "output" else self.weights.info(key)

    def ones(weights: Weights, key: Key) -> Tensor:
        tensor = weights.read(key)
        return torch.cat((tensor, tensor.new_ones(93, 64))) if key.kind == "output" else tensor

    def whole(chunk: Chunk) -> Chunk:
        return replace(chunk, parts=(Part(Key("output"), 0, 512),)) if "output" in chunk.tensor else chunk

    target: Any = right.target
    chunks = [whole(chunk) for chunk in target.chunks]
    wrong = TorchDistTarget(chunks, target.dtypes, target.extra_states, target.extras)
    replace(right, weights=Padded(right.weights, ones), target=wrong).run(output)
    assert verify(given, output).problems == ["output: rows from 419 are padding, expected zeros"]


@pytest.mark.parametrize("to", ["hf", "nemo"])
def test_a_wrong_configuration_is_found(to: str, sources: dict[str, Path], tmp_path: Path):
    source = open_source(sources["base"])
    wrong = replace(source, description=replace(source.description, rope_theta=500000.0))
    convert.plan({"base": wrong}, TargetOptions(to), NOISE).run(tmp_path / "moe")
    problems = verify({"base": sources["base"]}, tmp_path / "moe").problems
    assert problems == ["the configuration's rope_theta is 500000.0, expected 10000.0"]


def test_another_source_is_found(written: tuple[dict[str, Path], Path], sources: dict[str, Path]):
    problems = verify({"base": sources["other"]}, written[1]).problems
    assert {problem.split()[0] for problem in problems} == {"gate", "up", "down"}


def test_what_cannot_be_verified_is_refused(written: tuple[dict[str, Path], Path], sources: dict[str, Path]):
    with pytest.raises(ConfigurationError, match="expected a folder that skymoe wrote"):
        verify(written[0], sources["base"])
    with pytest.raises(ConfigurationError, match="the receipt names the sources base, given are base, other"):
        verify(sources, written[1])
