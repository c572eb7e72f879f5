"""`skymoe verify`: a written checkpoint against its sources, in tensors, configuration and files."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import foreign
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import describe_torch_dist
from nemo_skymoe.checkpoint.hugging_face import configuration
from nemo_skymoe.checkpoint.hugging_face.storage import open_storage
from nemo_skymoe.checkpoint.run_folder import checkpoint_of, receipt_folder
from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage
from nemo_skymoe.checkpoint.verification.comparison import Comparison, compare, said
from nemo_skymoe.checkpoint.verification.files import companion_problems, file_problems, written_receipt
from nemo_skymoe.checkpoint.verification.hugging_face_tensors import HuggingFaceModel
from nemo_skymoe.checkpoint.verification.megatron_tensors import MegatronModel
from nemo_skymoe.checkpoint.verification.recomputed import Recomputed
from nemo_skymoe.durable.errors import ConfigurationError
from nemo_skymoe.durable.receipt import RECEIPT

_SAME = (
    "rope_theta",
    "rope_scaling",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""The fields of a description that a conversion must not change."""
_TELLING = ("config.json", "weights", ".metadata")
"""Names by which a checkpoint of each form is known."""


def verify(
    sources: Mapping[str, Path],
    target: Path,
    config: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Recompute every tensor of `target` from its sources, and compare all bits.

    Args:
        sources: Folders by name, as they were given to the conversion. "base" is among them.
        target: A folder that `skymoe convert` or `skymoe upcycle` wrote, or the folder of a run, which stands for its
            last checkpoint. Its receipt names the options. Nothing else in it is trusted.
        config: A config.json for a Megatron source that does not describe itself.
        progress: Called with the bytes compared, their sum, and a word.

    Raises:
        ConfigurationError: There is no receipt, or the sources are not those that it names.
    """
    # A damaged folder of a run may not say any more which checkpoint is its last.
    written = target if (target / RECEIPT).is_file() else receipt_folder(checkpoint_of(target))
    if not (written / RECEIPT).is_file():
        _refuse_what_is_no_checkpoint(checkpoint_of(target))
    upcycling = written_receipt(written)["job"]["upcycling"]
    _check_names(sources, upcycling)
    models: dict[str, Any] = {}
    descriptions: dict[str, Description] = {}
    for name, folder in sources.items():
        models[name], descriptions[name] = _open(checkpoint_of(folder), config)
    expected = _expected(descriptions["base"], upcycling)
    try:
        target = checkpoint_of(target)
        found, description = _open(target)
    except Exception as problem:  # of a damaged folder; libraries raise whatever happens to fail
        return Comparison(problems=[f"'{target}' cannot be read: {said(problem)}", *file_problems(written)])
    result = Comparison(problems=_described(expected, description))
    recomputed = models["base"] if upcycling is None else Recomputed(models, upcycling)
    compared = compare(recomputed, found, expected.architecture, _counted(expected, progress))
    result.tensors, result.bytes = compared.tensors, compared.bytes
    result.files, beside = companion_problems(checkpoint_of(sources["base"]), target)
    result.problems += [*compared.problems, *found.problems(), *beside, *file_problems(written)]
    return result


def _open(folder: Path, config: Path | None = None) -> tuple[HuggingFaceModel | MegatronModel, Description]:
    _refuse_what_is_no_checkpoint(folder)
    # The storages refuse what is damaged, pickles, and metadata that would run code.
    if (folder / "config.json").is_file():
        open_storage(folder)
        description = configuration.read(folder)
        return HuggingFaceModel(folder, description.architecture), description
    storage = TorchDistStorage(folder)
    description = describe_torch_dist(folder, storage, config)
    return MegatronModel(folder, description.architecture), description


def _refuse_what_is_no_checkpoint(folder: Path) -> None:
    foreign.refuse_path(folder)
    is_model = any((folder / name).exists() for name in _TELLING)
    foreign.refuse_folder(folder, is_model=is_model)
    if not is_model:
        foreign.refuse_folder_of_models(folder, _TELLING)


def _check_names(sources: Mapping[str, Path], upcycling: Mapping[str, Any] | None) -> None:
    wanted = {"base", *(name for name, _ in (upcycling or {}).get("expert_source") or ())}
    if sources.keys() != wanted:
        raise ConfigurationError(
            f"the receipt names the sources {', '.join(sorted(wanted))}, given are {', '.join(sorted(sources))}"
        )


def _expected(base: Description, upcycling: Mapping[str, Any] | None) -> Description:
    """Return the description that the target must have."""
    if upcycling is None:
        return base
    parts = upcycling["granularity"] or 1
    sizes = replace(
        base.architecture,
        num_moe_experts=upcycling["num_experts"] * parts,
        moe_router_topk=upcycling["moe_router_topk"],
        ffn_hidden_size=base.architecture.ffn_hidden_size // parts,
    )
    return replace(base, architecture=sizes)


def _described(expected: Description, found: Description) -> list[str]:
    """Return the differences between two descriptions in what a model computes, one sentence each."""
    values = [(name, getattr(expected, name), getattr(found, name)) for name in _SAME]
    values += [
        (name, getattr(expected.architecture, name), getattr(found.architecture, name))
        for name in Architecture.__dataclass_fields__
        if name != "moe_router_topk" or expected.architecture.num_moe_experts
    ]
    if expected.architecture.num_moe_experts:
        values.append(("the gate's norm", _gate_scale(expected), _gate_scale(found)))
    return [
        f"the configuration's {name} is {theirs}, expected {ours}"
        for name, ours, theirs in values
        if ours != theirs
    ]


def _gate_scale(description: Description) -> float | None:
    """lambda under the sample standard deviation, which makes both definitions comparable."""
    scale, experts = description.moe_router_logit_norm_scale, description.architecture.num_moe_experts or 1
    if scale is None or description.moe_router_logit_norm_correction == 1:
        return scale
    return scale * sqrt(experts / (experts - 1))


def _counted(
    expected: Description, progress: Callable[[int, int, str], None] | None
) -> Callable[[int], None] | None:
    if progress is None:
        return None
    sizes = {"float32": 4, "float64": 8}
    total = expected.architecture.parameters * sizes.get(expected.dtype, 2)
    return lambda done: progress(done, total, "")
