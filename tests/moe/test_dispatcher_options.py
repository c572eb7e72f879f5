"""What the EDP options choose and what they refuse, before anything runs."""

import logging
from typing import Any

import pytest

from nemo_skymoe.config import EDP_DISPATCHERS, ConfigurationError
from nemo_skymoe.dispatchers import DISPATCHERS
from nemo_skymoe.moe import edp
from nemo_skymoe.moe.dispatch_alltoall import AllToAllTokenDispatcher, PaddedAllToAllTokenDispatcher
from nemo_skymoe.moe.dispatcher import EdpTokenDispatcher
from tests.cases import every
from tests.moe.edp_crafted import PADDED, config_for

SHARED_EXPERT = {
    "moe_shared_expert_overlap": True,
    "moe_shared_expert_intermediate_size": 8,
    "moe_token_dispatcher_type": "alltoall",
}
REFUSED = [
    ("edp_dispatcher", {"edp_dispatcher": "flex"}),
    ("sequence_parallel=False", {"edp_dispatcher": "replicated", "sequence_parallel": True}),
    ("sequence_parallel=True", {"edp_dispatcher": "alltoall", "sequence_parallel": False}),
    ("sequence_parallel=True", {"edp_dispatcher": "allgather", "sequence_parallel": False}),
    (
        "moe_capacity_scope='edp'",
        {"edp_dispatcher": "alltoall", "moe_capacity_scope": "edp", "moe_expert_capacity_factor": 1.0},
    ),
    ("moe_expert_capacity_factor is None", {"moe_capacity_scope": "edp"}),
    ("moe_token_dispatcher_type='flex'", {"moe_token_dispatcher_type": "flex"}),
    ("moe_shared_expert_overlap", SHARED_EXPERT),
    ("edp_replica_check_interval", {"edp_replica_check_interval": -1}),
    ("moe_edp=True", {"moe_edp": False, "edp_dispatcher": "allgather"}),
    ("moe_edp=True", {"moe_edp": False, "moe_capacity_scope": "edp", "moe_expert_capacity_factor": 1.0}),
    ("expert_model_parallel_size is 1", {"expert_model_parallel_size": 1}),
    ("expert_tensor_parallel_size is 2", {"expert_tensor_parallel_size": None}),
    ("expert_tensor_parallel_size is 2", {"expert_tensor_parallel_size": 2}),
    ("num_moe_experts is 7", {"num_moe_experts": 7}),
]


@every(("named", "options"), REFUSED)
def test_what_makes_no_sense_is_refused_by_name(named: str, options: dict[str, Any]):
    values = {"edp_dispatcher": "auto", "sequence_parallel": True, **options}
    with pytest.raises(ConfigurationError, match=named):
        config_for("auto", 2, **values)


def test_the_class_depends_on_padding():
    padded = config_for("alltoall", 2, **PADDED)
    assert AllToAllTokenDispatcher.of(padded) is PaddedAllToAllTokenDispatcher
    assert AllToAllTokenDispatcher.of(config_for("alltoall", 2)) is AllToAllTokenDispatcher


def test_the_table_names_classes_that_know_their_entry():
    assert set(EDP_DISPATCHERS) == {"auto", *DISPATCHERS}
    for name, entry in DISPATCHERS.items():
        assert issubclass(entry.load(), EdpTokenDispatcher) and entry.load().kind == entry.name == name


@every(
    ("chosen", "options"),
    [
        ("replicated", {"sequence_parallel": False}),
        ("alltoall", {}),
        ("allgather", {"moe_router_topk": 8, "num_moe_experts": 64}),
        ("allgather", {"moe_capacity_scope": "edp", "moe_expert_capacity_factor": 1.0}),
        ("alltoall", {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True}),
        ("allgather", {"moe_expert_capacity_factor": 3.0, "moe_pad_expert_input_to_capacity": True}),
    ],
)
def test_auto_takes_the_fewest_bytes(monkeypatch: pytest.MonkeyPatch, chosen: str, options: dict[str, Any]):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    values = {"sequence_parallel": True, "num_moe_experts": 16, "moe_router_topk": 2, **options}
    assert edp.resolve_dispatcher(config_for("auto", 4, **values)) == chosen


def test_the_choice_and_its_count_are_logged_once_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    edp._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=edp.__name__):
        for _ in range(3):
            edp.resolve_dispatcher(config_for("auto", 2, sequence_parallel=True))
    assert len(caplog.records) == 1
    assert "'auto' is 'alltoall'" in caplog.text and "allgather " in caplog.text
