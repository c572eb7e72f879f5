"""Put the ranks' outcomes of `edp_worlds` together and compare them with one rank's."""

import numpy
import torch

from tests.moe.edp_worlds import Outcome, context_positions


def whole_logits(outcomes: list[Outcome], index: int) -> numpy.ndarray:
    """[batch, sequence, vocabulary] put together from the ranks of a world."""
    size = 1 + max(outcome.cp for outcome in outcomes)
    order = torch.cat([context_positions(rank, size) for rank in range(size)]).numpy()
    rows = []
    for cp in range(size):
        parts = sorted((o.tp, i) for i, o in enumerate(outcomes) if o.cp == cp)
        rows.append(numpy.concatenate([outcomes[i].logits[index] for _, i in parts], axis=-1))
    return numpy.concatenate(rows, axis=1)[:, numpy.argsort(order)]


def logit_error(outcomes: list[Outcome], reference: Outcome) -> float:
    """Largest |y - y1| / |y1| over the micro-batches and the evaluation."""
    return max(
        relative_error(whole_logits(outcomes, index), whole) for index, whole in enumerate(reference.logits)
    )


def gradient_errors(outcomes: list[Outcome], reference: Outcome) -> dict[str, float]:
    """|g - g1| / |g1| of every parameter of the model; of replicas, the worst."""
    errors: dict[str, float] = {}
    for cp in {outcome.cp for outcome in outcomes}:
        ranks = sorted((o for o in outcomes if o.cp == cp), key=lambda o: o.tp)
        for name, whole in reference.gradients.items():
            holders = [o for o in ranks if name in o.gradients]
            parts = [o.gradients[name] for o in holders]
            dimension = holders[0].partition[name]
            found = [numpy.concatenate(parts, axis=dimension)] if dimension >= 0 else parts
            errors[name] = max([errors.get(name, 0.0), *(relative_error(part, whole) for part in found)])
    return errors


def relative_error(value: numpy.ndarray, expected: numpy.ndarray) -> float:
    """|value - expected| / |expected|; 0 where both are 0."""
    difference = float(numpy.linalg.norm(value - expected))
    return difference / float(numpy.linalg.norm(expected)) if difference else 0.0
