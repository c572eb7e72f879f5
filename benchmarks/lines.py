"""Count Python by folder: python -m benchmarks.lines [COMMIT ...] prints files and lines at commits of git.

Folders that are links in the package are counted where they stand.
"""

import argparse
import io
import subprocess
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
SUMS = {
    "durable, checkpoint and data": ("nemo_skymoe/durable", "nemo_skymoe/checkpoint", "nemo_skymoe/data"),
    "the package": ("nemo_skymoe", "recipes", "patches"),
    "the tests": ("tests",),
    "the benchmarks": ("benchmarks",),
}


class Count(Counter[str]):
    """Numbers by folder; a folder's own and those of the folders in it are summed by `below`."""

    def below(self, folders: tuple[str, ...]) -> int:
        return sum(
            n for name, n in self.items() if any(PurePosixPath(name).is_relative_to(f) for f in folders)
        )


def counted(commit: str) -> tuple[Count, Count]:
    """Files and lines of Python in the folders of a commit, two levels deep."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    files, lines = Count(), Count()
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if path.suffix == ".py" and (content := members.extractfile(member)) is not None:
                folder = str(PurePosixPath(*path.parent.parts[:2]))
                files[folder] += 1
                lines[folder] += content.read().count(b"\n")
    return files, lines


def table(commits: list[str]) -> str:
    """Markdown with a row per folder and a pair of columns per commit."""
    counts = [counted(commit) for commit in commits]
    rows = ["| folder |" + "".join(f" {commit}: files | lines |" for commit in commits)]
    rows += ["|---|" + "--:|--:|" * len(commits)]
    for folder in sorted({name for files, _ in counts for name in files}):
        rows.append(
            f"| {folder} |" + "".join(f" {files[folder]} | {lines[folder]} |" for files, lines in counts)
        )
    for title, folders in SUMS.items():
        sums = "".join(f" {files.below(folders)} | {lines.below(folders)} |" for files, lines in counts)
        rows.append(f"| {title}, together |{sums}")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", default=["HEAD"], help="commits of git, HEAD by default")
    print(table(parser.parse_args().commits))
