"""Values that the reports leave open and that several experiments share: every number here is ours, with its reason."""

VOCABULARY = 65536
"""The vocabulary of Table 2, for all models but Skywork-13B."""
SEQUENCE = 4096
"""Tokens of a sequence in the small experiments: Skywork-13B's. Figure 1's dense model was trained before the MoE's 8192."""
BATCH = 1024
"""Sequences of a step in the small experiments, 4.2M tokens: 72,000 steps in 300B tokens, a usual batch at this size."""
NODES, MICRO_BATCH = 4, 4
"""Nodes of 8 GPUs, and sequences a GPU takes at once, in the small experiments. Neither changes what is trained, except
for the tokens that an expert's capacity is counted over, which are a GPU's."""
WARMUP_STEPS = 2000
"""The warm-up of every start from scratch: that of Skywork-13B's 7B trial (2310.19341)."""
UPCYCLED_WARMUP_STEPS = 100
"""The warm-up of an upcycled start: the optimizer's moments are new, the weights are not."""
WEIGHT_DECAY, ADAM_BETAS, ADAM_EPS, CLIP_GRAD = 0.1, (0.9, 0.95), 1e-8, 1.0
"""Skywork-13B's (2310.19341), where the MoE's report is silent."""
CAPACITY_FACTOR = 1.25
"""The report's drop rates of 0.2 to 2% and its 38% MFU fit 1.1 to 1.25; 1.25 is the customary value."""

SAVE_INTERVAL, VALIDATION_INTERVAL, VALIDATION_BATCHES, LOG_INTERVAL = 1000, 1000, 32, 10
"""Steps between checkpoints, steps between validations, batches of a validation, and steps between lines of the log."""
SIMILARITY_INTERVAL = 500
"""Steps between two measurements of expert similarity, 2B tokens of the experiments; it costs a pass over the experts."""

LORA_DIM, LORA_ALPHA, LORA_LR = 8, 16, 1e-4
"""NeMo's own for Llama 3."""
FINETUNE_LR = 5e-6
"""NeMo's own for full finetuning of Llama 3 and Mixtral."""
FINETUNE_SEQUENCE, FINETUNE_BATCH, FINETUNE_STEPS = 2048, 128, 1000
"""NeMo's own, for SQuAD."""
FINETUNE_WARMUP_STEPS = 50
"""The longest warm-up of a finetuning; a shorter run warms up for a tenth of its steps."""
