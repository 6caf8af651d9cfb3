"""A Task holds what the user knows about the model's job, and refuses what cannot work."""

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.errors import InputError
from fxcompress.task import Task


def accuracy(module):
    return 0.5


def test_every_part_is_optional():
    assert repr(Task()) == "Task()"


def test_repr_says_what_is_there():
    loader = DataLoader(TensorDataset(torch.zeros(6, 2)), batch_size=2)
    task = Task([torch.zeros(2)] * 4, loader, functional.cross_entropy, accuracy, "top-1")
    assert repr(task) == (
        "Task(calibration=<list of 4 batches>, training=<DataLoader of 3 batches>, loss=cross_entropy, "
        "evaluate=accuracy, metric='top-1')"
    )


def test_model_inputs_are_the_first_of_a_tuple_or_the_batch_itself():
    x, y = torch.zeros(2), torch.ones(2)
    assert Task().model_inputs((x, y)) is x
    assert Task().model_inputs([x, y]) is x
    assert Task().model_inputs(x) is x
    assert Task().model_inputs({"x": x}) == {"x": x}
    assert Task(inputs=lambda batch: batch[::-1]).model_inputs((x, y)) == (y, x)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"calibration": (b for b in [1])},
            r"Task\.calibration is a generator, which can be read only once; give list",
        ),
        ({"training": iter([1])}, r"Task\.training is a list_iterator, which can be read only once"),
        ({"calibration": torch.zeros(3)}, r"Task\.calibration must hold batches, but a Tensor is one; write \[batch\]"),
        ({"calibration": {"x": 1}}, r"but a dict is one; write \[batch\]"),
        ({"calibration": []}, r"Task\.calibration has no batches; give at least one"),
        ({"training": 3}, r"Task\.training must be an iterable of batches, not 3"),
        ({"loss": "mse"}, r"Task\.loss must be a function, not 'mse'"),
        ({"evaluate": 0.9}, r"Task\.evaluate must be a function, not 0\.9"),
        ({"metric": ""}, r"Task\.metric must name what 'evaluate' measures, not ''"),
    ],
)
def test_parts_that_cannot_work_are_refused(parts, message):
    with pytest.raises(InputError, match=message):
        Task(**parts)
