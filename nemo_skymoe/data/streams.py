"""The samples of mixtures of Megatron's indexed datasets, by their number."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data import indexed
from nemo_skymoe.data.mixture import Blend, parse


class Stream:
    """One domain's samples in an endless order, epoch after epoch of `dataset`, that only the seed decides."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self._seed = dataset, seed
        self._epoch, self._step, self._shift = 0, 1, 0

    def __getitem__(self, position: int) -> Any:
        size = len(self.dataset)
        epoch, index = divmod(position, size)
        if epoch != self._epoch:
            self._begin(epoch, size)
        return self.dataset[(index * self._step + self._shift) % size]

    def _begin(self, epoch: int, size: int) -> None:
        """Begin an epoch with a permutation that needs no table: a multiplier coprime to the size, and a shift."""
        self._epoch, self._step, self._shift = epoch, 1, 0
        if epoch:
            draw = np.random.default_rng([self._seed, epoch])
            steps = draw.integers(1, size + 1, 1000)
            self._step = next((int(step) for step in steps if np.gcd(step, size) == 1), 1)
            self._shift = int(draw.integers(size))


class MixedSamples(torch.utils.data.Dataset):
    """The samples of a blend by their number."""

    def __init__(self, streams: dict[str, Stream], blend: Blend) -> None:
        self.streams, self.blend = streams, blend

    def __len__(self) -> int:
        return len(self.blend)

    def __getitem__(self, sample: int) -> Any:
        domain, position = self.blend.locate(int(sample))
        return self.streams[domain][position]


def mixed_samples(
    prefixes: dict[str, str], blend: Blend, *, held_out: float, seed: int, split: Split, config: Any
) -> MixedSamples:
    """Return the samples of `blend` from datasets with a share of held-out documents.

    Args:
        prefixes: Megatron's path prefix of each domain's dataset.
        blend: The samples' domains.
        held_out: Share of each domain's documents that only validation sees: the last ones.
        seed: Seed of the order of each domain's samples.
        split: Train, or another for the held-out documents.
        config: Megatron's `GPTDatasetConfig`.

    Raises:
        ConfigurationError: A dataset has too few tokens for one sample.
    """

    def stream(domain: str) -> Stream:
        return Stream(_epoch(prefixes[domain], held_out, split, config), seed)

    return MixedSamples({domain: stream(domain) for domain in sorted(blend.taken)}, blend)


def _epoch(prefix: str, held_out: float, split: Split, config: Any) -> Any:
    """Return one epoch of a dataset's documents."""
    documents = GPTDataset.build_low_level_dataset(prefix, config)
    count = GPTDataset.numel_low_level_dataset(documents)
    kept = count - math.ceil(count * held_out)
    chosen = np.arange(kept) if split is Split.train else np.arange(kept, count)
    tokens = int(documents.sequence_lengths[chosen].sum())
    if tokens <= config.sequence_length:
        raise ConfigurationError(
            f"the dataset '{prefix}' has {tokens} tokens in {len(chosen)} documents for {split.name}: expected more"
            f" than seq_length={config.sequence_length}"
        )
    return BlendedMegatronDatasetBuilder.build_generic_dataset(
        GPTDataset, lambda: True, True, documents, prefix, chosen.astype(np.int32), None, split, config
    )


def check_datasets(folder: Path, mixtures: Sequence[str]) -> None:
    """Refuse mixtures that make no sense or have a domain whose dataset is not in `folder`.

    Raises:
        ConfigurationError: The message names the mixture, and the domain.
    """
    for mixture in mixtures:
        for domain, _ in parse(mixture).weights:
            _check_dataset(folder, domain, mixture)


def _check_dataset(folder: Path, domain: str, mixture: str) -> None:
    for file in indexed.files(folder / domain):
        if not file.is_file():
            found = sorted(each.stem for each in folder.glob("*.idx"))
            raise ConfigurationError(
                f"the mixture '{mixture}' has the domain '{domain}', for which '{file}' is missing; in the folder are:"
                f" {', '.join(found) or 'none'} (made by skymoe preprocess)"
            )


def check_numbers(mixtures: Sequence[str], steps: Sequence[int] | None, held_out: float) -> None:
    """Refuse numbers of steps and shares that make no sense.

    Raises:
        ConfigurationError: The message names them.
    """
    if len(mixtures) != len(steps or [0]):
        raise ConfigurationError(
            f"there are {len(mixtures)} mixtures and steps={steps}, expected steps for every mixture"
        )
    if any(count < 1 for count in steps or ()):
        raise ConfigurationError(f"the phases' steps are {steps}, expected at least 1 each")
    if not 0 < held_out < 1:
        raise ConfigurationError(f"held_out is {held_out}, expected a share between 0 and 1")


def fingerprint(prefixes: Sequence[str], held_out: float) -> str:
    """Return a checksum of the data. Megatron names an index by its path, so changed data would find the old one."""
    stats = [file.stat() for prefix in prefixes for file in indexed.files(Path(prefix))]
    content = [held_out, *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()
