"""What is no checkpoint of a known format: each is recognised, and the sentence says what to do."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.checkpoint import convert, inspection
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.hugging_face.configuration import from_hf_config
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint.foreign_examples import CONFIG, EXAMPLES, POINTER, model, model_with


def sentences(made: Path) -> list[str]:
    """What inspecting, converting and upcycling say, each of it one line."""
    found: list[str] = []
    output = Path("converted").absolute()
    try:
        found += inspection.inspect(made).problems
    except ConfigurationError as reason:
        found.append(str(reason))
    for upcycling in (None, Upcycling(2)):
        with pytest.raises(ConfigurationError) as reason:
            target = TargetOptions("nemo", layer_spec="local")
            convert.plan({"base": open_source(made)}, target, upcycling).run(output)
        found.append(str(reason.value))
    assert not output.exists() and not output.with_name("converted.unfinished").exists()
    assert all("\n" not in sentence for sentence in found)
    return found


def test_each_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By whatever is done with it."""
    monkeypatch.chdir(tmp_path)
    for number, (make, message) in enumerate(EXAMPLES):
        (place := tmp_path / str(number)).mkdir()
        found = sentences(make(place))
        assert len(found) >= 3 and all(re.search(message, sentence) for sentence in found), (message, found)
    open_source(model(tmp_path / "good"))


def test_what_lies_beside_a_model_and_does_not_change_it_is_no_matter(tmp_path: Path):
    names = (
        "pytorch_model__bin",
        "global_step10__pt",
        "trainer_state__json",
        "consolidated__safetensors",
        "params__json",
    )
    for number, content in enumerate((b"x", POINTER)):
        made = model_with(**dict.fromkeys(names, content))(tmp_path / str(number))
        (made / "onnx").mkdir()
        (made / "lora").mkdir()
        (made / "lora/adapter_config.json").write_text("{}")
        assert inspection.inspect(made).problems == []


def test_harmless_fields_are_no_warning_and_others_are_refused(caplog: pytest.LogCaptureFixture):
    harmless: dict[str, Any] = {
        "unsloth_version": "2025.1",
        "tokenizer_class": "LlamaTokenizer",
        "router_aux_loss_coef": 0.01,
        "output_attentions": True,
        "use_sliding_window": False,
        "is_encoder_decoder": False,
        "final_logit_softcapping": None,
        "some_new_switch": False,
        "logits_scaling": 1.0,
        "head_dim": 8,
    }
    with caplog.at_level(logging.WARNING):
        from_hf_config(CONFIG | harmless)
    assert caplog.text == ""
    changing: dict[str, Any] = {
        "final_logit_softcapping": 30.0,
        "embedding_multiplier": 12.0,
        "shared_expert_intermediate_size": 64,
        "use_qk_norm": True,
        "some_new_multiplier": 2.0,
        "is_encoder_decoder": True,
        "rope_pct": 0.25,
        "rope_ratio": 2,
        "n_routed_experts": 8,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "logits_soft_cap": 30.0,
        "residual_scale": 2.0,
        "attention_sink_size": 4,
        "nope_layer_interval": 4,
        "vision_config": "x",
    }
    for name, value in changing.items():
        with pytest.raises(ConfigurationError, match=f"{name} is {value!r}"):
            from_hf_config(CONFIG | {name: value})


def test_part_of_a_head_is_refused_wherever_transformers_keeps_it():
    """transformers 5 has `partial_rotary_factor` among the `rope_parameters`."""
    whole = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert from_hf_config(CONFIG | {"rope_parameters": whole}).rope_theta == 1e4
    for kind in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}):
        half = {**kind, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        with pytest.raises(ConfigurationError, match=r"partial_rotary_factor is 0\.5, expected 1"):
            from_hf_config(CONFIG | {"rope_parameters": half})
