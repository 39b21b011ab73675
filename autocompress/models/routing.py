"""Blocks that look at their input and decide what is computed: exits, gates around a block, a choice of two branches.

Early exits after BranchyNet (Teerapittayanon et al. 2016) and SDN (Kaya et al. 2019, confidence by the largest
softmax), gated residual blocks after SkipNet (Wang et al. 2018) and ConvNet-AIG (Veit and Belongie 2018,
straight-through decisions and a target rate).

What is added to a network hangs on it by hooks, so that every part keeps its name: a block with an exit has a child
`exit`, one with a gate a child `gate`. In training every path is computed: exits answer beside the network and a gate
mixes with straight-through gradients. In evaluation every row of a batch takes the way that it decides, by
`torch.where`, which is what a file with branches computes for one sample (`branches`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Confidence = Literal["softmax", "entropy", "learned"]
CONFIDENCES: tuple[Confidence, ...] = ("softmax", "entropy", "learned")
NEVER = 2.0
"""A threshold that no confidence reaches."""
LEAN = 2.0
"""Logit with which a gate begins: it runs the block."""


def pooled(x: Tensor) -> Tensor:
    """(n, c) of (n, c, h, w), (n, tokens, c) or (n, c)."""
    if x.dim() == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.dim() == 3 else x


class Exit(nn.Module):
    """A head behind a block, and how sure it is of its answer.

    `features` channels in, `outputs` out; `hidden` > 0 puts a layer of that width between, and with `convolved` two
    convolutions of that width before the pooling, each over every second position. `order` counts the exits of a
    network from its input. Without `features` what comes in is an answer already.
    """

    threshold: Tensor

    def __init__(
        self, features: int, outputs: int, hidden: int, confidence: Confidence, order: int, *, convolved: bool = False
    ) -> None:
        super().__init__()
        self.confidence, self.order = confidence, order
        self.look: nn.Module | None = None
        if convolved:
            self.look = nn.Sequential(*_halved(features, hidden), *_halved(hidden, hidden))
            features, hidden = hidden, 0
        self.head: nn.Module = nn.Linear(features, outputs) if features else nn.Identity()
        if hidden:
            self.head = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        self.sure = nn.Linear(features or outputs, 1) if confidence == "learned" else None
        # values of their own, or an exporter makes one constant of all
        self.register_buffer("threshold", torch.tensor([NEVER + 0.01 * order]))
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> None:
        """Answer (n, outputs) and confidence (n, 1), kept in `seen` until they are taken."""
        features = pooled(x if self.look is None else self.look(x))
        answer = self.head(features)
        self.seen = answer, self.confidence_of(features, answer)

    def confidence_of(self, features: Tensor, answer: Tensor) -> Tensor:
        """(n, 1) from 0 to 1."""
        if self.sure is not None:
            return torch.sigmoid(self.sure(features))
        p = answer.softmax(1)
        if self.confidence == "softmax":
            return p.amax(1, keepdim=True)
        return 1.0 + (p * torch.log(p + 1e-9)).sum(1, keepdim=True) / math.log(answer.shape[1])

    def take(self) -> tuple[Tensor, Tensor]:
        """What was seen, once."""
        assert self.seen is not None, "the block behind which this exit lies was not run"
        seen, self.seen = self.seen, None
        return seen

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}  # a copy has seen nothing


class Gate(nn.Module):
    """Whether a block runs: else its input passes, or a thin branch of it with a `bottleneck` of that many channels."""

    threshold: Tensor

    def __init__(self, features: int, bottleneck: int, *, tokens: bool, order: int, key: int | str = 0) -> None:
        super().__init__()
        self.key = key
        self.decide = nn.Linear(features, 1)
        self.thin: nn.Module | None = None
        if bottleneck:
            make = nn.Linear if tokens else _pointwise
            self.thin = nn.Sequential(make(features, bottleneck), nn.ReLU(), make(bottleneck, features))
        self.register_buffer("threshold", torch.tensor([0.5 + 1e-4 * order]))
        self.chance: Tensor | None = None

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Of a block's input and output what goes on."""
        chance = torch.sigmoid(self.decide(pooled(x)))
        other = x if self.thin is None else x + self.thin(x)
        wide = (-1, *(1 for _ in output.shape[1:]))
        if not self.training:
            return torch.where((chance >= self.threshold).reshape(wide), output, other)
        self.chance = chance
        hard = (chance >= 0.5).to(chance)
        mixed = (hard + chance - chance.detach()).reshape(wide)
        return other + mixed * (output - other)

    def take(self) -> Tensor:
        """The chances of the last pass, once."""
        assert self.chance is not None, "the gated block was not run"
        chance, self.chance = self.chance, None
        return chance

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "chance": None}


def _halved(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


# --- hanging them on a network --------------------------------------------------------------------------------------


class Little(nn.Module):
    """A smaller network that answers before the one it hangs on, as `little`."""

    def __init__(self, net: nn.Module, part: Exit) -> None:
        super().__init__()
        self.net, self.exit = net, part

    def forward(self, *args: Any, **named: Any) -> None:
        """Its answer and confidence, kept in `exit.seen`."""
        self.exit(self.net(*args, **named))


class Answers(nn.Module):
    """The network's own answer of the last training pass, for the exits to learn from; hangs on it as `exits`."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}


def hang_exit(module: nn.Module, site: str, part: Exit) -> None:
    """Give a block an exit."""
    block = module.get_submodule(site)
    block.exit = part.train(block.training)
    block.register_forward_hook(_look)
    _answers(module)


def hang_little(module: nn.Module, net: nn.Module, part: Exit) -> None:
    """Give a network a smaller one that answers first."""
    module.little = Little(net, part).train(module.training)
    module.register_forward_pre_hook(_ask, with_kwargs=True)
    _answers(module)


def _answers(module: nn.Module) -> None:
    """Let the network pick among its exits' answers and its own."""
    if not hasattr(module, "exits"):
        module.exits = Answers()
        module.register_forward_hook(_answer)


def hang_gate(module: nn.Module, site: str, part: Gate) -> None:
    """Give a block a gate."""
    block = module.get_submodule(site)
    block.gate = part.train(block.training)
    block.register_forward_hook(_pass, with_kwargs=True)


def exits(module: nn.Module) -> list[tuple[str, Exit]]:
    """Site and exit, from input to output."""
    found = [(name.rpartition(".")[0], part) for name, part in module.named_modules() if isinstance(part, Exit)]
    return sorted(found, key=lambda one: one[1].order)


def gates(module: nn.Module) -> list[tuple[str, Gate]]:
    """Site and gate."""
    return [(name.rpartition(".")[0], part) for name, part in module.named_modules() if isinstance(part, Gate)]


def thresholds(module: nn.Module) -> dict[str, str]:
    """Site -> name of the buffer that its decision is compared with; empty for a network that decides nothing."""
    return {
        **{f"{site}.exit": f"{site}.exit.threshold" for site, _ in exits(module)},
        **{f"{site}.gate": f"{site}.gate.threshold" for site, _ in gates(module)},
    }


def is_hung(name: str) -> bool:
    """Whether a parameter of this name was hung on the network by a route."""
    return any(atom in ("exit", "gate", "little") for atom in name.split(".")[:-1])


@contextmanager
def forced(module: nn.Module, value: float) -> Iterator[None]:
    """Within, every decision has this threshold: 0 leaves by the first exit and runs what is gated."""
    parts = [part for _, part in (*exits(module), *gates(module))]
    before = [part.threshold.clone() for part in parts]
    try:
        for part in parts:
            part.threshold.fill_(value)
        yield
    finally:
        for part, kept in zip(parts, before, strict=True):
            part.threshold.copy_(kept)


def _ask(module: nn.Module, args: Any, named: Any) -> None:
    part: Any = module.little
    part(*args, **named)


def _look(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    part: Any = block.exit
    part(output if isinstance(output, Tensor) else output[0])


def _pass(block: nn.Module, args: Any, named: Any, output: Any) -> Any:
    part: Any = block.gate
    x = args[part.key] if isinstance(part.key, int) else named[part.key]
    if isinstance(output, Tensor):
        return part(x, output)
    return (part(x, output[0]), *output[1:])


def _answer(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
    if module.training:
        kept: Any = module.exits
        kept.last = output
        return None
    found = output
    for _, part in reversed(exits(module)):
        answer, sure = part.take()
        found = torch.where(sure >= part.threshold, answer, found)
    return found


def lesson(module: nn.Module) -> Tensor | None:
    """The loss of the exits in the last training pass: how far they are from the network's own answer, each.

    A confidence that is learned is told whether the exit says what the network says (cross entropy). None without
    exits.
    """
    found = exits(module)
    if not found:
        return None
    kept: Any = module.exits
    final = kept.last.detach().float()
    kept.last = None
    total = final.new_zeros(())
    for _, part in found:
        answer, sure = (one.float() for one in part.take())
        total = total + functional.kl_div(
            answer.log_softmax(1), final.log_softmax(1), log_target=True, reduction="batchmean"
        )
        if part.sure is not None:
            same = (answer.argmax(1, keepdim=True) == final.argmax(1, keepdim=True)).to(sure)
            total = total + functional.binary_cross_entropy(sure.clamp(1e-6, 1 - 1e-6), same)
    return total
