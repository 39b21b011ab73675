"""Ops change a model by a policy (protocol): decide reads weights and data, enact only obeys the receipt.

Structure ops (`subject` is an nn.Module, changed in place and returned) run before training; numeric ops
(`subject` is an `export.Exported`, a new one is returned) run on the exported ONNX parts. An op of phase `train` is
decided and enacted before training, where it may install an instrument (fake quantization, a mask), and settled after
it (`TrainOp`); one without `settle` changes nothing in the network, the training loop reads its rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from autocompress.types import Profile, Receipt, Rule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autocompress.tasks import Task

Phase = Literal["structure", "train", "numeric"]


@runtime_checkable
class Op(Protocol):
    """One technique. `params` maps each setting to the value that leaves the network alone.

    One may have `check(rule)`, which raises UserError for settings out of range: a space is then refused when it is
    read, before anything runs.
    """

    name: str
    phase: Phase
    params: dict[str, Any]

    def decide(
        self,
        subject: Any,
        rules: Sequence[Rule],
        task: Task,
        profile: Profile,
        tensors: dict[str, Any] | None = None,
    ) -> Receipt:
        """Choose channels, ranks, ranges ... for `rules` (all rules of this op). Leaves `subject` unchanged.

        What was fitted (factors, codebooks) is written into `tensors` by name; the receipt itself is JSON.

        One entry per rule that asks for something, in order of application; a rule that cannot be followed is an
        entry `skipped` with its reason. Raises TrialFailure when the whole op cannot be applied.
        """
        ...

    def enact(self, subject: Any, receipt: Receipt, tensors: Mapping[str, Any] | None = None) -> Any:
        """Obey the receipt: needs no data, runs no decomposition, draws no random number.

        Without `tensors` every shape is right and fitted values are left as initialised (trained weights follow).

        Raises UserError when the receipt speaks of another network (site and difference named).
        """
        ...


@runtime_checkable
class TrainOp(Op, Protocol):
    """An op whose facts are known only after training. `module` carries what `enact` installed.

    One that depends on a policy's other rules may have `narrow(module, rules, policy)`, which gives the rules to decide
    and entries of those that are skipped (so may a structure op). One that ranks by gradients may have
    `follow(module, receipt)`, called after every backward pass.

    A structure op may be one too: entries of status `open` are what training settles. Settled they are `done`, the
    module has the shape that enacting them gives, and a receipt of them alone makes that shape at once.
    """

    def advance(self, module: nn.Module, receipt: Receipt, share: float) -> None:
        """Called before every step with the share of the full training that is done, and once at its end with 1.

        What it sets must follow from the share and from the module's state: a training may go on elsewhere.
        """
        ...

    def penalty(self, module: nn.Module, receipt: Receipt) -> Tensor | None:
        """Added to the loss of every step; None for nothing."""
        ...

    def settle(self, module: nn.Module, receipt: Receipt) -> Receipt:
        """Remove the instrument in place and say what was learned; `module` has the names it had before `enact`.

        It is called in mid-training too, on a copy (`copy.deepcopy`) of the module that trains on.

        An entry's `facts["ranges"]`, {"input": [low, high], "output": [low, high]}, reach the file's quantization.
        """
        ...
