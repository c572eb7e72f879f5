"""Cures for upstream defects and missing platforms. Nothing in this package acts on import; callers apply it."""
