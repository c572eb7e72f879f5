"""Options that are more than text and numbers are read here, once, where the command line is."""

from pathlib import Path

from nemo_skymoe.architecture import MODELS, Architecture, as_architecture
from nemo_skymoe.commands.front_ends import Read
from nemo_skymoe.quantities import parse_tokens


def model_of(text: str) -> Architecture:
    """Return the model of a name, of its dimensions, or of a checkpoint's folder, from its headers alone.

    A name of `MODELS` is that model, also where a folder has that name: `./skywork-13b` is the folder.

    Raises:
        ConfigurationError: The text is none of these. The message names the option or the file.
    """
    if text.lower() not in MODELS and (Path(text).is_dir() or ("/" in text and "=" not in text)):
        return architecture_of(Path(text))
    return as_architecture(text)


def architecture_of(folder: Path) -> Architecture:
    """Return the model in a checkpoint's folder of any format, from its headers alone.

    Raises:
        ConfigurationError: The folder holds no checkpoint that is read here.
    """
    from nemo_skymoe.checkpoint.sources import open_source

    return open_source(folder).description.architecture


MODEL = Read(lambda _, text: model_of(text))
TOKENS = Read(parse_tokens)
