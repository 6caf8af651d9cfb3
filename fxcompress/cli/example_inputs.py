"""Example inputs from text: ``3x224x224``, ``128:int64``, ``input_ids=128:int64``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxcompress.errors import InputError, did_you_mean

BATCH = 2
"""Rows of example inputs: with one row, a batch dim could be taken for a fixed size."""

SYNTAX = "[NAME=]SIZES[:DTYPE], for example 3x224x224, 128:int64 or input_ids=128:int64"

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
}
_FORM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class InputText:
    """One input as text says it.

    Attributes:
        name: Keyword it is passed by; empty for a positional input.
        sizes: Sizes of one example, without the batch dim.
        dtype: Element type.
    """

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def parse(cls, text: str) -> InputText:
        """Reads ``[NAME=]SIZES[:DTYPE]``.

        Raises:
            InputError: If the text has another form, a size is 0, or the dtype is unknown.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise InputError(f"{text!r} does not describe an input; write {SYNTAX} (the batch dim is added)")
        sizes = tuple(int(size) for size in match["sizes"].split("x"))
        if 0 in sizes:
            raise InputError(f"the input {text!r} has a size of 0; write {SYNTAX}")
        dtype = match["dtype"] or "float32"
        if dtype not in _DTYPES:
            near = did_you_mean(dtype, _DTYPES) or f"; dtypes: {', '.join(_DTYPES)}"
            raise InputError(f"the input {text!r} has the unknown dtype {dtype!r}{near}")
        return cls(match["name"] or "", sizes, _DTYPES[dtype])

    def tensor(self, batch: int = BATCH) -> torch.Tensor:
        """Random values with a batch dim in front: normal, or 0 and 1 for integers, which any vocabulary has."""
        shape = (batch, *self.sizes)
        values = torch.randn(shape) if self.dtype.is_floating_point else torch.randint(2, shape)
        return values.to(self.dtype)


def example_inputs(texts: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of random tensors, positional inputs in the order given.

    Raises:
        InputError: If a text is wrong, or two inputs have the same name.
    """
    inputs = [InputText.parse(text) for text in texts]
    names = [each.name for each in inputs if each.name]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two inputs have the name {name!r}; give each once")
    args = tuple(each.tensor() for each in inputs if not each.name)
    return args, {each.name: each.tensor() for each in inputs if each.name}
