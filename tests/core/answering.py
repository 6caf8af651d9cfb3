"""A small model with a dataclass for an output."""

import dataclasses

import torch
from torch import nn
from torch.utils import _pytree as pytree


@dataclasses.dataclass
class Answer:
    value: torch.Tensor
    doubled: torch.Tensor


pytree.register_dataclass(Answer, serialized_type_name="tests.Answer")


class Answering(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return Answer(y, 2 * y)
