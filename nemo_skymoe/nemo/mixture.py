"""Mixtures of Megatron's indexed datasets, in phases, as a NeMo data module."""
# No `from __future__ import annotations`: NeMo-Run reads the signature of `mixture_data`.

from pathlib import Path
from typing import Any, Optional

import fiddle as fdl
from megatron.core.datasets.utils import Split
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from nemo.utils import logging

from nemo_skymoe import gpus
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.corpus import MANIFEST
from nemo_skymoe.data.mixture import DEFAULT, Blend, parse
from nemo_skymoe.data.streams import MixedSamples, check_datasets, check_numbers, fingerprint, mixed_samples
from nemo_skymoe.data.tokenizer import tokenizer_file
from nemo_skymoe.nemo.corpus import corpus_data


def mixture_data(
    corpus: str,
    mixtures: Optional[list[str]] = None,
    steps: Optional[list[int]] = None,
    seq_length: int = 4096,
    global_batch_size: int = 8,
    micro_batch_size: int = 1,
    num_workers: int = 0,
    seed: int = 1,
    held_out: float = 0.001,
    index_cache: Optional[str] = None,
) -> PreTrainingDataModule:
    """Return a data module with a mixture of the domains in the folder `corpus`, for `run.Config(mixture_data, ...)`.

    Args:
        corpus: A folder that `skymoe preprocess` wrote, or one with any of Megatron's datasets, `DOMAIN.bin` and `.idx`,
            and a tokenizer in `tokenizer`. The corpus of `skymoe corpus` is taken as it is, unless `mixtures` name its
            files.
        mixtures: A mixture such as "en:7 zh:2 code:1" for each phase. None is this one, for one phase.
        steps: Optimizer steps of each phase. None is one phase as long as the training.
        seq_length: Tokens of a sample.
        global_batch_size: Samples of an optimizer step.
        micro_batch_size: Samples of a forward pass of one data-parallel rank.
        num_workers: Loader processes of a rank; 0 loads in the training process.
        seed: Seed of the order of each domain's samples.
        held_out: Share of each domain's documents that is kept for validation in the first mixture: the last ones.
        index_cache: Folder for Megatron's sample indices; the default is `index` in `corpus`.

    Raises:
        ConfigurationError: A weight, a number of steps or a share makes no sense, or a dataset is missing.
    """
    folder = Path(corpus).expanduser().resolve()
    sizes: dict[str, Any] = {
        "seq_length": seq_length,
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "num_workers": num_workers,
        "seed": seed,
    }
    if mixtures is None and steps is None and (folder / MANIFEST).is_file():
        return corpus_data(corpus, index_cache=index_cache, **sizes)
    mixtures = mixtures or [DEFAULT]
    check_datasets(folder, mixtures)
    tokenizer = _tokenizer(folder)
    return MixtureDataModule(
        str(folder), mixtures, steps, tokenizer=tokenizer, held_out=held_out, index_cache=index_cache, **sizes
    )


class MixtureDataModule(PreTrainingDataModule):
    """A NeMo pre-training data module over `data.mixture.Blend`. `mixture_data` describes the arguments.

    Samples come from Megatron's GPTDataset, with one epoch of each domain, and run across document ends. When a domain
    begins again, its samples come in another order.
    """

    def __init__(
        self,
        folder: str,
        mixtures: list[str],
        steps: Optional[list[int]],
        tokenizer: Any,
        held_out: float,
        index_cache: Optional[str],
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        self.mixtures = [parse(mixture) for mixture in mixtures]
        self.steps, self.held_out = steps, held_out
        check_numbers(mixtures, steps, held_out)
        self.domains = sorted({domain for mixture in self.mixtures for domain, _ in mixture.weights})
        self.prefixes = {domain: str(Path(folder) / domain) for domain in self.domains}
        self.blend: Optional[Blend] = None
        paths = list(self.prefixes.values())
        cache = Path(index_cache) if index_cache else Path(folder) / "index"
        super().__init__(
            paths={"train": paths, "validation": paths, "test": paths},
            split=None,  # type: ignore[arg-type]  # NeMo warns about any other value beside a dictionary of paths
            tokenizer=tokenizer,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            num_workers=num_workers,
            seed=seed,
            persistent_workers=num_workers > 0,
            pin_memory=gpus.in_use(),
            index_mapping_dir=str(cache / fingerprint(paths, held_out)),
        )
        again: Any = fdl.Config(
            mixture_data,
            folder,
            mixtures,
            steps,
            seq_length,
            global_batch_size,
            micro_batch_size,
            num_workers,
            seed,
            held_out,
            index_cache,
        )
        self.__io__ = again

    def io_init(self, **kwargs: Any) -> Any:
        """Save the arguments of this class. NeMo would save those of the first base class that it has wrapped."""
        return fdl.Config(mixture_data)

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: Any,
        trainer_limit_val_batches: Any,
        trainer_limit_test_batches: Any,
    ) -> None:
        """Make the datasets: training has the samples of all phases, validation those of the batches that it reads."""
        steps = self.steps or [trainer_max_steps]
        if sum(steps) < trainer_max_steps:
            raise ConfigurationError(
                f"trainer.max_steps is {trainer_max_steps}, the data's phases have {sum(steps)} steps: add a phase"
            )
        batch = self.data_sampler.global_batch_size
        self.blend = Blend([(m, n * batch) for m, n in zip(self.mixtures, steps, strict=True)])
        self._train_ds = self._mixed(Split.train, self.blend)
        validation = _batches(trainer_limit_val_batches, "limit_val_batches") * batch
        self._validation_ds = self._mixed(Split.valid, Blend([(self.mixtures[0], validation)]))
        self._test_ds = self._validation_ds
        self._log(steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, and the mixtures that led there."""
        state = super().state_dict()
        assert self.blend is not None
        history = self.blend.history(state["consumed_samples"])
        return state | {"history": history, "epochs": self._epochs()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the saved position, if the phases up to it are those that led there.

        Raises:
            ConfigurationError: The phases differ, or the datasets have changed.
        """
        assert self.blend is not None
        consumed, history = state_dict["consumed_samples"], state_dict.get("history")
        now = self.blend.history(consumed)
        if history is not None and history != now:
            raise ConfigurationError(
                f"the checkpoint has seen (mixture, samples) {history}, the phases would have been {now}: phases that"
                " have begun cannot change"
            )
        epochs = self._epochs()
        for domain, samples in state_dict.get("epochs", {}).items():
            if epochs.get(domain, samples) != samples:
                raise ConfigurationError(
                    f"the dataset '{self.prefixes[domain]}' had {samples} samples when the checkpoint was written, now"
                    f" it has {epochs[domain]}"
                )
        super().load_state_dict(state_dict)

    def _epochs(self) -> dict[str, int]:
        return {domain: len(stream.dataset) for domain, stream in self._train_ds.streams.items()}

    def _mixed(self, split: Split, blend: Blend) -> MixedSamples:
        return mixed_samples(
            self.prefixes,
            blend,
            held_out=self.held_out,
            seed=self.seed,
            split=split,
            config=self.gpt_dataset_config,
        )

    def _log(self, steps: list[int]) -> None:
        assert self.blend is not None
        for number, (mixture, count) in enumerate(zip(self.mixtures, steps, strict=True), start=1):
            logging.info(f"phase {number} of {len(steps)}: {count} steps of {mixture}")
        for domain, samples in self.blend.taken.items():
            epochs = samples / len(self._train_ds.streams[domain].dataset)
            logging.info(f"'{domain}' is seen {epochs:.2f} times: {samples * self.seq_length} tokens")


def _tokenizer(folder: Path) -> Any:
    file = tokenizer_file(folder / "tokenizer")
    return AutoTokenizer(str(file.parent)) if file.suffix == ".json" else SentencePieceTokenizer(str(file))


def _batches(limit: Any, option: str) -> int:
    if not isinstance(limit, int):
        raise ConfigurationError(f"trainer.{option} is {limit}, expected a number of batches")
    return limit
