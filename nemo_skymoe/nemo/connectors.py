"""`nemo llm import` and `nemo llm export`: NeMo's connectors around the streaming conversion."""

from pathlib import Path
from typing import Any, NoReturn

from nemo.lightning import io

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import BASE
from nemo_skymoe.config import ConfigurationError


def connect(model: type[io.ConnectorMixin]) -> None:
    """Let NeMo import `hf://FOLDER` into this model class and export its checkpoints to `hf`."""
    io.model_importer(model, "hf")(HuggingFaceImporter)
    io.model_exporter(model, "hf")(HuggingFaceExporter)


class HuggingFaceImporter(io.ModelConnector):
    """Imports a folder in Hugging Face's form: the model that it describes, whatever the class says."""

    def apply(self, output_path: Path) -> Path:
        """Write the NeMo checkpoint. An interrupted import continues where it was."""
        if not self.is_dir():
            raise ConfigurationError(f"source 'hf://{self}' is not a folder: download the checkpoint first")
        return _convert(Path(self), output_path, "nemo")


class HuggingFaceExporter(io.ModelConnector):
    """Exports to Hugging Face's form, with modeling files for classes that transformers does not have."""

    def apply(self, output_path: Path) -> Path:
        """Write the folder. An interrupted export continues where it was."""
        return _convert(Path(self), output_path, "hf")

    def nemo_load(self, *_: Any, **__: Any) -> NoReturn:
        """Decline: NeMo offers every checkpoint to ModelOpt first, and for that would load the whole model."""
        raise RuntimeError("exported without loading the model")


def _convert(source: Path, output: Path, to: str) -> Path:
    convert.plan({BASE: open_source(source)}, TargetOptions(to)).run(output)
    return output
