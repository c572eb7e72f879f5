"""Bridge's options on the command line: what Bridge would let pass without a word is refused in one sentence."""

import pytest

from nemo_skymoe.bridge.overrides import set_options
from nemo_skymoe.bridge.recipes import skywork_moe_146b_pretrain_config
from nemo_skymoe.config import ConfigurationError
from tests.cases import every


def test_every_kind_of_option_is_set() -> None:
    config = skywork_moe_146b_pretrain_config()
    words = [
        "train.train_iters=7",
        "model.moe_router_logit_norm_scale=null",
        "optimizer.lr=1e-5",
        "logger.log_interval=3",
    ]
    set_options(config, [*words, "dataset.random_seed=5", "checkpoint.save='/a b'", "comm_overlap=null"])
    assert (config.train.train_iters, config.optimizer.lr, config.logger.log_interval) == (7, 1e-5, 3)
    assert config.model.moe_router_logit_norm_scale is None and config.comm_overlap is None
    assert (config.dataset.random_seed, config.checkpoint.save) == (5, "/a b")


@every(
    refused=[
        ("train.train_itrs=3", "option train.train_itrs is unknown: did you mean train.train_iters"),
        ("train.train_iters=many", "train.train_iters is 'many', expected"),
        ("+train.train_iters=3", "adds or removes an option"),
        ("~train.train_iters", "adds or removes an option"),
        ("train.train_iters=1,2", "is a sweep, expected one value"),
        ("train.train_iters=[", "cannot be read, expected OPTION=VALUE"),
        ("train.train_iters=${optimizer.lr}", "refers to another option"),
        ("peft.dim=4", "option peft.dim is unknown"),
        ("model.transformer_layer_spec=x", "model.transformer_layer_spec is a function"),
    ]
)
def test_what_bridge_would_ignore_is_refused(refused: tuple[str, str]) -> None:
    word, message = refused
    with pytest.raises(ConfigurationError, match=message):
        set_options(skywork_moe_146b_pretrain_config(), [word])
