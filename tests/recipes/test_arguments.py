"""The signature that a recipe has for NeMo-Run, and what its function gets."""
# ruff: noqa: UP045, NeMo-Run cannot parse `X | None`.

import inspect
from typing import Any, Optional

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments.arguments import EXPERTS, Given, with_arguments
from nemo_skymoe.experiments.figure_3 import MOE
from nemo_skymoe.experiments.runs import Pretraining
from tests.recipes.factories import FACTORIES


@with_arguments(MOE, "tokens", *EXPERTS, corpus="here")
def recipe(training: Pretraining, given: Given, own: Optional[int] = None) -> Any:
    """What it does."""
    return training, given, own


def test_its_signature_is_that_of_a_function_written_by_hand() -> None:
    def by_hand(
        *,
        dir: Optional[str] = "runs",
        name: Optional[str] = None,
        corpus: str = "here",
        resume_path: Optional[str] = None,
        scale: Optional[str] = None,
        mixture: Optional[str] = None,
        phases: Optional[str] = None,
        own: Optional[int] = None,
        tokens: float = 75e9,
        edp: int = 1,
        expert_capacity_factor: Optional[float] = 1.25,
        similarity_interval: int = 500,
    ) -> Any: ...  # type: ignore[empty-body]

    assert inspect.signature(recipe) == inspect.signature(by_hand)
    assert recipe.__annotations__ == by_hand.__annotations__
    assert (recipe.__name__, recipe.__doc__) == ("recipe", "What it does.")


def test_its_function_gets_the_sizes_that_were_given_and_the_experiments_own() -> None:
    training, given, own = recipe(edp=2, name="mine", own=3)
    assert (training.edp, training.tokens, training.max_lr) == (2, MOE.tokens, MOE.max_lr)
    assert (given.name, given.corpus, given.scale, own) == ("mine", "here", None, 3)


def test_an_argument_that_it_has_not_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'token'"):
        recipe(token=1)
    with pytest.raises(ConfigurationError, match="stages is now called phases, expected phases=VALUE"):
        recipe(stages="a.yaml")


def test_nemo_run_can_read_every_annotation() -> None:
    for command, factory in FACTORIES.items():
        for name, parameter in inspect.signature(factory).parameters.items():
            assert "|" not in str(parameter.annotation), (command, name)
            assert not isinstance(parameter.annotation, str), (command, name)
