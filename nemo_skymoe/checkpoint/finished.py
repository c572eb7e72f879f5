"""A job that is run again after it was done: its output is there already, if nothing of what made it has changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.checksums import FileChecksum, available_processors, check_file
from nemo_skymoe.checkpoint.reading import FileStorage
from nemo_skymoe.checkpoint.receipt import read_receipt


def finished(
    output: Path,
    identity: Mapping[str, Any],
    sources: Sequence[FileStorage],
    advance: Callable[[int, str], None],
) -> dict[str, Any] | None:
    """The receipt in `output`, if this job wrote it, and from sources that are still the same to the byte.

    The sources are read once more, the output is not: it got its name when it was complete.

    Args:
        identity: What makes two jobs the same, as a `Journal` has it.
        advance: Called with bytes read and a file's name.
    """
    receipt = read_receipt(output)
    expected = json.loads(json.dumps(identity))
    if receipt is None or any(receipt.get(key) != value for key, value in expected.items()):
        return None
    files = {
        (str(storage.folder), file.relative_to(storage.folder).as_posix()): file
        for storage in sources
        for file in storage.files
    }
    claimed = {
        (source["folder"], name): FileChecksum.from_json(value)
        for source in receipt["sources"]
        for name, value in source["files"].items()
    }
    if files.keys() != claimed.keys():
        return None

    def unchanged(place: tuple[str, str]) -> bool:
        return check_file(files[place], claimed[place], lambda count: advance(count, files[place].name))

    with ThreadPoolExecutor(available_processors()) as pool:
        return receipt if all(pool.map(unchanged, files)) else None
