"""LSTM, GRU and plain recurrence: gates of one hidden size."""

from __future__ import annotations

import torch
from fxcompress.passes.channels.layout import Dim, Layout, dim_size
from fxcompress.passes.channels.rules import Call, rule

aten = torch.ops.aten


@rule(aten.lstm.input)
def lstm(call: Call) -> list[Layout]:
    """Four gates; states ``(layers * directions, batch, hidden)``, the first perhaps projected."""
    hidden, cell = call.tensors("hx")
    return [_recurrent(call, hidden, cell), hidden, cell]


@rule(aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def gru(call: Call) -> list[Layout]:
    """Three gates, or one."""
    hidden = call.layout("hx")
    return [_recurrent(call, hidden, hidden), hidden]


@rule(aten.lstm_cell.default)
def lstm_cell(call: Call) -> list[Layout]:
    """One step: four gates, two states ``(batch, hidden)``."""
    return [_stepped(call, state) for state in call.tensors("hx")]


@rule(aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def gru_cell(call: Call) -> Layout:
    """One step: three gates, or one; a state ``(batch, hidden)``."""
    return _stepped(call, call.layout("hx"))


def _stepped(call: Call, state: Layout) -> Layout:
    weights = [call.layout(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call.given(name)]
    hidden = weights[1][1]
    _gates(call, call.layout("input")[-1], hidden, weights)
    call.join(state[-1], hidden)
    return (*state[:-1], hidden)


def _recurrent(call: Call, hidden: Layout, cell: Layout) -> Layout:
    """Each layer and direction has ``(gates * hidden, inputs)``, ``(gates * hidden, outputs)`` and biases.

    Outputs are the hidden units, or a projection ``(outputs, hidden)`` of them. States of all layers are one tensor.
    """
    x, params = call.layout("input"), call.tensors("params")
    layers, directions = call["num_layers"], 2 if call["bidirectional"] else 1
    each = len(params) // (layers * directions)
    plain = 4 if call["has_biases"] else 2
    inputs: Dim = x[-1]
    for layer in range(layers):
        found: list[Dim] = []
        for direction in range(directions):
            first = (layer * directions + direction) * each
            weights, projection = params[first : first + plain], params[first + plain : first + each]
            outputs = weights[1][1]
            units = projection[0][1] if projection else outputs
            _gates(call, inputs, units, weights)
            if projection:
                call.join(projection[0][0], outputs)
            call.join(hidden[-1], outputs)
            call.join(cell[-1], units)
            found.append(outputs)
        inputs = found[0] if directions == 1 else call.algebra.concatenated(found)
    call.keep(hidden[0], cell[0])
    return (*x[:-1], inputs)


def _gates(call: Call, inputs: Dim, hidden: Dim, weights: list[Layout]) -> None:
    """Rows of weights and biases are (gates, hidden units); columns of the first are inputs."""
    call.join(inputs, weights[0][1])
    for gated in (weight[0] for weight in weights):
        gates, units = call.algebra.split(gated, dim_size(gated) // dim_size(hidden))
        call.keep(gates)
        call.join(units, hidden)
