"""A Skywork-MoE trained by NeMo in two phases: an exact resume inside the second, its own mixture, learning rates."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import fiddle as fdl
import lightning.pytorch as pl
import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data import streams
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.data.preprocess import preprocess
from nemo_skymoe.data.streams import Stream
from nemo_skymoe.experiments.phases import Phase, read_phases
from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.nemo.learning_rate import LearningRateSchedule
from nemo_skymoe.nemo.mixture import MixtureDataModule, mixture_data
from nemo_skymoe.nemo.training_phases import PhasedLearningRate
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from nemo_skymoe.recipes import skywork_moe_146b, skywork_moe_tiny
from tests.cases import every

SEQUENCE, BATCH = 64, 4
PHASES = """
- {tokens: 512, max_lr: 1.0e-3, min_lr: 1e-4, mixture: {en: 3, code: 1}, warmup_steps: 1}
- {tokens: 1000, max_lr: 5e-4, min_lr: 0, mixture: "code:1 zh:1", shape: linear}
"""
FIRST, SECOND = 2, 4
CUT = 4
"""In the middle of the second phase."""


@dataclass
class Kept:
    """What a run saw: samples by domain and place, and by step losses, learning rates and coefficients."""

    samples: list[tuple[str, int]] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    coefficients: dict[int, dict[int, float]] = field(default_factory=dict)


class Keep(pl.Callback):
    def __init__(self, stop: int | None) -> None:
        self.kept, self.stop = Kept(), stop

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.kept.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.kept.losses[trainer.global_step] = trainer.callback_metrics["reduced_train_loss"].item()
        (callback,) = [c for c in trainer.callbacks if isinstance(c, SkyworkMoECallback)]  # type: ignore[attr-defined]
        assert callback._controller is not None
        self.kept.coefficients[trainer.global_step] = callback._controller.coefficient_by_layer()
        trainer.should_stop = trainer.global_step == self.stop


class Recorded(streams.MixedSamples):
    """Remembers which training samples were read."""

    read: ClassVar[list[tuple[str, int]]] = []

    def __getitem__(self, sample: int) -> Any:
        if len(self) >= (FIRST + SECOND) * BATCH:  # not those of validation
            self.read.append(self.blend.locate(int(sample)))
        return super().__getitem__(sample)


def recipe(folder: Path, name: str, phases: str = "phases.yaml") -> Any:
    made = skywork_moe_tiny.pretrain_recipe(
        dir=str(folder), name=name, corpus=str(folder / "data"), phases=str(folder / phases), scale="toy", edp=1,
        devices=1, similarity_interval=0,
    )  # fmt: skip
    made.trainer.devices = 1
    made.data.micro_batch_size, made.data.num_workers, made.data.held_out = BATCH, 0, 0.2
    made.trainer.val_check_interval = 3
    # Follows the drop rate fast and far enough to tell steps apart.
    made.model.config.moe_adaptive_aux_loss_smoothing = 0.5
    made.model.config.moe_adaptive_aux_loss_maximum = 1.0
    made.model.config.moe_expert_capacity_factor = 1.0
    made.log.ckpt.every_n_train_steps = 2
    return made


def train(made: Any, stop: int | None = None) -> Kept:
    nemo_cpu.apply()
    streams.MixedSamples = Recorded  # type: ignore[misc]
    keep = Keep(stop)
    partial = fdl.build(made)
    partial.keywords["trainer"].callbacks.append(keep)
    partial()
    keep.kept.samples = Recorded.read
    return keep.kept


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        files = [
            "argparse.py",
            "typing.py",
            "pydoc.py",
            "shutil.py",
            "uuid.py",
            "ast.py",
            "code.py",
            "csv.py",
        ]
        corpus = build_corpus(root / "corpus", 384, 0.3, files=files)
        inputs = []
        for domain in ("en", "zh", "code"):
            texts = [f"{domain} {number} " * 40 for number in range(20)]
            (root / f"{domain}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
            inputs.append(f"{domain}={root / domain}.jsonl")
        preprocess(inputs, root / "data", corpus.tokenizer)
        (root / "phases.yaml").write_text(PHASES)
        yield root


@pytest.fixture(scope="module")
def whole(folder: Path) -> Kept:
    (kept,) = run_ranks(train, 1, recipe(folder, "whole"))
    return kept


def test_each_phase_reads_its_mixture_and_goes_on_in_each_domain(whole: Kept) -> None:
    first, second = whole.samples[: FIRST * BATCH], whole.samples[FIRST * BATCH :]
    assert [domain for domain, _ in first].count("en") == 6
    assert {domain for domain, _ in second} == {"code", "zh"} and len(second) == SECOND * BATCH
    for domain in ("en", "zh", "code"):
        positions = [position for name, position in whole.samples if name == domain]
        assert positions == list(range(len(positions)))


def test_the_learning_rate_follows_each_phases_schedule(whole: Kept) -> None:
    first = LearningRateSchedule("cosine", 1, FIRST, 0.1)
    second = LearningRateSchedule("linear", 0, SECOND, 0.0)
    expected = [1e-3 * first.factor(n) for n in range(FIRST)] + [
        5e-4 * second.factor(n) for n in range(SECOND)
    ]
    assert [whole.rates[step] for step in range(FIRST + SECOND)] == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx([5e-4, 1e-3, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4])


def test_a_run_stopped_in_the_second_phase_goes_on_as_if_it_had_not(folder: Path, whole: Kept) -> None:
    run_ranks(train, 1, recipe(folder, "cut"), CUT)
    (resumed,) = run_ranks(train, 1, recipe(folder, "cut"))
    assert min(resumed.losses) == CUT + 1, "the second run started from scratch"
    assert resumed.samples == whole.samples[CUT * BATCH :]
    for found, expected in (
        (resumed.losses, whole.losses),
        (resumed.coefficients, whole.coefficients),
        (resumed.rates, whole.rates),
    ):
        assert found == {step: value for step, value in expected.items() if step in found}
    assert len({tuple(step.values()) for step in whole.coefficients.values()}) == FIRST + SECOND


@pytest.mark.long
def test_a_phase_added_to_a_finished_run_goes_on(folder: Path) -> None:
    third = PHASES + '- {tokens: 512, max_lr: 2e-3, min_lr: 1e-3, mixture: "en:1 code:1"}\n'
    (folder / "more.yaml").write_text(third)
    (expected,) = run_ranks(train, 1, recipe(folder, "at_once", "more.yaml"))
    run_ranks(train, 1, recipe(folder, "extended"))
    (added,) = run_ranks(train, 1, recipe(folder, "extended", "more.yaml"))
    assert sorted(added.losses) == [7, 8]
    assert added.losses == {step: expected.losses[step] for step in (7, 8)}
    assert added.rates == {step: expected.rates[step] for step in (6, 7)} and added.rates[6] == 2e-3
    assert added.samples == expected.samples[(FIRST + SECOND) * BATCH :]


def data(folder: Path, **options: Any) -> Any:
    arguments = {"mixtures": ["en:1 zh:1"], "seq_length": 16, "held_out": 0.2, "num_workers": 0}
    module: Any = mixture_data(str(folder / "data"), **(arguments | options))
    return module


def built(folder: Path, **options: Any) -> Any:
    module = data(folder, **options)
    module.build(4, 2, 1, 1)
    return module


def test_validation_is_held_out_and_the_same_in_every_run(folder: Path) -> None:
    module, longer = built(folder), data(folder, steps=[9, 9], mixtures=["en:1 zh:1", "code:1"])
    longer.build(18, 2, 1, 1)
    for made in (module, longer):
        assert len(made._validation_ds) == 8
        for number in range(8):
            sample = made._validation_ds[number]["tokens"]
            assert (sample == module._validation_ds[number]["tokens"]).all()
    seen = {tuple(module._train_ds.streams["en"][n]["tokens"].tolist()) for n in range(200)}
    held_out = {tuple(module._validation_ds.streams["en"][n]["tokens"].tolist()) for n in range(50)}
    assert seen and held_out and not seen & held_out


@every("size", [1, 2, 7, 60, 997])
def test_every_epoch_has_every_sample_once(size: int) -> None:
    stream = Stream(list(range(size)), 1)
    epochs = [[stream[size * epoch + n] for n in range(size)] for epoch in range(4)]
    assert epochs[0] == list(range(size))
    assert all(sorted(epoch) == epochs[0] for epoch in epochs)
    if size > 20:
        assert len({tuple(epoch) for epoch in epochs}) == 4
    assert Stream(list(range(size)), 1)[3 * size] == epochs[3][0], "the order depends on what was read before"


def test_phases_that_have_begun_cannot_change(folder: Path) -> None:
    phases = {"mixtures": ["en:1", "zh:1"], "steps": [2, 2]}
    module = built(folder, **phases)
    position = {"consumed_samples": 24, "history": module.blend.history(24), "epochs": module._epochs()}
    for changed in (
        {"steps": [1, 3]},
        {"mixtures": ["en:1", "en:1 zh:1"]},
        {"global_batch_size": 4, "steps": [2, 6]},
    ):
        other = data(folder, **(phases | changed))
        other.build(sum(other.steps), 2, 1, 1)
        with pytest.raises(ConfigurationError, match="phases that have begun cannot change"):
            other.load_state_dict(position)
    with pytest.raises(
        ConfigurationError, match=r"'.*/data/zh' had 1 samples when the checkpoint was written"
    ):
        built(folder, **phases).load_state_dict(position | {"epochs": {"zh": 1}})


@every(
    ("options", "message"),
    [
        ({"mixtures": ["en:1 fr:1"]}, "the domain 'fr', for which '.*/data/fr.bin' is missing; in the folder are: code, en, zh"),
        ({"mixtures": ["en:0"]}, "gives 'en' the weight 0"),
        ({"steps": [1, 2]}, r"there are 1 mixtures and steps=\[1, 2\]"),
        ({"steps": [0]}, r"the phases' steps are \[0\]"),
        ({"held_out": 0.0}, "held_out is 0.0, expected a share between 0 and 1"),
    ],
)  # fmt: skip
def test_bad_mixtures_are_refused_by_name(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        data(folder, **options)


@every(
    ("options", "message"),
    [
        ({"steps": [3]}, "trainer.max_steps is 4, the data's phases have 3 steps: add a phase"),
        ({"seq_length": 4000}, "'.*/data/en' has .* tokens in 16 documents for train: expected more than seq_length=4000"),
    ],
)  # fmt: skip
def test_bad_sizes_are_refused_by_name(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        built(folder, **options)
    with pytest.raises(
        ConfigurationError, match=r"trainer.limit_val_batches is 1.0, expected a number of batches"
    ):
        data(folder).build(4, 2, 1.0, 1)


def test_the_demonstration_corpus_is_taken_as_it_is(folder: Path) -> None:
    made = mixture_data(str(folder / "corpus"), seq_length=16)
    assert not isinstance(made, MixtureDataModule)
    named: Any = mixture_data(str(folder / "corpus"), ["train_text_document:1"], seq_length=16)
    assert isinstance(named, MixtureDataModule)


def test_the_context_of_a_checkpoint_makes_the_same_data_module(folder: Path) -> None:
    module = data(folder, steps=[3], index_cache=str(folder / "elsewhere"))
    again: Any = fdl.build(module.__io__)
    assert isinstance(again, MixtureDataModule) and again.__io__ == module.__io__
    assert (again.mixtures, again.steps, again.held_out) == (module.mixtures, [3], 0.2)
    assert again.index_mapping_dir == module.index_mapping_dir


def test_a_recipe_in_phases_survives_serialisation(folder: Path) -> None:
    made, serializer = recipe(folder, "any"), ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(made)) == made
    assert made.trainer.max_steps == FIRST + SECOND


def test_a_recipe_takes_a_mixture_or_phases() -> None:
    made = skywork_moe_146b.pretrain_recipe(corpus="text", mixture="en:70 zh:30")
    assert made.data.__fn_or_cls__ is mixture_data and made.data.mixtures == ["en:7 zh:3"]
    assert (made.data.seq_length, made.data.global_batch_size, made.data.seed) == (8192, 2048, 1)
    for arguments, message in (
        ({"mixture": "en:1"}, "corpus is None, expected the folder with the domains"),
        (
            {"corpus": "text", "mixture": "en:1", "phases": "file"},
            "mixture is 'en:1', expected none beside phases",
        ),
        ({"corpus": "text", "mixture": "en:-1"}, "gives 'en' the weight -1"),
        ({"corpus": "text", "phases": "nowhere.yaml"}, "the phases in 'nowhere.yaml' cannot be read"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            skywork_moe_146b.pretrain_recipe(**arguments)


def test_schedules_follow_each_other() -> None:
    phases = [LearningRateSchedule("linear", 0, 4, 0.5), LearningRateSchedule("constant", 1, 3, 1.0)]
    factors = [PhasedLearningRate(phases, [1.0, 0.25]).factor(step) for step in range(9)]
    assert factors == pytest.approx([1, 0.875, 0.75, 0.625, 0.125, 0.25, 0.25, 0.25, 0.25])


@every(
    ("text", "message"),
    [
        ("tokens: 3", "is dict, expected a list of phases"),
        ("[]", "is list, expected a list of phases"),
        ("- [", "cannot be read"),
        ("- {tokens: 1, max_lr: 1}", "phase 1 of '.*' has no min_lr"),
        ("- {tokens: 1, max_lr: 1, min_lr: 0, lr: 3}", "phase 1 of .* expected the keys tokens, max_lr, min_lr, mixture"),
        ("- {tokens: many, max_lr: 1, min_lr: 0}", "phase 1 of .*: tokens is 'many', expected a positive number"),
        ("- {tokens: .inf, max_lr: 1, min_lr: 0}", "tokens is inf"),
        ("- {tokens: 1, max_lr: 1, min_lr: 2}", "min_lr is 2, expected 0 to max_lr=1"),
        ("- {tokens: 1, max_lr: 1, min_lr: 0, shape: step}", "shape is 'step', expected one of cosine"),
        ("- {tokens: 1, max_lr: 1, min_lr: 0, warmup_steps: -1}", "warmup_steps is -1"),
        ("- {tokens: 1, max_lr: 1, min_lr: 0, mixture: en}", "phase 1 of .*: the mixture is 'en'"),
    ],
)  # fmt: skip
def test_phases_that_make_no_sense_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "phases.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_phases(tmp_path / "phases.yaml")


def test_a_warm_up_as_long_as_its_phase_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="warmup_steps is 2, expected fewer than the 2 steps"):
        Phase(100, 1e-3, 1e-4, warmup_steps=2).steps(64)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_phases(Path("nowhere.yaml"))
