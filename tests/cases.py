"""Many cases of one claim in one test: an id each would cost more than the cases do."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

Test = Callable[..., None]


def every(
    names: str | Sequence[str] = (),
    rows: Iterable[Any] = ((),),
    /,
    *,
    ids: Iterable[str] | Callable[[Any], Any] = repr,
    **values: Iterable[Any],
) -> Callable[[Test], Test]:
    """Make one test of many cases, where `pytest.mark.parametrize` makes many tests.

    Every case runs, and every case that fails is named. Fixtures stay arguments of the test and are made once, except that
    each case has a `tmp_path` and a `monkeypatch` of its own. A case that is skipped does not skip the others.

    Args:
        names, rows, ids: As `pytest.mark.parametrize` takes them. `ids` name the cases that fail.
        values: Values of further arguments by name: a case is made of every combination of them with every row.
    """
    given = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [row if len(given) != 1 else (row,) for row in rows]
    labels = ["-".join(str(ids(value)) for value in row) for row in rows] if callable(ids) else list(ids)
    cases = [
        ((label, *map(repr, chosen)), dict(zip([*given, *values], (*row, *chosen), strict=True)))
        for label, row in zip(labels, rows, strict=True)
        for chosen in itertools.product(*values.values())
    ]
    assert cases, "a test without a case proves nothing"

    def decorate(test: Test) -> Test:
        def run(**fixtures: Any) -> None:
            _run(test, [(" ".join(filter(None, label)), case) for label, case in cases], fixtures)

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in cases[0][1]]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorate


def _run(test: Test, cases: Sequence[tuple[str, Mapping[str, Any]]], fixtures: Mapping[str, Any]) -> None:
    failures: list[BaseException] = []
    skipped: list[BaseException] = []
    for number, (label, case) in enumerate(cases):
        try:
            with ExitStack() as ends:
                test(**case, **_own(fixtures, number, ends))
        except pytest.skip.Exception as reason:
            skipped.append(reason)
        except (Exception, BaseExceptionGroup, pytest.fail.Exception) as failure:
            failure.add_note(f"case {number}: {label}")
            failures.append(failure)
    if len(failures) > 1:
        raise BaseExceptionGroup(f"{len(failures)} of {len(cases)} cases failed", failures)
    if failures or len(skipped) == len(cases):
        raise [*failures, *skipped][0]


def _own(fixtures: Mapping[str, Any], number: int, ends: ExitStack) -> dict[str, Any]:
    """The fixtures, with a folder and with patches that one case alone has."""
    own = dict(fixtures)
    if "tmp_path" in own:
        own["tmp_path"] = own["tmp_path"] / f"case{number}"
        own["tmp_path"].mkdir()
    if "monkeypatch" in own:
        own["monkeypatch"] = ends.enter_context(pytest.MonkeyPatch.context())
    return own
