"""Skywork-MoE (Table 2), 146B parameters, on the report's cluster (appendix B.3)."""

from dataclasses import replace

from nemo_skymoe.architecture import SKYWORK_MOE_146B
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.runs import Finetuning, Pretraining

PRETRAINING = Pretraining(
    name="skywork_moe_146b",
    architecture=SKYWORK_MOE_146B,
    # Table 2: the native sequence length.
    seq_length=8192,
    # Ours: Skywork-13B's, which was trained at 4096. No other is published for the step to 8192.
    rotary_base=10_000,
    # Ours: about where Figure 4 ends.
    tokens=1e12,
    # Ours: 16.8M tokens a step, Skywork-13B's batch; 64 micro-batches for each of 32 DP ranks.
    global_batch_size=2048,
    micro_batch_size=1,
    # Ours: 6e-5 is where Skywork-13B ended (2310.19341), the state that is upcycled; a tenth of it is the customary end.
    max_lr=6e-5,
    min_lr=6e-6,
    warmup_steps=choices.UPCYCLED_WARMUP_STEPS,
    # Appendix B.3: 1536 A800 as PP 12 x EDP 4 x DP 32, ZeRO-1.
    num_nodes=192,
    pipeline_parallelism=12,
    edp=4,
    # What the planner (`nemo_skymoe.pipeline.plan`) makes of this model on A800-80G; a test asks it again.
    pipeline_layout="Et*5|(t*5|)*3(t*4|)*7t*4L",
    pipeline_recompute=((0,),) * 12,
)
RECOMPUTE = [list(stage) for stage in PRETRAINING.pipeline_recompute or ()]
"""The pretraining's recomputed layers as an argument of recipes."""
LORA = Finetuning(
    name="skywork_moe_146b_finetune",
    architecture=SKYWORK_MOE_146B,
    max_steps=choices.FINETUNE_STEPS,
    seq_length=choices.FINETUNE_SEQUENCE,
    global_batch_size=choices.FINETUNE_BATCH,
    micro_batch_size=1,
    # Ours: 52 layers on one node, fewer beside the embedding and the head.
    pipeline_parallelism=8,
    pipeline_layout="Et*6|(t*7|)*4(t*6|)*2t*6L",
)
FINETUNING = replace(
    LORA,
    # Ours: PP 12 x EDP 4 x DP 2, the layout of the pretraining on a sixteenth of its nodes.
    num_nodes=12,
    pipeline_parallelism=PRETRAINING.pipeline_parallelism,
    edp=PRETRAINING.edp,
    pipeline_layout=PRETRAINING.pipeline_layout,
)
