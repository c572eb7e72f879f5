"""Mixtures: exact shares, an even order, and domains that go on from phase to phase."""

import re
from collections import Counter
from typing import Any

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.mixture import DEFAULT, Blend, parse


def test_the_reports_mixture() -> None:
    mixture = parse(DEFAULT)
    assert mixture.weights == (("en", 7), ("zh", 2), ("code", 1))
    first = [mixture.locate(sample)[0] for sample in range(10)]
    assert Counter(first) == {"en": 7, "zh": 2, "code": 1}
    assert first == [mixture.locate(sample)[0] for sample in range(990, 1000)]


@pytest.mark.parametrize(
    "mixture",
    [
        "en:0.7 zh:0.2 code:0.1",
        "en:70 zh:20 code:10",
        "en:7/10 zh:2/10 code:1/10",
        {"en": 0.7, "zh": 0.2, "code": 0.1},
    ],
)
def test_only_proportions_count(mixture: Any) -> None:
    assert parse(mixture) == parse(DEFAULT)
    assert str(parse(mixture)) == DEFAULT


@pytest.mark.parametrize("mixture", ["en:7 zh:2 code:1", "a:1 b:1", "a:13 b:1 c:86", "a:997 b:3", "one:5"])
def test_no_domain_is_ever_a_sample_from_its_share(mixture: str) -> None:
    found = parse(mixture)
    taken = Counter(dict.fromkeys(dict(found.weights), 0))
    for sample in range(2 * found.period):
        domain, position = found.locate(sample)
        assert position == taken[domain], "a sample is repeated or left out"
        taken[domain] += 1
        assert found.taken(sample + 1) == taken
        for name, weight in found.weights:
            assert abs(taken[name] - (sample + 1) * weight / found.period) <= 1


def test_a_domain_goes_on_where_the_phases_before_have_left_it() -> None:
    blend = Blend([(parse("en:7 zh:2 code:1"), 23), (parse("zh:1 new:1"), 11), (parse("en:3 zh:2"), 8)])
    seen: dict[str, list[int]] = {}
    for sample in range(len(blend)):
        domain, position = blend.locate(sample)
        seen.setdefault(domain, []).append(position)
    assert len(blend) == 42 and set(seen) == {"en", "zh", "code", "new"}
    assert all(positions == list(range(len(positions))) for positions in seen.values())
    assert blend.taken == {domain: len(positions) for domain, positions in seen.items()}
    assert {blend.locate(sample)[0] for sample in range(23, 34)} == {"zh", "new"}
    for outside in (-1, 42):
        with pytest.raises(IndexError):
            blend.locate(outside)


def test_a_phase_added_at_the_end_changes_nothing_before_it() -> None:
    phases = [(parse("a:2 b:1"), 10), (parse("b:1"), 5)]
    short, long = Blend(phases), Blend([*phases, (parse("a:1 c:9"), 100)])
    assert [short.locate(sample) for sample in range(15)] == [long.locate(sample) for sample in range(15)]


def test_history_is_what_has_begun() -> None:
    blend = Blend([(parse("a:2 b:1"), 10), (parse("b:1"), 5)])
    assert blend.history(0) == []
    assert blend.history(10) == [["a:2 b:1", 10]]
    assert blend.history(12) == [["a:2 b:1", 10], ["b:1", 2]]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("", "the mixture is '', expected one as 'en:7 zh:2 code:1'"),
        ("en", "the mixture is 'en', expected one as"),
        ({}, "the mixture is {}, expected one as"),
        (3, "the mixture is 3, expected one as"),
        ("en:1 zh:1 en:2", "the mixture 'en:1 zh:1 en:2' has the domain 'en' twice"),
        *[
            (f"en:7 zh:{weight}", f"gives 'zh' the weight {weight}, expected a positive number")
            for weight in ("0", "-2", "nan", "inf", "many", "1/0", "")
        ],
        ("en:0.3333333 zh:0.7", "repeats after 10333333 samples, expected at most 100000: round its weights"),
    ],
)
def test_weights_that_make_no_sense_are_named(mixture: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        parse(mixture)
