"""A table of a format of the tests' own: its lines give the tensors of a model, and are read in both directions."""

from dataclasses import replace

import torch

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.tensors.mapping import Chunk, StoredWeights, assemble
from nemo_skymoe.checkpoint.tensors.model import model_keys
from nemo_skymoe.checkpoint.tensors.table import Line, below, entries, shape_of
from tests.checkpoint.fakes import DictStorage, random_weights

TABLE = (
    Line("words", "embedding"),
    Line("{layer}/norms", below("attention_norm", "mlp_norm")),
    Line("{layer}/attention", below("query", "key", "value")),
    Line("{layer}/out", "attention_output"),
    Line("{layer}/mlp", below("gate", "up"), "dense"),
    Line("{layer}/down", "down", "dense"),
    Line("{layer}/router", "router", "moe"),
    Line("{layer}/old/{expert}", below("gate", "up"), "moe old"),
    Line("{layer}/{expert}", below("up", "gate"), "moe new"),
    Line("{layer}/{expert}/down", "down", "moe"),
    Line("norm", "final_norm"),
    Line("head", "output"),
)
DENSE_FIRST = Architecture(2, 16, 24, 2, vocab_size=50, num_moe_experts=2, moe_layer_freq=(0, 1))


def chunks(architecture: Architecture, variant: str) -> list[Chunk]:
    found = []
    for line, layer, expert in entries(TABLE, architecture, variant):
        parts = line.parts(architecture, layer, expert)
        name = line.name.format(layer=layer, expert=expert)
        found.append(Chunk(name, shape_of(architecture, parts), parts))
    return found


def test_lines_are_found_where_their_words_hold() -> None:
    names = [chunk.tensor for chunk in chunks(DENSE_FIRST, "new")]
    assert names == [
        *("words", "0/norms", "0/attention", "0/out", "0/mlp", "0/down"),
        *(
            "1/norms",
            "1/attention",
            "1/out",
            "1/router",
            "1/0",
            "1/0/down",
            "1/1",
            "1/1/down",
            "norm",
            "head",
        ),
    ]
    assert "1/old/0" in {chunk.tensor for chunk in chunks(DENSE_FIRST, "old")}
    tied = chunks(replace(DENSE_FIRST, tied_embeddings=True), "new")
    assert [chunk.tensor for chunk in tied] == names[:-1]


def test_what_is_written_by_a_table_is_read_by_it() -> None:
    weights = random_weights(DENSE_FIRST)
    table = chunks(DENSE_FIRST, "new")
    stored = {chunk.tensor: assemble(chunk, weights, torch.float32) for chunk in table}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        chunk.tensor: chunk.shape for chunk in table
    }
    read = StoredWeights(DictStorage(stored), DENSE_FIRST, table)
    for key in model_keys(DENSE_FIRST):
        assert torch.equal(read.read(key), weights.read(key)), key
