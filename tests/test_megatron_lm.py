"""Megatron-LM's training with our options: its arguments, and coefficients in the state of the schedule that it saves."""

import argparse
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from nemo_skymoe import megatron_lm
from nemo_skymoe.config import SkyworkOptions


def test_without_megatron_lm_it_says_so() -> None:
    command = [sys.executable, "-m", "nemo_skymoe.megatron_lm", "--moe-edp"]
    answer = subprocess.run(command, capture_output=True, text=True)
    last = answer.stderr.strip().splitlines()[-1]
    assert answer.returncode == 1
    assert last.startswith("pretrain_gpt cannot be imported (") and "checkout of Megatron-LM 0.19" in last


def test_every_option_is_an_argument() -> None:
    parts = "megatron.training.argument_utils"
    pytest.importorskip(parts, reason="only newer wheels of megatron-core bring it", exc_type=ImportError)
    parser = megatron_lm.add_arguments(argparse.ArgumentParser())
    defaults = vars(parser.parse_args([]))
    assert defaults == {field.name: field.default for field in fields(SkyworkOptions)}
    given = parser.parse_args(
        ["--moe-edp", "--no-moe-adaptive-aux-loss", "--moe-router-logit-norm-scale", "2"]
    )
    assert (given.moe_edp, given.moe_adaptive_aux_loss, given.moe_router_logit_norm_scale) == (True, False, 2)


class Schedule:
    """Of its own state it knows one entry, and takes no other."""

    steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        (self.steps,) = (state.pop("steps"),)
        assert not state


class Controller:
    """It has a state, and keeps what it is given."""

    found: Any = None

    def state_dict(self) -> dict[str, float]:
        return {"coefficients": 0.5}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.found = state


def test_coefficients_are_a_part_of_what_megatron_lm_saves() -> None:
    made: list[Any] = []

    def get_megatron_optimizer(config: Any, model_chunks: Any, **options: Any) -> str:
        made.append((config, model_chunks, options))
        return "optimizer"

    training = SimpleNamespace(
        get_megatron_optimizer=get_megatron_optimizer,
        get_optimizer_param_scheduler=lambda optimizer: Schedule(),
    )
    controller = Controller()
    with mock.patch.object(megatron_lm, "_controller", return_value=controller) as attach:
        megatron_lm.keep_coefficients(training)
        optimizer = training.get_megatron_optimizer("config", ["chunk"], config_overrides=None)
        schedule = training.get_optimizer_param_scheduler(optimizer)
    assert made == [("config", ["chunk"], {"config_overrides": None})]
    attach.assert_called_once_with(["chunk"], "optimizer")
    saved = schedule.state_dict()
    assert saved == {"steps": 0, megatron_lm.KEY: {"coefficients": 0.5}}
    schedule.load_state_dict({**saved, "steps": 3})
    assert (schedule.steps, controller.found) == (3, {"coefficients": 0.5})
    schedule.load_state_dict({"steps": 4})
    assert (schedule.steps, controller.found) == (4, {})
