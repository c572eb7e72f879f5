"""The adaptive coefficients in a training of Bridge: which steps change them, what a new run begins with, what is logged."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.bridge.training import pretrain as bridge_pretrain
from megatron.bridge.training.gpt_step import forward_step

import nemo_skymoe.bridge  # noqa: F401  (before Bridge is imported)
from nemo_skymoe.bridge.callback import SkyworkMoECallback, with_callback
from nemo_skymoe.bridge.overrides import set_options
from nemo_skymoe.bridge.recipes import skywork_moe_146b_pretrain_config  # type: ignore[attr-defined]
from nemo_skymoe.checkpoint.torch_dist.common_state import read_common_state
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.moe.telemetry import METRICS
from nemo_skymoe.patches import bridge_compiled_helpers, bridge_cpu
from nemo_skymoe.ranks import RankFailed, run_ranks
from nemo_skymoe.report.curves import read_curves
from tests.bridge.recorded import Record, Recorder, same_bits, train
from tests.bridge.tiny import tiny_config, tiny_provider

INITIAL = {1: 0.01, 2: 0.01}


class BrokenGradients(Recorder):
    """Makes the gradients of the second step infinite, as an overflow does."""

    def on_train_step_start(self, context: Any) -> None:
        super().on_train_step_start(context)
        if context.state.train_state.step == 1:
            finalize = context.model[0].config.finalize_model_grads_func

            def broken(*args: Any, **kwargs: Any) -> Any:
                result = finalize(*args, **kwargs)
                next(context.model[0].parameters()).main_grad.fill_(float("inf"))
                context.model[0].config.finalize_model_grads_func = finalize
                return result

            context.model[0].config.finalize_model_grads_func = broken


def with_a_broken_step() -> Record:
    config = tiny_config(
        steps=3,
        model=tiny_provider(fp16=True, params_dtype=torch.float16, pipeline_dtype=torch.float16),
        overrides={
            "optimizer": {"fp16": True, "params_dtype": torch.float16, "initial_loss_scale": 1.0},
            "rerun_state_machine": {"check_for_nan_in_loss": False},
            "ddp": {"check_for_nan_in_grad": False},
        },
    )
    return train(config, BrokenGradients())


def test_a_skipped_step_changes_no_coefficient():
    [record] = run_ranks(with_a_broken_step, 1)
    assert record.skipped == [False, True, False]
    before, first, skipped, last = record.coefficients
    assert before == INITIAL and first != before and skipped == first and last != first


def trained(folder: Path, steps: int, warm: str = "reset", start: Path | None = None) -> Record:
    given = {"pretrained_checkpoint": None if start is None else str(start)}
    return train(tiny_config(folder, steps=steps, overrides={"checkpoint": given}), warm_start=warm)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """A run of three steps, and its coefficients."""
    folder = tmp_path_factory.mktemp("source")
    [record] = run_ranks(trained, 1, folder, 3)
    return folder, record.coefficients[-1]


def test_a_warm_start_resets_or_keeps_them(source: tuple[Path, dict[int, float]], tmp_path: Path):
    folder, kept = source
    for warm, expected in (("reset", INITIAL), ("keep", kept)):
        [record] = run_ranks(trained, 1, tmp_path / warm, 1, warm, folder)
        assert record.steps == [0] and record.coefficients[0] == expected
        [resumed] = run_ranks(trained, 1, tmp_path / warm, 2, warm)
        assert resumed.steps == [1] and resumed.coefficients[0] == record.coefficients[-1] != expected


def test_a_warm_start_is_an_option_of_the_command():
    config = skywork_moe_146b_pretrain_config()
    given: Any = with_callback([], config)
    assert [each.warm_start for each in given] == ["reset"]
    set_options(config, ["logger.warm_start=keep"])
    given = with_callback([], config)
    assert [each.warm_start for each in given] == ["keep"]
    set_options(config, ["logger.warm_start=new"])
    with pytest.raises(ConfigurationError, match="warm_start is 'new', expected 'reset' or 'keep'"):
        with_callback([], config)


def test_a_run_that_leaves_the_optimizer_behind_continues_them(
    source: tuple[Path, dict[int, float]], tmp_path: Path
):
    folder, kept = source
    shutil.copytree(folder, tmp_path / "copy")

    def world() -> Record:
        config = tiny_config(tmp_path / "copy", steps=4)
        config.checkpoint.load_optim = False
        return train(config)

    [record] = run_ranks(world, 1)
    assert record.steps == [3] and record.coefficients[0] == kept


def test_they_are_read_from_a_checkpoint_without_running_it(source: tuple[Path, dict[int, float]]):
    folder, kept = source
    state = read_common_state(folder / "iter_0000003")
    assert state["opt_param_scheduler"]["skywork_moe"] == {"aux_loss_coefficients": kept}


def test_a_checkpoint_without_them_starts_anew_with_a_warning(
    source: tuple[Path, dict[int, float]], tmp_path: Path
):
    """A run of Bridge's own manager, or of a dense model, has saved none."""
    folder = tmp_path / "plain"

    def plain() -> None:
        bridge_cpu.apply()
        bridge_compiled_helpers.apply()
        bridge_pretrain.pretrain(tiny_config(folder, steps=2), forward_step)

    def resumed() -> tuple[Record, list[str]]:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda entry: said.append(entry.getMessage())  # type: ignore[method-assign]
        logging.getLogger("nemo_skymoe").addHandler(handler)
        return trained(folder, 3), said

    run_ranks(plain, 1)
    [(record, said)] = run_ranks(resumed, 1)
    assert record.steps == [2] and record.coefficients[0] == INITIAL
    assert [
        line for line in said if "has no auxiliary-loss coefficients: every MoE layer starts at 0.01" in line
    ]


def test_coefficients_of_other_layers_are_refused(source: tuple[Path, dict[int, float]], tmp_path: Path):
    folder, _ = source
    shutil.copytree(folder, tmp_path / "copy")

    def world() -> None:
        config = tiny_config(tmp_path / "copy", steps=4)
        config.model.moe_layer_freq = [1, 0]
        train(config)

    with pytest.raises(RankFailed, match="moe_layer_freq"):
        run_ranks(world, 1)


def test_bridges_own_manager_is_refused_where_it_would_lose_them(tmp_path: Path):
    def world() -> None:
        bridge_cpu.apply()
        bridge_compiled_helpers.apply()
        config = tiny_config(tmp_path, steps=1)
        bridge_pretrain.pretrain(config, forward_step, callbacks=[SkyworkMoECallback()])

    with pytest.raises(RankFailed, match=r"custom_manager_class is None, expected 'nemo_skymoe\.bridge"):
        run_ranks(world, 1)
    assert not list(tmp_path.glob("iter_*"))


def test_everything_is_logged_for_every_layer_of_the_pipeline(tmp_path: Path):
    def world() -> Record:
        config = tiny_config(steps=4, model=tiny_provider(pipeline_model_parallel_size=2))
        config.logger.tensorboard_dir = str(tmp_path)
        return train(config, similarity_interval=2, histogram=True)

    records = run_ranks(world, 2)
    curves = read_curves(tmp_path)
    for layer in (1, 2):
        for name in (*METRICS, "aux_loss_coefficient", "load"):
            tag = f"moe/{name}_layer_{layer}" + ("_expert_3" if name == "load" else "")
            assert [*curves[tag].steps] == [1, 2, 3, 4], tag
        assert [*curves[f"moe/expert_similarity_layer_{layer}"].steps] == [0, 2, 4]
        logged = [*curves[f"moe/aux_loss_coefficient_layer_{layer}"].values]
        kept = [step[layer] for record in records for step in record.coefficients[1:] if layer in step]
        assert logged == pytest.approx(kept, rel=1e-6) and len({*kept}) == 4
    assert len(curves["load_balancing_loss"]) == 4


@pytest.mark.parametrize(
    "argument", [{"warm_start": "new"}, {"log_interval": -1}, {"similarity_interval": 1.5}]
)
def test_bad_arguments_are_refused(argument: dict[str, Any]):
    with pytest.raises(ConfigurationError, match=next(iter(argument))):
        SkyworkMoECallback(**argument)


def test_validation_changes_nothing():
    def world(interval: int | None) -> Record:
        config = tiny_config(steps=3)
        config.validation.eval_interval, config.validation.eval_iters = interval, 2
        return train(config)

    [without], [with_it] = (run_ranks(world, 1, interval) for interval in (1000, 1))
    assert same_bits(without.weights, with_it.weights) and without.losses == with_it.losses
    assert without.coefficients == with_it.coefficients and without.coefficients[-1] != INITIAL
