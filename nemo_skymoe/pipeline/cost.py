"""The time and memory of every block of a model on given hardware, counted from first principles.

The time of a block has three parts. Matrix products and attention run at a share of the peak (`Efficiency.compute`).
The other kernels pass over memory at full bandwidth. Collectives follow. Nothing overlaps inside a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.pipeline import memory
from nemo_skymoe.pipeline.communication import Group, Links
from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.flops import causal_attention_flops
from nemo_skymoe.pipeline.hardware import Hardware
from nemo_skymoe.pipeline.memory import BF16, FP32, Footprint
from nemo_skymoe.pipeline.problem import Block, PipelineProblem
from nemo_skymoe.pipeline.training import Training


@dataclass(frozen=True)
class Work:
    """The work of one GPU for one micro-batch in one direction."""

    flops: float = 0.0
    traffic: float = 0.0
    """Bytes to and from memory by kernels that are not matrix products."""
    wire: float = 0.0
    """Seconds of collectives."""


@dataclass(frozen=True)
class CostModel:
    """The cost of `model`, trained as `training` says, on `hardware`."""

    model: Architecture
    training: Training
    hardware: Hardware
    efficiency: Efficiency

    @cached_property
    def links(self) -> Links:
        """The links of the cluster."""
        return Links(self.hardware, self.efficiency)

    @cached_property
    def tensor_group(self) -> Group:
        """The ranks that split one layer."""
        return Group(self.training.tensor_parallel)

    @cached_property
    def context_group(self) -> Group:
        """The ranks that share a sequence."""
        return Group(self.training.context_parallel, self.training.tensor_parallel)

    @cached_property
    def expert_group(self) -> Group:
        """The ranks that split the experts of one layer."""
        return Group(self.training.expert_parallel)

    def seconds(self, work: Work) -> float:
        """Return the time that `work` takes."""
        compute = work.flops / (self.hardware.peak_flops * self.efficiency.compute)
        return compute + work.traffic / self.hardware.memory_bandwidth + work.wire

    def problem(self, memory_limit: float) -> PipelineProblem:
        """Return the planner's problem. `memory_limit` is in bytes of a GPU, with the model's fixed overhead."""
        kinds = {layer: self.layer(layer) for layer in {*self.model.layers}}
        return PipelineProblem(
            blocks=(self.embedding(), *(kinds[layer] for layer in self.model.layers), self.head()),
            stages=self.training.pipeline_parallel,
            micro_batches=self.training.micro_batches,
            memory_limit=memory_limit - self.efficiency.memory_overhead,
            virtual_stages=self.training.virtual_pipeline,
            transfer=self.transfer(),
            tail=self.tail(),
        )

    def embedding(self) -> Block:
        """Return the block of the token embedding: a lookup, and a reduction if the vocabulary is split."""
        work = Work(traffic=2 * self._hidden_bytes(), wire=self._tensor_collectives(1))
        footprint = memory.embedding_footprint(self.model, self.training)
        return self._block("embedding", work, work, footprint)

    def layer(self, layer: Architecture | None = None) -> Block:
        """Return the block of a transformer layer, which is one of `model.layers`, by default the first."""
        model = layer or self.model.layers[0]
        attention_forward, attention_backward = causal_attention_flops(model, self.training.seq_length)
        matmul = 2 * self._layer_macs(model)
        tokens = self.training.tokens / self.training.tensor_parallel
        regions = 1 if model.num_moe_experts else 2
        wire = self._tensor_collectives(2 * regions) + self._dispatch(model)
        again = self._tensor_collectives(regions if self.training.sequence_parallel else 0)
        sent, sent_back = self._exchanged(model, tokens * attention_forward, tokens * attention_backward)
        forward = Work(matmul + tokens * attention_forward, self._layer_traffic(model, 1), wire + sent)
        backward = Work(
            2 * matmul + tokens * attention_backward, self._layer_traffic(model, 2), wire + again + sent_back
        )
        return self._block("layer", forward, backward, memory.layer_footprint(model, self.training))

    def head(self) -> Block:
        """Return the block of final norm, output layer and loss.

        The fp32 softmax passes over the logits three times each way.
        """
        rows = memory.padded_vocabulary(self.model, self.training)
        logits = self.training.tokens * rows / self.training.tensor_parallel
        flops = 2 * logits * self.model.hidden_size
        traffic = 3 * FP32 * logits + 2 * self._hidden_bytes()
        forward = Work(flops, traffic, self._tensor_collectives(1))
        again = 2 if self.training.sequence_parallel else 1
        backward = Work(2 * flops, traffic, self._tensor_collectives(again))
        return self._block("head", forward, backward, memory.head_footprint(self.model, self.training))

    def transfer(self) -> float:
        """Return the seconds that it takes to send a micro-batch's activations to the next stage."""
        return self.links.point_to_point(self._hidden_bytes(), self.training.stage_gpus)

    def tail(self) -> float:
        """Return the seconds of a step that reduce gradients and gather parameters, on the fullest stage of an even
        layout.

        If these overlap with compute, only the part counts that the backward, or forward, of one micro-batch does not
        cover.
        """
        count = -(-self.model.num_layers // self.training.pipeline_parallel)
        layers = self.model.layers
        return max(self._tail(layers[first : first + count]) for first in range(0, len(layers), count))

    def _tail(self, layers: Sequence[Architecture]) -> float:
        """Return the seconds of `tail` for a stage with these layers."""
        training = self.training
        parameters = [memory.layer_parameters(layer, training) for layer in layers]
        ends = 2 if training.pipeline_parallel == 1 else 1
        dense = sum(each for each, _ in parameters) + ends * memory.vocabulary_parameters(
            self.model, training
        )
        dense_group = Group(training.replicas, training.tensor_parallel)
        expert_group = Group(training.expert_data_parallel, training.expert_parallel)
        seconds = self.links.ring(dense, dense_group)
        seconds += self.links.ring(sum(each for _, each in parameters), expert_group)
        reduce = training.gradient_bytes * seconds
        gather = (BF16 if training.distributed_optimizer else training.gradient_bytes) * seconds
        if training.overlap_grad_reduce:
            kinds = {layer: self.layer(layer) for layer in {*layers}}
            reduce = max(0.0, reduce - sum(kinds[layer].backward for layer in layers))
            gather = max(0.0, gather - sum(kinds[layer].forward for layer in layers))
        return reduce + gather

    def _block(self, kind: str, forward: Work, backward: Work, footprint: Footprint) -> Block:
        return Block(
            kind,
            forward=self.seconds(forward),
            backward=self.seconds(backward),
            recompute=self.seconds(forward) if kind == "layer" else 0.0,
            **vars(footprint),
        )

    def _hidden_bytes(self) -> float:
        """Return the bytes of one GPU's part of the activations between layers."""
        return BF16 * self.model.hidden_size * self.training.tokens / self.training.sequence_shards

    def _tensor_collectives(self, count: int) -> float:
        """Return the seconds of `count` all-gathers or reduce-scatters of a micro-batch's activations.

        Sequence parallelism gathers before attention and before a dense MLP, and reduce-scatters after them. The
        backward pass does the same in reverse, and gathers the input once more for the weights' gradient. Without
        sequence parallelism an all-reduce, which is one of each, does both: after them in the forward pass, and before
        them in the backward pass.
        """
        whole = BF16 * self.model.hidden_size * self.training.tokens
        return count * self.links.ring(whole, self.tensor_group)

    def _exchanged(self, model: Architecture, forward: float, backward: float) -> tuple[float, float]:
        """Return the seconds, (forward, backward), that context-parallel ranks wait for keys and values.

        Ranks pass keys and values on in a ring while they compute attention on those that they have (`cp_comm_type`
        p2p), and only the part counts that this attention, of `forward` and `backward` FLOPs, does not cover. In the
        backward pass their gradients travel too.
        """
        training = self.training
        both = 2 * BF16 * model.query_groups * model.head_size * training.tokens / training.tensor_parallel
        travel = self.links.ring(both * training.context_parallel, self.context_group)
        computed = self.seconds(Work(forward)), self.seconds(Work(backward))
        return max(0.0, travel - computed[0]), max(0.0, 2 * travel - computed[1])

    def _layer_macs(self, model: Architecture) -> float:
        """Count the multiply-adds of one layer's matrix products, for one micro-batch on one GPU."""
        training = self.training
        macs = model.attention_parameters * training.tokens / training.tensor_parallel
        macs += model.router_parameters * training.tokens / training.sequence_shards
        mlp = model.expert_parameters * memory.expert_tokens(model, training)
        return macs + (mlp if model.num_moe_experts else mlp / training.tensor_parallel)

    def _layer_traffic(self, model: Architecture, direction: int) -> float:
        """Count the bytes that the kernels of norms, RoPE, residuals, SwiGLU and permutations read and write.

        `direction` is 1 for forward and 2 for backward. Forward counts two norms (2 h each), two residual additions (3
        h), RoPE (twice query and key) and SwiGLU (3 f). Backward counts norms (3 h), sums of gradients (3 h), RoPE (the
        same) and SwiGLU (5 f).
        """
        training = self.training
        tokens = memory.expert_tokens(model, training)
        rotated = (model.num_attention_heads + model.query_groups) * model.head_size
        passes = 10 if direction == 1 else 12
        swiglu = (3 if direction == 1 else 5) * model.ffn_hidden_size * tokens
        permuted = 0.0
        if model.num_moe_experts:
            permuted = 4 * model.hidden_size * tokens  # into experts and out of them, read and written
        else:
            swiglu /= training.tensor_parallel
        rope = 2 * BF16 * rotated * training.tokens / training.tensor_parallel
        return passes * self._hidden_bytes() + rope + BF16 * (swiglu + permuted)

    def _dispatch(self, model: Architecture) -> float:
        """Return the seconds, in either direction, that it takes to bring tokens to the experts and back.

        Under EDP without sequence parallelism every GPU has all tokens, and nothing is dispatched. Otherwise tokens are
        gathered and reduced, or dealt out to their experts and back, whichever is faster.
        """
        training = self.training
        if not model.num_moe_experts:
            return 0.0
        if not training.sequence_parallel and training.tensor_parallel > 1:
            whole = BF16 * model.hidden_size * training.tokens
            return 2 * self.links.ring(whole, self.expert_group)
        mine = self._hidden_bytes()
        gather = self.links.ring(mine * self.expert_group.size, self.expert_group)
        copies = BF16 * model.hidden_size * memory.expert_tokens(model, training)
        deal = self.links.all_to_all(copies, self.expert_group)
        return 2 * min(gather, deal)
