"""Validation samples that are the same in every run."""

from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split


class HeldOutGPTDataset(GPTDataset):
    """Megatron's GPTDataset with validation and test splits of exactly one epoch.

    NeMo asks for as many validation samples as all validations of a run need together. Beyond one epoch Megatron
    shuffles several epochs together, so the validation set would depend on `max_steps`. Every validation starts again
    at the first sample. With one epoch, `limit_val_batches=N` is therefore the same N batches in every run.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: Any,
    ) -> None:
        if index_split is not Split.train:
            num_samples = None
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
