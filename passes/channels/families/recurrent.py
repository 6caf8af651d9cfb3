"""LSTM and GRU: gates of one hidden size."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Dim, Layout, dim_size
from fxcompress.passes.channels.rules import Call, rule

aten = torch.ops.aten


@rule(aten.lstm.input)
def lstm(call: Call) -> list[Layout]:
    """Four gates; states ``(layers * directions, batch, hidden)``."""
    hidden, cell = call.tensors("hx")
    result, _ = _recurrent(call, [hidden, cell])
    return [result, hidden, cell]


@rule(aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def gru(call: Call) -> list[Layout]:
    """Three gates, or one."""
    hidden = call.layout("hx")
    result, _ = _recurrent(call, [hidden])
    return [result, hidden]


def _recurrent(call: Call, states: list[Layout]) -> tuple[Layout, list[Dim]]:
    """Each layer and direction has weights ``(gates * hidden, inputs)`` and ``(gates * hidden, hidden)``."""
    x = call.layout("input")
    params = call.tensors("params")
    directions = 2 if call["bidirectional"] else 1
    each = 4 if call["has_biases"] else 2
    if len(params) != each * directions * call["num_layers"]:
        raise NotImplementedError("recurrent layers with projections have no rule")
    inputs: Dim = x[-1]
    everywhere: Dim | None = None
    for layer in range(call["num_layers"]):
        outputs: list[Dim] = []
        for direction in range(directions):
            first = (layer * directions + direction) * each
            weights = params[first : first + each]
            hidden = weights[1][1]
            call.join(inputs, weights[0][1])
            for gated in (weights[0][0], weights[1][0], *(bias[0] for bias in weights[2:])):
                gates, units = call.algebra.split(gated, dim_size(gated) // dim_size(hidden))
                call.keep(gates)
                call.join(units, hidden)
            if everywhere is not None:
                call.join(everywhere, hidden)
            everywhere = hidden
            outputs.append(hidden)
        inputs = outputs[0] if directions == 1 else call.algebra.concatenated(outputs)
    assert everywhere is not None
    for state in states:
        call.keep(state[0])
        call.join(state[-1], everywhere)
    return (*x[:-1], inputs), [everywhere]
