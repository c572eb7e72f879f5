"""The table of coverage adds up files: a package's share is that of its lines, not a mean over its files."""

from tests.coverage_table import table


def test_lines_are_added_by_package() -> None:
    def report(statements: int, covered: int) -> dict[str, dict[str, int]]:
        return {"summary": {"num_statements": statements, "covered_lines": covered}}

    rows = table({"a/one.py": report(90, 90), "a/two.py": report(10, 0), "a/b/three.py": report(0, 0)}).split(
        "\n"
    )
    assert [row.split() for row in rows] == [
        ["a", "100", "statements", "90.0%", "covered"],
        ["a/b", "0", "statements", "0.0%", "covered"],
        ["together", "100", "statements", "90.0%", "covered"],
    ]
