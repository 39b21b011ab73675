"""A builder of your own: write `model: {builder: examples.my_builder:Perceptron}` in a job, or pass an object.

Its knobs can stand under `arch:` of a search space, its sites under `policy:`.
"""

import torch
from torch import nn

from autocompress.models.trace import sites
from autocompress.types import Arch, Choice, Site, UserError


class Perceptron:
    """One hidden layer on 8 x 8 images; a narrower child keeps the hidden units that the head listens to most."""

    name = "examples.my_builder:Perceptron"
    knobs: dict[str, Choice] = {"hidden": 128}

    def build(self, arch: Arch) -> nn.Module:
        """(N, 1, 8, 8) to (N, 10)."""
        if strange := set(arch) - set(self.knobs):
            raise UserError(f"Perceptron has no knob {min(strange)!r}, only hidden")
        hidden = int({**self.knobs, **arch}["hidden"])
        return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def sites(self) -> tuple[Site, ...]:
        """Found by running the parent once."""
        return sites(self.build({}), torch.zeros(1, 1, 8, 8))

    @torch.no_grad()
    def inherit(self, child: nn.Module, parent: nn.Module, arch: Arch) -> None:  # noqa: ARG002  shapes say it all
        """Fill `child` in place."""
        body, head = (part for part in child.modules() if isinstance(part, nn.Linear))
        giver, listener = (part for part in parent.modules() if isinstance(part, nn.Linear))
        kept = listener.weight.abs().sum(0).topk(body.out_features).indices
        body.weight.copy_(giver.weight[kept])
        body.bias.copy_(giver.bias[kept])
        head.weight.copy_(listener.weight[:, kept])
        head.bias.copy_(listener.bias)
