"""A converted checkpoint in NeMo's own hands: its context becomes the model, its weights load to the last extra state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.lightning import io
from nemo.lightning.io.pl import TrainerContext
from torch import Tensor

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import open_torch_dist
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.torch_dist import names as torch_dist_names
from nemo_skymoe.checkpoint.untrusted.context_check import check_context
from nemo_skymoe.checkpoint.upcycling.options import BASE
from nemo_skymoe.checkpoint.verification.megatron_logits import megatron_logits
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.nemo.model import SkyworkConfig, SkyworkModel, SkyworkMoEConfig, SkyworkMoEModel
from nemo_skymoe.patches import nemo_cpu
from nemo_skymoe.ranks import run_ranks
from tests.cases import every
from tests.checkpoint import hf_models
from tests.checkpoint.families import MEGATRON_HAS_YARN, yarn
from tests.checkpoint.megatron_files import save

TOKENS = torch.arange(100, 164).view(2, 32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense` and `moe`, converted from Hugging Face's form with a tokenizer of 384 ids."""
    folder = tmp_path_factory.mktemp("checkpoints")
    files = ["calendar.py", "csv.py", "queue.py", "json/decoder.py"]
    tokenizer = build_corpus(folder / "corpus", 384, 0.3, files=files).tokenizer
    scaled = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0}
    scaled |= {"original_max_position_embeddings": 16}
    grouped = {"num_key_value_heads": 2, "rope_theta": 5e5}
    hf_models.llama(folder / "hf-dense", **grouped, rms_norm_eps=1e-5, rope_scaling=scaled)
    attention = {"add_qkv_bias": True, "qk_layernorm": True}
    attention |= yarn(original_max_position_embeddings=16) if MEGATRON_HAS_YARN else {}
    hf_models.skywork_moe(folder / "hf-moe", dtype=torch.float32, moe_gate_norm_std=0.5, **attention)
    for name in ("dense", "moe"):
        source = folder / f"hf-{name}"
        for file in tokenizer.iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        plan = convert.plan({BASE: open_source(source)}, TargetOptions("nemo"))
        plan.run(folder / name)
    return folder


def test_the_model_and_its_configuration_come_from_the_context(checkpoints: Path) -> None:
    dense: Any = io.load_context(checkpoints / "dense", subpath="model")
    moe: Any = io.load_context(checkpoints / "moe", subpath="model")
    assert type(dense) is SkyworkModel and type(dense.config) is SkyworkConfig
    assert type(moe) is SkyworkMoEModel and type(moe.config) is SkyworkMoEConfig
    expected = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "seq_length": 256,
        "vocab_size": 512,
        "rotary_base": 500000,
        "seq_len_interpolation_factor": None,
        "layernorm_epsilon": 1e-5,
        "share_embeddings_and_output_weights": False,
        "num_moe_experts": None,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "rope_scaling": True,
        "rope_scaling_factor": 32.0,
        "rope_scaling_low_freq_factor": 0.5,
        "rope_scaling_high_freq_factor": 2.0,
        "rope_scaling_original_max_position_embeddings": 16,
    }
    assert {name: getattr(dense.config, name) for name in expected} == expected
    assert (moe.config.num_moe_experts, moe.config.moe_router_topk) == (4, 2)
    assert (moe.config.add_qkv_bias, moe.config.qk_layernorm, moe.config.rope_scaling) == (True, True, False)
    assert moe.config.moe_router_logit_norm_scale == 0.5
    assert moe.config.yarn_rotary_scaling_factor == (4.0 if MEGATRON_HAS_YARN else 1.0)
    assert (moe.config.yarn_beta_fast, moe.config.yarn_mscale) == (
        (8.0, 1.0) if MEGATRON_HAS_YARN else (32.0, 1.0)
    )


def test_the_tokenizer_and_the_whole_context_load(checkpoints: Path) -> None:
    tokenizer: Any = io.load_context(checkpoints / "moe", subpath="model.tokenizer")
    assert tokenizer.vocab_size == 384 and tokenizer.ids_to_text(tokenizer.text_to_ids("a b")) == "a b"

    def whole() -> str:
        nemo_cpu.apply()
        context: Any = io.load_context(checkpoints / "moe")
        assert isinstance(context, TrainerContext)
        return type(context.trainer.strategy).__name__

    assert run_ranks(whole, 1) == ["MegatronStrategy"]


def nemo_logits(checkpoint: Path) -> Tensor:
    """By NeMo's model from NeMo's own, strict loading: every tensor and every extra state has to be there."""
    nemo_cpu.apply()
    _, trainer = io.ModelConnector(checkpoint).nemo_load(checkpoint)
    chunk: Any = trainer.strategy.megatron_parallel.module
    with torch.no_grad():
        return chunk.eval()(TOKENS, torch.arange(32).expand(2, 32), attention_mask=None)


@every("name", ["dense", "moe"])
def test_nemo_loads_the_weights_and_computes_the_same(checkpoints: Path, name: str) -> None:
    [found] = run_ranks(nemo_logits, 1, checkpoints / name)
    [expected] = run_ranks(megatron_logits, 1, checkpoints / name, TOKENS)
    assert found.shape == (2, 32, 512)
    assert torch.equal(found[..., : expected.shape[-1]], expected)


def nemo_writes(model: Any, folder: Path) -> None:
    """The context that NeMo leaves beside a checkpoint of this model."""
    nemo_cpu.apply()
    trainer = nl.Trainer(accelerator="cpu", devices=1, strategy=nl.MegatronStrategy())
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(folder / "context", yaml_attrs=["model"])


@every("kind", ["skywork", "skywork-moe", "llama", "mixtral"])
def test_what_nemo_itself_writes_is_read(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    """After a training there is no config.json in the context, and every option of NeMo's is in model.yaml."""
    sizes: dict[str, Any] = dict(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
        kv_channels=24, seq_length=128, rotary_base=5e5, layernorm_epsilon=1e-5,
    )  # fmt: skip
    no_te: dict[str, Any] = dict(apply_rope_fusion=False, moe_permute_fusion=False)
    tokenizer = AutoTokenizer(str(checkpoints / "corpus" / "tokenizer"))
    config = {
        "skywork": lambda: SkyworkConfig(**sizes),
        "skywork-moe": lambda: SkyworkMoEConfig(**sizes, num_moe_experts=4, moe_router_logit_norm_scale=0.5),
        "llama": lambda: llm.LlamaConfig(**sizes, **no_te),
        "mixtral": lambda: llm.MixtralConfig(**sizes, **no_te, num_moe_experts=4, moe_router_topk=2),
    }[kind]()
    classes = {
        "skywork": SkyworkModel,
        "skywork-moe": SkyworkMoEModel,
        "llama": llm.LlamaModel,
        "mixtral": llm.MixtralModel,
    }
    run_ranks(nemo_writes, 1, classes[kind](config, tokenizer=tokenizer), tmp_path)
    check_context(tmp_path / "context")
    moe = kind in ("skywork-moe", "mixtral")
    architecture = Architecture(
        2, 64, 96, 4, vocab_size=384, num_query_groups=2, kv_channels=24, num_moe_experts=4 if moe else None
    )
    tensors = {chunk.tensor: torch.zeros(chunk.shape) for chunk in torch_dist_names.chunks(architecture, 384)}
    save(tmp_path, tensors)
    assert open_torch_dist(tmp_path)[1] == Description(
        architecture,
        family="llama" if kind == "llama" else "skywork",
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        dtype="float32",
        bos_token_id=1,
        eos_token_id=2,
        moe_router_logit_norm_scale={"skywork-moe": 0.5, "mixtral": None}.get(kind, 1.0),
    )
