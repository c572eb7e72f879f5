"""The project's corpora and mixtures of domains, as a dataset of Bridge."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.training.config import TokenizerConfig
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split, get_blend_from_list

from nemo_skymoe import gpus
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.corpus import MANIFEST, Corpus, load_corpus
from nemo_skymoe.data.held_out import HeldOutGPTDataset
from nemo_skymoe.data.mixture import DEFAULT, Blend, parse
from nemo_skymoe.data.streams import check_datasets, check_numbers, fingerprint, mixed_samples
from nemo_skymoe.data.tokenizer import tokenizer_file
from nemo_skymoe.moe.layer import have_transformer_engine

ENDLESS = 2**40
"""More samples than any training validates on."""


@dataclass(kw_only=True)
class CorpusConfig(DatasetProvider):
    """The text in a folder of `skymoe corpus` or `skymoe preprocess`, in the order of the NeMo front door.

    Samples run across document ends: neither positions nor attention are reset there. Every validation sees the same
    batches.
    """

    corpus: str
    """The folder: that of `skymoe corpus`, or one with Megatron's datasets, `DOMAIN.bin` and `.idx`, and a tokenizer."""
    seq_length: int
    """Tokens of a sample."""
    random_seed: int = 1
    """Seed of the order of the samples."""
    mixtures: list[str] | None = None
    """A mixture such as "en:7 zh:2 code:1" for each phase. None is a corpus of `skymoe corpus` itself, or else this
    mixture."""
    steps: list[int] | None = None
    """Optimizer steps of each phase; None is one phase as long as the training."""
    held_out: float = 0.001
    """Share of each domain's documents that only validation sees, in a mixture."""
    index_cache: str | None = None
    """Folder for Megatron's indices of samples; None is `index` in the folder."""

    dataloader_type: Any = "single"
    num_workers: int = 0
    pin_memory: bool = field(default_factory=gpus.in_use)
    persistent_workers: bool = False
    skip_getting_attention_mask_from_dataset: bool = field(default_factory=have_transformer_engine)

    # No field: Bridge sets it where it finds it, and saves its files in the checkpoints, but it is no option.
    tokenizer = None

    def finalize(self) -> None:
        """Look at the folder, before anything is built.

        Raises:
            ConfigurationError: A mixture, a number of steps or a share makes no sense, or a dataset is missing.
            CheckpointError: The folder of `skymoe corpus` is unfinished.
        """
        super().finalize()
        if self.demonstration() is not None:
            return
        check_numbers(self.phases(), self.steps, self.held_out)
        check_datasets(self.folder, self.phases())

    @property
    def folder(self) -> Path:
        """The folder's absolute path."""
        return Path(self.corpus).expanduser().resolve()

    def phases(self) -> list[str]:
        """Return the mixture of each phase."""
        return self.mixtures or [DEFAULT]

    def demonstration(self) -> Corpus | None:
        """Return the corpus of `skymoe corpus` in the folder, if it is taken as it is."""
        as_it_is = self.mixtures is None and self.steps is None and (self.folder / MANIFEST).is_file()
        return load_corpus(self.folder) if as_it_is else None

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Return the samples of training, validation and test. The last two are the same."""
        corpus = self.demonstration()
        if corpus is not None:
            train, held_out = self._demonstration_samples(corpus, context)
        else:
            train, held_out = self._mixture_samples(context)
        # A run that is continued to another length has validated at other steps than Bridge counts samples for.
        validation = Repeated(held_out, context.test_samples, ENDLESS if context.valid_samples else 0)
        return train, validation, Repeated(held_out, context.test_samples, context.test_samples)

    def _demonstration_samples(self, corpus: Corpus, context: DatasetBuildContext) -> tuple[Any, Any]:
        train, valid = [str(corpus.train_prefix)], [str(corpus.valid_prefix)]
        config = self._config(
            context,
            corpus.fingerprint,
            blend_per_split=[get_blend_from_list(each) for each in (train, valid, valid)],
        )
        sizes = [context.train_samples, context.valid_samples, context.test_samples]
        built: Any = BlendedMegatronDatasetBuilder(HeldOutGPTDataset, sizes, lambda: True, config).build()
        return built[0], built[1]

    def _mixture_samples(self, context: DatasetBuildContext) -> tuple[Any, Any]:
        mixtures = [parse(mixture) for mixture in self.phases()]
        prefixes = {
            domain: str(self.folder / domain)
            for domain in sorted({name for each in mixtures for name, _ in each.weights})
        }
        paths = list(prefixes.values())
        config = self._config(
            context, fingerprint(paths, self.held_out), blend_per_split=[get_blend_from_list(paths)] * 3
        )

        def samples(blend: Blend, split: Split) -> Any:
            return mixed_samples(
                prefixes, blend, held_out=self.held_out, seed=self.random_seed, split=split, config=config
            )

        counts = samples_of_phases(self.steps, context.train_samples)
        train = samples(Blend(list(zip(mixtures, counts, strict=True))), Split.train)
        return train, samples(Blend([(mixtures[0], max(1, context.test_samples))]), Split.valid)

    def _config(self, context: DatasetBuildContext, content: str, **blend: Any) -> GPTDatasetConfig:
        cache = Path(self.index_cache) if self.index_cache else self.folder / "index"
        tokenizer: Any = context.tokenizer
        return GPTDatasetConfig(
            random_seed=self.random_seed,
            sequence_length=self.seq_length,
            tokenizer=tokenizer,
            # Megatron names an index by its path, not by its content: a rebuilt corpus must not find the old one.
            path_to_cache=str(cache / content),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=not self.skip_getting_attention_mask_from_dataset,
            **blend,
        )


class Repeated(torch.utils.data.Dataset):
    """The first `period` samples of a dataset again and again, `length` in all.

    Bridge reads on where the last validation ended. With the samples of one validation as the period, every validation
    sees the same.
    """

    def __init__(self, dataset: Any, period: int, length: int) -> None:
        self.dataset, self.period, self.length = dataset, max(1, period), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, sample: int) -> Any:
        return self.dataset[int(sample) % self.period % len(self.dataset)]


def samples_of_phases(steps: Sequence[int] | None, samples: int) -> list[int]:
    """Return the samples of each phase of a training with `samples` samples in all.

    Raises:
        ConfigurationError: The phases do not have as many steps as the training.
    """
    if steps is None:
        return [samples]
    batch, left = divmod(samples, sum(steps))
    if left or batch < 1:
        raise ConfigurationError(
            f"dataset.steps are {list(steps)}, which does not divide the training's {samples} samples: expected"
            " train.train_iters to be their sum"
        )
    return [count * batch for count in steps]


def tokenizer_of(folder: Path) -> TokenizerConfig:
    """Return the tokenizer in a corpus's folder, whose size is that of the model's vocabulary.

    Raises:
        ConfigurationError: There is none.
    """
    file = tokenizer_file(folder.expanduser().resolve() / "tokenizer")
    if file.suffix == ".json":
        return TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(file.parent),
            use_tokenizer_vocab_size=True,
        )
    return TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(file), use_tokenizer_vocab_size=True
    )
