"""Structural verification: one function for each rule of the normal form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from fxcompress.errors import VerificationError
from fxcompress.ir.layers import described, layer_of
from fxcompress.ir.ops import get_state, is_operation
from fxcompress.ir.program import Program
from fxcompress.tracing.functionalize import is_mutating
from fxcompress.tracing.normalize import ASSERTIONS

Rule = Callable[[Program], Iterator[str]]

RULES: dict[str, Rule] = {}
"""Rule name -> function that yields one message for each violation."""

_SHOWN = 8


def rule(function: Rule) -> Rule:
    """Registers a rule under its function's name."""
    name = function.__name__.replace("_", "-")
    if name in RULES:
        raise ValueError(f"rule {name!r} is defined twice")
    RULES[name] = function
    return function


def violations(program: Program) -> Iterator[str]:
    """Every violation of the normal form, as ``rule: message``."""
    for name, check in RULES.items():
        for message in check(program):
            yield f"{name}: {message}"


def verify(program: Program) -> None:
    """Checks that a Program is in normal form.

    Raises:
        VerificationError: It is not; the message lists the first violations.
    """
    found = list(islice(violations(program), _SHOWN + 1))
    if found:
        more = ["..."] if len(found) > _SHOWN else []
        raise VerificationError(f"{program!r} is not in normal form:\n  " + "\n  ".join(found[:_SHOWN] + more))


@rule
def well_formed(program: Program) -> Iterator[str]:
    """Nodes are defined before use, names are unique and targets resolve (``fx.Graph.lint``)."""
    try:
        program.graph.lint()
    except RuntimeError as error:
        yield str(error)


@rule
def known_operations(program: Program) -> Iterator[str]:
    """Calls are to operator overloads, to arithmetic on sizes, or to modules; there are no method calls."""
    for node in program.nodes:
        if node.op == "call_method":
            yield f"{node.name} calls the method {node.target!r}; write the ATen overload"
        elif node.op == "call_function" and not is_operation(node.target):
            yield f"{node.name} calls {node.target!r}, which is no operator overload"


@rule
def standard_modules(program: Program) -> Iterator[str]:
    """Called modules are standard layers with one tensor operand."""
    for node in program.nodes:
        if node.op != "call_module":
            continue
        module = program.graph_module.get_submodule(str(node.target))
        if layer_of(module) is None:
            yield f"{node.name} calls a {type(module).__name__}, which is not a standard layer"
        elif len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            yield f"{node.name} must call {node.target!r} with one tensor"


@rule
def no_mutation(program: Program) -> Iterator[str]:
    """No operation writes into its operands."""
    for node in program.nodes:
        if is_mutating(node):
            yield f"{node.name} writes in place ({node.target})"


@rule
def no_assertions(program: Program) -> Iterator[str]:
    """Export's guards and asserts are gone."""
    for node in program.nodes:
        if isinstance(node.target, OpOverload) and node.target.overloadpacket in ASSERTIONS:
            yield f"{node.name} only asserts ({node.target})"


@rule
def values_known(program: Program) -> Iterator[str]:
    """Every node carries the FakeTensor (or number) it stands for in ``meta["val"]``."""
    for node in program.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta:
            yield f'{node.name} has no meta["val"]'
        elif isinstance(node.meta["val"], torch.Tensor) and not isinstance(node.meta["val"], FakeTensor):
            yield f'{node.name} keeps a real tensor in meta["val"]'


@rule
def state_resolves(program: Program) -> Iterator[str]:
    """``get_attr`` reads a parameter or buffer whose shape and dtype are those the graph believes."""
    for node in program.nodes:
        if node.op != "get_attr":
            continue
        try:
            tensor = get_state(program.graph_module, str(node.target))
        except AttributeError:
            yield f"{node.name} reads {node.target!r}, which is no parameter or buffer"
            continue
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and (tuple(val.shape) != tuple(tensor.shape) or val.dtype != tensor.dtype):
            yield (
                f"{node.name} believes {node.target!r} is {val.dtype} {tuple(val.shape)}, but it is "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )


@rule
def no_orphans(program: Program) -> Iterator[str]:
    """All state is read by a node, directly or under another name of the same tensor."""
    called = {str(node.target) for node in program.nodes if node.op == "call_module"}
    read: set[int] = set()
    for node in program.nodes:
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            read.add(id(getattr(program.graph_module.get_submodule(owner), leaf, None)))
    owners = list(program.graph_module.named_modules(remove_duplicate=False))
    for path, module in owners:
        if path in called:
            read |= {id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())}
    for path, module in owners:
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in read:
                yield f"{f'{path}.{leaf}'.lstrip('.')!r} is read by no node"


@rule
def attributes_agree(program: Program) -> Iterator[str]:
    """A module's attributes describe its weights (``out_channels`` is the number of filters, and so on)."""
    for node in program.nodes:
        if node.op == "call_module":
            module = program.graph_module.get_submodule(str(node.target))
            for message in _disagreements(module):
                yield f"{node.target}: {message}"


def _disagreements(module: nn.Module) -> Iterator[str]:
    """Rebuilds the module from its own attributes: a right one has the same state shapes."""
    layer = layer_of(module)
    if layer is None:
        return
    for attribute, expected in described(module).items():
        if getattr(module, attribute) != expected:
            yield f"{attribute} is {getattr(module, attribute)}, but the weights say {expected}"


@rule
def interface_agrees(program: Program) -> Iterator[str]:
    """Placeholders and outputs are the leaves of the caller's structure."""
    placeholders = [node for node in program.nodes if node.op == "placeholder"]
    if len(placeholders) != program.interface.in_spec.num_leaves:
        yield f"{len(placeholders)} placeholders for {program.interface.in_spec.num_leaves} input leaves"
    outputs = program.graph.output_node().args[0]
    if not isinstance(outputs, tuple):
        yield "the output is not a flat tuple"
    elif len(outputs) != program.interface.out_spec.num_leaves:
        yield f"{len(outputs)} outputs for {program.interface.out_spec.num_leaves} output leaves"
    for node, leaf in zip(placeholders, program.interface.leaves, strict=False):
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and (not isinstance(leaf, torch.Tensor) or val.dim() != leaf.dim()):
            yield f"{node.name} stands for {tuple(val.shape)}, but the example input has another rank"


@rule
def inference_mode(program: Program) -> Iterator[str]:
    """A Program is in eval mode; training happens on what :meth:`Program.emit` gives."""
    for path, module in program.graph_module.named_modules():
        if module.training:
            yield f"{path or 'the root'} is in training mode"
            return
