import pytest
import torch

from fxcompress.cli.example_inputs import BATCH, example_inputs
from fxcompress.errors import InputError


def test_sizes_get_a_batch_dim_and_normal_values():
    (image,), named = example_inputs(["3x8x6"])
    assert image.shape == (BATCH, 3, 8, 6)
    assert image.dtype == torch.float32
    assert bool(image.std() > 0.5)
    assert named == {}


def test_integers_are_valid_in_any_vocabulary():
    (tokens,), _ = example_inputs(["128:int64"])
    assert tokens.dtype == torch.int64
    assert set(tokens.unique().tolist()) == {0, 1}


def test_named_inputs_are_keywords():
    args, named = example_inputs(["3x4x4", "input_ids=16:int64", "mask=16:bool"])
    assert [tuple(each.shape) for each in args] == [(BATCH, 3, 4, 4)]
    assert {name: (tuple(each.shape), each.dtype) for name, each in named.items()} == {
        "input_ids": ((BATCH, 16), torch.int64),
        "mask": ((BATCH, 16), torch.bool),
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["3,224,224"], "'3,224,224' does not describe an input; write .*3x224x224"),
        ([""], "does not describe an input"),
        (["3x0x8"], "'3x0x8' has a size of 0"),
        (["3x8:flaot32"], "unknown dtype 'flaot32'; did you mean 'float32'"),
        (["a=3", "a=4"], "two inputs have the name 'a'"),
    ],
)
def test_bad_text(texts, message):
    with pytest.raises(InputError, match=message):
        example_inputs(texts)
