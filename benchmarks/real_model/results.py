"""The results, a part at a time: what is there is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


class Results:
    """A JSON file of parts by name."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.parts = self._read()

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a part, which is measured if it is not there."""
        if name not in self.parts:
            print(f"== {name}", flush=True)
            found = measure()
            # Another process may have measured another part meanwhile.
            self.parts = self._read() | {name: found}
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.parts, indent=1) + "\n")
            temporary.replace(self.file)
        return self.parts[name]

    def _read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.is_file() else {}
