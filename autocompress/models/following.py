"""A network run once with its channels' labels followed, operator by operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from autocompress.models.labels import Call, Labels
from autocompress.models.masked import compute
from autocompress.models.sumrules import rule_of


@contextmanager
def following(labels: Labels) -> Iterator[None]:
    """What runs inside is followed; modules too, so that what has no parameters can still be named."""

    def enter(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001  a hook
        labels.enter(module)

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG001  a hook
        labels.leave(module)

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operators hide what they do
    try:
        with _Following(labels):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()


class _Following(TorchDispatchMode):
    """Every operator that a labelled tensor reaches runs by its rule."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiles this mode; torch need not import its compiler (1.5 s) to leave it alone."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        labels, call = self.labels, Call(func, args, kwargs or {})
        concerned = [tensor for tensor in call.tensors() if labels.layout(tensor) is not None]
        if not concerned:
            return call.run()
        output = call.run() if labels.gone is None else compute(labels, call)
        rule_of(call)(labels, call, output)
        return output
