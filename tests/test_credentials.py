"""Secrets are refused as values, wherever they stand, and no message repeats one; what is none is left alone."""

from typing import Any

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.credentials import check_options, check_text, check_variables

HEX = "0123456789abcdef" * 3
NAMES = (
    "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NGC_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "MY_SECRET", "MY_SECRET_2", "SECRET_THING", "DB_PASSWORD", "PGPASSWORD", "MY_PASSWD", "SITE_PASSWORD_OLD",
    "OPENAI_API_KEY", "GITHUB_TOKEN", "wandb_api_key", "AZURE_STORAGE_ACCESS_KEY", "COMET_APIKEY", "PRIVATE_KEY", "TOKEN",
)  # fmt: skip
VALUES = (
    "hf_abcdefghijklmnopqrstuvwxyz", "sk-abcdefghijklmnop1234", "sk-proj-abc_def-ghijklmnop", "ghp_abcdefghijklmnopqrst0123",
    "github_pat_11ABCDEFG0abcdefghij", "glpat-abcdefghij0123456789", "nvapi-abcdefghijklmnopqrst", "AKIAIOSFODNN7EXAMPLE",
    "https://me:swordfish@host/data", "docker://me:swordfish@nvcr.io#nvidia/nemo:25.11", "me:swordfish@nvcr.io#nvidia/nemo",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc", "-----BEGIN OPENSSH PRIVATE KEY-----\nabc", "https://:swordfish@host",
    "http_proxy=http://me:swordfish@proxy:3128",
)  # fmt: skip
HARMLESS = {
    "NCCL_SOCKET_IFNAME": "bond0", "TOKENIZERS_PARALLELISM": "False", "HF_HUB_OFFLINE": "1", "AWS_REGION": "us-east-1",
    "AWS_PROFILE": "site", "WANDB_API_KEY_FILE": "/home/me/key", "MAX_TOKENS": "4096", "HF_HOME": "/data/hf", "MONKEY": "1",
    "WANDB_PROJECT": "moe", "PATH": "/usr/bin:/bin", "PWD": "/x", "KEYBOARD": "de", "HASH": HEX, "URL": "https://me@host:80/x",
    "IMAGE": "nvcr.io/nvidia/nemo:25.11@sha256:" + HEX, "IMAGE_2": "nemo:25@sha256:" + HEX, "MOUNT": "/a:/b", "EMAIL": "me@site.org",
    "TOKENIZER_PATH": "/x", "PASSED": "1", "COMPASS": "n", "AUTHOR": "me", "WANDB_ENTITY": "a-team",
}  # fmt: skip


def sentence(name: str) -> str:
    return rf"{name} is given what looks like a secret: secrets are passed by name from the environment, never by value"


def test_variables() -> None:
    for name in NAMES:
        with pytest.raises(ConfigurationError, match=sentence(f"env_vars.{name}")) as refused:
            check_variables("env_vars", {"A": "b", name: "swordfish"})
        assert "swordfish" not in str(refused.value) and f"{{{name}: null}}" in str(refused.value)
        check_variables("env_vars", {name: None})
    for value in (*VALUES, f"{HEX}"):
        name = "WANDB_KEY" if value == HEX else "X"
        with pytest.raises(ConfigurationError, match=sentence(f"env_vars.{name}")) as refused:
            check_variables("env_vars", {name: value})
        assert value not in str(refused.value) and "swordfish" not in str(refused.value)
    check_variables("env_vars", HARMLESS)


def test_options_at_any_depth() -> None:
    for value in VALUES:
        nested: Any
        for nested in ({"cluster": {"comment": value}}, {"cluster": {"srun_args": ["--x", value]}}):
            (name,) = nested["cluster"]
            with pytest.raises(ConfigurationError, match=sentence(f"cluster.{name}")) as refused:
                check_options(nested)
            assert value not in str(refused.value) and "swordfish" not in str(refused.value)
    for name in ("wandb_key", "api_key", "password", "hf_token", "auth_token", "client_secret", "token"):
        with pytest.raises(ConfigurationError, match=sentence(f"training.log.{name}")):
            check_options({"training": {"log": {name: "swordfish"}}})
        check_options({"training": {"log": {name: None, "x": True}}})
        check_options({"training": {"log": {name: "${oc.env:X}"}}})
    with pytest.raises(ConfigurationError, match=sentence("cluster.setup_lines")):
        check_options({"cluster": {"setup_lines": "module load x\nexport HF_TOKEN='swordfish'"}})
    options = {
        "eod_token": "x",
        "tokens": 1e9,
        "moe_token_dispatcher_type": "alltoall",
        "key": None,
        "tokenizer": "a" * 50,
    }
    check_options({"cluster": {"env_vars": HARMLESS}, "training": options})


def test_text_before_it_is_parsed() -> None:
    for text in (
        "cluster.env_vars={A: b, WANDB_API_KEY: swordfish}", "cluster.env_vars.HF_TOKEN=swordfish", "+cluster.env_vars.HF_TOKEN=swordfish",
        "cluster.env_vars={'DB_PASSWORD': \"swordfish\"}", "cluster.env_vars={A: [, HF_TOKEN=swordfish", "training.api_key=swordfish",
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match="secrets are passed by name") as refused:
            check_text("cluster", text)
        assert "swordfish" not in str(refused.value)
    for text in (
        "cluster.env_vars={WANDB_API_KEY: null, HF_TOKEN: ~}", "training.max_lr=1e-4", "cluster.env_vars.HF_TOKEN=null", "data.tokens=1e9",
        "cluster.env_vars={HF_TOKEN: ${oc.env:HF_TOKEN}}", "export HF_TOKEN=$HF_TOKEN", "model.eod_token=3",
        "jobs=[upcycle,training]", "cluster.env_vars={NCCL_SOCKET_IFNAME: bond0}",
    ):  # fmt: skip
        check_text("cluster", text)
