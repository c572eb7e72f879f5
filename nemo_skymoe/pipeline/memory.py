"""Bytes on one GPU: weights with gradients and optimizer state, and the activations of one micro-batch.

Activations follow Korthikanti et al. (arXiv 2205.05198, section 4) for a Llama-like layer in bf16 without dropout or
biases. FlashAttention keeps no s x s tensor. A token then takes 16 h + 6 f bytes for hidden size h and MLP size f.
Tensor parallelism splits what lies inside attention and MLP, and sequence parallelism splits the rest.
"""

from dataclasses import dataclass

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.pipeline.training import Training

BF16, FP32 = 2, 4
ADAM = 12
"""Bytes of the fp32 master weight and the two moments."""
VOCABULARY_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this times the tensor-parallel size."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one block on one GPU, in the terms of `problem.Block`."""

    weights: float
    activations: float
    checkpoint: float = 0.0
    working: float = 0.0


def padded_vocabulary(model: Architecture, training: Training) -> int:
    """Return the number of rows of the embedding and of the output layer that Megatron stores."""
    multiple = VOCABULARY_MULTIPLE * training.tensor_parallel
    return -(-model.vocab_size // multiple) * multiple


def layer_parameters(model: Architecture, training: Training) -> tuple[float, float]:
    """Count the (dense, expert) parameters of one layer on one GPU.

    Raises:
        ConfigurationError: The model's layers differ. Pass one of its `layers` instead.
    """
    if model.layers_differ:
        raise ConfigurationError("the layers of this model differ: expected one of them, of its `layers`")
    tensor = training.tensor_parallel
    dense = model.attention_parameters / tensor + model.router_parameters + 2 * model.hidden_size
    if not model.num_moe_experts:
        return dense + model.expert_parameters / tensor, 0.0
    return dense, model.num_moe_experts / training.expert_parallel * model.expert_parameters


def vocabulary_parameters(model: Architecture, training: Training) -> float:
    """Count the parameters of the embedding, or of the output layer, on one GPU."""
    return padded_vocabulary(model, training) * model.hidden_size / training.tensor_parallel


def state_bytes(dense: float, expert: float, training: Training) -> float:
    """Return the bytes of weights, gradients and optimizer state of these parameters.

    The distributed optimizer splits its state of dense parameters over the data- and context-parallel ranks, and that
    of experts over the ranks with the same experts.
    """
    kept = BF16 + training.gradient_bytes
    if not training.distributed_optimizer:
        return (kept + ADAM) * (dense + expert)
    dense_optimizer = ADAM * dense / training.replicas
    return kept * (dense + expert) + dense_optimizer + ADAM * expert / training.expert_data_parallel


def embedding_footprint(model: Architecture, training: Training) -> Footprint:
    """Return the bytes of the token embedding. It keeps the token ids; its output is the first layer's input."""
    return Footprint(
        weights=state_bytes(vocabulary_parameters(model, training), 0.0, training),
        activations=8.0 * training.tokens,
    )


def layer_footprint(model: Architecture, training: Training) -> Footprint:
    """Return the bytes of a transformer layer, for a model whose layers are alike, or for one of `model.layers`."""
    hidden = BF16 * model.hidden_size * training.tokens / training.sequence_shards
    mlp = _moe_activations(model, training) if model.num_moe_experts else _mlp_activations(model, training)
    return Footprint(
        weights=state_bytes(*layer_parameters(model, training), training),
        activations=_attention_activations(model, training) + 2 * hidden + mlp,
        checkpoint=hidden,
        working=_largest_gradients(model, training),
    )


def head_footprint(model: Architecture, training: Training) -> Footprint:
    """Return the bytes of final norm, output layer and loss.

    The block keeps the fp32 softmax, and works on bf16 logits and an fp32 copy of them.
    """
    logits = training.tokens * padded_vocabulary(model, training) / training.tensor_parallel
    hidden = BF16 * model.hidden_size * training.tokens / training.sequence_shards
    return Footprint(
        weights=state_bytes(vocabulary_parameters(model, training) + model.hidden_size, 0.0, training),
        activations=2 * hidden + FP32 * logits,
        working=(BF16 + FP32) * logits,
    )


def _attention_activations(model: Architecture, training: Training) -> float:
    """Count input and output of the norm, query, key, value, the attention's output and its fp32 log-sum-exp."""
    hidden = 2 * BF16 * model.hidden_size / training.sequence_shards
    heads = (2 * model.num_attention_heads + 2 * model.query_groups) * model.head_size
    split = BF16 * heads + FP32 * model.num_attention_heads
    return training.tokens * (hidden + split / training.tensor_parallel)


def _mlp_activations(model: Architecture, training: Training) -> float:
    """Count both halves of the first product and their SwiGLU. The input is the norm's output."""
    return training.tokens * 3 * BF16 * model.ffn_hidden_size / training.tensor_parallel


def _moe_activations(model: Architecture, training: Training) -> float:
    """Count the router's fp32 logits, probabilities and map, and the tensors of its experts.

    An expert keeps a copy of each of its tokens, both halves of the first product, and their SwiGLU, which the same
    kernel weights by the gate.
    """
    experts = model.num_moe_experts or 0
    router = training.tokens / training.sequence_shards * (2 * FP32 + 1) * experts
    return router + expert_tokens(model, training) * BF16 * (model.hidden_size + 3 * model.ffn_hidden_size)


def _largest_gradients(model: Architecture, training: Training) -> float:
    """Return the most bytes that a layer's backward pass needs at once: the gradients inside its MLP."""
    tokens = expert_tokens(model, training)
    width = 3 * model.ffn_hidden_size + (model.hidden_size if model.num_moe_experts else 0)
    if not model.num_moe_experts:
        width /= training.tensor_parallel
    return BF16 * tokens * width


def expert_tokens(model: Architecture, training: Training) -> float:
    """Return the tokens that the experts of one GPU compute in one micro-batch, in balance. A dense model computes all
    tokens.

    Neither splitting experts over more GPUs nor sequence parallelism changes this number: the tokens of
    `tensor_parallel` GPUs, each k times, are spread over as many GPUs.
    """
    if not model.num_moe_experts:
        return float(training.tokens)
    assignments = model.moe_router_topk * training.capacity * training.tokens
    return assignments / training.tensor_parallel
