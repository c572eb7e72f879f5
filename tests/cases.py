"""Many cases of one claim in one test: an id each would cost more than the cases do."""

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

Test = Callable[..., None]


def every(**cases: Iterable[Any]) -> Callable[[Test], Test]:
    """Make one test of all combinations of these arguments, as `pytest.mark.parametrize` makes many.

    Fixtures stay arguments of the test, and are made once. The first case that fails is named.
    """
    combinations = list(itertools.product(*cases.values()))

    def decorate(test: Test) -> Test:
        def run(**fixtures: Any) -> None:
            for values in combinations:
                case = dict(zip(cases, values, strict=True))
                try:
                    test(**case, **fixtures)
                except BaseException as error:
                    error.add_note(f"case: {case}")
                    raise

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in cases]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorate
