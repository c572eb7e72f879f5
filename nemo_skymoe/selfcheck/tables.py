"""The packaged tables of tensor names beside what the installed Megatron-Core stores of real models."""

from nemo_skymoe.checkpoint.verification.measured_names import EXAMPLES, differences
from nemo_skymoe.moe.layer import have_transformer_engine
from nemo_skymoe.selfcheck.finding import Finding


def check() -> list[Finding]:
    """Compare names and shapes of Megatron's local layers, and of Transformer Engine's where it is."""
    found = [_compared("local")]
    if have_transformer_engine():
        return [*found, _compared("te")]
    return [
        *found,
        Finding("absent", "table of Transformer Engine's names", "Transformer Engine cannot be imported"),
    ]


def _compared(layer_spec: str) -> Finding:
    wrong = differences(layer_spec)
    what = f"table of {'Transformer Engine' if layer_spec == 'te' else 'Megatron'}'s names, {len(EXAMPLES)} models"
    return Finding("WRONG", what, "; ".join(wrong[:3])) if wrong else Finding("ok", what)
