"""Cures of Bridge's import and adapters where Transformer Engine is absent, and what Bridge has to be told of this package.

All of it happens on import, before any other module here imports Bridge.
"""

from nemo_skymoe.patches import bridge_lora_without_te, bridge_without_te, unified_memory

unified_memory.apply()
bridge_without_te.apply()

from megatron.bridge.utils import instantiate_utils  # noqa: E402

bridge_lora_without_te.apply()

TARGETS = (
    "nemo_skymoe.bridge.checkpoint.SkyworkCheckpointManager",
    "nemo_skymoe.bridge.data.CorpusConfig",
    "nemo_skymoe.bridge.learning_rate.ExpertLearningRate",
    "nemo_skymoe.bridge.logger.SkyworkLoggerConfig",
    "nemo_skymoe.bridge.provider.SkyworkProvider",
    "nemo_skymoe.bridge.provider.skywork_layer_spec",
    "nemo_skymoe.bridge.schedule.SkyworkSchedulerConfig",
    "nemo_skymoe.bridge.tokenizer.beside_the_weights",
)
"""All that a checkpoint's `run_config.yaml` may name of this package. Bridge makes nothing that it was not told of."""

for _target in TARGETS:
    instantiate_utils.target_allowlist.add_exact(_target)

from nemo_skymoe.bridge import hugging_face  # noqa: E402, F401 (AutoBridge finds what has been imported)
