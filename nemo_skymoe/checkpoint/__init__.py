"""Upcycling and conversion of checkpoints."""
