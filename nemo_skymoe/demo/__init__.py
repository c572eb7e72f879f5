"""The demo: the story of the report on a laptop."""
