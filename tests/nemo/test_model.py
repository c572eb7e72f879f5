"""What NeMo keeps of a configuration, from which it builds the further chunks of a virtual pipeline."""

from dataclasses import dataclass

import torch
from nemo.lightning import io
from nemo.lightning._strategy_lib import set_model_parallel_attributes
from nemo.lightning.pytorch.strategies.megatron_strategy import ParallelismConfig

from nemo_skymoe.nemo.model import SkyworkConfig, SkyworkModel

SIZES = {"num_layers": 4, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}


@dataclass
class First(SkyworkConfig):
    """Used before the class that is derived from it."""


@dataclass
class Second(First):
    pass


def test_the_parallel_sizes_are_kept_in_whatever_order_classes_are_used() -> None:
    parallelism = ParallelismConfig(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        microbatch_group_size_per_vp_stage=2,
        context_parallel_size=1,
        sequence_parallel=False,
        expert_model_parallel_size=1,
        moe_extended_tp=False,
        pipeline_dtype=torch.float32,
    )
    for kind in (SkyworkConfig, First, Second, SkyworkConfig):
        model = SkyworkModel(kind(**SIZES))
        set_model_parallel_attributes(model, parallelism)
        again = io.reinit(model).config
        assert type(again) is kind and again.num_layers == 4
        assert (again.pipeline_model_parallel_size, again.virtual_pipeline_model_parallel_size) == (2, 2), (
            kind
        )
