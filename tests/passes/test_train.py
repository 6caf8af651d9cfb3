"""train: fine-tuning, also of what is quantized."""

import copy

import pytest
import torch
from fxcompress.passes.train import Train
from models import inputs, settled
from torch import nn
from torch.nn.functional import mse_loss

from fxcompress import InputError, PassManager, Task, compress, load, trace
from fxcompress.manager.instruments import Verify

X = inputs(32, 6)
Y = inputs(32, 3, seed=2)


def model():
    return settled(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))


def loss(outputs, batch):
    return mse_loss(outputs, batch[1])


def task(batches=2, **options):
    return Task(**{"training": [*zip(X.chunk(batches), Y.chunk(batches), strict=True)], "loss": loss, **options})


def trained(given, of=None, **options):
    done = PassManager([Train(**options)]).run(trace(given, X[:4]), of or task())
    return done.program, done.records[0].result


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"rate": 0.01}, lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0)),
        ({"optimizer": "sgd", "weight_decay": 0.1, "rate": 0.05},
         lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)),
    ],
)  # fmt: skip
def test_learns_what_a_plain_loop_does(options, make):
    reference = model().train()
    optimizer = make(reference.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    losses = []
    for _ in range(3):
        for batch in task().training:
            value = loss(reference(batch[0]), batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        schedule.step()

    after, result = trained(model(), epochs=3, **options)

    learned = after.graph_module.state_dict()
    assert learned.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(learned[name], tensor, rtol=1e-9, atol=1e-12)
    assert result.statistics == {
        "steps": 6, "first": round(sum(losses[:2]) / 2, 4), "last": round(sum(losses[4:]) / 2, 4)
    }  # fmt: skip


def test_the_model_and_the_program_before_stay_as_they_are():
    given = model()
    given.train()
    state = copy.deepcopy(given.state_dict())
    before = trace(given, X[:4])

    PassManager("train{epochs=2}").run(before, task())

    assert given.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.state_dict().items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.graph_module.state_dict().items())


def test_is_in_eval_mode_afterwards():
    after, _ = trained(model())

    assert not any(module.training for module in after.graph_module.modules())


def test_frozen_parameters_stay():
    given = model()
    given[0].requires_grad_(False)

    after, _ = trained(given)

    assert torch.equal(after.graph_module.get_parameter("0.weight"), given[0].weight)
    assert not torch.equal(after.graph_module.get_parameter("3.weight"), given[3].weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.down(self.up(x).relu())[:, :3]


def test_shared_weights_stay_shared():
    after, _ = trained(settled(Tied()))

    root = after.graph_module
    assert root.get_parameter("up.weight") is root.get_parameter("down.weight")


def test_quantized_weights_learn_through_rounding():
    """A weight on which a pair of Q/DQ nodes acts gets the gradient of what it was rounded to."""
    given = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    images, targets = X.float(), Y.float()
    done = PassManager("insert-qdq{vnni=true}").run(trace(given, images[:4]), Task(calibration=[images]))
    batch = (images, targets)

    after = PassManager("train{optimizer=sgd rate=0.1}").run(done.program, task(training=[batch])).program

    program = done.program
    rounded = {  # the weights as the layers read them
        str(node.args[0].args[0].target): node for node in program.nodes if "dequantize_per_channel" in str(node.target)
    }
    assert set(rounded) == {"0.weight", "2.weight"}
    plain = copy.deepcopy(given)
    seen = torch.fx.Interpreter(program.graph_module, garbage_collect_values=False)
    seen.run(images)
    for name, node in rounded.items():
        plain.get_parameter(name).data.copy_(seen.env[node])
    inner = [node for node in program.nodes if "dequantize_per_tensor" in str(node.target)]
    first, second = (seen.env[node].clone().requires_grad_() for node in inner)
    hidden = plain[0](first).relu()
    loss(plain[2](hidden + (second - hidden).detach()), batch).backward()
    for name in rounded:
        step = given.get_parameter(name) - after.graph_module.get_parameter(name)
        torch.testing.assert_close(step, 0.19 * plain.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_pruned_trained_and_quantized_in_one_pipeline(tmp_path):
    given = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    data = [(X.float(), Y.float())]

    out = compress(
        given, X[:4].float(), "select-channels,remove-channels,train{epochs=4},fold-batchnorm,insert-qdq,train",
        task=Task(training=data, loss=loss, calibration=[X.float()]),
    )  # fmt: skip

    out.save(tmp_path / "model.pt2")
    again = load(tmp_path / "model.pt2")
    assert torch.equal(again(X.float()), out.model(X.float()))
    assert again.graph_module.get_parameter("0.weight").shape == (8, 6)


def test_refuses_a_model_without_trainable_parameters():
    after, result = trained(model().requires_grad_(False))

    assert not result.changed
    assert [refusal.code for refusal in result.refusals] == ["nothing-trainable"]
    assert result.statistics == {"steps": 0}
    assert torch.equal(after.graph_module.get_parameter("0.weight"), model()[0].weight)


@pytest.mark.parametrize("missing", ["training", "loss"])
def test_needs_batches_and_a_loss(missing):
    with pytest.raises(InputError, match="train needs batches to train on and a loss"):
        trained(model(), task(**{missing: None}))


def test_needs_weights():
    with pytest.raises(InputError, match="on the meta device"):
        PassManager("train", [Verify()]).run(trace(model().to("meta"), X[:4].to("meta")), task())


def test_names_the_step_at_which_the_loss_explodes():
    with pytest.raises(
        InputError, match=r"the loss is (nan|inf) at step \d of train, epoch \d of 9; give a smaller rate"
    ):
        trained(model(), epochs=9, optimizer="sgd", rate=1e30)


def test_a_batch_of_the_wrong_structure_is_named():
    with pytest.raises(InputError):
        trained(model(), task(training=[((X, X), Y)]))


@pytest.mark.parametrize(("option", "value"), [("epochs", 0), ("rate", 0.0), ("weight_decay", -1.0)])
def test_options_out_of_range(option, value):
    with pytest.raises(InputError, match=option.replace("_", "-")):
        Train(**{option: value})


def test_the_same_seed_gives_the_same_weights():
    one, _ = trained(settled(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))), seed=3)
    two, _ = trained(settled(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))), seed=3)
    other, _ = trained(settled(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))), seed=4)

    weight = one.graph_module.get_parameter("0.weight")
    assert torch.equal(weight, two.graph_module.get_parameter("0.weight"))
    assert not torch.equal(weight, other.graph_module.get_parameter("0.weight"))
