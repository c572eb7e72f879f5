"""A test of many cases loses none of them: each runs, and each that fails is named."""

from pathlib import Path

import pytest

from tests.cases import every


def test_every_case_runs_and_every_failure_is_named() -> None:
    seen: list[int] = []

    @every(number=range(5))
    def test(number: int) -> None:
        seen.append(number)
        assert number % 2 == 0

    with pytest.raises(BaseExceptionGroup, match="2 of 5 cases failed") as failed:
        test()
    assert seen == [0, 1, 2, 3, 4]
    notes = [error.__notes__ for error in failed.value.exceptions]
    assert notes == [["case 1: 1"], ["case 3: 3"]]


def test_a_single_failure_is_raised_as_it_is() -> None:
    @every("number", [1, 2], other="ab")
    def test(number: int, other: str) -> None:
        assert (number, other) != (2, "a")

    with pytest.raises(AssertionError) as failed:
        test()
    assert failed.value.__notes__ == ["case 2: 2 'a'"]


def test_a_skipped_case_skips_no_other() -> None:
    seen: list[int] = []

    @every(number=range(3))
    def some(number: int) -> None:
        if number == 0:
            pytest.skip("not this one")
        seen.append(number)

    some()
    assert seen == [1, 2]

    @every(number=range(3))
    def all_of_them(number: int) -> None:
        pytest.skip(f"not {number}")

    with pytest.raises(pytest.skip.Exception, match="not 0"):
        all_of_them()


@every(name=["first", "second"])
def test_each_case_has_a_folder_and_patches_of_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not hasattr(pytest, "of_one_case")
    monkeypatch.setattr(pytest, "of_one_case", name, raising=False)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").touch()
