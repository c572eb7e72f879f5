"""Figure 1 (section 3): the four starts of an 8-expert MoE, their learning rates and their final losses.

The dense model has 0.3B parameters and saw 300B tokens. Losses and similarities are read off the figure, to about a
pixel. The tokens of an MoE are counted from its own start.
"""

from dataclasses import dataclass

from nemo_skymoe.experiments import figure_1

DENSE_MAX_LR, DENSE_MIN_LR = figure_1.DENSE.max_lr, figure_1.DENSE.min_lr
DENSE = figure_1.DENSE.architecture
"""The dense model whose learning rates the figure has."""


@dataclass(frozen=True)
class Start:
    """One curve of Figure 1. Every cosine ends at the dense model's last learning rate."""

    name: str
    max_lr: float
    shape: str
    """`cosine` or `constant`."""
    losses: dict[str, float]
    """Loss at the end of a budget of `100B` or `300B` tokens."""
    similarity: float
    """Similarity of the experts at the end: 1 for copies, 0 from scratch."""


def _start(name: str, start: str, losses: dict[str, float], similarity: float) -> Start:
    chosen = figure_1.STARTS[start]
    return Start(name, chosen.max_lr, chosen.lr_shape, losses, similarity)


SCRATCH = _start("from scratch", "scratch", {"100B": 2.265, "300B": 2.200}, 0.0)
EARLY = _start("upcycled after 100B tokens", "100b", {"100B": 2.258, "300B": 2.235}, 0.075)
FINISHED_CONSTANT = _start("upcycled after 300B tokens", "300b", {"100B": 2.285, "300B": 2.248}, 0.23)
FINISHED = _start("upcycled after 300B tokens, higher rate", "300b_high_lr", {"300B": 2.228}, 0.15)
STARTS = (SCRATCH, EARLY, FINISHED_CONSTANT, FINISHED)


MINIATURE = {"2/3": ("0.400", "0.590"), "twice": ("0.113", "0.209")}
"""The least and the most nats per token by which the upcycled models ended below the one from scratch, at each of the
two costs, in this project's miniature of the figure (benchmarks/paper/results/figure1.md, three seeds)."""


@dataclass(frozen=True)
class Schedule:
    """A learning rate over the MoE's training, relative to that of its dense model. The report gives no warm-up."""

    start: Start
    peak: str
    """The highest rate in words, as a proportion of the dense model's."""
    max_lr: float | None
    """The highest rate; None if the dense model's rates are not known, because a model of another size gives no basis
    for them."""
    min_lr: float | None

    def __str__(self) -> str:
        numbers = "" if self.max_lr is None else f" ({self.max_lr:g} to {self.min_lr:g})"
        return f"{self.start.shape} from {self.peak} to its last rate{numbers}"


Rates = tuple[float, float]
"""Peak and last learning rate of a dense model."""


def scratch_schedule(dense: Rates | None) -> Schedule:
    """Return the schedule of the dense model itself, as in Figure 1."""
    return Schedule(SCRATCH, "the dense model's peak", *(dense or (None, None)))


def upcycled_schedule(dense: Rates | None, *, finished: bool) -> Schedule:
    """Return the schedule for a dense checkpoint at the end of its own schedule, or for one before it.

    Rates are in Figure 1's proportion to the dense model's: 0.6 of its peak before the end. At the end they are 4 times
    its last rate, because the constant last rate ended worse, with experts that stayed more alike. They are never above
    the dense model's peak.
    """
    of_peak, of_last = EARLY.max_lr / DENSE_MAX_LR, FINISHED.max_lr / DENSE_MIN_LR
    if not finished:
        words = f"{of_peak:g} of the dense model's peak"
        return Schedule(EARLY, words, *((of_peak * dense[0], dense[1]) if dense else (None, None)))
    words = f"{of_last:g} times the dense model's last rate, at most its peak,"
    return Schedule(
        FINISHED, words, *((min(dense[0], of_last * dense[1]), dense[1]) if dense else (None, None))
    )
