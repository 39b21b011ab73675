"""Quality before and after each stage of a candidate's making: where the points were lost, and where they came back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autocompress.export import predictor
from autocompress.pipeline import FOUR_BITS, Work, load_weights, reshape, shape, train_op
from autocompress.tasks import Predict, several
from autocompress.types import Candidate, Receipt, Stage


def answers(module: nn.Module) -> Predict:
    """A torch module as a function of numpy arrays, in evaluation mode; its modes are as before afterwards."""

    def predict(inputs: Any) -> Any:
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            with torch.no_grad():
                found = several(module(*(torch.from_numpy(one) for one in several(inputs))))
        finally:
            for part, mode in modes.items():
                part.training = mode
        outputs = tuple(one.float().numpy() for one in found)
        return outputs[0] if len(outputs) == 1 else outputs

    return predict


def stages(
    work: Work, candidate: Candidate, receipts: tuple[Receipt, ...], weights: bytes, model: bytes, split: str
) -> tuple[Stage, ...]:
    """The stages of a finished candidate, made again from the parent: as inherited, after each structure op, with
    batch-norm statistics estimated anew, trained (`weights`, safetensors), and as the file that ships (`model`).
    """
    found: list[Stage] = []

    def look(name: str, module: nn.Module) -> None:
        quality = work.task.quality(answers(module), split)
        if name != "batch norm" or quality != found[-1].quality:  # nothing to estimate: not a stage
            found.append(Stage(name=name, quality=quality))

    shape(work, candidate, look)
    module = load_weights(reshape(work.builder, work.ops, candidate.arch, receipts), weights)
    for receipt in receipts:
        if receipt.op == FOUR_BITS:  # the network was trained to be rounded so, and is little without
            module = train_op(work, receipt).enact(module, receipt)
    look("trained", module)
    found.append(Stage(name="shipped", quality=work.task.quality(predictor(model), split)))
    return tuple(found)
