"""The options of Skywork-MoE, which are plain values mixed into Megatron's and NeMo's configuration classes.

An option exists once, here, under a name in Megatron's style. Every bad value is refused here by that name.
"""

import math
from dataclasses import dataclass
from typing import Any, Optional

from nemo_skymoe import option_values, unfit_options
from nemo_skymoe.dispatchers import DISPATCHERS, fitting
from nemo_skymoe.durable.errors import ConfigurationError

AUX_LOSS_FORMS = ("switch", "square")
CAPACITY_SCOPES = ("rank", "edp")
EDP_DISPATCHERS = ("auto", *DISPATCHERS)
LOGIT_NORM_SCALES = (0.01, 100.0)
LOGIT_NORM_EPS = (1e-12, 0.01)


@dataclass
class SkyworkOptions:
    """Options of Skywork-MoE (arXiv 2406.06563) on top of a Megatron `TransformerConfig`.

    Mix it in *before* the configuration class: `class MyConfig(SkyworkOptions, TransformerConfig)`. `__post_init__` may
    run any number of times, because NeMo calls it again after setting the parallel sizes.

    Raises:
        ConfigurationError: A value cannot work. The message names the option and what was expected.
    """

    moe_router_logit_norm_scale: Optional[float] = 1.0
    """lambda of eq. (6): the standard deviation of a token's gating logits after normalisation. None turns it off."""
    moe_router_logit_norm_correction: int = 1
    """1 takes the sample's standard deviation, as the released model does; 0 takes the population's (eq. 6 as written).
    """
    moe_router_logit_norm_eps: float = 1e-6
    """A token whose logits have a standard deviation of at most this counts as one with equal logits. Its gate is
    uniform, and its gradients are finite."""
    moe_router_gate_bias: bool = False
    """Adds the bias of eq. (1) to the gate, starting at zero. The released model has none."""
    moe_router_two_layer_gate: bool = False
    """Uses the gate of the authors' later code, W2 tanh(W1 x), with W1 [8 n, hidden] and W2 [n, 8 n] for n experts."""
    moe_router_telemetry: bool = True
    """Observes the router in training: drop rate, load, entropy and gate ratios (`moe.telemetry.LayerMetrics`)."""

    moe_aux_loss_form: str = "switch"
    """"switch" is Megatron's n * sum_j f_j P_j; "square" is the report's eq. (4), sum_j (1/n - P_j)^2. At equal
    coefficients and balanced load the gradient of "switch" is n/2 times larger."""
    moe_adaptive_aux_loss: bool = True
    """Gives every MoE layer its own coefficient, which follows the layer's token drop rate (eq. 7-9)."""
    moe_adaptive_aux_loss_sensitivity: float = 0.2
    """xi: the coefficient per unit of drop rate."""
    moe_adaptive_aux_loss_maximum: float = 0.01
    """alpha_max: the largest coefficient."""
    moe_adaptive_aux_loss_smoothing: float = 0.99
    """beta: the weight of the previous coefficient."""
    moe_adaptive_aux_loss_initial: Optional[float] = None
    """alpha_0: the first coefficient, which the report does not give. None means alpha_max, where its Figure 4 starts.
    """
    moe_nominal_capacity_factor: float = 1.25
    """Capacity factor of the *virtual* drop rate, which is used if training is dropless."""

    moe_edp: bool = False
    """Expert Data Parallelism (appendix B.1): the expert-parallel group is the tensor-parallel group. Megatron uses the
    letters EDP for something else, the size of the expert-data-parallel group."""
    edp_dispatcher: str = "auto"
    """Token dispatcher under EDP. Without sequence parallelism it is "replicated", which dispatches nothing and
    combines in one all-reduce. With sequence parallelism it is "allgather" or "alltoall". "auto" takes the one that
    sends the fewest bytes."""
    edp_overlap: bool = False
    """Exchanges a micro-batch under EDP in two halves, of which one travels while the experts compute the other."""
    moe_capacity_scope: str = "rank"
    """Tokens over which an expert's capacity is counted: those of a "rank", or of the "edp" group."""
    edp_replica_check_interval: int = 0
    """Forward passes of a layer between two comparisons of the routing of the "replicated" dispatcher's ranks; 0 for
    never."""

    differs_from_checkpoint: Optional[list[str]] = None
    """The options in which the model is another on purpose than the checkpoint that it starts from, such as
    ["rotary_base"] for a longer context. Any other option that decides what the model computes has to be the checkpoint's.
    """

    def __post_init__(self) -> None:
        _refuse(option_values.wrong_type(self, SkyworkOptions) or option_values.wrong_size(self))
        self._check_choices()
        self._check_ranges()
        self._check_moe()
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            try:
                parent.__post_init__()
            except (AssertionError, ImportError, ValueError) as reason:
                raise ConfigurationError(unfit_options.in_our_words(self, str(reason))) from reason
        # The check runs again, because Megatron turns options into others: `moe_router_topk_limited_devices` becomes
        # groups of experts.
        self._check_moe()
        if getattr(self, "num_moe_experts", None):
            self._check_parallelism()

    def _check_choices(self) -> None:
        for option, choices in (
            ("moe_aux_loss_form", AUX_LOSS_FORMS),
            ("edp_dispatcher", EDP_DISPATCHERS),
            ("moe_capacity_scope", CAPACITY_SCOPES),
            ("moe_router_logit_norm_correction", (0, 1)),
        ):
            value = getattr(self, option)
            if value not in choices:
                raise ConfigurationError(
                    f"{option} is {value!r}, expected one of {', '.join(map(str, choices))}"
                )
        changes: Any = self.differs_from_checkpoint
        if changes is not None and not (
            isinstance(changes, list | tuple) and all(isinstance(one, str) for one in changes)
        ):
            raise ConfigurationError(
                f"differs_from_checkpoint is {changes!r}, expected a list of options, such as ['rotary_base']"
            )

    def _check_ranges(self) -> None:
        maximum = self.moe_adaptive_aux_loss_maximum
        for option, (least, most), otherwise in (
            ("moe_router_logit_norm_scale", LOGIT_NORM_SCALES, "the gate is uniform or one-hot"),
            ("moe_router_logit_norm_eps", LOGIT_NORM_EPS, "the gate is uniform"),
        ):
            value = getattr(self, option)
            if value is not None and not least <= value <= most:
                raise ConfigurationError(
                    f"{option} is {value}, expected a finite number above 0, from {least:g} to {most:g}: beyond,"
                    f" {otherwise} and the router does not learn"
                )
        for option, least, most in (
            ("moe_adaptive_aux_loss_sensitivity", 0.0, math.inf),
            ("moe_adaptive_aux_loss_maximum", 0.0, math.inf),
            ("moe_nominal_capacity_factor", 0.0, math.inf),
        ):
            value = getattr(self, option)
            if value is not None and not least < value < most:
                raise ConfigurationError(f"{option} is {value}, expected a finite number above {least:g}")
        if self.edp_replica_check_interval < 0:
            raise ConfigurationError(
                f"edp_replica_check_interval is {self.edp_replica_check_interval}, expected 0 (never) or a count"
            )
        if not 0.0 <= self.moe_adaptive_aux_loss_smoothing < 1.0:
            raise ConfigurationError(
                f"moe_adaptive_aux_loss_smoothing is {self.moe_adaptive_aux_loss_smoothing}, expected 0 <= beta < 1"
            )
        initial = self.moe_adaptive_aux_loss_initial
        if initial is not None and not 0.0 <= initial <= maximum:
            raise ConfigurationError(
                f"moe_adaptive_aux_loss_initial is {initial}, expected 0 <= alpha_0 <= moe_adaptive_aux_loss_maximum"
                f" = {maximum}"
            )

    def _check_moe(self) -> None:
        if getattr(self, "num_moe_experts", None) is None:
            return
        _refuse(option_values.wrong_moe_value(self))
        _refuse(unfit_options.unfit_for_router(self))
        self._check_router()

    def _check_router(self) -> None:
        config: Any = self
        experts, topk = config.num_moe_experts, config.moe_router_topk
        if topk > experts:
            raise ConfigurationError(
                f"moe_router_topk is {topk}, expected at most num_moe_experts = {experts}"
            )
        if experts == 1:
            raise ConfigurationError(
                "num_moe_experts is 1, expected 2 or more: a router of one expert has nothing to choose and gets no"
                " gradient"
            )
        if experts == 2 and self.moe_router_logit_norm_scale is not None:
            raise ConfigurationError(
                "num_moe_experts=2 with moe_router_logit_norm_scale: two normalised logits are always the same two"
                " numbers and the router gets no gradient; expected 3 or more experts, or"
                " moe_router_logit_norm_scale=None"
            )
        if config.moe_router_score_function != "softmax":
            raise ConfigurationError(
                f"moe_router_score_function is {config.moe_router_score_function!r}, expected 'softmax' (eq. 1)"
            )
        if topk == 1 and not config.moe_router_pre_softmax:
            raise ConfigurationError(
                "moe_router_topk=1 with renormalised weights (eq. 2) gives every token weight 1 and the router no"
                " gradient; set moe_router_topk=2 or moe_router_pre_softmax=True"
            )
        if config.moe_apply_probs_on_input and topk > 1:
            raise ConfigurationError(
                f"moe_apply_probs_on_input=True needs moe_router_topk=1, got {topk}: expected False"
            )
        if self.moe_router_two_layer_gate and config.init_method_std == 0:
            raise ConfigurationError(
                "init_method_std is 0 with moe_router_two_layer_gate: where both of its matrices are zero neither gets a"
                " gradient; expected a number above 0"
            )
        groups = {
            option: getattr(config, option)
            for option in (
                "moe_router_group_topk",
                "moe_router_num_groups",
                "moe_router_topk_limited_devices",
            )
            if getattr(config, option, None)
        }
        if groups:
            given = " and ".join(f"{option} is {value}" for option, value in groups.items())
            raise ConfigurationError(f"{given}, expected None: the report's top-k is over all experts")
        if getattr(config, "mtp_num_layers", None):
            raise ConfigurationError(
                f"mtp_num_layers is {config.mtp_num_layers}, expected None: multi-token prediction adds MoE layers that"
                " the coefficients and the telemetry, kept by layer number, would take for others"
            )
        self._check_balancing()

    def _check_balancing(self) -> None:
        config: Any = self
        kind = config.moe_router_load_balancing_type
        if "sinkhorn" in kind:
            raise ConfigurationError(
                "moe_router_load_balancing_type='sinkhorn' replaces the report's gate (eq. 1-2), and in Megatron it"
                " does not support an auxiliary loss; expected 'aux_loss'"
            )
        if self.moe_aux_loss_form == "square" and "aux_loss" not in (
            [kind] if isinstance(kind, str) else kind
        ):
            raise ConfigurationError(
                f"moe_aux_loss_form='square' (eq. 4) is a form of moe_router_load_balancing_type='aux_loss', got {kind!r}"
            )
        if not self.moe_adaptive_aux_loss:
            return
        if kind != "aux_loss":
            raise ConfigurationError(
                f"moe_adaptive_aux_loss needs moe_router_load_balancing_type='aux_loss', got {kind!r}"
            )
        if config.moe_router_force_load_balancing:
            raise ConfigurationError(
                "moe_adaptive_aux_loss follows the drop rate of a router that moe_router_force_load_balancing=True"
                " replaces by random numbers, as benchmarks do: expected one of them to be False"
            )
        if not self.moe_router_telemetry:
            raise ConfigurationError(
                "moe_adaptive_aux_loss follows the drop rate that moe_router_telemetry=False does not measure"
            )

    def _check_parallelism(self) -> None:
        config: Any = self
        experts = config.num_moe_experts
        if experts % config.expert_model_parallel_size:
            raise ConfigurationError(
                f"num_moe_experts is {experts}, expected a multiple of expert_model_parallel_size ="
                f" {config.expert_model_parallel_size}"
            )
        self._check_cuda_graphs()
        if self.moe_edp:
            self._check_edp()
            self._check_edp_dispatcher()
            return
        self._check_whole_experts()
        if self.edp_dispatcher != "auto" or self.moe_capacity_scope != "rank" or self.edp_overlap:
            raise ConfigurationError(
                f"edp_dispatcher={self.edp_dispatcher!r}, edp_overlap={self.edp_overlap} and"
                f" moe_capacity_scope={self.moe_capacity_scope!r} take effect under EDP only: set moe_edp=True, or leave"
                " them at 'auto', False and 'rank'"
            )

    def _check_cuda_graphs(self) -> None:
        config: Any = self
        captured = getattr(config, "cuda_graph_impl", "none") != "none" or any(
            getattr(config, option, False) for option in ("enable_cuda_graph", "external_cuda_graph")
        )
        ours = [
            name
            for name in ("moe_adaptive_aux_loss", "moe_router_telemetry", "moe_edp")
            if getattr(self, name)
        ]
        if not (captured and ours):
            return
        # megatron-core 0.18 renames the option, and empties the old one.
        option = "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope"
        scope = getattr(config, option) or []
        parts = {getattr(part, "name", part) for part in ([scope] if isinstance(scope, str) else scope)}
        if not parts or not parts <= {"attn", "mlp"}:
            raise ConfigurationError(
                f"{ours[0]} is True, and what it does in Python in every step would not happen in a captured CUDA graph:"
                f" {option} is {scope!r}, expected 'attn'"
            )

    def _check_whole_experts(self) -> None:
        config: Any = self
        tensor, within = config.tensor_model_parallel_size, config.expert_tensor_parallel_size
        if config.expert_model_parallel_size == 1 and within not in (None, tensor):
            raise ConfigurationError(
                f"expert_tensor_parallel_size is {within} with tensor_model_parallel_size={tensor} and"
                " expert_model_parallel_size=1: Megatron reduces the gradients of experts over the ranks of attention"
                f" unless experts are spread over ranks; expected expert_tensor_parallel_size={tensor}, or"
                " expert_model_parallel_size above 1"
            )

    def check_training(self) -> None:
        """Refuse a layout that can serve but not train. Only the caller knows which of them it is going to do.

        Raises:
            ConfigurationError: Tensor parallelism is on, with neither sequence parallelism nor EDP.
        """
        config: Any = self
        if (
            getattr(config, "num_moe_experts", None)
            and config.tensor_model_parallel_size > 1
            and not config.sequence_parallel
            and not self.moe_edp
        ):
            raise ConfigurationError(
                f"sequence_parallel is False with tensor_model_parallel_size={config.tensor_model_parallel_size}:"
                " Megatron's experts do not train on tokens that every tensor-parallel rank holds; expected"
                " sequence_parallel=True, or moe_edp=True"
            )

    def _check_edp(self) -> None:
        config: Any = self
        tensor, expert = config.tensor_model_parallel_size, config.expert_model_parallel_size
        if expert != tensor:
            raise ConfigurationError(
                f"moe_edp makes the expert group the tensor-parallel group: expert_model_parallel_size is {expert},"
                f" expected tensor_model_parallel_size = {tensor}"
            )
        if config.expert_tensor_parallel_size not in (None, 1):
            raise ConfigurationError(
                f"moe_edp keeps every expert whole: expert_tensor_parallel_size is"
                f" {config.expert_tensor_parallel_size} (Megatron's default is tensor_model_parallel_size), expected 1"
            )

    def _check_edp_dispatcher(self) -> None:
        config: Any = self
        _refuse(unfit_options.unfit_for_edp(config))
        if (
            config.moe_router_force_load_balancing
            and not config.sequence_parallel
            and config.tensor_model_parallel_size > 1
        ):
            raise ConfigurationError(
                "moe_router_force_load_balancing=True draws other random logits on every rank, where without"
                " sequence parallelism the ranks of moe_edp hold the same tokens: expected sequence_parallel=True, or"
                " moe_router_force_load_balancing=False"
            )
        if config.moe_token_dispatcher_type == "flex":
            raise ConfigurationError(
                "moe_token_dispatcher_type='flex' needs DeepEP's groups, under moe_edp expected 'allgather' or"
                " 'alltoall'; edp_dispatcher chooses what runs"
            )
        if self.moe_capacity_scope == "edp" and config.moe_expert_capacity_factor is None:
            raise ConfigurationError(
                "moe_capacity_scope='edp' says how a capacity is counted, but moe_expert_capacity_factor is None"
            )
        if self.edp_dispatcher != "auto":
            _refuse(DISPATCHERS[self.edp_dispatcher].unfit(self))
        elif not fitting(self):
            _refuse(DISPATCHERS["allgather" if config.sequence_parallel else "replicated"].unfit(self))


def _refuse(reason: str | None) -> None:
    if reason:
        raise ConfigurationError(reason)
