"""The committed page of all Megatron-Cores is that of the committed log, in which none failed."""

from nemo_skymoe.doctor import MEGATRON
from tests.versions_table import LOG, PAGE, ROOT, page, rows

TWICE = """\
2026-01-02 abc1234, Linux x86_64, 2 cores
megatron-core 0.15.3, Python 3.11.7, torch 2.13.0+cpu
1 failed, 9 passed, 2 skipped, 5 deselected in 61.00s (0:01:01)
megatron-core 0.14.0, Python 3.11.7, torch 2.13.0+cpu
9 passed in 30.00s
2026-01-03 def5678, Linux x86_64, 2 cores
megatron-core 0.15.3, Python 3.11.7, torch 2.13.0+cpu
10 passed, 2 skipped, 5 deselected in 121.00s (0:02:01)
"""


def test_the_last_run_of_each_counts() -> None:
    old, new = rows(TWICE)
    assert (old.version, old.passed, old.date, old.commit) == ("0.14.0", 9, "2026-01-02", "abc1234")
    assert (new.version, new.passed, new.failed, new.skipped, new.minutes) == ("0.15.3", 10, 0, 2, 2)
    assert next(iter(rows(TWICE.partition("2026-01-03")[0].replace("0.14.0", "0.16.1")))).failed == 1


def test_the_page_is_that_of_the_log_and_no_supported_version_failed() -> None:
    log = LOG.read_text()
    assert PAGE.read_text() == page(log)
    found = list(rows(log))
    assert [row.version.rpartition(".")[0] for row in found] == [*MEGATRON]
    assert all(row.passed > 500 and not row.failed for row in found)
    assert all(row.version in (ROOT / "tests" / "versions.sh").read_text() for row in found)
