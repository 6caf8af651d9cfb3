"""What coverage checks of capture: the emitted module against the original, in values, state, gradients and cost."""

from __future__ import annotations

import copy
import pickle
from typing import Any

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3


def check_trace(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    import fxcompress as fxc

    program = fxc.trace(subject.model, (subject.args, subject.kwargs))
    emitted = program.emit()
    return {
        "_program": program, "_emitted": emitted, "nodes": len(program.graph.nodes),
        "meta": any(parameter.is_meta for parameter in emitted.parameters()),
        "batch": program.interface.batch_size,
    }  # fmt: skip


def check_outputs(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The emitted module gives what the original gives, at the traced batch and at another."""
    import torch

    if row["meta"]:
        return {}
    if row["batch"] is None:
        raise AssertionError("the batch is not dynamic")
    errors = []
    for rows in (row["batch"], row["batch"] + 1):
        args, kwargs = row["_program"].interface.resized(rows)
        with torch.no_grad(), mha_fast_path_off():
            errors.append(difference(subject.model(*args, **kwargs), row["_emitted"](*args, **kwargs)))
    if max(errors) > OUTPUT_TOLERANCE:
        raise AssertionError(f"outputs differ by {max(errors):.2e}")
    return {"error": max(errors)}


def check_state(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Keys are the model's; what no output depends on is dropped and listed."""
    before, after = set(subject.model.state_dict()), set(row["_emitted"].state_dict())
    if after - before:
        raise AssertionError(f"state_dict has new keys: {sorted(after - before)[:3]}")
    dropped = sorted(before - after)
    listed = [d for d in row["_program"].diagnostics if d.code == "unused-state"]
    if dropped and not listed:
        raise AssertionError(f"dropped without a word: {dropped[:3]}")
    live = reached_parameters(subject) if dropped and not row["meta"] else set()
    if live & set(dropped):
        raise AssertionError(f"dropped, but outputs depend on it: {sorted(live & set(dropped))[:3]}")
    return {"dropped": len(dropped)}


def reached_parameters(subject: Any) -> set[str]:
    """Parameters that the original's outputs depend on, by its own autograd."""
    import torch

    model = copy.deepcopy(subject.model)
    with torch.enable_grad(), mha_fast_path_off():
        loss(model(*subject.args, **subject.kwargs)).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_training(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """One step with batch norm in train mode: same gradients, same moved statistics."""
    if row["meta"]:
        return {}
    original, emitted = copy.deepcopy(subject.model), row["_emitted"]
    with mha_fast_path_off():
        for model in (original, emitted):
            batch_norms_train(model)
            loss(model(*subject.args, **subject.kwargs)).backward()
    worst = 0.0
    theirs = dict(original.named_parameters(remove_duplicate=False))
    ours = dict(emitted.named_parameters(remove_duplicate=False))
    scale = max((p.grad.abs().max().item() for p in theirs.values() if p.grad is not None), default=0.0)
    for key, parameter in ours.items():
        a, b = theirs[key].grad, parameter.grad
        if (a is None) != (b is None):
            raise AssertionError(f"only one of the two has a gradient for {key}")
        if a is not None and b is not None:
            own = max(a.abs().max().item(), 1e-4 * scale)
            worst = max(worst, (a - b).abs().max().item() / own if own else 0.0)
    if worst > GRADIENT_TOLERANCE:
        raise AssertionError(f"gradients differ by {worst:.2e}")
    their_buffers = dict(original.named_buffers(remove_duplicate=False))
    for key, buffer in emitted.named_buffers(remove_duplicate=False):
        if key in their_buffers and difference(their_buffers[key], buffer) > GRADIENT_TOLERANCE:
            raise AssertionError(f"buffer {key} moves differently in training")
    emitted.eval()
    return {"gradient_error": worst}


def check_again(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The emitted module deep-copies, pickles and exports again."""
    import torch
    from torch.export import Dim, ShapesCollection
    from torch.utils._pytree import tree_leaves

    emitted = row["_emitted"].eval()
    if not row["meta"]:
        args, kwargs = subject.args, subject.kwargs
        expected = row["_program"](*args, **kwargs)
        again = copy.deepcopy(emitted) if row["nodes"] % 2 else pickle.loads(pickle.dumps(emitted))
        with torch.no_grad():
            again.load_state_dict(row["_program"].graph_module.state_dict())
            if difference(expected, again(*args, **kwargs)) > OUTPUT_TOLERANCE:
                raise AssertionError("a copy gives another output")
    shapes = ShapesCollection()
    interface = row["_program"].interface
    leaves = tree_leaves((interface.args, interface.kwargs))
    for index, dims in interface.dynamic.items():
        shapes[leaves[index]] = dict.fromkeys(dims, Dim.DYNAMIC)
    torch.export.export(
        emitted, interface.args, interface.kwargs,
        dynamic_shapes=shapes.dynamic_shapes(emitted, interface.args, interface.kwargs),
    )  # fmt: skip
    return {}


def check_cost(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """MACs agree with torch's own counter, which watches the original run on one row."""
    import torch
    from torch.utils._pytree import tree_map
    from torch.utils.flop_counter import FlopCounterMode

    import fxcompress as fxc

    cost = fxc.analyze(row["_program"], "cost")
    args, kwargs = row["_program"].interface.resized(1)
    model = copy.deepcopy(subject.model).requires_grad_(False)  # the counter hooks what has a gradient

    def error() -> tuple[float, float]:
        with torch.no_grad(), mha_fast_path_off(), FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
        reference = counter.get_total_flops() / 2
        return abs(cost.macs - reference) / max(reference, 1), reference

    off, reference = error()
    if off > 1e-3 and not row["meta"]:  # a fused CPU kernel (LSTM) hides its products; on meta it has none
        model.to("meta")
        args, kwargs = tree_map(
            lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
        )
        off, reference = error()
    if off > 1e-3:
        raise AssertionError(f"cost counts {cost.macs:.0f} MACs, torch counts {reference:.0f}")
    return {"params": cost.params, "macs": cost.macs}


def check_islands(subject: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Captured parts in place of the originals give the same detections, also for other images."""
    import torch

    import fxcompress as fxc

    partial = fxc.trace_islands(subject.model, (subject.args, subject.kwargs))
    emitted = partial.emit()
    others = ([torch.rand(3, 160, 192) for _ in range(3)],)
    errors = []
    for args in (subject.args, others):
        with torch.no_grad():
            errors.append(difference(subject.model(*args), emitted(*args)))
    if max(errors) > OUTPUT_TOLERANCE:
        raise AssertionError(f"outputs differ by {max(errors):.2e}")
    covered = sum(p.numel() for island in partial.islands.values() for p in island.graph_module.parameters())
    total = sum(p.numel() for p in subject.model.parameters())
    if set(emitted.state_dict()) != set(subject.model.state_dict()):
        raise AssertionError("state_dict keys differ")
    return {"error": max(errors), "islands": list(partial.islands), "captured_share": round(covered / total, 3)}


CHECKS = {
    "trace": check_trace, "state": check_state, "outputs": check_outputs, "cost": check_cost,
    "training": check_training, "again": check_again,
}  # fmt: skip
ISLAND_CHECKS = {"islands": check_islands}


def mha_fast_path_off() -> Any:
    """torch's fused attention is another algorithm; both sides run the plain one."""
    from contextlib import contextmanager

    import torch

    @contextmanager
    def off() -> Any:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return off()


def batch_norms_train(model: Any) -> None:
    from torch import nn

    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()


def loss(output: Any) -> Any:
    """The same number of any output structure: mean squares over all floating tensors."""
    import torch
    from torch.utils._pytree import tree_leaves

    parts = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return sum(part.clamp(-1e4, 1e4).square().mean() for part in parts if part.requires_grad)


def difference(expected: Any, found: Any) -> float:
    """Largest error relative to the largest value of each output."""
    from torch.utils._pytree import tree_leaves

    from fxcompress.verification.numerics import compare_outputs

    comparison = compare_outputs(tree_leaves(expected), tree_leaves(found))
    return 0.0 if comparison.exact else comparison.max_rel_error
