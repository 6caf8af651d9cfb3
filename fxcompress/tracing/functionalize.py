"""In-place operations become functional, with every alias of the written tensor brought up to date.

A write through a view (``x[:, 1:] += y``) becomes a functional operation whose result is scattered back into the
tensors it was a view of, and other views that are read later are taken again from the new value. This is what
``torch.func.functionalize`` does while tracing; doing it on the graph keeps dropout, batch norm and the module paths
that a second trace would lose.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from fxcompress.errors import CaptureError
from fxcompress.ir.constants import is_constant_state
from fxcompress.ir.ops import bind

aten = torch.ops.aten


def functionalize(graph_module: fx.GraphModule) -> None:
    """Removes every in-place operation from a graph.

    Raises:
        CaptureError: A write has no functional form, or changes the model's own state.
    """
    rewriter = _Functionalizer(graph_module)
    for node in list(graph_module.graph.nodes):
        rewriter.visit(node)


def is_mutating(node: fx.Node) -> bool:
    """Whether a node writes into one of its operands."""
    return node.op == "call_function" and isinstance(node.target, OpOverload) and node.target._schema.is_mutable


class _Functionalizer:
    """Walks a graph in order and keeps track of which nodes share memory.

    ``parent`` leads from a view to what it is a view of, ``views`` back, and ``recipe`` to the node whose operation
    takes the view (a view that was written to is computed by another operation, but is taken again by this one).
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph = graph_module.graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, list[fx.Node]] = {}
        self.recipe: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        if is_mutating(node):
            self._rewrite(node)
            return
        source = _viewed(node)
        if source is not None:
            self._link(node, source, node)

    def _link(self, view: fx.Node, source: fx.Node, recipe: fx.Node) -> None:
        self.parent[view] = source
        self.views.setdefault(source, []).append(view)
        self.recipe[view] = recipe

    def _rewrite(self, node: fx.Node) -> None:
        target = node.args[0]
        written = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]  # type: ignore[union-attr]
        if not isinstance(target, fx.Node) or written != [node.target._schema.arguments[0].name]:  # type: ignore[union-attr]
            raise CaptureError(
                f"{node.target} writes into {', '.join(written)}, which has no functional form here; rewrite it out of "
                "place, without out= and without lists of tensors"
            )
        for view in self._path(target):
            if view.target is operator.getitem and view in self.parent:
                self._single(view)
        target = node.args[0]
        assert isinstance(target, fx.Node)
        path = self._path(target)
        root = path[-1]
        if root.op == "get_attr" and not is_constant_state(self.graph_module, str(root.target)):
            raise CaptureError(
                f"the model writes into its own state {root.target!r} in eval mode; a Program is a pure function: pass "
                "the state as an input, or use fxcompress.trace_islands"
            )
        now = self.order[node]
        with self.graph.inserting_before(node):
            value = _functional(self.graph, node, target)
            node.replace_all_uses_with(value)
            versions = {target: value}
            stale = [alias for alias in self._family(root) if alias is not target and self._read_after(alias, now)]
            if stale:
                self._scatter(path, versions)
                self._retake(stale, versions)
        self._succeed(versions, now)
        self.graph.erase_node(node)

    def _single(self, part: fx.Node) -> None:
        """Makes one part of a split a slice (or, of an unbind, a selection) of the tensor that was split."""
        parts = self.parent[part]
        source = self.parent[parts]
        with self.graph.inserting_before(part):
            view = _part(self.graph, part, parts, source)
        view.meta = dict(part.meta)
        self.order[view] = self.order[part]
        self._link(view, source, view)
        part.replace_all_uses_with(view)
        for child in self.views.pop(part, []):
            self.parent[child] = view
            self.views.setdefault(view, []).append(child)
        self.views[parts].remove(part)
        del self.parent[part], self.recipe[part]
        self.graph.erase_node(part)

    def _path(self, node: fx.Node) -> list[fx.Node]:
        """A node, what it is a view of, and so on up to the tensor that owns the memory."""
        path = [node]
        while path[-1] in self.parent:
            path.append(self.parent[path[-1]])
        return path

    def _family(self, root: fx.Node) -> list[fx.Node]:
        """All nodes that share the memory of ``root``."""
        members, pending = [], [root]
        while pending:
            member = pending.pop()
            members.append(member)
            pending += self.views.get(member, [])
        return members

    def _read_after(self, node: fx.Node, now: int) -> bool:
        return any(self.order.get(user, now) > now for user in node.users)

    def _scatter(self, path: list[fx.Node], versions: dict[fx.Node, fx.Node]) -> None:
        """Writes the new value of a view into what it is a view of, up to the owner of the memory."""
        for view, parent in pairwise(path):
            made = _scatter_into(self.graph, self.recipe[view], parent, versions[view])
            made.meta = dict(parent.meta)
            versions[parent] = made

    def _retake(self, stale: list[fx.Node], versions: dict[fx.Node, fx.Node]) -> None:
        """Other views that are read later are taken again from the new value."""
        for alias in stale:
            for view in reversed(self._path(alias)):
                if view not in versions:
                    recipe, source = self.recipe[view], versions[self.parent[view]]
                    original = recipe.args[0]
                    again = self.graph.node_copy(recipe, partial(_substitute, original, source))
                    again.meta = dict(view.meta)
                    versions[view] = again

    def _succeed(self, versions: dict[fx.Node, fx.Node], now: int) -> None:
        """Later users read the new versions, which are views of each other as the old ones were."""
        for old, new in versions.items():
            self.order[new] = now
            old.replace_all_uses_with(new, delete_user_cb=lambda user: self.order.get(user, now) > now)
            if old in self.parent:
                parent = self.parent[old]
                self._link(new, versions.get(parent, parent), self.recipe[old])


def _substitute(old: Any, new: fx.Node, operand: fx.Node) -> fx.Node:
    return new if operand is old else operand


def _viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one shares, by schema and (where the schema says "maybe") by storage."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and _viewed(source) is not None else None
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable or not node.args:
        return None
    first = node.target._schema.arguments[0]
    source = node.args[0]
    if first.alias_info is None or not isinstance(source, fx.Node):
        return None
    ours, theirs = node.meta.get("val"), source.meta.get("val")
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return source if ours.untyped_storage()._cdata == theirs.untyped_storage()._cdata else None
    return source


def _functional(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node:
    overload = node.target
    assert isinstance(overload, OpOverload)
    name = overload._schema.name.split("::")[1]
    if name == "copy_":
        value = _copied(graph, target, node.args[1])
    elif name == "zero_":
        value = graph.call_function(aten.zeros_like.default, (target,))
    else:
        namespace = getattr(torch.ops, overload.namespace)
        plain = "__" + name[3:] if name.startswith("__i") else name.rstrip("_")
        functional = _same_arguments(getattr(namespace, plain, None), overload)
        if functional is None:
            raise CaptureError(f"{overload} writes in place and has no functional form; rewrite it out of place")
        value = graph.call_function(functional, node.args, node.kwargs)
    value.meta = dict(node.meta)
    return _kept_dtype(graph, node, value)


def _part(graph: fx.Graph, part: fx.Node, parts: fx.Node, source: fx.Node) -> fx.Node:
    """The slice or selection of ``source`` that is ``part``, a result of splitting it."""
    index = part.args[1]
    assert isinstance(index, int)
    assert isinstance(parts.target, OpOverload)
    call, found = bind(parts.target, parts.args, parts.kwargs), parts.meta["val"]
    index, dim = index % len(found), call.get("dim")
    if not isinstance(dim, int):
        raise CaptureError(f"a part of {parts.target} is written in place; rewrite it out of place")
    if parts.target is aten.unbind.int:
        return graph.call_function(aten.select.int, (source, dim, index))
    start = sum(piece.shape[dim] for piece in found[:index])
    end = start + found[index].shape[dim]
    if not isinstance(end, int):
        raise CaptureError(f"a part of {parts.target} over a dynamic dim is written in place; rewrite it out of place")
    return graph.call_function(aten.slice.Tensor, (source, dim, start, end))


def _same_arguments(packet: Any, overload: OpOverload) -> OpOverload | None:
    """The functional overload that takes what an in-place one takes; ``pow_.Scalar`` is ``pow.Tensor_Scalar``."""
    if packet is None:
        return None
    wanted = _argument_types(overload)
    names = sorted(packet.overloads(), key=lambda name: name != overload._overloadname)
    overloads = (getattr(packet, name) for name in names)
    return next((o for o in overloads if not o._schema.is_mutable and _argument_types(o) == wanted), None)


def _argument_types(overload: OpOverload) -> list[str]:
    return [str(argument.type) for argument in overload._schema.arguments]


def _kept_dtype(graph: fx.Graph, node: fx.Node, value: fx.Node) -> fx.Node:
    """A write keeps its target's dtype, where the functional operation would promote it."""
    kept = node.meta["val"].dtype
    operands = [operand.meta["val"] for operand in value.all_input_nodes]
    if all(not isinstance(val, torch.Tensor) or val.dtype == kept for val in operands):
        return value
    args, kwargs = map_arg((value.args, value.kwargs), lambda operand: operand.meta["val"])
    promoted = value.target(*args, **kwargs)  # type: ignore[operator]
    if promoted.dtype == kept:
        return value
    value.meta["val"] = promoted
    converted = graph.call_function(aten.to.dtype, (value, kept))
    converted.meta = dict(node.meta)
    return converted


def _copied(graph: fx.Graph, target: fx.Node, source: Any) -> fx.Node:
    """The value of ``target`` after ``target.copy_(source)``: the source in the target's shape and dtype."""
    ours, theirs = target.meta["val"], source.meta["val"]
    value: fx.Node = source
    if theirs.dtype != ours.dtype:
        value = graph.call_function(aten.to.dtype, (value, ours.dtype))
        value.meta = dict(source.meta, val=theirs.to(ours.dtype))
    if not same_shape(ours, theirs):
        value = graph.call_function(aten.expand.default, (value, sizes(graph, target)))
    elif value is source:
        value = graph.call_function(aten.clone.default, (value,))
    return value


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two (possibly symbolic) shapes are known to be equal."""
    return left.dim() == right.dim() and all(
        statically_known_true(a == b) for a, b in zip(left.shape, right.shape, strict=True)
    )


def sizes(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """The shape of a node as literals, with size nodes for dims that are dynamic."""
    shape: list[Any] = []
    for dim, size in enumerate(node.meta["val"].shape):
        if isinstance(size, torch.SymInt):
            read = graph.call_function(aten.sym_size.int, (node, dim))
            read.meta["val"] = size
            shape.append(read)
        else:
            shape.append(size)
    return shape


def _scatter_into(graph: fx.Graph, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
    """The new value of ``parent`` after its view ``view`` took ``value``."""
    if view.target is operator.getitem:
        raise CaptureError(f"a part of {parent.target} is written in place; rewrite it out of place")
    assert isinstance(view.target, OpOverload)
    call = bind(view.target, view.args, view.kwargs)
    inverse = _INVERSES.get(view.target)
    if inverse is None:
        raise CaptureError(f"a write through the view {view.target} has no functional form; rewrite it out of place")
    return inverse(graph, parent, value, call)


Inverse = Callable[[fx.Graph, fx.Node, fx.Node, dict[str, Any]], fx.Node]


def _slice(graph: fx.Graph, parent: fx.Node, value: fx.Node, call: dict[str, Any]) -> fx.Node:
    step = () if call["step"] == 1 else (call["step"],)
    return graph.call_function(
        aten.slice_scatter.default, (parent, value, call["dim"], call["start"], call["end"], *step)
    )


def _select(graph: fx.Graph, parent: fx.Node, value: fx.Node, call: dict[str, Any]) -> fx.Node:
    return graph.call_function(aten.select_scatter.default, (parent, value, call["dim"], call["index"]))


def _reshape(graph: fx.Graph, parent: fx.Node, value: fx.Node, call: dict[str, Any]) -> fx.Node:
    return graph.call_function(aten.reshape.default, (value, sizes(graph, parent)))


def _permuted(graph: fx.Graph, parent: fx.Node, value: fx.Node, call: dict[str, Any], view: OpOverload) -> fx.Node:
    """The inverse of a permutation, read off what the view does to a shape whose sizes all differ."""
    rank = parent.meta["val"].dim()
    probe = torch.empty(tuple(range(1, rank + 1)), device="meta")
    order = [size - 1 for size in view(**{**call, "self": probe}).shape]
    return graph.call_function(aten.permute.default, (value, [order.index(dim) for dim in range(rank)]))


def _diagonal(graph: fx.Graph, parent: fx.Node, value: fx.Node, call: dict[str, Any]) -> fx.Node:
    return graph.call_function(
        aten.diagonal_scatter.default, (parent, value, call["offset"], call["dim1"], call["dim2"])
    )


_INVERSES: dict[OpOverload, Inverse] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **{
        view: partial(_permuted, view=view)
        for view in (
            aten.transpose.int,
            aten.t.default,
            aten.permute.default,
            aten.movedim.int,
            aten.movedim.intlist,
            aten.swapaxes.default,
            aten.swapdims.default,
            aten.numpy_T.default,
            aten.mT.default,
        )
    },
    aten.diagonal.default: _diagonal,
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.view_as.default,
            aten.lift_fresh.default,
        ),
        _reshape,
    ),
}
