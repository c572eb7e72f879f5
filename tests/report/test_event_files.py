"""What of a run's event files is drawn: every damage is said, and two runs are never one curve."""

import os
import struct
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.report.curves import read_logs
from nemo_skymoe.report.run import report_run

LOSS = "reduced_train_loss"


def event_file(path: Path, losses: dict[int, float], *, begun: float, batch: int | None = None) -> Path:
    """An event file by its format: a step a second, without TensorBoard's own writer and its clock.

    With a batch it is one of Megatron-Bridge, which logs the loss by samples too.
    """
    events = [Event(wall_time=begun, file_version="brain.Event:2")]
    for seconds, (step, loss) in enumerate(losses.items()):
        tags = {LOSS: step} if batch is None else {f"{LOSS} vs samples": step * batch, LOSS: step}
        for tag, at in tags.items():
            event = Event(wall_time=begun + seconds, step=at)
            event.summary.value.add(tag=tag, simple_value=loss)
            events.append(event)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(record, events)))
    return path


def record(event: Event) -> bytes:
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + sums[0] + data + sums[1]


def curve(folder: Path) -> dict[int, float]:
    found = read_logs(folder).curves[LOSS]
    return dict(zip(found.steps.tolist(), found.values.tolist(), strict=True))


def test_where_a_file_is_damaged_or_cut_off_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = event_file(tmp_path / "events.out.tfevents.1", {step: 1.0 for step in range(10)}, begun=0.0)
    whole = file.read_bytes()
    size = len(whole) // 11  # nearly: the first record is another
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    file.write_bytes(damaged)
    (remark,) = read_logs(tmp_path).remarks
    assert f"'{file}' is damaged at byte " in remark and f"of {len(whole):,}" in remark
    read = int(remark.partition("at byte ")[2].partition(" ")[0])
    assert 0 <= len(whole) // 2 - read < 2 * size and 0 < len(curve(tmp_path)) < 9
    assert remark in report_run(tmp_path).read_text("utf-8").replace("&#x27;", "'")
    assert remark in caplog.text
    file.write_bytes(whole[:-3])
    (remark,) = read_logs(tmp_path).remarks
    assert "ends within a record at byte" in remark and list(curve(tmp_path)) == list(range(9))
    file.write_bytes(whole)
    assert read_logs(tmp_path).remarks == []


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    steps = range(20)
    event_file(tmp_path / "a" / "tfevents", {step: 1.0 for step in steps}, begun=0.0)
    event_file(tmp_path / "b" / "tfevents", {step: 2.0 for step in steps}, begun=100.0)
    with pytest.raises(
        ConfigurationError,
        match=r"two runs lie below it, which both log .* from step 0 on: .*/a/.*/b/.* expected the folder of one run",
    ):
        read_logs(tmp_path)
    event_file(tmp_path / "b" / "tfevents", {step + 5: 2.0 for step in steps}, begun=10.0)
    with pytest.raises(ConfigurationError, match=r"two runs .* were written at the same time"):
        read_logs(tmp_path)
    assert set(curve(tmp_path / "b").values()) == {2.0}


def test_what_was_given_up_is_not_drawn_behind_what_took_its_place(tmp_path: Path) -> None:
    """Resumed from a checkpoint and stopped before the point that the first attempt had reached."""
    event_file(tmp_path / "tfevents.1", {step: 1.0 for step in range(100)}, begun=0.0)
    event_file(tmp_path / "tfevents.2", {step: 2.0 for step in range(50, 70)}, begun=1000.0)
    assert curve(tmp_path) == {step: 1.0 if step < 50 else 2.0 for step in range(70)}
    (remark,) = read_logs(tmp_path).remarks
    assert "tfevents.1' of " in remark and "the steps 0 to 99; " in remark and "the steps 50 to 69." in remark
    event_file(tmp_path / "tfevents.3", {step: 3.0 for step in range(5)}, begun=2000.0)
    assert curve(tmp_path) == {step: 3.0 for step in range(5)}
    remarks = read_logs(tmp_path).remarks
    assert len(remarks) == 2 and all("is left out: the run was begun again" in one for one in remarks)


def test_samples_are_not_taken_for_steps(tmp_path: Path) -> None:
    event_file(tmp_path / "events.out.tfevents.1", {step: 2.0 for step in range(6)}, begun=0.0, batch=8)
    event_file(tmp_path / "events.out.tfevents.2", {step: 1.0 for step in range(4, 8)}, begun=9.0, batch=8)
    assert curve(tmp_path) == {step: 2.0 if step < 4 else 1.0 for step in range(8)}
    (remark,) = read_logs(tmp_path).remarks
    assert "with the steps 0 to 5;" in remark and "with the steps 4 to 7." in remark
    assert "cover the optimizer steps 0 to 7." in report_run(tmp_path).read_text("utf-8")


def test_links_are_followed_and_one_file_is_read_once(tmp_path: Path) -> None:
    real = event_file(tmp_path / "disk" / "logs" / "tfevents", {0: 1.0, 1: 2.0}, begun=0.0)
    run = tmp_path / "run"
    run.mkdir()
    os.symlink(real.parent, run / "logs")
    os.symlink(run, run / "round")
    os.symlink(real, run / "again.tfevents")
    assert curve(run) == {0: 1.0, 1: 2.0}
    assert read_logs(run).remarks == []
