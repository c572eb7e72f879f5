"""Files that nobody vouches for: pickles that are read as data, and checks of what other libraries would build."""
