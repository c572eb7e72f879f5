"""The classes and functions that a checkpoint may name where torch, Megatron or NeMo will build or call them.

Everything that these frameworks write is here; none of it runs a command, imports what a file names or unpickles
anything when it is built (tokenizers open their files, and some loggers their connection). Classes of a user's own are
added by their full names in an environment variable.
"""

from __future__ import annotations

import os
import re

VARIABLE = "SKYMOE_ALLOWED_CLASSES"
"""Full names, separated by commas, that the user vouches for."""

_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
)
_STORAGES = (
    *("BFloat16", "Half", "Float", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool"),
    *("ComplexFloat", "ComplexDouble"),
)
_NUMPY_DTYPES = (
    *("Float16", "Float32", "Float64", "Bool", "Object"),
    *(f"{kind}{bits}" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
)
_PICKLED = {
    "builtins": ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "slice", "str", "tuple"),
    "collections": ("OrderedDict", "defaultdict", "deque", "Counter"),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "datetime": ("datetime", "timedelta"),
    "signal": ("Signals",),
    "io": ("BytesIO",),
    "_io": ("BytesIO",),
    "_codecs": ("encode",),
    "torch": ("Size", "device", *_DTYPES, *(f"{kind}Storage" for kind in _STORAGES)),
    "torch.storage": ("UntypedStorage", "TypedStorage", "_load_from_bytes"),
    "torch.serialization": ("_get_layout",),
    "torch.nn.parameter": ("Parameter",),
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"),
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.dtypes": tuple(f"{kind}DType" for kind in _NUMPY_DTYPES),
    "megatron.core.enums": ("ModelType", "Fp8Recipe", "Fp4Recipe"),
    "megatron.core.transformer.enums": (
        *("AttnBackend", "AttnMaskType", "AttnType", "LayerType", "ModelType", "CudaGraphScope"),
        *("CudaGraphModule", "InferenceCudaGraphScope"),
    ),
    # What megatron-core 0.17 puts in the place of torch.storage._load_from_bytes, with weights_only=True.
    "megatron.core.safe_globals": ("safe_load_from_bytes",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
    "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "lightning.pytorch.trainer.states": ("TrainerFn", "TrainerStatus", "RunningStage"),
    "transformer_engine.common.recipe": (
        *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"),
        *("Format", "_FormatHelper", "_OverrideLinearPrecision", "MMParams", "QParams"),
    ),
}  # fmt: skip
# Protocol 2 has Python 2's name of that module.
_PICKLED["__builtin__"] = _PICKLED["builtins"]
PICKLED = frozenset(f"{module}.{name}" for module, names in _PICKLED.items() for name in names)
"""`common.pt` and the byte objects of `*.distcp` name these: states of optimizer, random numbers, callbacks, FP8."""

_CONFIGURED = {
    "builtins": ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "slice", "str", "tuple"),
    "fiddle._src.config": ("Config", "BuildableTraverserMetadata"),
    "fiddle._src.partial": ("Partial",),
    "fiddle._src.casting": ("CastingMetadata",),
    "fiddle._src.history": ("HistoryEntry", "ChangeKind"),
    "nemo_run.config": ("Config", "Partial"),
    "collections": ("OrderedDict", "defaultdict"),
    "pathlib": ("Path", "PosixPath"),
    "datetime": ("timedelta",),
    "torch": ("dtype", "device", "Size", *_DTYPES),
    "torch.nn.functional": ("silu", "gelu", "relu", "tanh", "sigmoid", "softmax", "mse_loss", "cross_entropy"),
    "torch._C._nn": ("gelu",),
    "torch.nn.init": ("xavier_uniform_", "normal_", "kaiming_normal_", "zeros_"),
    "torch.distributed.checkpoint.state_dict": ("StateDictOptions",),
    "megatron.core.utils": ("init_method_normal", "scaled_init_method_normal"),
    "megatron.core.activations": ("squared_relu", "quick_gelu", "fast_gelu"),
    "megatron.core.jit": ("noop_decorator",),
    "nemo.collections.llm.fn.activation": ("openai_gelu", "quick_gelu", "squared_relu", "fast_gelu"),
    "nemo.collections.llm.gpt.model.base": (
        *("gpt_data_step", "gpt_forward_step", "default_layer_spec", "transformer_engine_layer_spec"),
        *("transformer_engine_full_layer_spec", "local_layer_spec", "torch_dtype_from_mcore_config"),
    ),
    "nemo_skymoe.nemo.corpus": ("corpus_data",),
    "nemo_skymoe.nemo.mixture": ("mixture_data",),
    "nemo_skymoe.nemo.model": ("skywork_layer_spec", "skywork_local_layer_spec"),
    "nemo_skymoe.nemo.learning_rate": ("is_expert_parameter",),
    "nemo.collections.common.tokenizers.huggingface.auto_tokenizer": ("AutoTokenizer",),
    "nemo.collections.common.tokenizers.sentencepiece_tokenizer": ("SentencePieceTokenizer",),
    "nemo.collections.common.tokenizers.tiktoken_tokenizer": ("TiktokenTokenizer",),
    "nemo.collections.common.tokenizers.bytelevel_tokenizers": ("ByteLevelTokenizer",),
    "nemo.collections.common.tokenizers.char_tokenizer": ("CharTokenizer",),
    "nemo.collections.common.tokenizers.word_tokenizer": ("WordTokenizer",),
    "nemo.collections.common.tokenizers.null_tokenizer": ("NullTokenizer",),
    "transformers.models.auto.tokenization_auto": ("AutoTokenizer",),
}  # fmt: skip
CONFIGURED = frozenset(f"{module}.{name}" for module, names in _CONFIGURED.items() for name in names)
"""`context/io.json` names these, and beside them the classes of `_PACKAGES`."""

_PACKAGES = re.compile(
    r"""(?!megatron\.core\.models\.huggingface\. | megatron\.core\.distributed\.fsdp\. | .*\.ModuleSpec$
    | nemo\.collections\.llm\.gpt\.data\.hf_dataset\.)(
    nemo_skymoe\.nemo | nemo\.collections\.llm\.(gpt|bert|t5|peft|fn)
    | nemo\.lightning\.(pytorch|io|nemo_logger|resume|data) | nemo\.lightning\.megatron_parallel
    | megatron\.core\.(transformer|optimizer|distributed|models|datasets|dist_checkpointing|enums)
    | megatron\.core\.(model_parallel_config|process_groups_config)
    | lightning\.pytorch\.(callbacks|loggers|plugins|trainer\.trainer|profilers)
    )(\.\w+)*\._?[A-Z]\w*""",
    re.VERBOSE,
)
"""Classes (names that begin with a capital letter) of models, data, strategies, optimizers and callbacks.

Those that download a model or data when they are built, or import what an argument names, are left out.
"""
_MEMBERS = re.compile(r"megatron\.core(\.\w+)*\.enums\.[A-Z]\w*\.[A-Za-z]\w*")
"""The members of Megatron's enumerations."""
_NEVER_BUILT = re.compile(
    r"megatron\.core\.datasets\..*(?<!Config) | nemo\.collections\.llm\.\w+\.data\..*Dataset", re.VERBOSE
)
"""Data modules refer to the class of a dataset. Built by a context it would open files, and unpickle some of them."""


def may_be_pickled(name: str) -> bool:
    """Say whether a pickle may refer to it."""
    return name in PICKLED or name in _vouched_for()


def may_be_configured(name: str) -> bool:
    """Say whether a context may name it."""
    return (
        name in CONFIGURED
        or _PACKAGES.fullmatch(name) is not None
        or _MEMBERS.fullmatch(name) is not None
        or name in _vouched_for()
    )


def may_be_built(name: str) -> bool:
    """Say whether a context may call it, too."""
    return may_be_configured(name) and (_NEVER_BUILT.fullmatch(name) is None or name in _vouched_for())


def is_vouched_for(name: str) -> bool:
    """Say whether the user has named it in the environment."""
    return name in _vouched_for()


def advice(name: str) -> str:
    """Return advice on a name that is not allowed."""
    return (
        f"expected only what Megatron and NeMo write; if you know where the checkpoint is from and need it, set"
        f" {VARIABLE}={name}"
    )


def _vouched_for() -> set[str]:
    return {name.strip() for name in os.environ.get(VARIABLE, "").split(",")}
