"""Read numbers that a user gives: they are finite and in their range, or the message names the option."""

from decimal import Context

from nemo_skymoe.config import ConfigurationError

MOST = 10**18
"""This is more than anything here counts to, and small enough for every later product to be finite."""
_UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}
# A number that overflows becomes infinite, and text that is no number becomes NaN. Neither is an exception.
_DECIMAL = Context(prec=60, traps=[])


def check_positive(**values: float | None) -> None:
    """Refuse by name a value that is not finite, not above 0, or above `MOST`. None stands for a value not given."""
    for name, value in values.items():
        if value is not None and not 0 < value <= MOST:  # NaN is not in this range
            kind = "an integer of at least 1" if isinstance(value, int) else "a finite number above 0"
            raise ConfigurationError(f"{name} is {value}, expected {kind} and at most {MOST:.0e}")


def parse_tokens(name: str, text: str) -> int:
    """`300B`, `1.2T`, `3e11` as an integer. ConfigurationError: anything else, by the option's name."""
    unit = _UNITS.get(text[-1:].upper(), 1)
    count = _DECIMAL.multiply(_DECIMAL.create_decimal(text[:-1] if unit > 1 else text), unit)
    # Compared before it becomes an integer, which would never end for 1e999999.
    if not (count.is_finite() and 1 <= count <= MOST and count == int(count)):
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ConfigurationError(
            f"{name} is {shown!r}, expected a number of tokens such as 300B or 1.2T, at most {MOST:.0e}"
        )
    return int(count)
