"""The demonstration: Skywork-13B's architecture at 2M parameters, upcycled to 16 experts. All numbers are ours."""

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.experiments.runs import Demonstration, Finetuning

SKYWORK_TINY = Architecture(
    num_layers=4, hidden_size=160, ffn_hidden_size=432, num_attention_heads=4, vocab_size=2048
)
"""The dense model, with the vocabulary that `skymoe corpus` makes by default."""
SKYWORK_MOE_TINY = SKYWORK_TINY.with_experts(16)
SEQUENCE, BATCH = 256, 8

DENSE = Demonstration(
    name="skywork_tiny",
    architecture=SKYWORK_TINY,
    max_steps=300,
    seq_length=SEQUENCE,
    global_batch_size=BATCH,
    micro_batch_size=4,
    max_lr=3e-3,
    min_lr=3e-4,
    warmup_steps=20,
    num_gpus_per_node=1,
    val_check_interval=100,
    limit_val_batches=8,
    log_interval=5,
)
MOE = Demonstration(
    name="skywork_moe_tiny",
    architecture=SKYWORK_MOE_TINY,
    max_steps=300,
    seq_length=SEQUENCE,
    global_batch_size=BATCH,
    micro_batch_size=8,
    max_lr=1e-3,
    min_lr=1e-4,
    warmup_steps=20,
    num_gpus_per_node=2,
    edp=2,
    val_check_interval=100,
    limit_val_batches=8,
    log_interval=5,
    similarity_interval=20,
)


def finetuning_of(of: Demonstration) -> Finetuning:
    """Return the finetuning of a demonstration's model, on one rank."""
    return Finetuning(
        name=f"{of.name}_finetune",
        architecture=of.architecture,
        max_steps=100,
        seq_length=SEQUENCE,
        global_batch_size=BATCH,
        micro_batch_size=4,
        num_gpus_per_node=1,
        precision=of.precision,
        val_check_interval=of.val_check_interval,
        limit_val_batches=of.limit_val_batches,
        log_interval=of.log_interval,
    )
