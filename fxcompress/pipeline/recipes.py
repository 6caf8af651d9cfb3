"""Recipes: pipelines with a name, for those who do not want to choose passes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fxcompress import registry
from fxcompress.errors import InputError, did_you_mean
from fxcompress.pass_base import Pass
from fxcompress.pipeline.text import Pipeline, as_pipeline, parse

# Weights for onnxruntime have 7 bits: without VNNI its kernels add pairs of 8-bit products in 16 bits, which overflow.
RECIPES: Mapping[str, str] = {
    "default": "eliminate-dead,fold-constants,fold-batchnorm",
    "int8": (
        "eliminate-dead,fold-constants,canonicalize-linear,fold-batchnorm,insert-qdq,correct-bias,refine-rounding"
    ),
    "int8-onnxruntime": (
        "eliminate-dead,fold-constants,canonicalize-linear,fold-batchnorm,"
        "insert-qdq{target=onnxruntime weight-bits=7},correct-bias,refine-rounding"
    ),
    "int8-executorch": (
        "eliminate-dead,fold-constants,canonicalize-linear,fold-batchnorm,insert-qdq{target=executorch},correct-bias,"
        "refine-rounding"
    ),
    "half-int8": (
        "eliminate-dead,fold-constants,canonicalize-linear,select-channels,remove-channels,"
        "train{epochs=8 rate=0.02 optimizer=sgd},fold-batchnorm,"
        "insert-qdq{target=onnxruntime weight-bits=7},correct-bias"
    ),
}
"""Recipe name -> pipeline text; no recipe has the name of a pass."""


def recipe(name: str) -> Pipeline:
    """The pipeline of a recipe.

    Raises:
        InputError: If there is none of that name; near names are given.
    """
    if name not in RECIPES:
        near = did_you_mean(name, RECIPES) or f"; recipes: {', '.join(RECIPES)}"
        raise InputError(f"there is no recipe {name!r}{near}")
    return parse(RECIPES[name])


def choose(pipeline: str | Pipeline | Sequence[Pass]) -> Pipeline:
    """A pipeline from the name of a recipe, from pipeline text, from passes, or as it is.

    Raises:
        InputError: If a single name is neither a recipe nor a pass, or the pipeline text is wrong.
    """
    if not isinstance(pipeline, str):
        return as_pipeline(pipeline)
    name = pipeline.strip()
    if name in RECIPES:
        return recipe(name)
    first = re.split(r"[{,]", name)[0].strip()
    near = "" if first in registry.names() else did_you_mean(name, RECIPES)
    if near:
        raise InputError(f"{name!r} is neither a recipe nor a pass{near}")
    return parse(pipeline)
