"""Schedules of NeMo and ours in runs that are shorter, resumed with other values, or may end before they do."""

import itertools
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from nemo.lightning.pytorch.optim import lr_scheduler as nemos

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo import checks, schedule_length
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule
from nemo_skymoe.nemo.schedule_length import ScheduleOfThisRun, check_early_end, follow_max_steps
from nemo_skymoe.nemo.training_phases import PhasedLearningRate
from tests.cases import every

PEAK, END, STEPS = 1.0, 0.1, 1000
Scheduler = Callable[[], Any]
NEMOS: dict[str, tuple[Scheduler, bool]] = {
    "warm-up": (lambda: nemos.WarmupPolicyScheduler(100, max_steps=STEPS, min_lr=END), False),
    "hold": (lambda: nemos.WarmupHoldPolicyScheduler(100, hold_steps=300, max_steps=STEPS, min_lr=END), False),
    "square": (lambda: nemos.SquareAnnealingScheduler(max_steps=STEPS, min_lr=END), True),
    "root": (lambda: nemos.SquareRootAnnealingScheduler(max_steps=STEPS, min_lr=END), True),
    "noam": (lambda: nemos.NoamAnnealingScheduler(1, 100, max_steps=STEPS), False),
    "linear": (lambda: nemos.WarmupAnnealingScheduler(100, max_steps=STEPS, min_lr=END), True),
    "inverse root": (lambda: nemos.InverseSquareRootAnnealingScheduler(max_steps=STEPS, min_lr=END), False),
    "polynomial": (lambda: nemos.PolynomialDecayAnnealingScheduler(max_steps=STEPS, min_lr=END), True),
    "polynomial hold": (lambda: nemos.PolynomialHoldDecayAnnealingScheduler(max_steps=STEPS, min_lr=END), True),
    "cosine": (lambda: nemos.CosineAnnealingScheduler(STEPS, 100, 0, END), True),
    "cosine constant": (lambda: nemos.CosineAnnealingScheduler(STEPS, 100, 300, END), True),
    "ratios": (lambda: nemos.WarmupHoldAnnealScheduler(0.1, 0.3, STEPS, "linear", END), True),
    "ratios, root": (lambda: nemos.WarmupHoldAnnealScheduler(0.1, 0.3, STEPS, "one_minus_square_root", END), True),
}  # fmt: skip
"""And whether it ends at `min_lr`. Without NoamHoldAnnealingScheduler, which NeMo gives no warm-up and which refuses to
run without, and T5InverseSquareRootAnnealingScheduler, which divides by a number of steps that is None."""


def begin(module: Any, peaks: tuple[float, ...] = (PEAK,)) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
    )
    return optimizer, module.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]


def go(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    """The rates that so many steps are made with."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(make: Scheduler, steps: int) -> list[float]:
    """Of every step, and of one more, in a run of `steps`; NeMo sets `max_steps` as its strategy does."""
    module = make()
    follow_max_steps(SimpleNamespace(lr_scheduler=module), steps)
    module.max_steps = steps
    return go(*begin(module), steps + 1)


def test_nemos_schedules_keep_their_shape_however_long_they_run() -> None:
    for name, (make, ends) in NEMOS.items():
        full = go(*begin(make()), STEPS + 1)
        for steps in (1, 2, 10, 50, 100, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS):
            found = rates(make, steps)
            assert all(0 <= rate <= PEAK for rate in found), (name, steps)
            if ends and steps >= 10:
                assert found[-1] == pytest.approx(END), (name, steps)
            if steps > STEPS or steps < 10 or name in ("noam", "inverse root"):
                continue  # their rate follows the steps, not the share of a run
            stride = STEPS / steps
            for step, rate in enumerate(found):
                window = full[max(0, int((step - 2.5) * stride)) : int((step + 2.5) * stride) + 2]
                assert min(window) - 1e-9 <= rate <= max(window) + 1e-9, (name, steps, step)


def test_lengths_that_leave_no_room_for_the_shape_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo's own recipes leave the schedule's `max_steps` at its default: their lengths are for any run."""
    said: list[str] = []
    monkeypatch.setattr(schedule_length.logging, "warning", said.append)
    for steps, lengths in ((100000, (750, 80000)), (1000, (100, 100)), (10, (1, 1)), (5, (0, 0))):
        cosine = nemos.CosineAnnealingScheduler(min_lr=END)
        follow_max_steps(SimpleNamespace(lr_scheduler=cosine), steps)
        assert (cosine.warmup_steps, cosine.constant_steps) == lengths, steps
        found = go(*begin(cosine), steps + 1)
        falls = [before - after for before, after in itertools.pairwise(found)]
        # A cosine over at least a tenth of the run falls by less than pi / 2 of the whole way in a tenth of the run.
        assert max(falls) <= 1.6 * (PEAK - END) / max(1, steps / 10), steps
    assert (
        len(said) == 3
        and "max_steps=10 and is run for trainer.max_steps=1000: its warmup_steps is 100" in said[0]
    )
    just_fits = LearningRateSchedule("linear", 2000, 4386, 0.1, decay_steps=2384)
    follow_max_steps(SimpleNamespace(lr_scheduler=just_fits), 4386)
    found = [just_fits.factor(step) for step in range(4387)]
    assert max(before - after for before, after in itertools.pairwise(found)) < 1e-3


MADE: dict[str, Callable[[int, float], Any]] = {
    "ours": lambda steps, peak: LearningRateSchedule("linear", 2, steps, 0.1),
    "phases": lambda steps, peak: PhasedLearningRate(
        [LearningRateSchedule("linear", 2, 10, 0.1), LearningRateSchedule("cosine", 0, max(1, steps - 10), 0.1)],
        [1.0, 0.5],
    ),
    "NeMo's": lambda steps, peak: nemos.CosineAnnealingScheduler(steps, 2, 0, 0.01),
    "NeMo's, constant": lambda steps, peak: nemos.CosineAnnealingScheduler(steps, 2, 2, 0.01),
    "NeMo's linear": lambda steps, peak: nemos.WarmupAnnealingScheduler(2, max_steps=steps),
}  # fmt: skip


@every("name", MADE)
@every(("steps", "peak"), [(20, 1.0), (10, 0.5), (20, 0.5), (10, 1.0)])
def test_a_resumed_run_has_the_rates_of_its_own_schedule(
    name: str, steps: int, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rate after the resumption is that of a run that was made so from its first step."""
    said: list[str] = []
    monkeypatch.setattr(schedule_length.logging, "warning", said.append)
    cut = 6
    first = begin(MADE[name](10, 1.0), (1.0, 0.25))
    before = go(*first, cut)
    expected = go(*begin(MADE[name](steps, peak), (peak, peak / 4)), steps)
    module = MADE[name](steps, peak)
    callback: Any = ScheduleOfThisRun(SimpleNamespace(lr_scheduler=module))
    optimizer, scheduler = begin(module, (peak, peak / 4))
    optimizer.load_state_dict(first[0].state_dict())
    scheduler.load_state_dict(first[1].state_dict())
    callback.on_train_start(None, None)
    assert go(optimizer, scheduler, steps - cut) == pytest.approx(expected[cut:], rel=1e-12)
    changed = expected[cut] != go(*begin(MADE[name](10, 1.0), (1.0, 0.25)), 10)[cut]
    assert ["goes on at" in line for line in said] == [True] * changed, (before, said)
    assert not {"_load", "scheduler"} & set(scheduler.state_dict())


def trainer(**options: Any) -> Any:
    return SimpleNamespace(**({"max_steps": 10, "limit_train_batches": 1.0, "callbacks": []} | options))


def test_epochs_that_repeat_their_first_batches_are_refused() -> None:
    check_early_end(trainer())
    for limit in (10, 11):
        check_early_end(trainer(limit_train_batches=limit))
    for limit in (9, 1, 0, 0.5, 0.0):
        with pytest.raises(
            ConfigurationError, match=rf"trainer\.limit_train_batches is {limit}, expected 1\.0"
        ):
            check_early_end(trainer(limit_train_batches=limit))
    with pytest.raises(ConfigurationError, match=r"trainer\.overfit_batches is 2, expected 0"):
        check_early_end(trainer(limit_train_batches=2, overfit_batches=2))


def test_what_may_end_a_run_early_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in (
        ({"max_epochs": -1}, []),
        ({"max_epochs": None}, []),
        ({"max_epochs": 2}, ["trainer.max_epochs=2 may end the run before the 10 steps"]),
        ({"callbacks": [Timer(timedelta(hours=1))]}, ["trainer.max_time (Timer) may end"]),
        ({"callbacks": [EarlyStopping("val_loss")]}, ["the callback EarlyStopping may end"]),
        ({"max_epochs": 1, "fast_dev_run": True}, []),
    ):
        said: list[str] = []
        monkeypatch.setattr(schedule_length.logging, "warning", said.append)
        check_early_end(trainer(**options))
        assert len(said) == len(words) and all(word in line for word, line in zip(words, said, strict=True))


def test_the_models_own_optimizer_is_fitted_where_there_is_no_other() -> None:
    plain, scheduled = (
        SimpleNamespace(lr_scheduler=None),
        SimpleNamespace(lr_scheduler=LearningRateSchedule()),
    )
    model = SimpleNamespace(optim=scheduled)
    assert checks.optimizer_of(model, None) is scheduled
    assert checks.optimizer_of(SimpleNamespace(optim=plain), scheduled) is scheduled
    assert checks.optimizer_of(model, scheduled) is scheduled
    with pytest.raises(
        ConfigurationError, match=r"model\.optim has a learning-rate schedule, but optim replaces"
    ):
        checks.optimizer_of(model, plain)
