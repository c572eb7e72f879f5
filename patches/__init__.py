"""Cures for upstream defects and missing platforms. Nothing here acts on import; callers apply."""
