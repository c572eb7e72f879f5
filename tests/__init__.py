"""The tests, and what several of them share: `from tests.FOLDER.FILE import ...` wherever a test stands."""
