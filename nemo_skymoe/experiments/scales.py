"""The sizes at which any experiment trains on CPU ranks: "toy" to see that it works, "miniature" to learn something."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of model and data, with `token_share` of the experiment's tokens, or else `steps` steps."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    seq_length: int
    batch: int
    ranks: int
    steps: int = 0
    token_share: float = 0.0
    least_warmup: int = 1
    log_interval: int = 1
    validations: int = 1
    validation_batches: int = 1
    float32: bool = False
    """Whether to train in float32 instead of the recipe's bf16. A CPU computes it faster, and small differences survive
    in it."""


SCALES = {
    "toy": Scale(
        layers=2, hidden_size=64, ffn_hidden_size=96, heads=4, seq_length=64, batch=4, ranks=2, steps=4
    ),
    # 1B tokens become 10,000. A warm-up does not shrink below what Adam's second moment remembers (beta 0.95), except
    # in a run that is too short for both.
    "miniature": Scale(
        layers=4,
        hidden_size=64,
        ffn_hidden_size=176,
        heads=4,
        seq_length=128,
        batch=16,
        ranks=1,
        token_share=1e-5,
        least_warmup=20,
        log_interval=10,
        validations=5,
        validation_batches=32,
        float32=True,
    ),
}
