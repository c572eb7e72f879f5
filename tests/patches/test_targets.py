"""A patch whose target upstream no longer has ends in an error that names the target, for every patch of the CPU runtime."""

import sys

import pytest

from nemo_skymoe.patches.targets import MissingTarget, apply_rest, replace


class Owner:
    old = 1


def test_the_name_that_is_there_is_replaced() -> None:
    replace(Owner, ("new", "old"), 2)
    assert Owner.old == 2
    assert not hasattr(Owner, "new")


def test_a_missing_target_is_named() -> None:
    with pytest.raises(MissingTarget, match=r"Owner has no new or newer, .* expected a version that"):
        replace(Owner, ("new", "newer"), 2)
    with pytest.raises(MissingTarget, match=r"^tests\..*test_targets has no gone, "):
        replace(sys.modules[__name__], "gone", 2)


def test_a_substitution_that_failed_is_not_taken_for_applied() -> None:
    called: list[str] = []

    def fails() -> None:
        called.append("fails")
        replace(Owner, "newer", 2)

    substitutions = {"first": lambda: called.append("first"), "second": fails}
    applied: list[str] = []
    for _ in range(2):
        with pytest.raises(MissingTarget):
            apply_rest(substitutions, applied)
    assert applied == ["first"]
    assert called == ["first", "fails", "fails"]
