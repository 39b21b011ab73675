"""An op of your own: `crop` keeps the centre of a convolution's kernel, so a 3 x 3 layer costs a ninth.

Name it `examples.my_op:Crop` in a policy, or pass an object. `decide` looks, `enact` only obeys the receipt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from autocompress.models.trace import leaves
from autocompress.ops import Phase
from autocompress.tasks import Task
from autocompress.types import Entry, Profile, Receipt, Rule, UserError


class Crop:
    """`margin` rows and columns are taken off every side; 0 leaves a layer alone."""

    name = "examples.my_op:Crop"
    phase: Phase = "structure"
    params: dict[str, Any] = {"margin": 0}

    def decide(
        self, subject: nn.Module, rules: Sequence[Rule], task: Task, profile: Profile, tensors: Any = None
    ) -> Receipt:
        """One entry per rule that asks for something; facts name the layers and the kernel that stays."""
        del task, profile, tensors  # the shapes say enough
        entries: list[Entry] = []
        for rule in (rule for rule in rules if rule.settings["margin"]):
            parts = {name: subject.get_submodule(name) for name in leaves(subject, rule.site)}
            kernels = {name: part.kernel_size[0] for name, part in parts.items() if isinstance(part, nn.Conv2d)}
            left = {name: kernel - 2 * int(rule.settings["margin"]) for name, kernel in kernels.items()}
            facts = {name: [kernels[name], kernel] for name, kernel in left.items() if kernel > 0}
            why = "" if facts else "no kernel there is large enough"
            entries.append(Entry(site=rule.site, status="done" if facts else "skipped", why=why, facts=facts))
        return Receipt(op=self.name, entries=tuple(entries))

    def enact(self, subject: nn.Module, receipt: Receipt, tensors: Mapping[str, Any] | None = None) -> nn.Module:
        """Crop in place; padding shrinks with the kernel, so shapes stay."""
        del tensors
        for entry in receipt.entries:
            for name, (was, kernel) in entry.facts.items():
                conv = dict(subject.named_modules()).get(name)
                if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (was, was):
                    raise UserError(f"crop at site {entry.site}: {name} is no {was} x {was} convolution here")
                cut = (was - kernel) // 2
                conv.weight = nn.Parameter(conv.weight.detach()[..., cut : was - cut, cut : was - cut].clone())
                conv.kernel_size, conv.padding = (kernel, kernel), tuple(int(p) - cut for p in conv.padding)
        return subject
