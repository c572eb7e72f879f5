"""What the tests owe a machine that is busy with other work: none reads a clock, so none asserts a measured time.

Speeds are measured in benchmarks/. Work is counted (`tests/calls.py`), events are waited for (`tests/waiting.py`).
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
CLOCKS = {
    "time": {"time", "monotonic", "perf_counter", "process_time", "thread_time", "clock_gettime", "clock"},
    "datetime": {"now", "utcnow", "today"},
    "os": {"times", "wait3", "wait4"},
    "resource": {"getrusage"},
    "timeit": {"timeit", "repeat", "default_timer", "Timer"},
    "psutil": {"cpu_times", "cpu_percent"},
}
# Names that nothing but a clock has, whatever the module is called where it is used.
TELLING = {name for names in CLOCKS.values() for name in names} - {
    "time",
    "clock",
    "now",
    "today",
    "times",
    "repeat",
}
IN_TEXT = re.compile(rf"\b(?:time\.time|os\.times|datetime\.now|{'|'.join(sorted(TELLING))})(?:_ns)?\(")
MAY = {
    "waiting.py": "gives up on what hangs",
    "compat/pair.py": "is no test, and prints how long it took",
}


def clocks(code: str) -> Iterator[str]:
    """Every reading of a clock in a program, also in the programs that it writes down as text."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module in CLOCKS:
            names = {alias.name.removesuffix("_ns") for alias in node.names}
            yield from (f"{node.module}.{name}" for name in names & CLOCKS[node.module])
        elif isinstance(node, ast.Attribute):
            module = ast.unparse(node.value).rpartition(".")[2]
            name = node.attr.removesuffix("_ns")
            if name in TELLING | CLOCKS.get(module, set()):
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from IN_TEXT.findall(node.value)


def test_no_test_reads_a_clock() -> None:
    files = {str(file.relative_to(TESTS)): file for file in TESTS.rglob("*.py")}
    del files[Path(__file__).name]
    found = {name: [*clocks(file.read_text())] for name, file in files.items()}
    assert {name for name, reads in found.items() if reads} == MAY.keys(), found


def test_a_clock_is_found_however_it_is_read() -> None:
    for code in (
        "import time\nstart = time.time()\nassert time.time() - start < 1",
        "import time as t\nassert t.perf_counter_ns() < 1",
        "from time import process_time as now\nassert now() < 1",
        "import os\nassert os.times().user < 1",
        "import resource as r\nused = r.getrusage(r.RUSAGE_SELF)",
        "import datetime\nassert datetime.datetime.now() < limit",
        "from datetime import datetime\nassert datetime.now() < limit",
        "code = 'import time; print(time.monotonic())'",
        "from timeit import timeit\nassert timeit(f) < 1",
    ):
        assert [*clocks(code)], code
    assert [*clocks("import time\ntime.sleep(600)\nrun(timeout=600)\nassert times[0] < plan.time")] == []
