"""TensorBoard event files: read their scalars, find how far they can be read, and put the files of one run together."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.folders import every_file

Points = dict[int, float]
"""Values by optimizer step."""

_BY_SAMPLES = " vs samples"
"""Megatron-Bridge logs some scalars again under this ending, with the number of samples in place of the step."""
_FRAME = 16
"""Bytes around a record: its length and two checksums."""


@dataclass(frozen=True)
class EventFile:
    """One event file; times are in seconds since the epoch."""

    path: Path
    begun: float
    scalars: dict[str, Points]
    """The scalars by tag."""
    times: dict[str, tuple[float, float]]
    """Times at which the first and the last value of a tag were logged."""
    damage: str | None
    """A sentence that says from which place on the file cannot be read; None if all of it can."""

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last step."""
        steps = [step for points in self.scalars.values() for step in points]
        return min(steps), max(steps)


def find_event_files(run_dir: Path) -> list[Path]:
    """Return every `*tfevents*` below a folder, also behind links to folders.

    Each real file is listed once, and they are in the order of their paths.
    """
    found: dict[Path, Path] = {}
    for path in every_file(run_dir):
        if "tfevents" in path.name and path.is_file():
            found.setdefault(path.resolve(), path)
    return sorted(found.values())


def read_event_file(path: Path) -> EventFile:
    """Return every scalar of a file, as far as it can be read.

    Raises:
        ConfigurationError: The file cannot be opened.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    try:
        damage = _damage(path)
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0})
        events.Reload()
    except OSError as reason:
        raise ConfigurationError(f"'{path}' cannot be read: {reason.strerror or reason}") from None
    logged = {tag: events.Scalars(tag) for tag in events.Tags()[SCALARS] if not tag.endswith(_BY_SAMPLES)}
    return EventFile(
        path=path,
        begun=(events.FirstEventTimestamp() or 0.0) if logged else 0.0,
        scalars={tag: {event.step: event.value for event in values} for tag, values in logged.items()},
        times={tag: (values[0].wall_time, values[-1].wall_time) for tag, values in logged.items()},
        damage=damage,
    )


def _damage(path: Path) -> str | None:
    """Return a sentence on the place where TensorBoard stops reading, which it does without a message."""
    from tensorboard.compat.tensorflow_stub import errors
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    size, read = path.stat().st_size, 0
    records = PyRecordReader_New(str(path))
    while True:
        try:
            records.GetNext()
        except errors.OutOfRangeError:
            return None
        except errors.DataLossError as reason:
            if "truncated" in str(reason):
                return (
                    f"'{path}' ends within a record at byte {read:,} of {size:,}, as it does while a run is writing or"
                    " where one was killed."
                )
            return f"'{path}' is damaged at byte {read:,} of {size:,}: the events after it are left out."
        read += _FRAME + len(records.record() or b"")


def merge(files: Sequence[EventFile]) -> tuple[dict[str, Points], list[str]]:
    """Return the scalars of one run's files by tag, and sentences on how they were put together.

    A resumed run has several files. Each replaces the values of earlier ones from its first step on: anything that they
    logged after the checkpoint that it continued from belongs to an attempt that was given up.

    Raises:
        ConfigurationError: Two files are of different runs: they were written at the same time, or both begin at the
            first step and lie in different folders.
    """
    points: dict[str, Points] = {}
    kept: list[EventFile] = []
    remarks: list[str] = []
    for file in sorted(files, key=lambda file: (file.begun, file.path)):
        tag = _shared_tag(points, file)
        if tag is not None:
            _check_together(kept, file, tag)
            begin = min(file.scalars[tag])
            if begin <= min(points[tag]):
                remarks += [f"{_described(one)} is left out: the run was begun again." for one in kept]
                kept = []
            points = _before(points, begin)
        for name, values in file.scalars.items():
            points[name] = points.get(name, {}) | values
        kept.append(file)
    if len(kept) > 1:
        together = "; ".join(_described(file) for file in kept)
        remarks.append(
            f"The curves are put together from {len(kept)} event files, of which each takes the place of the earlier ones"
            f" from its first step on: {together}."
        )
    return dict(sorted(points.items())), remarks


def _shared_tag(points: dict[str, Points], file: EventFile) -> str | None:
    """Return a scalar that both files log along the run. One that is logged once, at every start, proves nothing."""
    shared = [tag for tag in file.scalars if len(points.get(tag, ())) > 1]
    return max(shared, key=lambda tag: len(points[tag]), default=None)


def _before(points: dict[str, Points], begin: int) -> dict[str, Points]:
    return {
        tag: before
        for tag, values in points.items()
        if (before := {step: value for step, value in values.items() if step < begin})
    }


def _check_together(kept: Sequence[EventFile], file: EventFile, tag: str) -> None:
    having = [one for one in kept if tag in one.scalars]
    first = min(min(one.scalars[tag]) for one in having)
    for one in having:
        if one.times[tag][1] > file.times[tag][0]:
            raise _two_runs(one, file, "were written at the same time")
        if min(file.scalars[tag]) <= first and one.path.parent != file.path.parent:
            raise _two_runs(one, file, f"both log {tag} from step {first} on")


def _two_runs(one: EventFile, other: EventFile, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"RUN_DIR: two runs lie below it, which {why}: {_described(one)} and {_described(other)}; expected the"
        f" folder of one run, such as '{one.path.parent}' or '{other.path.parent}'"
    )


def _described(file: EventFile) -> str:
    begun = datetime.fromtimestamp(file.begun).isoformat(" ", "seconds")
    return f"'{file.path}' of {begun} with the steps {file.steps[0]:,} to {file.steps[1]:,}"
