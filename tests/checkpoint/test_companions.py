"""The files beside the weights: every one that travels one way comes back, and `verify` looks at them."""

import shutil
from pathlib import Path

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.durable.receipt import RECEIPT
from tests.checkpoint import hf_models

REMOTE = {
    "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["quaint.Quaint", null]}}',
    "quaint.py": b"from .helper import trie\nfrom . import tables, pieces\nimport os\n",
    "helper.py": b"trie = 1\n",
    "tables.py": b"\n",
    "pieces.py": b"from .helper import trie\n",
}
SETS: dict[str, dict[str, bytes]] = {
    "no tokenizer": {"generation_config.json": b'{"temperature": 0.5}\r\n'},
    "tekken": {"tekken.json": b"{}"},
    "tiktoken": {"qwen.tiktoken": b"IQ== 0\n"},
    "byte pairs": {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n"},
    "templates": {"chat_template.jinja": b"{{ x }}", "additional_chat_templates/tool.jinja": b"{{ y }}"},
    "maps": {"special_tokens_map.json": b"{}", "added_tokens.json": b"{}", "chat_template.json": b"{}"},
    "sentencepiece": {"sentencepiece.bpe.model": b"\x00\xff", "tokenizer.model.v3": b"\x00"},
    "word pieces": {"vocab.txt": b"a\nb\n"},
    "remote code": REMOTE,
    "processors": {
        "preprocessor_config.json": b"{}",
        "processor_config.json": b"{}",
        "x_processor_config.json": b"{}",
    },
    "a processor's code": {
        "processor_config.json": b'{"auto_map": {"AutoProcessor": "mine.Mine", "AutoModel": "m.M"}}',
        "mine.py": b"",
    },
    "terms": {
        "LICENSE": b"(c)",
        "LICENSE-MODEL.md": b"(c)",
        "Skywork Community License.pdf": b"%PDF",
        "Skywork \u6a21\u578b\u793e\u533a\u8bb8\u53ef\u534f\u8bae.pdf": b"%PDF",
        "NOTICE": b"",
        "Copying.txt": b"",
        "USE_POLICY.md": b"",
        "README.md": b"#",
        "README_zh.md": b"#",
    },
    "generation": {"generation_config_for_text_generation.json": b"{}"},
    "old vocabularies": {"rwkv_vocab_v20230424.txt": b"", "vocab-src.json": b"{}", "spiece.model": b"\x00"},
}
STAYS = {
    "train.py": b"",
    "modeling_x.py": b"",
    "m.py": b"",
    "notes.txt": b"",
    "optimizer.pt": b"",
    "trainer_state.json": b"",
    "licenses/MIT.txt": b"",
    "original/tokenizer.model": b"",
    "events.out.tfevents": b"",
    ".gitattributes": b"",
}


def convert_to(to: str, source: Path, output: Path, upcycling: Upcycling | None = None) -> Path:
    convert.plan({"base": open_source(source)}, TargetOptions(to), upcycling).run(output)
    return output


def beside(folder: Path) -> dict[str, bytes]:
    """Everything that is not the weights, their configuration or our code."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    ours = (RECEIPT, "config.json", "configuration_skywork.py", "modeling_skywork.py")
    return {
        name: file.read_bytes()
        for name, file in files.items()
        if name not in ours and "safetensors" not in name
    }


def test_what_travels_one_way_comes_back(tmp_path: Path):
    model = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    hf_models.skywork_dense(tmp_path / "bare", **model, num_key_value_heads=2, vocab_size=40)
    for name, files in SETS.items():
        source = tmp_path / name / "source"
        shutil.copytree(tmp_path / "bare", source)
        for file, content in (files | STAYS).items():
            (source / file).parent.mkdir(exist_ok=True)
            (source / file).write_bytes(content)
        nemo = convert_to("nemo", source, tmp_path / name / "nemo")
        bridge = convert_to("bridge", nemo, tmp_path / name / "bridge")
        back = convert_to("hf", bridge, tmp_path / name / "back")
        moe = convert_to("nemo", source, tmp_path / name / "moe", Upcycling(2))
        upcycled = convert_to("hf", moe, tmp_path / name / "upcycled")
        for output in (back, upcycled):
            assert beside(output) == files, (name, output)
        for made in (nemo, bridge, back, moe):
            found = verify({"base": source}, made)
            assert (found.problems, found.files) == ([], len(files)), (name, made)


def test_verify_finds_a_file_that_is_not_the_sources(tmp_path: Path):
    model = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    hf_models.skywork_dense(tmp_path / "source", **model, num_key_value_heads=2, vocab_size=40)
    for name in ("tekken.json", "merges.txt"):
        (tmp_path / "source" / name).write_bytes(b"{}")
    nemo = convert_to("nemo", tmp_path / "source", tmp_path / "nemo")
    (tmp_path / "source/tekken.json").write_bytes(b"{ }")
    (tmp_path / "source/merges.txt").unlink()
    (tmp_path / "source/generation_config.json").write_bytes(b"{}")
    assert verify({"base": tmp_path / "source"}, nemo).problems == [
        "'generation_config.json' is beside the source's weights, but not beside these",
        "'merges.txt' is not beside the source's weights",
        "'tekken.json' is not the source's, byte for byte",
    ]
