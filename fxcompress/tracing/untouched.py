"""The caller's model is never changed: mode, attributes, values and global switches are put back whatever happens."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set, deque})
_STATISTICS = frozenset({"running_mean", "running_var"})


class Loan:
    """A model in eval mode, with what is needed to give it back as it was."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._paths = {path: m for path, m in modules.items() if not isinstance(m, torch.jit.ScriptModule)}
        scripted = [module for path, module in modules.items() if path not in self._paths]
        self._modes = [(module, module.training) for module in scripted]  # their attributes live outside Python
        self._attributes = {path: dict(module.__dict__) for path, module in self._paths.items()}
        self._contents: dict[int, tuple[Any, Any]] = {}
        for attributes in self._attributes.values():
            self._remember(attributes.values())

    def _remember(self, values: Any) -> None:
        for value in values:
            if type(value) in _CONTAINERS and id(value) not in self._contents:
                self._contents[id(value)] = (value, value.copy())
                self._remember(value.values() if isinstance(value, dict) else value)

    def changed(self) -> list[str]:
        """Names of the attributes, parameters and buffers that are not what they were."""
        found: list[str] = []
        for path, module in self._paths.items():
            before = self._attributes[path]
            names = [name for name, value in module.__dict__.items() if self._moved(value, before.get(name, found))]
            for table in (module._parameters, module._buffers):
                old = self._contents[id(table)][1]
                names += [name for name, value in table.items() if value is not old.get(name, found)]
            found += [f"{path}.{name}".lstrip(".") for name in names if not name.startswith("_") and name != "training"]
        return found

    def _moved(self, value: Any, before: Any) -> bool:
        return value is not before or _differs(*self._contents.get(id(value), (None, None)))

    def forget_cached(self) -> None:
        """Drops tensors that a forward put where there was nothing, so that the next computes them again.

        A cached tensor would enter the graph as a constant. What a forward replaced (a counter, a buffer) stays: the
        model depends on it, and verification shall see that.
        """
        for path, module in self._paths.items():
            _drop_new_tensors(module.__dict__, self._attributes[path])
        for container, content in self._contents.values():
            if isinstance(container, dict):
                _drop_new_tensors(container, content)

    def give_back(self) -> None:
        """Puts every attribute, container and mode back."""
        for path, module in self._paths.items():
            module.__dict__.clear()
            module.__dict__.update(self._attributes[path])
        for container, content in self._contents.values():
            if _differs(container, content):
                container.clear()
                (container.update if isinstance(container, (dict, set)) else container.extend)(content)
        for module, mode in self._modes:
            module.training = mode


def _drop_new_tensors(table: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    for name in [name for name, value in table.items() if isinstance(value, torch.Tensor) and before.get(name) is None]:
        if name in before:
            table[name] = None
        else:
            del table[name]


@contextmanager
def borrowed(model: nn.Module) -> Iterator[Loan]:
    """Lends a model in eval mode; restores every module's attributes and mode, also on error or Ctrl-C.

    A forward may leave traces on its modules (cached shapes, tensors of a tracer); each module's attribute table is put
    back as it was. The fused attention fast path is off meanwhile: it hides the operations of ``MultiheadAttention``.
    """
    loan = Loan(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        yield loan
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        loan.give_back()


def _differs(left: Any, right: Any) -> bool:
    """Whether two containers of one type hold other objects (compared by identity: tensors have no truth value)."""
    if left is None or isinstance(left, set):
        return bool(left != right)
    if len(left) != len(right):
        return True
    if isinstance(left, Mapping):
        return any(name not in right or right[name] is not value for name, value in left.items())
    return any(a is not b for a, b in zip(left, right, strict=True))


class StateKeeper(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, whatever an operation is about to write into a model's state is saved first."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names: dict[int, str] = {}
        self._saved: dict[str, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for name, tensor in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
                if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                    self._names.setdefault(tensor.untyped_storage()._cdata, f"{path}.{name}".lstrip("."))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments if isinstance(func, OpOverload) else ()  # torch.cond and the like have none
        for index, argument in enumerate(arguments):
            # the schemas of batch norms do not say that they write the running statistics
            if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in _STATISTICS:
                self._save(args[index] if index < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _save(self, target: Any) -> None:
        if not isinstance(target, torch.Tensor) or target.layout is not torch.strided:
            return
        storage = target.untyped_storage()
        name = self._names.pop(storage._cdata, None)
        if name is not None:
            self._saved[name] = (storage, storage.clone())  # type: ignore[no-untyped-call]

    def restore(self) -> list[str]:
        """Writes back what was saved and has changed; gives the names of that state."""
        changed = [name for name, (now, before) in self._saved.items() if not torch.equal(_bytes(now), _bytes(before))]
        for name in changed:
            storage, value = self._saved[name]
            storage.copy_(value)
        return changed


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@contextmanager
def kept_state(model: nn.Module) -> Iterator[list[str]]:
    """Keeps the values of parameters and buffers over a real forward, also on error or Ctrl-C.

    Yields a list that holds, at the end, the names of the state that the forward has changed.
    """
    keeper = StateKeeper(model)
    written: list[str] = []
    try:
        with keeper:
            yield written
    finally:
        written += keeper.restore()


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Runs with a fixed random state and puts the caller's back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
