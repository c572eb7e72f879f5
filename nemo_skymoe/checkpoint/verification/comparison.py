"""Bit-for-bit comparison of a whole model, tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.verification.bits import different
from nemo_skymoe.checkpoint.verification.recomputed import Model
from nemo_skymoe.durable.errors import CheckpointError


@dataclass
class Comparison:
    """The result of a comparison: the numbers of tensors, bytes and files that were compared, and the problems."""

    tensors: int = 0
    bytes: int = 0
    files: int = 0
    """Number of files that travel with the tensors, such as the tokenizer's."""
    problems: list[str] = field(default_factory=list)


def places(architecture: Architecture) -> Iterator[tuple[str, int | None, int | None]]:
    """Kind, layer and expert of every tensor that a model of these sizes has."""
    yield "embedding", None, None
    for layer in range(architecture.num_layers):
        for kind in ("attention_norm", "query", "key", "value", "attention_output", "mlp_norm"):
            yield kind, layer, None
        for part in ("query", "key", "value") if architecture.add_qkv_bias else ():
            yield f"{part}_bias", layer, None
        for part in ("query", "key") if architecture.qk_layernorm else ():
            yield f"{part}_norm", layer, None
        experts: list[int | None] = [None]
        if architecture.num_moe_experts is not None and _is_moe(architecture.moe_layer_freq, layer):
            yield "router", layer, None
            experts = list(range(architecture.num_moe_experts))
        for expert in experts:
            for kind in ("gate", "up", "down"):
                yield kind, layer, expert
    yield "final_norm", None, None
    if not architecture.tied_embeddings:
        yield "output", None, None


def _is_moe(frequency: int | tuple[int, ...], layer: int) -> bool:
    """Megatron's `moe_layer_freq`, read a second time: every n-th layer from the first on, or a 1 for every MoE layer."""
    return layer % frequency == 0 if isinstance(frequency, int) else frequency[layer] == 1


def said(reason: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(reason).split()) or type(reason).__name__


def compare(
    expected: Model, found: Model, architecture: Architecture, progress: Callable[[int], None] | None = None
) -> Comparison:
    """Compare every tensor of a model of these sizes; one tensor of each is in memory at a time.

    Args:
        progress: Called with the bytes compared so far.

    Raises:
        CheckpointError: `expected` has not all of its tensors.
    """
    result = Comparison()
    for kind, layer, expert in places(architecture):
        name = kind + (f" of layer {layer}" if layer is not None else "")
        name += f", expert {expert}" if expert is not None else ""
        try:
            theirs = found.tensor(kind, layer, expert)
        except KeyError as missing:
            result.problems.append(f"{name}: {missing} is missing")
            continue
        except Exception as damage:  # libraries name damage by whatever happens to fail
            result.problems.append(f"{name} cannot be read: {said(damage)}")
            continue
        try:
            ours = expected.tensor(kind, layer, expert)
        except KeyError as missing:
            raise CheckpointError(
                f"the source has no {missing}, the {name}: expected a complete model"
            ) from None
        if difference := different(ours, theirs):
            result.problems.append(f"{name}: {difference}")
        result.tensors += 1
        result.bytes += theirs.numel() * theirs.itemsize
        if progress is not None:
            progress(result.bytes)
    return result
