"""Mixtures of domains and their phases. The number of a sample alone says which sample of which domain it is.

Nothing is drawn at random, and nothing is stored for a sample. A run finds its place from a number alone, and phases
that are added later leave the earlier ones as they were.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm

import numpy as np

from nemo_skymoe.config import ConfigurationError

DEFAULT = "en:7 zh:2 code:1"
"""The report's mixture (section 5)."""
_LONGEST_PERIOD = 100_000


@dataclass(frozen=True)
class Mixture:
    """Domains by their weights, which are whole numbers without a common divisor.

    The order repeats after `period` samples. A domain's samples are spread evenly over it: the k-th of its w samples is
    at (k + 1/2) / w of the way.
    """

    weights: tuple[tuple[str, int], ...]

    @property
    def period(self) -> int:
        """Number of samples after which every domain has had exactly its share."""
        return sum(weight for _, weight in self.weights)

    @cached_property
    def order(self) -> np.ndarray:
        """[period]: the domain of each slot, by its number in `weights`."""
        parts = [(np.arange(weight) + 0.5) / weight for _, weight in self.weights]
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return owners[np.argsort(np.concatenate(parts), kind="stable")]

    @cached_property
    def ranks(self) -> np.ndarray:
        """[period]: the number of slots before each that belong to the same domain."""
        ranks = np.empty(self.period, dtype=np.int64)
        for number, (_, weight) in enumerate(self.weights):
            ranks[self.order == number] = np.arange(weight)
        return ranks

    def locate(self, sample: int) -> tuple[str, int]:
        """Return the domain of a sample, and the number of the domain's samples before it."""
        periods, slot = divmod(sample, self.period)
        domain, weight = self.weights[self.order[slot]]
        return domain, periods * weight + int(self.ranks[slot])

    def taken(self, samples: int) -> dict[str, int]:
        """Return how many of the first `samples` samples are of each domain."""
        periods, rest = divmod(samples, self.period)
        begun = np.bincount(self.order[:rest], minlength=len(self.weights))
        return {
            domain: periods * weight + int(more)
            for (domain, weight), more in zip(self.weights, begun, strict=True)
        }

    def __str__(self) -> str:
        return " ".join(f"{domain}:{weight}" for domain, weight in self.weights)


def parse(mixture: str | Mapping[str, float]) -> Mixture:
    """Read `en:7 zh:2 code:1`, or a dictionary. Only the proportions of the weights count.

    Raises:
        ConfigurationError: There is no domain, a domain is there twice, or a weight is not a positive number of few
            digits.
    """
    if isinstance(mixture, str):
        pairs = [part.rpartition(":")[::2] for part in mixture.split()]
    elif isinstance(mixture, Mapping):
        pairs = [(str(domain), str(weight)) for domain, weight in mixture.items()]
    else:
        raise ConfigurationError(f"the mixture is {mixture!r}, expected one as '{DEFAULT}'")
    if not pairs or not all(domain for domain, _ in pairs):
        raise ConfigurationError(f"the mixture is {mixture!r}, expected one as '{DEFAULT}'")
    weights: dict[str, Fraction] = {}
    for domain, text in pairs:
        if domain in weights:
            raise ConfigurationError(f"the mixture {mixture!r} has the domain '{domain}' twice")
        weights[domain] = _weight(domain, text, mixture)
    unit = lcm(*(weight.denominator for weight in weights.values()))
    whole = [int(weight * unit) for weight in weights.values()]
    found = Mixture(tuple(zip(weights, (weight // gcd(*whole) for weight in whole), strict=True)))
    if found.period > _LONGEST_PERIOD:
        raise ConfigurationError(
            f"the mixture {mixture!r} repeats after {found.period} samples, expected at most {_LONGEST_PERIOD}: round"
            " its weights"
        )
    return found


def _weight(domain: str, text: str, mixture: object) -> Fraction:
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise ConfigurationError(
            f"the mixture {mixture!r} gives '{domain}' the weight {text}, expected a positive number"
        )
    return weight


class Blend:
    """Phases one after the other, each with a mixture. A domain continues where the phases before have left it.

    Args:
        phases: Mixture and number of samples of each phase.
    """

    def __init__(self, phases: Sequence[tuple[Mixture, int]]):
        self.phases = tuple(phases)
        self._starts = [0]
        self._before: list[dict[str, int]] = [{}]
        for mixture, samples in phases:
            self._starts.append(self._starts[-1] + samples)
            taken, before = mixture.taken(samples), self._before[-1]
            self._before.append(before | {name: before.get(name, 0) + count for name, count in taken.items()})

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def taken(self) -> dict[str, int]:
        """Number of samples of each domain in all phases."""
        return self._before[-1]

    def locate(self, sample: int) -> tuple[str, int]:
        """Return the domain of a sample, and the number of the domain's samples before it in all phases."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        phase = bisect_right(self._starts, sample) - 1
        domain, position = self.phases[phase][0].locate(sample - self._starts[phase])
        return domain, self._before[phase].get(domain, 0) + position

    def history(self, samples: int) -> list[list[str | int]]:
        """Return what the first `samples` samples were made of: mixture and number, phase by phase."""
        begun = [
            [str(mixture), min(count, samples - start)]
            for (mixture, count), start in zip(self.phases, self._starts, strict=False)
            if start < samples
        ]
        return begun
