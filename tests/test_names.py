"""The nearest name is the one that a person meant."""

from nemo_skymoe.names import unknown
from tests.cases import every

OPTIONS = (
    "training.max_lr", "training.min_lr", "training.max_rank", "training.tokens", "training.trainer", "training.trainer.max_steps",
    "training.trainer.max_epochs", "training.trainer.strategy", "training.trainer.strategy.ddp.bucket_size",
    "training.optim.lr_scheduler.max_steps", "training.log.ckpt.save_last",
)  # fmt: skip


@every(
    ("name", "near"),
    [
        ("training.max_step", "training.trainer.max_steps"),
        ("training.trainer.max_step", "training.trainer.max_steps"),
        ("training.optim.max_step", "training.optim.lr_scheduler.max_steps"),
        ("training.maxlr", "training.max_lr"),
        ("training.bucket_size", "training.trainer.strategy.ddp.bucket_size"),
        ("training.startegy", "training.trainer.strategy"),
        ("training.token", "training.tokens"),
        ("training.trainr.max_steps", "training.trainer.max_steps"),
    ],
)
def test_the_last_word_counts_first(name: str, near: str) -> None:
    assert str(unknown("option", name, OPTIONS)) == f"option {name} is unknown: did you mean {near}?"


def test_without_a_near_one_all_are_shown_or_the_first() -> None:
    assert str(unknown("group", "qqqq", ("a", "b"))) == "group qqqq is unknown: expected one of a, b"
    assert str(unknown("group", "qqqq", map(str, range(13)))).endswith(", ...")
    assert str(unknown("group", "x", ())) == "group x is unknown: expected one of "
