# training
# skywork_moe_tiny_pretrain_2rank_cpu_fp32_config: 1 x 2 = 2 ranks, PP 1 x TP 2 x DP 1, EP 2
# One hardware queue: kernels start in launch order, so that tensor-parallel messages overlap with compute.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Experts get another number of tokens every step; without this the allocator's memory fragments.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# Buffers of finished messages are freed at once; else many micro-batches' stay allocated.
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
# Data loaders fork; tokenizers' threads do not survive that.
export TOKENIZERS_PARALLELISM=False
# Files come from the mounts: 1536 ranks do not ask the Hub for them.
export HF_HUB_OFFLINE=1
export TORCH_CUDA_ARCH_LIST=8.0
export CUDA_HOME=/nonexistent
/venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 --tee 3 -m nemo_skymoe.bridge --recipe skywork_moe_tiny_pretrain_2rank_cpu_fp32_config
