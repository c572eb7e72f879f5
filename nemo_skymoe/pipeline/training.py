"""The properties of a training on which time and memory depend: parallel sizes, batch, and what is switched on."""

from dataclasses import dataclass, fields

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.quantities import check_positive


@dataclass(frozen=True)
class Training:
    """Parallel sizes, sequence and batch of a training.

    The defaults are those of Megatron and of the recipes, and every command takes them from here.

    Experts are not split (`expert_tensor_parallel_size=1`). If `expert_parallel` equals `tensor_parallel`, the layout
    is the report's EDP (appendix B.1).
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    expert_parallel: int = 1
    context_parallel: int = 1
    """Ranks that share every sequence. Each has the same share of the causal attention, as Megatron splits it."""
    data_parallel: int = 1
    seq_length: int = 4096
    micro_batch_size: int = 1
    global_batch_size: int = 1
    sequence_parallel: bool = False
    capacity_factor: float | None = None
    """Capacity factor of an expert: it computes this multiple of its fair share of the tokens. None is dropless and in
    balance."""
    pad_to_capacity: bool = False
    """True if experts compute their whole capacity, empty places too (`moe_pad_expert_input_to_capacity`)."""
    distributed_optimizer: bool = True
    """True if each data-parallel rank keeps its share of the optimizer state (ZeRO-1)."""
    gradient_bytes: int = 4
    """Bytes of one gradient: 4 in fp32, 2 in bf16."""
    overlap_grad_reduce: bool = True
    """True if gradients are reduced behind the last backward, and parameters gathered behind the first forward."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ConfigurationError(f"{field.name} is {value}, expected an integer of at least 1")
        check_positive(capacity_factor=self.capacity_factor)
        if self.gradient_bytes not in (2, 4):
            raise ConfigurationError(
                f"gradient_bytes is {self.gradient_bytes}, expected 2 (bf16) or 4 (fp32)"
            )
        if self.context_parallel > 1 and self.seq_length % (2 * self.context_parallel):
            raise ConfigurationError(
                f"seq_length is {self.seq_length}, expected a multiple of 2 x context_parallel"
                f" ({self.context_parallel}): Megatron gives every rank two parts of a sequence"
            )
        samples = self.micro_batch_size * self.data_parallel
        if self.global_batch_size % samples:
            raise ConfigurationError(
                f"global_batch_size is {self.global_batch_size}, expected a multiple of micro_batch_size"
                f" ({self.micro_batch_size}) x data_parallel ({self.data_parallel}) = {samples}"
            )
        interleaved = self.virtual_pipeline > 1
        if interleaved and self.micro_batches % self.pipeline_parallel:
            raise ConfigurationError(
                f"global_batch_size {self.global_batch_size} makes {self.micro_batches} micro-batches; with"
                " virtual_pipeline above 1 Megatron expects a multiple of"
                f" pipeline_parallel ({self.pipeline_parallel})"
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step and one data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def replicas(self) -> int:
        """Number of GPUs that hold the same part of everything but the experts, and reduce its gradients."""
        return self.context_parallel * self.data_parallel

    @property
    def stage_gpus(self) -> int:
        """Number of GPUs that hold one pipeline stage."""
        return self.tensor_parallel * self.replicas

    @property
    def num_gpus(self) -> int:
        """Number of all GPUs."""
        return self.stage_gpus * self.pipeline_parallel

    @property
    def expert_data_parallel(self) -> int:
        """Number of GPUs that hold the same experts."""
        return self.stage_gpus // self.expert_parallel

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch that a context-parallel rank has."""
        return self.seq_length // self.context_parallel * self.micro_batch_size

    @property
    def sequence_shards(self) -> int:
        """Number of parts into which activations outside attention and MLP are split."""
        return self.tensor_parallel if self.sequence_parallel else 1

    @property
    def capacity(self) -> float:
        """Tokens that experts compute for each token that the router sends, in balance."""
        if self.capacity_factor is None:
            return 1.0
        return self.capacity_factor if self.pad_to_capacity else min(1.0, self.capacity_factor)

    def check(self, model: Architecture) -> None:
        """Refuse a training of `model` that cannot work.

        Raises:
            ConfigurationError: The message names the option.
        """
        tensor, expert = self.tensor_parallel, self.expert_parallel
        for name, size in (
            ("num_attention_heads", model.num_attention_heads),
            ("num_query_groups", model.query_groups),
            ("ffn_hidden_size", model.ffn_hidden_size),
        ):
            if size % tensor and not (name == "ffn_hidden_size" and model.num_moe_experts):
                raise ConfigurationError(
                    f"tensor_parallel is {tensor}, expected a divisor of {name} ({size})"
                )
        if self.sequence_parallel and self.seq_length // self.context_parallel % tensor:
            with_context = f" x context_parallel ({self.context_parallel})" * (self.context_parallel > 1)
            raise ConfigurationError(
                f"seq_length is {self.seq_length}, expected a multiple of tensor_parallel ({tensor}){with_context}"
                " with sequence_parallel"
            )
        if not model.num_moe_experts:
            self._check_dense()
        elif model.num_moe_experts % expert:
            raise ConfigurationError(
                f"expert_parallel is {expert}, expected a divisor of num_moe_experts"
                f" ({model.num_moe_experts})"
            )
        elif self.stage_gpus % expert:
            raise ConfigurationError(
                f"expert_parallel is {expert}, expected a divisor of the GPUs of a stage:"
                f" {self._of_a_stage()}"
            )
        elif tensor > 1 and not self.sequence_parallel and expert != tensor:
            raise ConfigurationError(
                f"sequence_parallel is False, expected True with tensor_parallel {tensor} and"
                f" expert_parallel {expert}; only EDP, where they are equal, works without"
            )

    def _of_a_stage(self) -> str:
        sizes = {"tensor_parallel": self.tensor_parallel, "context_parallel": self.context_parallel}
        named = {name: size for name, size in sizes.items() if size > 1 or name == "tensor_parallel"}
        named["data_parallel"] = self.data_parallel
        return " x ".join(f"{name} ({size})" for name, size in named.items())

    def _check_dense(self) -> None:
        if self.expert_parallel > 1:
            raise ConfigurationError(
                f"expert_parallel is {self.expert_parallel}, expected 1: the model is dense"
            )
        if self.capacity_factor is not None:
            raise ConfigurationError(
                f"capacity_factor is {self.capacity_factor}, expected None: the model is dense"
            )
