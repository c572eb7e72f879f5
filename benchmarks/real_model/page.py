"""The page and its picture, drawn from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.pictures import table
from benchmarks.real_model.conversions import EXPERTS, INITIALISATIONS, TOPK
from benchmarks.real_model.corpus import HELD_OUT, SEQUENCE, SEQUENCES
from benchmarks.real_model.function import COMPARED, DTYPES
from benchmarks.real_model.generation import NEW_TOKENS, PROMPTS, QUESTION
from benchmarks.real_model.training import BATCH, BEFORE, NAMES, RANKS, SPECIALIST_STEPS, STEPS

PAGE = Path(__file__).parents[1] / "real_model.md"
WAYS = ("without cache", "batched with left padding", "pipeline")

Parts = Mapping[str, Any]


def write(parts: Parts) -> None:
    """Write the page, and the picture of the trainings beside it."""
    from benchmarks.real_model import picture

    PAGE.write_text(text(parts))
    if "training of moe" in parts:
        PAGE.with_suffix(".png").write_bytes(picture.draw(parts))


def text(parts: Parts) -> str:
    """Return the page. A part that is missing is said not to have been measured."""
    upcycled = [f"upcycled, {init}" for init in INITIALISATIONS]
    functions = [f"function, {init}" for init in INITIALISATIONS]
    trained = [f"{part} of {name}" for name in NAMES for part in ("training", "export")]
    sections = (
        (_head, ("model", "versions"), ()),
        (_conversions, ("conversions",), upcycled),
        (_logits, ("logits",), ()),
        (_function, functions[:1], functions),
        (_generation, ("text of dense", "text of moe"), ()),
        (_training, ("corpus", functions[0], "training of moe"), trained),
        (_specialists, ("specialists",), ()),
    )
    lines: list[str] = []
    for section, needed, wanted in sections:
        missing = [name for name in dict.fromkeys((*needed, *wanted)) if name not in parts]
        if all(name in parts for name in needed):
            lines += section(parts)
            lines.append("")
        if missing:
            lines += [f"Not measured: {'; '.join(missing)}.", ""]
    return "\n".join(lines)


def _head(parts: Parts) -> list[str]:
    model, versions = parts["model"], parts["versions"]
    return [
        "# A published model, from its weights to a trained MoE",
        "",
        "```bash",
        "pip install -e '.[nemo,real-model]'",
        "python -m benchmarks.real_model",
        "python -m benchmarks.real_model --publish",
        "```",
        "",
        f"The model is SmolLM2-135M-Instruct: a `{model['class']}` of {model['parameters'] / 1e6:.1f}M parameters with"
        f" {model['layers']} layers of width {model['hidden']}, {model['heads']} heads in {model['groups']} groups and"
        f" {'tied' if model['tied'] else 'untied'} embeddings. The package `{model['package']}` carries it as"
        f" `{model['file']}`. The GGUF file has 4 bits a weight, which transformers and the package `gguf` widen; the"
        " folder that everything begins with is in bfloat16, as such models are published. Every step is a command that"
        " a user types. The page, its picture and its digits come from `benchmarks/real_model/results.json`.",
        "",
        f"CPU only, {', '.join(f'{name} {number}' for name, number in versions.items())}.",
    ]


def _conversions(parts: Parts) -> list[str]:
    found = parts["conversions"]
    verified = dict(found["verified"])
    for init in INITIALISATIONS:
        verified |= parts.get(f"upcycled, {init}", {})
    return [
        "## Conversions",
        "",
        f"{found['equal']} of {found['tensors']} tensors are equal to the bit after the way from Hugging Face's form to"
        f" NeMo's and back. Each upcycling makes {EXPERTS} experts of which a token meets {TOPK}; `granular` cuts each of"
        " them in two, of which a token meets twice as many. `skymoe verify` recomputed every tensor of every result.",
        "",
        *_verified(verified),
    ]


def _verified(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    cells = [
        (name, row["tensors"], f"{row['bytes'] / 1e6:,.0f}", row["differences"]) for name, row in rows.items()
    ]
    return table(("", "tensors", "MB compared", "differences"), cells)


def _logits(parts: Parts) -> list[str]:
    rows = [(name, f"{relative:.1e}") for name, relative in parts["logits"].items()]
    return [
        "## The same function in Megatron",
        "",
        "`skymoe verify --logits` runs a folder in NeMo's form in Megatron and one in Hugging Face's in transformers, on a"
        " text of 512 tokens in float32.",
        "",
        *table(("", "largest difference / largest logit"), rows),
    ]


def _function(parts: Parts) -> list[str]:
    rows = [("dense", *[""] * (2 * len(DTYPES)), f"{parts['function, copy']['dense loss']:.6f}")]
    for init in (each for each in INITIALISATIONS if f"function, {each}" in parts):
        found = parts[f"function, {init}"]
        cells = [cell for dtype in DTYPES for cell in _difference(found[dtype])]
        rows.append((init, *cells, f"{found['loss']:.6f}"))
    heads = [head for dtype in DTYPES for head in (f"{dtype}: difference", f"{dtype}: equal logits")]
    return [
        "## The same function in transformers",
        "",
        f"The exported folders are loaded as any other. Logits are those of {COMPARED} sequences of {SEQUENCE} tokens; the"
        " difference is the largest one, divided by the largest logit of the dense model in the same precision. Losses are"
        f" the mean over {SEQUENCES} sequences of held-out text, in nats a token, in float32. With `noise` (0.01 of each"
        " matrix's deviation) and `drop` (half of each MLP drawn anew) the model is meant to compute something else.",
        "",
        *table(("", *heads, "held-out loss"), rows),
    ]


def _difference(found: Mapping[str, float]) -> tuple[str, str]:
    return (f"{found['relative']:.1e}", f"{100 * found['equal']:.2f}%")


def _generation(parts: Parts) -> list[str]:
    dense, moe = parts["text of dense"], parts["text of moe"]
    rows = [(name, *(f"{found[way]} of {len(found['texts'])}" for way in WAYS)) for name, found in
            (("dense", dense), ("MoE of copies", moe))]  # fmt: skip
    same = _same(dense["tokens"], moe["tokens"])
    return [
        "## Text",
        "",
        f"Up to {NEW_TOKENS} tokens are generated greedily for {len(dense['texts'])} prompts, in float32. The table says for"
        " how many of them another way gives the text that one prompt at a time gives with the cache. The upcycled MoE"
        f" gives the dense model's tokens for {same} of {len(dense['texts'])}.",
        "",
        *table(("", *WAYS), rows),
    ]


def _training(parts: Parts) -> list[str]:
    losses, corpus = parts["function, copy"], parts["corpus"]
    rows = []
    for name, before in BEFORE.items():
        if f"training of {name}" in parts:
            training, export = parts[f"training of {name}"], parts.get(f"export of {name}")
            minutes = (training[key] / 60 for key in ("seconds", "processor_seconds"))
            cells = (
                f"{losses[before]:.4f}",
                f"{export['loss']:.4f}" if export else "",
                *(f"{each:.0f}" for each in minutes),
            )
            rows.append((NAMES[name], *cells, export["verified"]["differences"] if export else ""))
    return [
        "## Trained on",
        "",
        f"The models continue for {STEPS} steps of {BATCH} sequences of {SEQUENCE} tokens on Python's standard library"
        f" ({corpus['documents']} files, {corpus['tokens'] / 1e6:.1f}M tokens of the model's own tokenizer, of which"
        f" {100 * HELD_OUT:.0f}% of the files are held out), with `nemo llm pretrain --factory` and the recipes"
        f" `skywork_dense` and `skywork_moe`, in float32 on {RANKS} CPU ranks that are pipeline stages. Learning rates are the"
        " recipes' own. The MoE starts from the copies, and drops no token (`expert_capacity_factor=None`). Losses are"
        " those of the exported folders in transformers, on held-out text.",
        "",
        *table(
            ("", "loss before", "loss after", "minutes", "processor minutes", "differences of the export"),
            rows,
        ),
        "",
        "![Losses, drop rates and coefficients of the trainings](real_model.png)",
        "",
        "This is one seed and few tokens, and other work ran on the same two cores: it shows that the way works, and says"
        " nothing about which model wins.",
        "",
        *_texts(parts),
    ]


def _texts(parts: Parts) -> list[str]:
    if not {"text of dense", "text of moe", "export of moe"} <= parts.keys():
        return []
    prompts = (QUESTION, *PROMPTS)
    exports = {name: parts[f"export of {name}"]["text"] for name in NAMES if f"export of {name}" in parts}
    columns = {
        "dense before": parts["text of dense"]["texts"],
        "MoE before": parts["text of moe"]["texts"],
        **{f"{NAMES[name]} after": found["texts"] for name, found in exports.items()},
    }
    rows = [
        [_quoted(prompt), *(_quoted(texts[number]) for texts in columns.values())]
        for number, prompt in enumerate(prompts)
    ]
    equal = [
        f"{NAMES[name]}, {way}: {found[way]} of {len(prompts)}"
        for name, found in exports.items()
        for way in WAYS
    ]
    return [
        *table(("prompt", *columns), rows, "---"),
        "",
        f"The other ways of generating were compared after the training as well; texts that are equal: {'; '.join(equal)}.",
    ]


def _specialists(parts: Parts) -> list[str]:
    found = parts["specialists"]
    return [
        "## Specialised sources",
        "",
        f"The dense model was continued for {SPECIALIST_STEPS} steps in nothing but its MLPs"
        f" (`model.config.train_only_ffn=true`), and {EXPERTS // 2} experts each come from it and from the model as it was."
        f" The held-out loss of that MoE is {found['loss']:.4f} before any training.",
        "",
        *_verified(found["verified"]),
    ]


def _same(found: Sequence[Any], expected: Sequence[Any]) -> int:
    return sum(one == other for one, other in zip(found, expected, strict=True))


def _quoted(content: str) -> str:
    """Return a text as a cell of a table."""
    shown = content.strip().replace("|", "\\|").replace("`", "'")
    return "<br>".join(f"`{line}`" for line in shown.splitlines() if line.strip())
