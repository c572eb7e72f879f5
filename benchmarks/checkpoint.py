"""Memory and speed of conversion and upcycling, beside the naive way and beside the disk.

    python benchmarks/checkpoint.py --sizes 1 4 --workers 2 --results FILE
    python benchmarks/checkpoint.py --page FILE

A size's rows can be measured in pieces, each of which appends its lines to FILE; the second form prints their tables.
Every run is a fresh process; VmHWM is its peak. A plain write (one file, one fsync, as many bytes but at most 4 GB)
stands before and after every run, and a run's ratio is against the mean of these two. Sources are read once before
each run, so that they lie in the page cache wherever they fit. Widths: hidden 2048, FFN 5120, vocabulary 8192 with 1
and 4 layers (1 and 4 GB); hidden 4608, FFN 12288, vocabulary 65536 with 1, 2 and 3 (6.8, 12.4 and 18 GB, up to 45 GB
of disk at a time). 16 experts, bfloat16.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from checkpoint_tables import page

Width = tuple[int, int, int, int]
REDUCED, FULL = (2048, 5120, 16, 8192), (4608, 12288, 36, 65536)
"""Hidden size, FFN, heads, vocabulary."""
SIZES = {"1": (1, REDUCED), "4": (4, REDUCED), "6.8": (1, FULL), "12.4": (2, FULL), "18": (3, FULL)}
"""Layers and width by the GB that are written, about."""
EXPERTS = 16
INITIALISATIONS: dict[str, dict[str, Any]] = {
    "copy": {},
    "granular": {"granularity": 2},
    "specialized": {"expert_source": (("other", 8), ("base", 8))},
    "noise": {"noise": 0.05},
    "drop": {"drop_ratio": 0.5},
}
RANDOM = ("noise", "drop")
ROWS = (*INITIALISATIONS, "convert")
_LARGEST_PLAIN = 4_000_000_000


def make_dense(folder: Path, layers: int, width: Width, seed: int) -> None:
    """A dense checkpoint in Skywork-13B's layout; seeds differ in their MLPs alone."""
    import torch
    from safetensors.torch import save_file

    from nemo_skymoe.architecture import Architecture
    from nemo_skymoe.checkpoint.description import Description
    from nemo_skymoe.checkpoint.hugging_face import exported_files
    from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names

    hidden, ffn, heads, vocabulary = width
    sizes = Architecture(layers, hidden, ffn, heads, vocab_size=vocabulary)
    folder.mkdir(parents=True)
    tensors = {}
    for number, chunk in enumerate(hugging_face_names.chunks(sizes)):
        generator = torch.Generator().manual_seed(number + (10_000 * seed if ".mlp." in chunk.tensor else 0))
        # A row, again and again: drawing billions of numbers would take longer than everything that is measured.
        row = torch.randn(chunk.shape[-1], generator=generator).mul_(0.02).bfloat16()
        tensors[chunk.tensor] = row.expand(chunk.shape).contiguous()
    save_file(tensors, folder / "model.safetensors")
    for name, content in exported_files.extras(Description(sizes), None).items():
        (folder / name).write_bytes(content)


def planned(job: dict[str, Any]) -> Any:
    """The plan of a job."""
    from nemo_skymoe.checkpoint import convert
    from nemo_skymoe.checkpoint.convert import TargetOptions
    from nemo_skymoe.checkpoint.sources import open_source
    from nemo_skymoe.checkpoint.upcycling.options import Upcycling

    upcycling = None if job["upcycling"] is None else Upcycling(EXPERTS, **job["upcycling"])
    sources = {name: open_source(Path(folder)) for name, folder in job["sources"].items()}
    options = TargetOptions(job["to"], layer_spec="local" if job["to"] == "nemo" else None)
    return convert.plan(sources, options, upcycling)


def convert(job: dict[str, Any]) -> dict[str, float]:
    """Convert once in a child process, and return the bound on its memory too. The clock starts after Python's imports."""
    import torch.distributed.checkpoint  # noqa: F401

    from nemo_skymoe.checkpoint.tensors.model import model_keys

    start, processor = time.perf_counter(), sum(os.times()[:4])
    plan = planned(job)
    plan.run(Path(job["output"]), workers=job["workers"])
    seconds, processor = time.perf_counter() - start, sum(os.times()[:4]) - processor
    largest = max(
        *(plan.weights.info(key).bytes for key in model_keys(plan.weights.architecture)),
        *(2 * prod(chunk.chunk_shape) for chunk in plan.target.chunks),
    )
    written = written_bytes(Path(job["output"]))
    return {"seconds": seconds, "processor": processor, "bytes": written, "bound": 2 * largest + 1e9}


def naive(job: dict[str, Any]) -> dict[str, float]:
    """Load, build and save the whole model in a child process, as public tools do."""
    from safetensors.torch import load_file, save_file
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    from nemo_skymoe.checkpoint.torch_dist.storage import TorchDistStorage

    start = time.perf_counter()
    source = Path(job["sources"]["base"])
    if (source / "weights").is_dir():
        storage = TorchDistStorage(source)
        tensors = {name: storage.read(name) for name in storage.tensors}
    else:
        tensors = {}
        for file in sorted(source.glob("*.safetensors")):
            tensors |= load_file(file)
    if job["upcycling"] is not None:
        mlps = {name for name in tensors if ".mlp." in name}
        tensors |= {f"{name}.{expert}": tensors[name].clone() for name in mlps for expert in range(EXPERTS)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in mlps}
    output = Path(job["output"])
    output.mkdir()
    if job["to"] == "hf":
        save_file(tensors, output / "model.safetensors")
    else:
        save(dict(tensors), storage_writer=FileSystemWriter(output), no_dist=True)
    return {"seconds": time.perf_counter() - start, "bytes": written_bytes(output)}


def written_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_child(what: str, job: dict[str, Any]) -> dict[str, float]:
    """Run `convert` or `naive` in a fresh process and add its peak."""
    command = [sys.executable, __file__, "--child", what, json.dumps(job)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def child(what: str, job: dict[str, Any]) -> None:
    """The fresh process."""
    result = {"convert": convert, "naive": naive}[what](job)
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    peak = max(int(status.split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    print(json.dumps(result | {"peak": peak * 1024}))


def plain_write(folder: Path, count: int) -> float:
    """Bytes a second of a sequential write of `count` bytes, at most 4 GB, with one fsync."""
    block = os.urandom(1 << 24)
    blocks = max(1, min(count, _LARGEST_PLAIN) // len(block))
    file = folder / "plain"
    start = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        for _ in range(blocks):
            out.write(block)
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return blocks * len(block) / seconds


def into_page_cache(job: dict[str, Any]) -> None:
    """Read the sources once, if memory has room for them."""
    files = [path for folder in job["sources"].values() for path in Path(folder).rglob("*") if path.is_file()]
    if sum(path.stat().st_size for path in files) > available_memory() - 2e9:
        return
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def available_memory() -> int:
    """Bytes that processes could take, as the kernel estimates it."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    return 1024 * int(line.split()[1])


def busy_cores(seconds: float = 2.0) -> float:
    """Return how many cores others keep busy while this process sleeps."""

    def busy() -> float:
        ticks = [int(tick) for tick in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / seconds


class Measurements:
    """Runs and the plain writes between them; what is found is appended to a file, a line of JSON a row."""

    def __init__(self, size: str, results: Path, workers: int):
        self.size, self.results, self.workers = size, results, workers
        self._last_plain: float | None = None

    def row(self, name: str, job: dict[str, Any], repeats: int, with_naive: bool = False) -> None:
        """Measure one row; its output stays."""
        output, busy = Path(job["output"]), busy_cores()
        bytes_planned = planned(job).target.bytes
        plain = [self._last_plain or plain_write(output.parent, bytes_planned)]
        runs = []
        for _ in range(repeats):
            shutil.rmtree(output, ignore_errors=True)
            into_page_cache(job)
            runs.append(in_child("convert", job))
            plain.append(plain_write(output.parent, bytes_planned))
        self._last_plain = plain[-1]
        reference = None
        if with_naive and 2 * bytes_planned < available_memory():
            into_page_cache(job)
            other = output.with_name("naive")
            reference = in_child("naive", job | {"output": str(other)})
            shutil.rmtree(other)
        drawn = generator_rate() if job["upcycling"] and job["upcycling"]["init"] in RANDOM else None
        line = {
            "size": self.size,
            "row": name,
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "workers": self.workers,
            "busy": busy,
            "bytes": runs[0]["bytes"],
            "bound": runs[0]["bound"],
            "runs": runs,
            "plain": plain,
            "naive": reference,
            "generator": drawn,
        }
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")


def measure(size: str, folder: Path, measurements: Measurements, rows: Sequence[str], repeats: int) -> None:
    """Those of the ROWS of one size. At most two outputs are there at a time."""
    layers, width = SIZES[size]
    sources = {name: str(folder / name) for name in ("base", "other")}
    if "specialized" not in rows:
        del sources["other"]
    for seed, source in enumerate(sources.values()):
        make_dense(Path(source), layers, width, seed)
    plain: dict[str, Any] = {"workers": measurements.workers, "upcycling": None}

    def upcycling(init: str) -> dict[str, Any]:
        given = sources if init == "specialized" else {"base": sources["base"]}
        options = {"init": init} | INITIALISATIONS[init]
        return plain | {"sources": given, "to": "hf", "output": str(folder / init), "upcycling": options}

    for init in (init for init in INITIALISATIONS if init in rows):
        times = 1 if init in RANDOM else repeats
        measurements.row(f"upcycle {init}, hf to hf", upcycling(init), times, init == "copy")
        if init != "copy":
            shutil.rmtree(folder / init)
    if "copy" not in rows and "convert" in rows:
        in_child("convert", upcycling("copy"))
    for source in sources.values():
        shutil.rmtree(source)
    if "convert" in rows:
        there = plain | {
            "sources": {"base": str(folder / "copy")},
            "to": "nemo",
            "output": str(folder / "nemo"),
        }
        measurements.row("convert, hf to nemo", there, repeats, True)
        shutil.rmtree(folder / "copy")
        back = plain | {
            "sources": {"base": str(folder / "nemo")},
            "to": "hf",
            "output": str(folder / "back"),
        }
        measurements.row("convert, nemo to hf", back, repeats, True)
    shutil.rmtree(folder)


def generator_rate() -> tuple[float, float]:
    """Bytes of bfloat16 a second that NumPy's Philox alone gives on one core, and with our blocks on all."""
    import numpy as np

    from nemo_skymoe.checkpoint.upcycling.random_numbers import Stream, normal

    count = 1 << 25
    buffer = np.empty(count, dtype=np.float32)
    start = time.perf_counter()
    np.random.Generator(np.random.Philox(0)).standard_normal(dtype=np.float32, out=buffer)
    middle = time.perf_counter()
    normal(Stream(0, "gate", 0), (count,), 0.0, 1.0, "bfloat16")
    return 2 * count / (middle - start), 2 * count / (time.perf_counter() - middle)


def main() -> None:
    """Measure, or print the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1", "4"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--results", type=Path, default=Path("runs/benchmark/checkpoint.jsonl"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--child", nargs=2)
    given = parser.parse_args()
    if given.child:
        child(given.child[0], json.loads(given.child[1]))
        return
    if given.page:
        print(page([json.loads(line) for line in given.page.read_text().splitlines()]))
        return
    folder = given.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for size in given.sizes:
        measurements = Measurements(size, given.results, given.workers)
        measure(size, folder / size, measurements, given.rows, given.repeats)


if __name__ == "__main__":
    main()
