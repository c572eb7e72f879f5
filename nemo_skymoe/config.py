"""What a user sets (filled in below)."""


class ConfigurationError(ValueError):
    """A value the user gave cannot work; the message names the option and what was expected."""
