"""FLOPs and seconds of blocks, against the arithmetic of the report and sums by hand."""

from dataclasses import replace

import pytest

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.dispatchers import DISPATCHERS
from nemo_skymoe.pipeline.communication import Group, Links
from nemo_skymoe.pipeline.cost import CostModel
from nemo_skymoe.pipeline.efficiency import Efficiency
from nemo_skymoe.pipeline.flops import causal_attention_flops, model_flops
from nemo_skymoe.pipeline.hardware import A100_80G, A800_80G, H200, PRESETS, hardware_preset
from nemo_skymoe.pipeline.training import Training
from nemo_skymoe.traffic import Exchange
from tests.cases import every

H, F, L, V = 4608, 12288, 52, 65536
REPORT = Training(
    tensor_parallel=4,
    sequence_parallel=True,
    expert_parallel=4,
    pipeline_parallel=12,
    data_parallel=32,
    global_batch_size=2048,
    seq_length=8192,
    capacity_factor=1.25,
    pad_to_capacity=True,
    overlap_grad_reduce=False,
)
DENSE = Training(pipeline_parallel=2, data_parallel=256, global_batch_size=4096, overlap_grad_reduce=False)
IDEAL = Efficiency(compute=1.0, links=1.0)


def test_flops_of_a_token_of_the_report():
    flops = model_flops(SKYWORK_MOE_146B, 8192)
    assert flops.attention_projections == 6 * L * 4 * H * H == pytest.approx(26.50e9, rel=1e-3)
    assert flops.experts == 6 * L * 2 * 3 * H * F == pytest.approx(106.00e9, rel=1e-3)
    assert flops.router == 6 * L * 16 * H == pytest.approx(0.02e9, rel=0.2)
    assert flops.output_layer == 6 * V * H == pytest.approx(1.81e9, rel=2e-3)
    assert flops.attention_core == 12 * L * H * 8192 == pytest.approx(23.56e9, rel=1e-3)


@every(("capacity", "gigaflops", "mfu"), [(1.0, 157.9, 0.349), (1.1, 168.5, 0.373), (1.25, 184.4, 0.408)])
def test_mfu_of_690_tokens_a_second(capacity: float, gigaflops: float, mfu: float):
    total = model_flops(SKYWORK_MOE_146B, 8192, capacity).total
    assert total / 1e9 == pytest.approx(gigaflops, abs=0.05)
    assert 690 * total / A800_80G.peak_flops == pytest.approx(mfu, abs=5e-4)


def test_flops_of_a_token_of_the_13b():
    """arXiv 2310.19341, Table 10: 176.2 TFLOP/s at 1873 tokens/s, within 1.1 percent."""
    total = model_flops(SKYWORK_13B, 4096).total
    assert total / 1e9 == pytest.approx(93.09, abs=0.01)
    assert total == pytest.approx(176.2e12 / 1873, rel=0.0115)


def test_flash_attention_computes_seven_products_over_half_the_square():
    forward, backward = causal_attention_flops(SKYWORK_13B, 4096)
    product = 2 * 4096 * H / 2  # one of s x s by a head's width, over the causal half, a token
    assert (forward, backward) == (2 * product, 5 * product)


def test_a_dense_layer_by_hand():
    """Matrix products and attention at the peak; kernels that pass over memory; nothing on the wire."""
    layer = CostModel(SKYWORK_13B, DENSE, A800_80G, IDEAL).layer()
    macs = 4 * H * H + 3 * H * F
    traffic = 2 * (10 * H + 2 * 2 * H + 3 * F)
    forward = 4096 * ((2 * macs + 2 * 4096 * H) / 312e12 + traffic / 2039e9)
    traffic = 2 * (12 * H + 2 * 2 * H + 5 * F)
    backward = 4096 * ((4 * macs + 5 * 4096 * H) / 312e12 + traffic / 2039e9)
    assert (layer.forward, layer.backward) == pytest.approx((forward, backward))
    assert layer.recompute == layer.forward


def test_the_reports_layer_by_hand():
    """EDP4: attention gathers and scatters 3/4 of the sequence, experts the cheaper of gathering and dealing out."""
    layer = CostModel(SKYWORK_MOE_146B, REPORT, A800_80G, IDEAL).layer()
    tokens, routed = 8192 / 4, 1.25 * 2 * 8192 / 4
    flops = tokens * (2 * (4 * H * H + 16 * H) + 2 * 8192 * H) + routed * 2 * 3 * H * F
    traffic = 2 * (tokens * (10 * H + 2 * 2 * H) + routed * (3 * F + 4 * H))
    attention_wire = 2 * 8192 * 2 * H * 3 / 4 / 200e9
    dealt = 2 * routed * 2 * H * 3 / 4 / 200e9
    gathered = attention_wire
    forward = flops / 312e12 + traffic / 2039e9 + attention_wire + min(dealt, gathered)
    assert dealt < gathered
    assert layer.forward == pytest.approx(forward)


def test_sequence_parallelism_gathers_the_input_again_for_the_weights_gradient():
    """Five collectives where an all-reduce each way is four: of attention and MLP, two times half a micro-batch."""
    split = replace(DENSE, tensor_parallel=2, data_parallel=128)
    alone = CostModel(SKYWORK_13B, split, A800_80G, IDEAL).layer()
    both = CostModel(SKYWORK_13B, replace(split, sequence_parallel=True), A800_80G, IDEAL).layer()
    ring = 4096 * 2 * H / 2 / 200e9
    halved = 4096 / 2 * 2 * H / 2039e9  # norms and residual additions pass over half of the tokens
    assert alone.forward - both.forward == pytest.approx(10 * halved)
    assert alone.backward - both.backward == pytest.approx(12 * halved - 2 * ring)


def test_edp_without_sequence_parallelism_only_combines():
    both = CostModel(SKYWORK_MOE_146B, REPORT, A800_80G, IDEAL).layer()
    alone = CostModel(SKYWORK_MOE_146B, replace(REPORT, sequence_parallel=False), A800_80G, IDEAL).layer()
    # An all-reduce of the whole output, where sequence parallelism deals out 1.25 x 2/4 of it and back.
    whole = 8192 * 2 * H * 3 / 4 / 200e9
    wire = 2 * whole - 2 * 1.25 * 2 / 4 * whole
    norms_and_residuals = 10 * 2 * H * (8192 - 2048) / 2039e9
    router = 2 * 16 * H * (8192 - 2048) / 312e12
    assert alone.forward - both.forward == pytest.approx(wire + norms_and_residuals + router)


@every(
    ("options", "dispatcher", "beside"),
    [
        ({}, "alltoall", 5e-4),
        ({"capacity_factor": 3.0}, "allgather", 1e-3),
        ({"sequence_parallel": False}, "replicated", 0),
    ],
)
def test_dispatch_moves_the_bytes_that_the_dispatchers_send(options: dict, dispatcher: str, beside: float):
    """Against `traffic`, which benchmarks/edp.py holds against real ranks; it also counts what goes beside rows."""
    training = replace(REPORT, **options)
    exchange = Exchange(4, 2048, H, 16, 2, capacity_factor=training.capacity_factor, padded=True)
    no_wire = replace(A800_80G, nvlink=1e30)
    wired, free = (CostModel(SKYWORK_MOE_146B, training, gpu, IDEAL).layer() for gpu in (A800_80G, no_wire))
    attention = 2 * 8192 * 2 * H * 3 / 4
    sent = (wired.forward - free.forward) * 200e9 - attention
    assert sent == pytest.approx(DISPATCHERS[dispatcher].bytes_sent(exchange).forward, rel=beside + 1e-9)


def test_the_head_by_hand():
    head = CostModel(SKYWORK_13B, DENSE, A800_80G, IDEAL).head()
    traffic = 4096 * (3 * 4 * V + 2 * 2 * H) / 2039e9
    assert head.forward == pytest.approx(4096 * 2 * V * H / 312e12 + traffic)
    assert head.backward == pytest.approx(4096 * 4 * V * H / 312e12 + traffic)


def test_a_layer_takes_the_time_of_its_tokens():
    once = CostModel(SKYWORK_MOE_146B, REPORT, A800_80G, Efficiency()).layer()
    twice = CostModel(SKYWORK_MOE_146B, replace(REPORT, micro_batch_size=2), A800_80G, Efficiency()).layer()
    assert twice.time == pytest.approx(2 * once.time)


def test_capacity_costs_time_only_where_it_is_padded():
    def time(**options) -> float:
        return CostModel(SKYWORK_MOE_146B, replace(REPORT, **options), A800_80G, Efficiency()).layer().time

    assert time(capacity_factor=None) == time(pad_to_capacity=False) == time(capacity_factor=1.0)
    assert time(capacity_factor=0.5) < time(capacity_factor=1.0) < time(capacity_factor=1.1) < time()


@every("model", [SKYWORK_13B, SKYWORK_MOE_146B])
def test_more_tensor_parallelism_is_faster_but_not_in_proportion(model):
    def time(tensor: int) -> float:
        training = Training(
            tensor_parallel=tensor,
            sequence_parallel=True,
            expert_parallel=tensor if model.num_moe_experts else 1,
        )
        return CostModel(model, training, A800_80G, Efficiency()).layer().time

    assert time(1) / 2 < time(2) < time(1)
    assert time(2) / 2 < time(4) < time(2)


def test_rings_use_nvlink_inside_a_node_and_every_adapter_between_nodes():
    links = Links(A800_80G, IDEAL)
    assert links.ring(8e9, Group(8)) == pytest.approx(7e9 / 200e9)
    assert links.ring(8e9, Group(1)) == 0
    # Two ranks a node: two rings, each on an adapter of 12.5 GB/s.
    assert links.ring(32e9, Group(32, stride=4)) == pytest.approx(31e9 / 25e9)
    assert links.ring(8e9, Group(8, stride=8)) == pytest.approx(7e9 / 12.5e9)
    # Eight adapters of an A100's node are slower than its NVLink, no faster.
    assert Links(A100_80G, IDEAL).ring(16e9, Group(16)) == pytest.approx(15e9 / 200e9)


def test_all_to_all_is_bound_by_the_slower_of_nvlink_and_network():
    links = Links(A800_80G, IDEAL)
    assert links.all_to_all(8e9, Group(8)) == pytest.approx(7e9 / 200e9)
    assert links.all_to_all(16e9, Group(16)) == pytest.approx(8e9 / 12.5e9)


def test_a_stage_sends_its_part_of_the_sequence_to_another_node():
    transfer = CostModel(SKYWORK_MOE_146B, REPORT, A800_80G, IDEAL).transfer()
    assert transfer == pytest.approx(8192 / 4 * 2 * H / 12.5e9)
    in_node = replace(REPORT, data_parallel=1, global_batch_size=64)
    transfer = CostModel(SKYWORK_MOE_146B, in_node, A800_80G, IDEAL).transfer()
    assert transfer == pytest.approx(8192 / 4 * 2 * H / 200e9)


def test_gradients_of_the_13b_are_reduced_over_eight_adapters_a_node():
    model = CostModel(SKYWORK_13B, DENSE, A800_80G, IDEAL)
    parameters = 26 * (4 * H * H + 3 * H * F + 2 * H) + V * H
    assert model.tail() == pytest.approx(parameters * (4 + 2) * 255 / 256 / 100e9)


def test_overlap_hides_reduction_behind_one_micro_batch():
    without = CostModel(SKYWORK_MOE_146B, REPORT, A800_80G, Efficiency())
    overlapped = CostModel(
        SKYWORK_MOE_146B, replace(REPORT, overlap_grad_reduce=True), A800_80G, Efficiency()
    )
    layer = without.layer()
    # 5 layers: more than one micro-batch covers, in both directions.
    assert overlapped.tail() == pytest.approx(without.tail() - 5 * layer.time)


def test_presets_are_found_in_any_case():
    assert hardware_preset("h200") is H200
    assert set(PRESETS) == {"A800-80G", "A100-80G", "H100", "H200"}
    with pytest.raises(ConfigurationError, match="hardware is 'V100', expected one of A800-80G"):
        hardware_preset("V100")


@every(
    ("options", "message"),
    [
        (
            {"tensor_parallel": 5},
            "tensor_parallel is 5, expected a divisor of num_attention",
        ),
        (
            {"expert_parallel": 3},
            r"expert_parallel is 3, expected a divisor of num_moe_experts",
        ),
        (
            {"expert_parallel": 8, "data_parallel": 1},
            r"expert_parallel is 8, expected a divisor of the GPUs of a stage",
        ),
        (
            {"sequence_parallel": False, "expert_parallel": 8},
            "sequence_parallel is False, expected True",
        ),
        ({"seq_length": 8190}, "seq_length is 8190, expected a multiple of tensor_parallel"),
        (
            {"global_batch_size": 100},
            r"global_batch_size is 100, expected a multiple of micro_batch_size \(1\) x",
        ),
        ({"micro_batch_size": 0}, "micro_batch_size is 0, expected an integer of at least 1"),
        ({"tensor_parallel": 2.0}, "tensor_parallel is 2.0, expected an integer of at least 1"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0, expected a finite number above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor is nan, expected a finite number above 0"),
        ({"capacity_factor": float("inf")}, "capacity_factor is inf, expected a finite number above 0"),
        ({"gradient_bytes": 8}, "gradient_bytes is 8, expected 2"),
        (
            {"virtual_pipeline": 2, "global_batch_size": 32 * 10},
            "makes 10 micro-batches; with virtual_pipeline above 1",
        ),
    ],
)
def test_inconsistent_sizes_are_refused_by_name(options: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        replace(REPORT, **options).check(SKYWORK_MOE_146B)


@every("option", ["expert_parallel", "capacity_factor"])
def test_options_of_experts_are_refused_for_a_dense_model(option: str):
    with pytest.raises(ConfigurationError, match=f"{option} is 2, expected .*: the model is dense"):
        replace(DENSE, **{option: 2}).check(SKYWORK_13B)
