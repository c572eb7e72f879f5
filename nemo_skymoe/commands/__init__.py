"""The commands of `skymoe`, with one file per subject. Every heavy import waits inside the command that needs it."""
