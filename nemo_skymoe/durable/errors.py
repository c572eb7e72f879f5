"""The errors that a user can do something about; every message says what."""


class ConfigurationError(ValueError):
    """A value the user gave cannot work; the message names the option and what was expected."""


class CheckpointError(ConfigurationError):
    """A file or a tensor of a checkpoint or a dataset is not what it must be; the message names it."""


class JobError(ConfigurationError):
    """A job cannot go on: a full disk, a dead worker, another process at work, or another job's folder."""
