"""Every claim of the report that can be checked, in one table: published, ours, whether it holds.

python -m benchmarks.paper.claims > benchmarks/README.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.paper import command, pictures
from benchmarks.paper.claim import CONTRADICTED, HOLDS, NOT_HERE, Claim
from benchmarks.paper.figures import FIGURES

_PARAMETERS = "pytest tests/recipes/test_parameters.py"
_COST = "python benchmarks/cost_model.py"
BEFORE: Sequence[Claim] = (
    Claim("sec. 1, Table 2", "parameters", "146B", "146,356,167,168", HOLDS, _PARAMETERS),
    Claim("sec. 1, Table 2", "activated parameters", "22B", "22.69B, 22.09B without embeddings", HOLDS, _PARAMETERS),
    Claim("sec. 3, fn.", "activated parameters over the dense model's", "about 1.7", "1.667", HOLDS, _PARAMETERS),
    Claim("sec. 3, fn.", "GPU-hours a token over the dense model's", "about 2", "", NOT_HERE),
    Claim("app. C.1", "experts' share of the parameters", "over 97%", ".970 and .984, without embeddings",
          HOLDS, _PARAMETERS),
    Claim("sec. 2.1, 3", "upcycled, nothing dropped: the dense model's loss", "equal", "5.309409 and 5.309409",
          HOLDS, "make demo"),
)  # fmt: skip
AFTER: Sequence[Claim] = (
    Claim("Table 1", "scores on six benchmarks", "C-Eval 82.2, ... HumanEval 43.9", "", NOT_HERE),
    Claim("app. B.1", "EDP trains what one rank trains", "not published", "gradients within 3e-15, float64",
          HOLDS, "pytest tests/moe"),
    Claim("app. B.1", "EDP, dropless, sends less than Megatron's dispatchers on the same mesh", "not published",
          "0.90 of its all-to-all, 0.30 of its all-gather; 1.00 and 0.42 padded to capacity", HOLDS, "python benchmarks/edp.py"),
    Claim("app. B.2, Fig. 6", "bubble of [5,5,5,5,4] against [6,6,6,6] (simulated)", "up to -10%",
          "tokens/GPU/s -8.8% at 4 micro-batches, +2.6% at 16, +8.1% at 64", "depends on the micro-batches",
          "python benchmarks/pipeline.py"),
    Claim("app. B.3", "tokens per GPU and second on 1536 A800 (predicted)", "690", "824; 621 to 901 over what is unknown",
          "consistent", _COST),
    Claim("app. B.3", "MFU at 690 tokens per GPU and second", "38%", "34.9% by 6N + 12LHS", CONTRADICTED, _COST),
)  # fmt: skip
_HEAD = """# Benchmarks

Each script asks one claim, and each page names the command that made it. These commands repeat the report's figures:

```
python -m benchmarks.paper.figure3 --budget full     # figure1, 2, 3, 4, 7, 8, and `defaults`
python -m benchmarks.paper.claims > benchmarks/README.md
```

`--budget short` is a smoke test of minutes. The full runs are the report's recipes at `scale=miniature`: 4 layers of
width 64, float32, and 10,000 tokens where the report has 1B, on English, Chinese and code as 7:2:1
([sources](paper/text.py)). Runs of one seed share initial weights and batches. [paper/results/](paper/results) has the raw
curves and a page for each figure:
{pages}. Runs are deterministic, and those whose curves exist are not repeated.

Differences in loss are in nats per token, ± half the 95% confidence interval over the seeds' paired differences. A claim
**holds** or **does not** if the whole interval is on one side; otherwise it is undecided, whatever the mean.
Nothing corrects for the number of claims: of twenty without an effect, one is expected to be decided by chance.
{incomplete}
The report's figures are repeated with small models that are trained here. [A published model](real_model.md), SmolLM2-135M, goes the
whole way as well: converted, upcycled in every way, compared, trained and exported (`python -m benchmarks.real_model`).

## The report's claims

{summary}

"""


def main() -> None:
    """Print the page."""
    workshop = command.place("full")
    rows, pages, missing = list(BEFORE), [], []
    for figure in FIGURES:
        found = command.collected(figure, workshop)
        seeds = len(next(iter(found.values()))) if found else 0
        if not found:
            missing.append(figure.name)
            continue
        pages.append(
            f"[{figure.name}](paper/results/{figure.name}.md) ({seeds} seed{'s' if seeds > 1 else ''})"
        )
        own = f"python -m benchmarks.paper.{figure.name}"
        rows += [Claim(*(*_cells(claim)[:5], claim.command or own)) for claim in figure.claims(found)]
    rows += AFTER
    incomplete = f"Not run yet: {', '.join(missing)}." if missing else ""
    columns = ("where", "claim", "published", "here", "", "command")
    cells = [(*_cells(row)[:5], f"`{row.command}`" if row.command else "") for row in rows]
    print(
        _HEAD.format(pages=", ".join(pages), incomplete=incomplete, summary=_summary(rows))
        + "\n".join(pictures.table(columns, cells, "---"))
    )


def _summary(rows: Sequence[Claim]) -> str:
    """Count the claims of the report by verdict."""
    verdicts = Counter(row.verdict.strip("*") for row in rows if row.published != "not published")
    counts = "; ".join(f"{verdict}: {count}" for verdict, count in verdicts.most_common())
    return f'{verdicts.total()} rows have values that the report publishes ({counts}). The others say "not published".'


def _cells(claim: Claim) -> tuple[str, str, str, str, str, str]:
    return claim.place, claim.statement, claim.published, claim.ours, claim.verdict, claim.command


if __name__ == "__main__":
    main()
