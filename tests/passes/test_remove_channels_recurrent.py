"""remove-channels in recurrent networks: hidden units go from all gates at once, in every layer and direction."""

import pytest
from models import inputs
from pruning import Wire, prune, shapes
from torch import nn

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
SEQUENCE = inputs(2, 5, 6)

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")  # of torch.export, about flat weights


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_hidden_units(kind, layers, directions, bias):
    def forward(m, x):
        return m.head(m.cells(m.stem(x))[0])

    cells = kind(4, 8, layers, bidirectional=directions == 2, bias=bias, batch_first=True)
    after = prune(Wire(forward, stem=nn.Linear(6, 4), cells=cells, head=nn.Linear(8 * directions, 3)), SEQUENCE)

    found = shapes(after)
    assert found["stem"] == (2, 6)
    assert found["head"] == (3, 4 * directions)
    for layer in range(layers):
        for suffix in ("", "_reverse")[:directions]:
            below = 2 if layer == 0 else 4 * directions
            assert found[f"cells.weight_ih_l{layer}{suffix}"] == (GATES[kind] * 4, below)
            assert found[f"cells.weight_hh_l{layer}{suffix}"] == (GATES[kind] * 4, 4)


def test_projected_states():
    cells = nn.LSTM(6, 8, 2, proj_size=6, bidirectional=True, batch_first=True)
    after = prune(Wire(lambda m, x: m.head(m.cells(x)[0]), cells=cells, head=nn.Linear(12, 3)), SEQUENCE)

    found = shapes(after)
    assert found["cells.weight_hr_l0"] == found["cells.weight_hr_l1_reverse"] == (3, 4)
    assert (found["cells.weight_ih_l0"], found["cells.weight_ih_l1"]) == ((16, 6), (16, 6))
    assert found["cells.weight_hh_l0"] == (16, 3)
    assert found["head"] == (3, 6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_last_state_feeds_a_layer(kind):
    def forward(m, x):
        state = m.cells(x)[1]
        return m.head(state[0][-1] if kind is nn.LSTM else state[-1])

    after = prune(Wire(forward, cells=kind(6, 8, batch_first=True), head=nn.Linear(8, 3)), SEQUENCE)

    assert shapes(after)["head"] == (3, 4)


def test_one_network_starts_another():
    def forward(m, x):
        encoded, state = m.encoder(x)
        return m.head(m.decoder(encoded, state)[0])

    model = Wire(
        forward, encoder=nn.GRU(6, 8, batch_first=True), decoder=nn.GRU(8, 8, batch_first=True), head=nn.Linear(8, 3)
    )
    after = prune(model, SEQUENCE)

    assert shapes(after) == {
        "encoder.weight_ih_l0": (12, 6), "encoder.weight_hh_l0": (12, 4),
        "decoder.weight_ih_l0": (12, 4), "decoder.weight_hh_l0": (12, 4), "head": (3, 4),
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells_in_a_loop(kind, gates):
    def forward(m, x):
        state = x.new_zeros(x.shape[0], 8)
        state = (state, state) if kind is nn.LSTMCell else state
        for step in x.unbind(1):
            state = m.cell(step, state)
        return m.head(state[0] if kind is nn.LSTMCell else state)

    after = prune(Wire(forward, cell=kind(6, 8), head=nn.Linear(8, 3)), SEQUENCE)

    assert shapes(after) == {"cell.weight_ih": (4 * gates, 6), "cell.weight_hh": (4 * gates, 4), "head": (3, 4)}


def test_convolutions_before_and_attention_after():
    def forward(m, x):
        x = m.cells(m.conv(x.transpose(1, 2)).transpose(1, 2).relu())[0]
        return m.head((m.score(x).softmax(1) * x).sum(1))

    model = Wire(
        forward, conv=nn.Conv1d(6, 8, 3, padding=1), cells=nn.LSTM(8, 8, 2, batch_first=True), score=nn.Linear(8, 1),
        head=nn.Linear(8, 3),
    )  # fmt: skip
    after = prune(model, SEQUENCE)

    found = shapes(after)
    assert (found["conv"], found["score"], found["head"]) == ((4, 6, 3), (1, 4), (3, 4))
    assert found["cells.weight_ih_l1"] == (16, 4)
