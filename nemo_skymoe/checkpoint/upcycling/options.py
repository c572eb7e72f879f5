"""The options of upcycling. Plain values: no torch."""

from dataclasses import dataclass, replace
from math import isfinite

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.durable.errors import ConfigurationError

BASE = "base"
"""Name of the source that gives everything but the MLPs."""
OWN_OPTION = {
    "copy": None,
    "noise": "noise",
    "drop": "drop_ratio",
    "granular": "granularity",
    "specialized": "expert_source",
}
"""The initialisations, each with the option that it needs and no other has."""


@dataclass(frozen=True)
class Upcycling:
    """The options by which a dense model becomes an MoE.

    Raises:
        ConfigurationError: The options do not go together. The message names the one that does not fit.
    """

    num_experts: int = 16
    """Number of experts of a layer. With `granularity` G it is the number of copies of the MLP, each of which is cut
    into G experts."""
    moe_router_topk: int = 2
    """Number of experts that see a token."""
    init: str = "copy"
    """"copy", "noise", "drop", "granular" or "specialized"."""
    seed: int = 0
    router_std: float = 0.02
    """Standard deviation of the routers' weights. It is never zero, because equal logits leave the gate no direction to
    grow in."""
    noise: float | None = None
    """Standard deviation of the noise, relative to that of the matrix to which it is added."""
    drop_ratio: float | None = None
    """Share of the intermediate dimension that is drawn anew."""
    granularity: int | None = None
    """Number of parts into which every MLP is cut, a power of two."""
    expert_source: tuple[tuple[str, int], ...] | None = None
    """Sources by name and the number of experts from each, in the order of the experts."""

    def __post_init__(self) -> None:
        self._check_own_option()
        if self.num_experts < 2:
            raise ConfigurationError(f"num_experts is {self.num_experts}, expected at least 2")
        if not 0 <= self.seed < 2**64:
            raise ConfigurationError(f"seed is {self.seed}, expected 0 to 2^64 - 1")
        if not (isfinite(self.router_std) and self.router_std > 0):
            raise ConfigurationError(f"router_std is {self.router_std}, expected more than 0")
        if self.noise is not None and not (isfinite(self.noise) and self.noise >= 0):
            raise ConfigurationError(f"noise is {self.noise}, expected at least 0")
        if self.drop_ratio is not None and not 0 <= self.drop_ratio <= 1:
            raise ConfigurationError(f"drop_ratio is {self.drop_ratio}, expected 0 to 1")
        self._check_granularity()
        self._check_expert_source()
        experts = self.num_experts * (self.granularity or 1)
        if not 1 <= self.moe_router_topk <= experts:
            raise ConfigurationError(f"moe_router_topk is {self.moe_router_topk}, expected 1 to {experts}")

    def _check_own_option(self) -> None:
        if self.init not in OWN_OPTION:
            raise ConfigurationError(f"init is '{self.init}', expected one of {', '.join(OWN_OPTION)}")
        for init, option in OWN_OPTION.items():
            if option is None:
                continue
            given = getattr(self, option) is not None
            if given and init != self.init:
                raise ConfigurationError(f"{option} belongs to init {init}, but init is {self.init}")
            if not given and init == self.init:
                raise ConfigurationError(
                    f"init is {init}, expected a value of the option {option} with it: --{option.replace('_', '-')} VALUE"
                )

    def _check_granularity(self) -> None:
        parts = self.granularity
        if parts is None:
            return
        if parts < 2 or parts & (parts - 1):
            # Any other factor would round the scaled down projection, and the function would change.
            raise ConfigurationError(f"granularity is {parts}, expected a power of two, at least 2")
        if self.moe_router_topk % parts:
            raise ConfigurationError(
                f"moe_router_topk is {self.moe_router_topk}, expected a multiple of granularity ({parts})"
            )

    def _check_expert_source(self) -> None:
        if self.expert_source is None:
            return
        names = [name for name, _ in self.expert_source]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"expert_source names a source twice: {', '.join(names)}")
        for name, count in self.expert_source:
            if count < 1:
                raise ConfigurationError(f"expert_source gives '{name}' {count} experts, expected at least 1")
        if len(self.experts()) != self.num_experts:
            raise ConfigurationError(
                f"expert_source counts {len(self.experts())} experts, expected num_experts ({self.num_experts})"
            )

    def experts(self) -> tuple[str, ...]:
        """Return the name of each expert's source, or nothing unless the MoE is specialised."""
        return tuple(name for name, count in self.expert_source or () for _ in range(count))

    def architecture(self, dense: Architecture) -> Architecture:
        """Return the sizes of the MoE.

        Raises:
            ConfigurationError: The intermediate dimension cannot be cut into `granularity` parts.
        """
        parts = self.granularity or 1
        if dense.ffn_hidden_size % parts:
            raise ConfigurationError(
                f"granularity is {parts}, expected a divisor of ffn_hidden_size ({dense.ffn_hidden_size})"
            )
        experts = dense.with_experts(self.num_experts * parts, self.moe_router_topk)
        return replace(experts, ffn_hidden_size=dense.ffn_hidden_size // parts)


def parse_expert_source(text: str) -> tuple[tuple[str, int], ...]:
    """Read `zh:3,en:3,code:1,base:1`."""
    pairs = []
    for item in text.split(","):
        name, colon, count = item.strip().partition(":")
        if not (name and colon and count.isdigit()):
            raise ConfigurationError(
                f"expert_source has '{item}', expected NAME:COUNT, as in zh:3,en:3,code:1,base:1"
            )
        pairs.append((name, int(count)))
    return tuple(pairs)
