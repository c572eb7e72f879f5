"""NeMo's front door computes what both front doors computed: three steps from an upcycled checkpoint.

`tests/bridge/test_both_doors.py` says the same of Megatron-Bridge, and compares the two where both are installed.
"""

from tests.doors import case, through_nemo


def test_nemo_repeats_the_traces_of_both_doors() -> None:
    case.check_equal(through_nemo.traces(), case.read(case.TRACES), case.ANY_CPU)


def test_the_traces_tell_steps_layers_and_layouts_apart() -> None:
    """So that another order of the data, rate or drop rate would be seen."""
    first, second = case.read(case.TRACES).values()
    for trace in (first, second):
        assert (
            len(set(trace.losses)) == len(set(trace.gradient_norms)) == len(trace.coefficients) == case.STEPS
        )
        assert all(len(set(step.values())) == case.ARCHITECTURE.num_layers for step in trace.coefficients)
    assert abs(first.losses[0] - second.losses[0]) > 1000 * case.ANY_CPU
