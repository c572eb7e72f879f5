"""The sentences that give the reasons for an answer, with the figures that they rest on."""

from nemo_skymoe.advice import figure1, rule
from nemo_skymoe.advice.advising import Advice, Measure
from nemo_skymoe.advice.rule import Answer


def reasons(advice: Advice) -> list[str]:
    """Return the sentences that lead from the figures to the answer."""
    if advice.deciding is None:
        return [
            "There is no dense checkpoint, so section 3.3 trains from scratch: training a dense model first would cost"
            " what the MoE could use (--cost cumulative with --dense-tokens gives the figures)."
        ]
    if advice.cost == "cumulative":
        return _against_training_to_upcycle(advice, advice.deciding)
    return [_by_ratio(advice.deciding), _CONTRADICTED, *_disagreement(advice)]


_CONTRADICTED = (
    "This is the report's rule, from one experiment. This project's own miniature of that experiment contradicts it:"
    " the losses of upcycled models ended below that of the one from scratch in both cases, by"
    f" {figure1.MINIATURE['2/3'][0]} to {figure1.MINIATURE['2/3'][1]} nats per token at 2/3 C_dense and by"
    f" {figure1.MINIATURE['twice'][0]} to {figure1.MINIATURE['twice'][1]} at 2 C_dense. Its dense model had seen 6.5 tokens per parameter, and the report's 1000. Whether this is"
    " the reason was not tested."
)


def evidence(advice: Advice) -> list[str]:
    """Return sentences on the evidence for answer and schedule: one experiment, Figure 1, and its limits."""
    lost = figure1.FINISHED_CONSTANT.losses["100B"] - figure1.SCRATCH.losses["100B"]
    won = figure1.SCRATCH.losses["100B"] - figure1.EARLY.losses["100B"]
    kept = [
        "The evidence is one experiment, in which each curve is one run: a dense 0.3B model for 300B tokens, which cost"
        " C_dense, and MoEs with 8 experts. The losses are read off Figure 1.",
        f"At 100B MoE tokens (2/3 C_dense) the checkpoint after 100B tokens, a third of C_dense, ended {won:.3f} below"
        f" scratch. The finished one, at a constant learning rate of {figure1.DENSE_MIN_LR:g}, ended {lost:.3f} above: the"
        " learning rate matters as much as the checkpoint.",
        "At 300B MoE tokens (2 C_dense) scratch was best. Among the upcycled models the loss was higher the more alike the"
        " experts stayed, except for the early checkpoint.",
    ]
    if advice.answer is Answer.UPCYCLE:
        kept.append('The limit of 2/3 is ours; the report says "much less than C_dense".')
    return kept


def _by_ratio(measure: Measure) -> str:
    ratio = f"C_moe is {float(measure.ratio):.3g} C_dense"
    match measure.answer:
        case Answer.UPCYCLE:
            return f"{ratio}, less than 2/3: from scratch the budget would be too small to catch up with the checkpoint."
        case Answer.SCRATCH:
            return (
                f"{ratio}, 2 or more: from scratch the experts diverge, and the budget is enough to profit."
            )
    return (
        f"{ratio}, between 2/3, where Figure 1 has upcycled models on both sides of scratch, and 2, where scratch has won."
        " The report tried nothing in between. Train both for a tenth of the budget, or choose the cheaper mistake, which"
        " is upcycling, because it is ahead early."
    )


def _disagreement(advice: Advice) -> list[str]:
    others = [measure for measure in advice.measures if measure.answer is not advice.answer]
    return [
        f"By {measure.name} the ratio is {float(measure.ratio):.3g}: {measure.answer}." for measure in others
    ]


def _against_training_to_upcycle(advice: Advice, measure: Measure) -> list[str]:
    total = 1 + float(measure.ratio)
    assert advice.dense is not None and advice.same_cost_tokens is not None
    hours = advice.dense.gpu_hours + advice.moe.gpu_hours
    finished, scratch = figure1.FINISHED_CONSTANT, figure1.SCRATCH
    return [
        _CONTRADICTED,
        f"Training the dense model only to upcycle it costs C_dense + C_moe = {total:.3g} C_dense"
        f" ({hours:,.0f} GPU-hours predicted).",
        f"The same cost is {advice.same_cost_tokens / 1e9:,.0f}B tokens of the MoE from scratch, in place of"
        f" {advice.moe.tokens / 1e9:,.0f}B after upcycling.",
        f"In Figure 1 the dense model and an upcycled MoE of 100B tokens cost {1 + rule.UPCYCLE_BELOW} C_dense and reached"
        f" {finished.losses['100B']:.3f}; from scratch 2/3 C_dense reached {scratch.losses['100B']:.3f} and 2 C_dense"
        f" {scratch.losses['300B']:.3f}.",
    ]
