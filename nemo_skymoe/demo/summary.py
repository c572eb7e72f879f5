"""The demo's report: the models and the text, three losses before training, three after, and the router's curves."""

from pathlib import Path

from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.demo.door import Door
from nemo_skymoe.demo.phases import BATCH, BATCHES, SEQUENCE
from nemo_skymoe.demo.record import SMOOTHING, Story
from nemo_skymoe.report.curves import LossCurve, read_curves
from nemo_skymoe.report.page import Table, Text, write_report

HELD_OUT_TOKENS = BATCH * BATCHES * SEQUENCE


def write(story: Story, door: Door) -> Path:
    """Write the report of a finished story, and return its path."""
    curves = {
        name: read_curves(story.output / "tensorboard" / name) for name in ("dense", "moe", "dense_continued")
    }
    losses = [
        LossCurve.of_run("dense", curves["dense"]),
        LossCurve.of_run("dense continued", curves["dense_continued"], offset=story.dense_steps),
        LossCurve.of_run("MoE", curves["moe"], offset=story.dense_steps),
    ]
    return write_report(
        story.output / "report",
        "Skywork-MoE in miniature",
        _lead(story),
        losses,
        curves["moe"],
        [
            *_loss_tables(story),
            _corpus_table(story),
            _mesh_table(story),
            _time_table(story),
            Text("Configuration of the MoE", door.configuration(checkpoint_of(story.folder("moe")))),
        ],
    )


def _lead(story: Story) -> str:
    difference = story.after["MoE, nothing dropped"] - story.after["dense"]
    return (
        "A dense model of Skywork-13B's architecture with 1.9M parameters was trained on the sources of Python's"
        f" standard library for {story.dense_steps} steps, upcycled to 16 experts of which two see each token, and"
        f" continued for {story.steps} steps with the report's normalised gate (scale 1), adaptive auxiliary-loss"
        f" coefficients (its constants, but smoothed by {SMOOTHING} a step instead of 0.99) and Expert Data Parallelism,"
        f" in {story.door} and Megatron-Core on two {story.device.upper()} ranks."
        " For comparison the dense model was continued on the same batches with the same schedule.\n\n"
        f"At the end the MoE's loss on held-out text is {abs(difference):.4f} nats"
        f" {'below' if difference < 0 else 'above'} the continued dense model's."
        " Both used the same peak learning rate, chosen beforehand; nothing was tuned for either. One seed and"
        " one size: a demonstration, not evidence about the method."
    )


def _loss_tables(story: Story) -> list[Table]:
    def table(title: str, losses: dict[str, float], note: str) -> Table:
        return Table(
            title,
            ("model", "loss (nats a token)"),
            [(name, f"{loss:.6f}") for name, loss in losses.items()],
            note,
        )

    return [
        table(
            "Before the first step",
            story.before,
            f"On the same {HELD_OUT_TOKENS} held-out tokens. Copies of the dense MLP whose weights add up to one compute what it"
            " computed; with a capacity, dropped tokens miss their experts.",
        ),
        table("At the end", story.after, "The same text; 'dense' is the dense model continued."),
    ]


def _corpus_table(story: Story) -> Table:
    corpus = story.corpus
    rows = [
        ("training", corpus.train_files, f"{corpus.train_bytes / 1e6:.2f}", corpus.train_tokens),
        ("held out", corpus.valid_files, f"{corpus.valid_bytes / 1e6:.2f}", corpus.valid_tokens),
    ]
    return Table(
        "Corpus",
        ("split", "files", "MB", "tokens"),
        rows,
        f"The standard library of Python {corpus.python}, sources with their documentation strings; byte-level BPE"
        f" of {corpus.vocab_size} tokens trained on the training split.",
    )


def _mesh_table(story: Story) -> Table:
    columns = tuple(story.mesh[0])
    return Table(
        "Device mesh",
        columns,
        [tuple(row.values()) for row in story.mesh],
        "Expert Data Parallelism (appendix B.1): a rank's place in the tensor-parallel group of attention is its"
        " place in the expert-parallel group.",
    )


def _time_table(story: Story) -> Table:
    return Table(
        "Time",
        ("phase", "seconds"),
        [(name, f"{seconds:.0f}") for name, seconds in story.seconds.items()],
        f"Peak memory of all processes together, at most: {story.memory / 2**30:.1f} GiB.",
    )
