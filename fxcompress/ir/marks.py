"""Marks of what passes have done to a node that must not be done again; copies and artifacts keep them.

A pass that measures what a node gave before it was quantized, say, cannot tell that from what the pass itself changed.
"""

from __future__ import annotations

from torch import fx

DONE = "done"
"""Key in a node's ``meta``: names of passes."""


def is_done(node: fx.Node, name: str) -> bool:
    """Whether a node is marked by the pass of that name."""
    return name in node.meta.get(DONE, ())


def mark_done(node: fx.Node, name: str) -> None:
    """Marks a node for good."""
    node.meta[DONE] = (*node.meta.get(DONE, ()), name)
