"""Many cases of one claim in one test: an id each would cost more than the cases do."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

Test = Callable[..., None]
Case = dict[str, Any]


def every(
    cases: Iterable[Mapping[str, Any]] | None = None, /, **values: Iterable[Any]
) -> Callable[[Test], Test]:
    """Make one test of many cases, as `pytest.mark.parametrize` makes many tests.

    Every case runs, and every case that fails is named. Fixtures stay arguments of the test and are made once, except that
    each case has a `tmp_path` and a `monkeypatch` of its own. A case that is skipped does not skip the others.

    Args:
        cases: The arguments of each case, by name.
        values: The values of each argument: the cases are all combinations of them, with each of `cases` where both are given.
    """
    products = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    combinations = [
        {**case, **product} for case in ([{}] if cases is None else cases) for product in products
    ]
    assert combinations, "a test without a case proves nothing"

    def decorate(test: Test) -> Test:
        def run(**fixtures: Any) -> None:
            _run(test, combinations, fixtures)

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in combinations[0]]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorate


def _run(test: Test, cases: list[Case], fixtures: Mapping[str, Any]) -> None:
    failures: list[BaseException] = []
    skipped: list[BaseException] = []
    for number, case in enumerate(cases):
        try:
            with ExitStack() as ends:
                test(**case, **_own(fixtures, number, ends))
        except pytest.skip.Exception as reason:
            skipped.append(reason)
        except (Exception, pytest.fail.Exception) as failure:
            failure.add_note(f"case: {case}")
            failures.append(failure)
    if len(failures) > 1:
        raise BaseExceptionGroup(f"{len(failures)} of {len(cases)} cases failed", failures)
    if failures or len(skipped) == len(cases):
        raise [*failures, *skipped][0]


def _own(fixtures: Mapping[str, Any], number: int, ends: ExitStack) -> Case:
    """The fixtures, with a folder and with patches that one case alone has."""
    own = dict(fixtures)
    if "tmp_path" in own:
        own["tmp_path"] = own["tmp_path"] / f"case{number}"
        own["tmp_path"].mkdir()
    if "monkeypatch" in own:
        own["monkeypatch"] = ends.enter_context(pytest.MonkeyPatch.context())
    return own
