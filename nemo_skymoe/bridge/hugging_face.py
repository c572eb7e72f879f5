"""Bridge's conversion of `SkyworkForCausalLM`, dense and MoE under one name, as `AutoBridge` finds it.

The result is the same as that of `skymoe convert`. A folder is read by the same code, so that every layout which that
knows is read here too, and what it refuses is refused here. Unlike that it builds the model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_skymoe.bridge.from_checkpoint import provider_of_description
from nemo_skymoe.bridge.hugging_face_folder import FolderState
from nemo_skymoe.bridge.provider import SkyworkProvider
from nemo_skymoe.bridge.vocabulary import VocabularyMapping
from nemo_skymoe.checkpoint.hugging_face.configuration import from_hf_config
from nemo_skymoe.checkpoint.hugging_face.export.configuration_skywork import SkyworkConfig
from nemo_skymoe.checkpoint.hugging_face.export.modeling_skywork import SkyworkForCausalLM
from nemo_skymoe.checkpoint.hugging_face.exported_files import to_hf_config
from nemo_skymoe.checkpoint.torch_dist.names import padded_vocab_size
from nemo_skymoe.checkpoint.torch_dist.options import from_options
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.errors import CheckpointError

_LAYER, _HF_LAYER = "decoder.layers.*.", "model.layers.*."
_EXPERT = f"{_HF_LAYER}block_sparse_moe.experts.*."
_VOCABULARY = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
}
_NAMES = {
    "decoder.final_layernorm.weight": "model.norm.weight",
    f"{_LAYER}self_attention.linear_qkv.layer_norm_weight": f"{_HF_LAYER}input_layernorm.weight",
    f"{_LAYER}self_attention.linear_proj.weight": f"{_HF_LAYER}self_attn.o_proj.weight",
    f"{_LAYER}self_attention.q_layernorm.weight": f"{_HF_LAYER}self_attn.q_norm.weight",
    f"{_LAYER}self_attention.k_layernorm.weight": f"{_HF_LAYER}self_attn.k_norm.weight",
    f"{_LAYER}mlp.linear_fc1.layer_norm_weight": f"{_HF_LAYER}post_attention_layernorm.weight",
    f"{_LAYER}mlp.linear_fc2.weight": f"{_HF_LAYER}mlp.down_proj.weight",
    f"{_LAYER}mlp.experts.linear_fc2.weight*": f"{_EXPERT}w2.weight",
    f"{_LAYER}mlp.experts.local_experts.*.linear_fc2.weight": f"{_EXPERT}w2.weight",
}
"""Megatron's names and the release's. Bridge adds those of norms that are layers of their own."""
_GATED = {
    f"{_LAYER}mlp.linear_fc1.weight": (f"{_HF_LAYER}mlp.gate_proj.weight", f"{_HF_LAYER}mlp.up_proj.weight"),
    f"{_LAYER}mlp.experts.linear_fc1.weight*": (f"{_EXPERT}w1.weight", f"{_EXPERT}w3.weight"),
    f"{_LAYER}mlp.experts.local_experts.*.linear_fc1.weight": (f"{_EXPERT}w1.weight", f"{_EXPERT}w3.weight"),
}
_ROUTER = f"{_LAYER}mlp.router.weight", f"{_HF_LAYER}block_sparse_moe.gate.weight"
_QKV = f"{_LAYER}self_attention.linear_qkv"

# The package's own classes stand for those in the folder, so that its code need not be trusted.
AutoConfig.register("skywork", SkyworkConfig, exist_ok=True)
AutoModelForCausalLM.register(SkyworkConfig, SkyworkForCausalLM, exist_ok=True)


@MegatronModelBridge.register_bridge(  # type: ignore[arg-type]
    source="SkyworkForCausalLM", target=GPTModel, provider=SkyworkProvider, model_type="skywork"
)
class SkyworkBridge(MegatronModelBridge[Any, SkyworkProvider, GPTModel]):
    """Skywork-13B and Skywork-MoE. Whether it is an MoE, and in which layers, is what the configuration says."""

    def provider_bridge(self, hf_pretrained: Any) -> SkyworkProvider:
        """Return the provider of the model that a configuration describes.

        Raises:
            ConfigurationError: It describes a model that has no place here, or one that is quantised.
        """
        config = hf_pretrained.config
        description = from_hf_config(
            config.to_dict(), str(getattr(config, "name_or_path", "") or "config.json")
        )
        dtype = getattr(config, "dtype", None) or self.dtype_from_hf(config)
        return provider_of_description(
            description,
            padded_vocab_size=padded_vocab_size(description.architecture.vocab_size),
            bf16=description.dtype == "bfloat16",
            fp16=description.dtype == "float16",
            params_dtype=dtype,
        )

    @classmethod
    def megatron_to_hf_config(cls, provider: Any) -> dict[str, Any]:
        """Return the config.json of a provider's model.

        Raises:
            ConfigurationError: An option has a value that the exported model's code does not know.
        """
        options = {name: getattr(provider, name) for name in provider.__dataclass_fields__}
        activation = options["activation_func"]
        options["activation_func"] = f"{activation.__module__}.{activation.__qualname__}"
        if provider.unpadded_vocab_size is not None and not provider.should_pad_vocab:
            options["vocab_size"] = provider.unpadded_vocab_size
        dtype = "bfloat16" if provider.bf16 else "float16" if provider.fp16 else "float32"
        return to_hf_config(from_options(options, dtype, "the provider"))

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the pairs of names, for experts that run grouped and for those that run one after another."""
        tokens = getattr(self.hf_config, "vocab_size", None)
        return MegatronMappingRegistry(
            *(VocabularyMapping(ours, theirs, tokens) for ours, theirs in _VOCABULARY.items()),
            *(AutoMapping(ours, theirs) for ours, theirs in _NAMES.items()),
            *(GatedMLPMapping(ours, gate=gate, up=up) for ours, (gate, up) in _GATED.items()),
            *(
                QKVMapping(
                    f"{_QKV}.{part}", **{kind: f"{_HF_LAYER}self_attn.{kind}_proj.{part}" for kind in "qkv"}
                )
                for part in ("weight", "bias")
            ),
            ReplicatedMapping(*_ROUTER),
        )

    def load_weights_hf_to_megatron(
        self, hf_pretrained: Any, megatron_model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Fill the model as Bridge does. Every rank calls this.

        Raises:
            ConfigurationError: The folder is not the model that its configuration describes.
        """
        return super().load_weights_hf_to_megatron(_read(hf_pretrained), megatron_model, *args, **kwargs)

    def build_conversion_tasks(self, hf_pretrained: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return Bridge's tasks. Of a tensor that is missing on either side it only warns, and leaves it as it is.

        Raises:
            ConfigurationError: The model has a parameter that the release has not, or the source lacks a tensor.
        """
        tasks = super().build_conversion_tasks(hf_pretrained, *args, **kwargs)
        if None in tasks:
            raise ConfigurationError(
                "the model has a parameter that SkyworkForCausalLM has not, such as a gate's bias or second layer, or all"
                " experts in one tensor: expected moe_router_gate_bias=False, moe_router_two_layer_gate=False and"
                " moe_single_grouped_weight=False"
            )
        source = getattr(getattr(hf_pretrained, "state", None), "source", None)
        if source is not None:
            missing = sorted(_names(tasks) - set(source.get_all_keys()))
            if missing:
                raise CheckpointError(
                    f"'{missing[0]}' is not in '{hf_pretrained.model_name_or_path}', expected the released names: write it"
                    " in these first, with skymoe convert --to hf"
                )
        return tasks


def _names(tasks: Iterable[Any]) -> set[str]:
    names: set[str] = set()
    for task in tasks:
        theirs: str | Mapping[str, str] = task.mapping.hf_param
        names |= {theirs} if isinstance(theirs, str) else set(theirs.values())
    return names


def _read(hf_pretrained: Any) -> Any:
    """Return what Bridge reads the weights from: a local folder through our own reader, anything else as it is."""
    folder = getattr(hf_pretrained, "model_name_or_path", None)
    loaded: Mapping[str, Tensor] | None = getattr(hf_pretrained, "_model", None)
    if loaded is not None or folder is None or not Path(folder).is_dir():
        return hf_pretrained
    state = FolderState(Path(folder))
    return SimpleNamespace(config=hf_pretrained.config, model_name_or_path=folder, state=state)
