"""The job that writes a checkpoint: it can be killed at any byte and continued by the same command."""
