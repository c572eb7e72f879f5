"""The errors that a user can do something about. Every message says what."""


class ConfigurationError(ValueError):
    """A value that the user gave cannot work. The message names the option and what was expected."""


class CheckpointError(ConfigurationError):
    """A file or a tensor of a checkpoint or a dataset is not what it should be. The message names it."""


class JobError(ConfigurationError):
    """A job cannot continue: the disk is full, a worker has died, another process is at work, or the folder is another
    job's."""
