"""Artifacts: what `save` writes, `load` gives back."""

import json
import subprocess
import sys

import pytest
import torch
from answering import Answering
from models import BERT_INPUTS, residual_net, small_bert, small_vit
from torch import nn
from torch.utils import _pytree as pytree

import fxcompress as fxc
from fxcompress.artifact import archive, read_manifest
from fxcompress.verification.verifier import verify


class Tied(nn.Module):
    """Shared weights, frozen and non-persistent state, dropout, cumulative batch norm, dicts in and out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.norm = nn.BatchNorm1d(8, momentum=None)
        self.drop = nn.Dropout(0.25)
        self.mix = nn.Linear(8, 8)
        self.again = self.mix
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor([2.0, float("inf")])[:1].clone(), requires_grad=False)
        self.register_buffer("shift", torch.linspace(0, 1, 8), persistent=False)
        self.mix.bias.requires_grad_(False)

    def forward(self, batch):
        x = self.embed(batch["tokens"]) * self.scale + self.shift
        x = self.drop(self.norm(x.transpose(1, 2)).transpose(1, 2))
        x = self.again(torch.relu(self.mix(x)))
        return {"logits": self.head(x), "best": (x.argmax(-1), [x.mean()])}


TOKENS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


MODELS = {
    "residual": (residual_net, torch.randn(2, 3, 8, 8), None),
    "vit": (small_vit, torch.randn(2, 3, 32, 32), None),
    "bert": (small_bert, *BERT_INPUTS),
    "tied, dicts": (Tied, ({"tokens": TOKENS},), {"batch": (1,)}),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A traced Program, its file, and the Program loaded from it."""
    torch.manual_seed(0)
    make, inputs, dynamic = MODELS[request.param]
    program = fxc.trace(make(), inputs, dynamic=dynamic)
    path = tmp_path_factory.mktemp("artifact") / "m.pt2"
    fxc.save(program, path)
    return program, path, fxc.load(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The file of a small model, to damage copies of."""
    program = fxc.trace(Answering(), torch.randn(2, 4))
    path = tmp_path_factory.mktemp("small") / "m.pt2"
    fxc.save(program, path, pipeline="fold-batchnorm", report={"layers": [1, 2]})
    return program, path


def outputs(program, rows):
    args, kwargs = program.interface.resized(rows)
    with torch.no_grad():
        return pytree.tree_flatten(program(*args, **kwargs))


def test_the_graph_comes_back_node_by_node(saved):
    program, _, loaded = saved
    assert loaded.text() == program.text()
    assert [node.meta.get("nn_module_stack") for node in loaded.nodes] == [
        dict(node.meta["nn_module_stack"]) if node.meta.get("nn_module_stack") else None for node in program.nodes
    ]
    assert loaded.diagnostics == program.diagnostics
    assert loaded.name == program.name
    verify(loaded)


def test_outputs_are_bit_equal_at_two_batch_sizes(saved):
    program, _, loaded = saved
    for rows in (2, 3):
        (expected, expected_spec), (found, spec) = outputs(program, rows), outputs(loaded, rows)
        assert spec == expected_spec
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_state_comes_back_with_names_order_sharing_flags_and_values(saved):
    program, _, loaded = saved
    before, after = program.graph_module, loaded.graph_module
    for listing in (nn.Module.named_parameters, nn.Module.named_buffers):
        was, now = (dict(listing(module, remove_duplicate=False)) for module in (before, after))
        assert list(was) == list(now)
        assert [[a is b for b in was.values()] for a in was.values()] == [
            [a is b for b in now.values()] for a in now.values()
        ]
        for name, tensor in was.items():
            assert now[name].requires_grad == tensor.requires_grad
            assert type(now[name]) is type(tensor)
            assert now[name].dtype == tensor.dtype
            assert torch.equal(now[name], tensor)
    assert list(before.state_dict()) == list(after.state_dict())


def test_what_is_emitted_trains_as_the_original_does(saved):
    program, _, loaded = saved
    results = []
    for module in (program.emit().train(), loaded.emit().train()):
        torch.manual_seed(3)
        leaves = pytree.tree_leaves(module(*program.interface.args, **program.interface.kwargs))
        sum(leaf.square().mean() for leaf in leaves if leaf.requires_grad).backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append((gradients, dict(module.named_buffers())))
    (gradients, buffers), (again, buffers_again) = results
    assert gradients.keys() == again.keys()
    assert gradients
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)
    assert all(torch.equal(buffers[name], buffers_again[name]) for name in buffers)


def test_training_behaviour_survives(tmp_path):
    model = Tied()
    model.norm.num_batches_tracked += 41
    fxc.save(fxc.trace(model, ({"tokens": TOKENS},)), tmp_path / "m.pt2")
    module = fxc.load(tmp_path / "m.pt2").emit()
    assert module.norm.momentum is None
    assert module.norm.num_batches_tracked == 41
    assert module.drop.p == 0.25
    assert module.head.weight is module.embed.weight
    assert module.embed.padding_idx == 0
    assert "shift" not in module.state_dict()
    assert not module.scale.requires_grad
    mean = module.norm.running_mean.clone()
    module.train()({"tokens": TOKENS})
    assert module.norm.num_batches_tracked == 42
    assert not torch.equal(module.norm.running_mean, mean)


def test_dynamic_dims_stay_dynamic(tmp_path):
    make, inputs, dynamic = MODELS["tied, dicts"]
    fxc.save(fxc.trace(make(), inputs, dynamic=dynamic), tmp_path / "m.pt2")
    loaded = fxc.load(tmp_path / "m.pt2")
    assert loaded.interface.dynamic == {0: (0, 1)}
    assert loaded({"tokens": torch.ones(5, 9, dtype=torch.long)})["logits"].shape == (5, 9, 11)
    fxc.save(loaded, tmp_path / "again.pt2")
    assert fxc.load(tmp_path / "again.pt2").text() == loaded.text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    x = torch.randn(2, 4, dtype=dtype)
    program = fxc.trace(Answering().to(dtype), x)
    fxc.save(program, tmp_path / "m.pt2")
    loaded = fxc.load(tmp_path / "m.pt2")
    assert loaded.graph_module.layer.weight.dtype == dtype
    assert torch.equal(loaded(x).value, program(x).value)
    assert torch.equal(loaded.interface.args[0], x)


def test_strided_and_overlapping_weights(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16))
    model[0] = model[0].to(memory_format=torch.channels_last)
    storage = torch.randn(40, 16)
    model[2].weight, model[3].weight = nn.Parameter(storage[:16]), nn.Parameter(storage[8:24])
    program = fxc.trace(model, torch.randn(2, 3, 4, 4))
    fxc.save(program, tmp_path / "m.pt2")
    loaded = fxc.load(tmp_path / "m.pt2").graph_module
    assert loaded.get_submodule("0").weight.stride() == model[0].weight.stride()
    assert torch.equal(loaded.get_submodule("3").weight, storage[8:24])


def test_the_manifest_carries_pipeline_and_report(small):
    manifest = read_manifest(small[1])
    assert manifest["pipeline"] == "fold-batchnorm"
    assert manifest["report"] == {"layers": [1, 2]}
    assert manifest["version"] == archive.FORMAT_VERSION
    assert manifest["torch"] == torch.__version__


def test_plain_torch_export_reads_the_file_too(saved):
    program, path, _ = saved
    module = torch.export.load(path).module()
    args, kwargs = program.interface.resized(3)
    found = pytree.tree_leaves(module(*args, **kwargs))
    for a, b in zip(outputs(program, 3)[0], found, strict=True):
        torch.testing.assert_close(a, b)


ELSEWHERE = """
import json, sys
import fxcompress as fxc
answering, bert = map(fxc.load, sys.argv[1:])
answer = answering.emit()(*answering.interface.args)
hidden = bert(**bert.interface.kwargs)
print(json.dumps([{k: v.tolist() for k, v in answer.items()}, type(answering(*answering.interface.args)).__name__,
                  type(hidden).__name__, hidden.last_hidden_state.tolist()]))
"""


def test_a_process_without_the_users_classes_gets_dicts_and_hugging_face_outputs(small, tmp_path):
    program, path = small
    make, inputs, _ = MODELS["bert"]
    hugging_face = fxc.trace(make(), inputs)
    fxc.save(hugging_face, tmp_path / "bert.pt2")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, path, tmp_path / "bert.pt2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, kind, output_class, hidden = json.loads(done.stdout)
    expected = program(*program.interface.args)
    assert answer == {"value": expected.value.tolist(), "doubled": expected.doubled.tolist()}
    assert kind == "dict"
    assert output_class == "BaseModelOutputWithPoolingAndCrossAttentions"
    reference = hugging_face(**hugging_face.interface.kwargs).last_hidden_state
    torch.testing.assert_close(torch.tensor(hidden), reference)


def test_saving_changes_nothing(tmp_path):
    program = fxc.trace(Tied(), ({"tokens": TOKENS},))
    text, tensors = program.text(), dict(program.graph_module.state_dict(keep_vars=True))
    fxc.save(program, tmp_path / "m.pt2")
    assert program.text() == text
    assert all(tensor is tensors[name] for name, tensor in program.graph_module.state_dict(keep_vars=True).items())
