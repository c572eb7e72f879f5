"""Killed at any byte, before any system call or from outside, a job ends with the bytes of one left alone."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.checkpoint.fakes import random_weights
from tests.checkpoint.simple_formats import TINY, open_folder, write
from tests.durable import crash

ways = pytest.mark.parametrize("way", [("hf", "torch_dist"), ("torch_dist", "hf")], ids="-to-".join)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder where a sync takes no time: a killed process loses nothing that it wrote, on any file system."""
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def conversion(folder: Path, way: tuple[str, str], workers: int = 1) -> tuple[Callable[[], Any], Path]:
    """A source in `folder`, a function that converts it, and where to."""
    source, output = folder / "source", folder / "output"
    write(way[0], random_weights(TINY, torch.bfloat16), source)

    def convert() -> None:
        weights, storage = open_folder(way[0], source)
        write(way[1], weights, output, [storage], workers=workers)

    return convert, output


@ways
def test_killed_in_the_middle_of_a_write(way: tuple[str, str], memory: Path):
    convert, output = conversion(memory, way)
    expected = crash.uninterrupted(convert, output)
    for byte in crash.evenly(expected.written, 8):
        crash.check(convert, output, expected, byte=byte)


@ways
def test_killed_between_system_calls(way: tuple[str, str], memory: Path):
    convert, output = conversion(memory, way)
    expected = crash.uninterrupted(convert, output)
    last = range(expected.calls - 8, expected.calls)  # receipt, index, journal and the folder's own name
    for call in {*crash.evenly(expected.calls, 6), *last}:
        crash.check(convert, output, expected, call=call)


@ways
def test_continues_instead_of_starting_over(way: tuple[str, str], memory: Path):
    convert, output = conversion(memory, way)
    expected = crash.uninterrupted(convert, output)
    # Written files are recorded a little later: how many of them a kill leaves recorded depends on the threads.
    continued = crash.check(convert, output, expected, byte=expected.written * 9 // 10)
    assert continued.written < 0.75 * expected.written


@ways
@pytest.mark.long
def test_killed_at_a_hundred_bytes_and_once_more(way: tuple[str, str], memory: Path):
    convert, output = conversion(memory, way)
    expected = crash.uninterrupted(convert, output)
    random = Random(5)
    for byte in crash.evenly(expected.written, 100):
        crash.check(convert, output, expected, byte=byte, again=random.randrange(expected.written))


@ways
@pytest.mark.long
def test_killed_before_every_system_call(way: tuple[str, str], memory: Path):
    convert, output = conversion(memory, way)
    expected = crash.uninterrupted(convert, output)
    for call in range(expected.calls):
        crash.check(convert, output, expected, call=call)


@ways
@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 3])
def test_killed_from_outside(way: tuple[str, str], workers: int, memory: Path):
    convert, output = conversion(memory, way, workers)
    expected = crash.uninterrupted(convert, output)
    for number in range(30):
        crash.check(convert, output, expected, seconds=number * 0.01)


@pytest.mark.long
def test_a_dead_worker_ends_the_job_and_the_next_attempt_continues(memory: Path):
    convert, output = conversion(memory, ("hf", "torch_dist"), workers=2)
    expected = crash.uninterrupted(convert, output)
    for byte in crash.evenly(sum(map(len, expected.files.values())) // 2, 10):
        run = crash.attempt(convert, byte=byte)
        assert run.killed or "a worker process died (SIGKILL)" in run.error or not run.error
        if not output.exists():
            assert not crash.attempt(convert).error
        assert crash.tree(output) == expected.files
        shutil.rmtree(output)
