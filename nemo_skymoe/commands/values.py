"""Options that are more than text and numbers are read here, once, where the command line is."""

from nemo_skymoe.architecture import as_architecture
from nemo_skymoe.commands.front_ends import Read
from nemo_skymoe.quantities import parse_tokens

MODEL = Read(lambda _, text: as_architecture(text))
TOKENS = Read(parse_tokens)
