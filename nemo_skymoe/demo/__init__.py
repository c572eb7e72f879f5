"""The demo tells the story of the report on a laptop."""
