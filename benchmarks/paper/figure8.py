"""Figure 8 (appendix C.2): experts from four specialised dense models against copies of one; beside them the other
initialisations.

    python -m benchmarks.paper.figure8 --budget full
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.paper import pictures
from benchmarks.paper.claim import Claim, equal, signed
from benchmarks.paper.command import Figure, Page, Results, main
from benchmarks.paper.figure1 import dense
from benchmarks.paper.results import losses, paired
from benchmarks.paper.runs import Run, Start
from nemo_skymoe.checkpoint.upcycling.options import Upcycling

LABELS = {
    "copy": "copies of one model",
    "specialized": "3 zh, 3 en, 1 code, 1 base",
    "noise": "copies with noise (0.1)",
    "drop": "Drop-Upcycling (r = 0.5)",
    "granular": "granular (G = 2, top-4 of 16)",
}
REPORT = {"copy": 2.000, "specialized": 1.995}
"""Losses read off the report's figure, where its curves end (90B tokens)."""
TOKENS, SOURCE_TOKENS = 100e9, 50e9
"""The report's, and half of its 100B of one domain: the Chinese text would be seen too often."""
SOURCE_RATE = 3e-4
"""Constant, where the dense run ended, as the recipe has it at full size."""
RATES = {"max_lr": 1.2e-3, "min_lr": 3e-4}
"""Those of Figure 1 for a start from the end of the dense run."""
OPTIONS = {
    "copy": Upcycling(8, 2),
    "specialized": Upcycling(
        8, 2, init="specialized", expert_source=(("zh", 3), ("en", 3), ("code", 1), ("base", 1))
    ),
    "noise": Upcycling(8, 2, init="noise", noise=0.1),
    "drop": Upcycling(8, 2, init="drop", drop_ratio=0.5),
    "granular": Upcycling(8, 4, init="granular", granularity=2),
}
_GRANULAR = {
    "model.config.num_moe_experts": 16,
    "model.config.moe_router_topk": 4,
    "model.config.ffn_hidden_size": 88,
}


def source(seed: int, domain: str) -> Run:
    """The dense model trained on one domain, its FFNs alone."""
    rates = {"max_lr": SOURCE_RATE, "min_lr": SOURCE_RATE}
    return Run(
        "figure8", f"source_{domain}", seed, "skywork_1p3b.pretrain_recipe",
        {"train_only_ffn": True, "tokens": SOURCE_TOKENS, "mixture": f"{domain}:1", **rates},
        start=Start({"base": (dense(seed), 1.0)}),
    )  # fmt: skip


def runs(seed: int) -> list[Run]:
    """The sources, then an arm an initialisation."""
    sources = {domain: source(seed, domain) for domain in ("zh", "en", "code")}
    every = {"base": (dense(seed), 1.0)}
    return [
        *sources.values(),
        *(
            Run(
                "figure8", arm, seed, "skywork_1p3b.moe_pretrain_recipe",
                {"sources": 4 if arm == "specialized" else 1, "tokens": TOKENS, "similarity_interval": 20, **RATES},
                _GRANULAR if arm == "granular" else {},
                Start(
                    every | ({name: (run, 1.0) for name, run in sources.items()} if arm == "specialized" else {}),
                    replace(OPTIONS[arm], seed=seed),
                ),
            )
            for arm in LABELS
        ),
    ]  # fmt: skip


def page(found: Results) -> Page:
    """Loss and expert similarity, and our differences from the copies beside the report's."""
    figure, axes = pictures.grid(1, 4)
    pictures.lines(axes[0, 0], found, LABELS, pictures.train_loss, "Training loss")
    gap = pictures.behind(found["copy"])
    pictures.lines(axes[0, 1], found, LABELS, gap, "Training loss minus that of copies")
    pictures.lines(
        axes[0, 2], found, LABELS, lambda run: run.mean_curve("expert_similarity"), "Expert similarity"
    )
    gaps = {arm: paired(losses(found[arm]), losses(found["copy"])) for arm in LABELS}
    report = [REPORT[arm] - REPORT["copy"] if arm in REPORT else None for arm in LABELS]
    pictures.against(axes[0, 3], list(LABELS), report, list(gaps.values()), "Final loss minus that of copies")
    axes[0, 3].legend()
    axes[0, 3].tick_params(axis="x", labelsize=7)
    pictures.key(figure, axes[0, 0])
    rows = [
        (
            LABELS[arm], pictures.mean_and_spread(losses(found[arm])), "" if arm == "copy" else gaps[arm], REPORT.get(arm),
            pictures.mean_and_spread([float(run.mean_curve("expert_similarity").values[-1]) for run in found[arm]], 3),
        )
        for arm in LABELS
    ]  # fmt: skip
    columns = ("experts", "loss", "minus copies", "report", "similarity at the end")
    return Page(figure, pictures.table(columns, rows))


def claims(found: Results) -> list[Claim]:
    """Specialised sources help a little; the other initialisations are compared for their own sake."""
    place, made = "app. C.2, Fig. 8", []
    ours = {arm: paired(losses(found[arm]), losses(found["copy"])) for arm in LABELS}
    published = REPORT["specialized"] - REPORT["copy"]
    made.append(
        signed(place, "loss, specialised sources minus copies of one", published, ours["specialized"])
    )
    made.append(equal(place, "the same is small", published, ours["specialized"], 0.01))
    for arm in ("noise", "drop", "granular"):
        statement = f"loss, {LABELS[arm]} minus copies (ours, not the report's)"
        made.append(Claim(place, statement, "not published", str(ours[arm]), ours[arm].verdict))
    return made


FIGURE = Figure("figure8", "Figure 8 in miniature: what the experts are made of", runs, page, claims)

if __name__ == "__main__":
    main(FIGURE)
