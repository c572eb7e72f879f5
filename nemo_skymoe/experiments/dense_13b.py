"""Skywork-13B (arXiv 2310.19341), the dense model that the report upcycles."""

from nemo_skymoe.architecture import SKYWORK_13B
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.runs import Finetuning, Pretraining

PRETRAINING = Pretraining(
    name="skywork_13b",
    architecture=SKYWORK_13B,
    # 2310.19341: the released model's configuration.
    rotary_base=10_000,
    # 2310.19341: a cosine over the first 2T tokens; 2 to 3T at the constant min_lr followed.
    tokens=2e12,
    max_lr=6e-4,
    min_lr=6e-5,
    # 2310.19341: 16M tokens a step.
    seq_length=4096,
    global_batch_size=4096,
    micro_batch_size=1,
    # 2310.19341, Table 10: 512 A800 as DP 256 x PP 2, distributed optimizer, no TP.
    num_nodes=64,
    pipeline_parallelism=2,
)
FINETUNING = Finetuning(
    name="skywork_13b_finetune",
    architecture=SKYWORK_13B,
    max_steps=choices.FINETUNE_STEPS,
    seq_length=choices.FINETUNE_SEQUENCE,
    global_batch_size=choices.FINETUNE_BATCH,
    micro_batch_size=1,
    # Ours: the 13B and its gradients on two GPUs.
    pipeline_parallelism=2,
)
