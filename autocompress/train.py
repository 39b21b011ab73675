"""Training that can stop at any step and go on elsewhere as if it had never stopped.

The schedule is set beforehand, whatever fidelity is run to, and every random number comes from (seed, step):
`run_to(0.3)`, `state()`, `load()` in another process and `run_to(1.0)` give the same weights as one `run_to(1.0)` (to
the bit with equal versions, processor and thread count). The caller sets the number of threads.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from itertools import islice
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.distill import Distillation, Kind
from autocompress.lesson import Lesson
from autocompress.models.routing import is_hung
from autocompress.models.trace import examples, still
from autocompress.models.weights import fill
from autocompress.ops import TrainOp
from autocompress.tasks import Task, batch_size, several
from autocompress.tasks.recipe import Recipe, recipe, steps
from autocompress.taught import answers_of
from autocompress.types import Receipt, TrialFailure, UserError

MOMENTS = {
    "sgd": {"momentum_buffer": "momentum"},
    "adamw": {"exp_avg": "momentum", "exp_avg_sq": "square", "step": "count"},
}
"""What an optimizer keeps of each parameter, and its name in a state."""
SHARE = "share"
"""Of the rate, in a group of parameters."""
LESSON = "lesson:"
"""Before the names of what learns beside the network; no parameter of a network has a colon in its name."""
PROBE_BATCH, PROBE_TURNS = 16, 3
SETTLED = 50
"""Steps after which a batch norm's running statistics have forgotten what was before (at torch's momentum of 0.1)."""
Pause = Callable[[], object]
"""Called at every step boundary; returns when the trainer may go on."""


def at_once() -> None:
    """The pause of a trainer that nobody asks to wait."""


def draw(seed: int, *place: int) -> int:
    """A 32-bit seed that depends on nothing but its arguments."""
    return int.from_bytes(blake2b(repr((seed, *place)).encode(), digest_size=4).digest(), "little")


def bf16_pays() -> bool:
    """True where the processor multiplies bfloat16 itself; elsewhere autocast is slower than float32."""
    # no public question answers this before torch 2.12's get_capabilities
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def bf16_runs(module: nn.Module, task: Task) -> bool:
    """Whether every operation of this network has a kernel for bfloat16; special functions and strangers' may not."""
    try:
        with still(module), torch.autocast("cpu", dtype=torch.bfloat16):
            module(*examples(task.input, 2))
    except Exception:  # noqa: BLE001  if there is another reason, training in float32 says it
        return False
    return True


def bf16_faster(module: nn.Module, task: Task) -> bool:
    """Whether a training step of this network is faster in bfloat16 here: the quickest of a few, on a small batch.

    A processor that multiplies bfloat16 gains on wide layers; many narrow or depthwise ones lose more in conversion.
    """
    if not bf16_pays() or not bf16_runs(module, task):
        return False
    inputs, targets = next(iter(task.batches("train", PROBE_BATCH, limit=PROBE_BATCH)))
    double = channels_last(copy.deepcopy(module)).train()
    arguments = tuple(map(_as_images, several(inputs)))
    took: dict[bool, float] = {}
    for turn in range(PROBE_TURNS):
        for narrow in (False, True):
            started = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                outputs = double(*arguments)
            floats = tuple(one.float() for one in several(outputs))
            task.loss(floats[0] if len(floats) == 1 else floats, targets).backward()
            if turn:  # the first warms up
                took[narrow] = min(took.get(narrow, math.inf), time.perf_counter() - started)
    return took[True] < took[False]


def channels_last(module: nn.Module) -> nn.Module:
    """The same module, its convolutions' weights laid out as the processor's kernels want them.

    Those over two axes: torch's own `to(memory_format=...)` refuses a network that has others over three.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module


def one_cycle(step: int, total: int, warm: float = 0.2) -> float:
    """Share of the peak rate at a step: linear up over `warm`, then half a cosine to zero (Smith and Topin 2018)."""
    rise = max(1.0, warm * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, total - rise)))


class Training:
    """One full training of `module` on `task` by the task's recipe (`tasks.recipe`), run in pieces.

    `epochs` is what fidelity 1 means; `lr`, `batch` and so on take the place of the recipe's. With a teacher the loss
    is `weight` times the distillation loss of `kind` plus the task's own, that `1 - weight` times for responses. The
    module is changed in place and moved to channels-last memory; hooks are on it only while `run_to` runs.
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        epochs: float,
        seed: int,
        *,
        teacher: nn.Module | None = None,
        weight: float = 0.0,
        temperature: float = 1.0,
        kind: Kind = "response",
        lr: float | None = None,
        batch: int | None = None,
        momentum: float | None = None,
        decay: float | None = None,
        clip: float | None = None,
        bf16: bool | None = None,
        pause: Pause = at_once,
        instruments: Sequence[tuple[TrainOp, Receipt]] = (),
        cycles: Mapping[float, float] | None = None,
        gentle: float = 1.0,
    ) -> None:
        """`cycles`: shares of the training at which the learning rate has come down to nothing, to begin anew, and
        how much of `lr` it was at most before each of them.

        What is judged there is judged at rest (SGDR, Loshchilov and Hutter 2017), not in the middle of a descent.
        `gentle`: the share of the rate for all but what routes have hung on the network, which begins at random; with
        0 the network rests: it only answers, in evaluation mode.
        Raises UserError for a distillation weight without a teacher.
        """
        if weight > 0 and teacher is None:
            raise UserError(f"training: a distillation weight of {weight} needs a teacher")
        self.module = channels_last(module)
        asked = {"lr": lr, "batch": batch, "momentum": momentum, "decay": decay, "clip": clip}
        self.recipe = recipe(task).model_copy(update={key: value for key, value in asked.items() if value is not None})
        self.task, self.seed, self.pause = task, seed, pause
        self.batch, self.lr, self.clip = self.recipe.batch, self.recipe.lr, self.recipe.clip
        self.instruments = tuple(instruments)
        self.lesson: Lesson | None = None
        if teacher is not None and weight > 0:
            self.lesson = Lesson(
                Distillation.of({"weight": weight, "temperature": temperature, "kind": kind}),
                channels_last(teacher).eval(),
                self.module,
                examples(task.input, 2),
                judge=getattr(task, "distillation", None),
                seed=draw(seed, 2),
            )
        self.bf16 = bf16_pays() and bf16_runs(self.module, task) if bf16 is None else bf16
        self.steps_per_epoch = steps(task, "train", self.batch)
        self.total = max(1, round(epochs * self.steps_per_epoch))
        self.step = 0
        peaks = {max(1, round(share * self.total)): peak for share, peak in (cycles or {}).items()}
        self.ends = dict(sorted(({self.total: 1.0} | peaks).items()))
        self.began = 0  # step at which the cycle began
        # scales and biases are not decayed (He et al. 2019, "Bag of tricks", section 3.1)
        groups: list[dict[str, Any]] = []
        self.rests = gentle == 0
        for fresh, share in [(True, 1.0)] if self.rests else [(False, gentle), (True, 1.0)]:
            for wide in (True, False):
                found = [p for name, p in self._learning() if is_hung(name) == fresh and (p.ndim > 1) == wide]
                if found:
                    groups.append({"params": found, "weight_decay": self.recipe.decay if wide else 0.0, SHARE: share})
        self.optimizer = _optimizer(self.recipe, groups)

    def run_to(self, fidelity: float) -> dict[str, float]:
        """Train up to this share of the full training; what is behind already is not repeated.

        Returns loss (mean of the steps just taken), steps, images and seconds, which are the steps' own: what the
        epoch has behind it is passed over before. Raises TrialFailure when the loss is no longer a number.
        """
        target, began, first = round(fidelity * self.total), 0.0, self.step
        losses, images = 0.0, 0
        self.module.train()
        with torch.random.fork_rng(devices=[]), self._taught(target), self._resting():
            while self.step < target:
                for inputs, targets in self._rest_of_epoch():
                    began = began or time.perf_counter()
                    self.pause()
                    torch.default_generator.manual_seed(draw(self.seed, 1, self.step))
                    losses += self._update(inputs, targets)
                    images += batch_size(inputs)
                    self.step += 1
                    if self.step in self.ends:
                        self.began = self.step
                    if self.step >= target:
                        break
        if self.step == self.total:  # schedules end, however few the steps were
            self._advance()
        taken = self.step - first
        return {
            "loss": losses / taken if taken else 0.0,
            "steps": float(taken),
            "images": float(images),
            "seconds": time.perf_counter() - began if taken else 0.0,
        }

    @property
    def rested(self) -> bool:
        """Whether the rate has just come down to nothing, over steps enough for running statistics of these weights."""
        before = max((end for end in self.ends if end < self.step), default=0)
        return self.step in self.ends and self.step - before >= SETTLED

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """The network itself in evaluation mode and without gradients, if it rests; what hangs on it learns."""
        if not self.rests:
            yield
            return
        resting = [p for name, p in self.module.named_parameters() if not is_hung(name) and p.requires_grad]
        for name, part in self.module.named_modules():
            if name and not is_hung(f"{name}.weight"):
                part.training = False
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)

    def _rest_of_epoch(self) -> Iterator[tuple[Any, Any]]:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        passed = islice(self.task.batches("train", self.batch, seed=draw(self.seed, 0, epoch)), done, None)
        yield from passed
        if self.step // self.steps_per_epoch == epoch:
            short = f"a shuffled pass ended after {self.step % self.steps_per_epoch} batches"
            raise UserError(f"task {self.task.name}: {short}, a plain one gives {self.steps_per_epoch}")

    def _update(self, inputs: Any, targets: Any) -> float:
        if batch_size(inputs) == 1:  # batch normalisation has no statistics of one sample
            return 0.0
        self._advance()
        arguments = _arguments(inputs)
        rate = self.lr * self._share()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group[SHARE]
        with self._precision():
            outputs = self.module(*arguments)
            if self.lesson is not None:
                self.lesson.listen(arguments)
        outputs = outputs.float() if isinstance(outputs, Tensor) else tuple(one.float() for one in outputs)
        loss = several(outputs)[0].new_zeros(())
        for op, receipt in self.instruments:
            if (penalty := op.penalty(self.module, receipt)) is not None:
                loss = loss + penalty
        left = 1.0 if self.lesson is None else self.lesson.left
        if left > 0:
            loss = loss + left * self.task.loss(outputs, targets)
        if self.lesson is not None:
            loss = loss + self.lesson.settings.weight * self.lesson.loss(outputs)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrialFailure(f"training diverged: loss is {value} at step {self.step} of {self.total}")
        if not loss.requires_grad:  # every layer of the network is frozen
            return value
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for op, receipt in self.instruments:
            if (follow := getattr(op, "follow", None)) is not None:
                follow(self.module, receipt)
        norm = nn.utils.clip_grad_norm_([p for _, p in self._learning()], self.clip)
        if not torch.isfinite(norm):
            raise TrialFailure(f"training diverged: gradient is {float(norm)} at step {self.step} of {self.total}")
        self.optimizer.step()
        return value

    def _share(self) -> float:
        """Of the highest rate, now."""
        end, peak = next(cycle for cycle in self.ends.items() if cycle[0] > self.step)
        return peak * one_cycle(self.step - self.began, end - self.began)

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that the optimizer moves, by its name in a state."""
        yield from self.module.named_parameters()
        if self.lesson is not None:
            yield from ((f"{LESSON}{name}", p) for name, p in self.lesson.adapters.named_parameters())

    @contextmanager
    def _taught(self, target: int) -> Iterator[None]:
        """Both networks watched, the teacher's answers at hand; no hook is left behind."""
        lesson = self.lesson
        if lesson is None or self.step >= target:
            yield
            return
        again = self.total > self.steps_per_epoch  # every sample is seen more than once
        if again and lesson.settings.kind == "response" and not getattr(self.task, "augments", True):
            lesson.answers = answers_of(
                lesson.teacher, self.task, self.batch, bf16=self.bf16, prepare=_arguments, pause=self.pause
            )
        lesson.open()
        try:
            yield
        finally:
            lesson.close()

    def _advance(self) -> None:
        for op, receipt in self.instruments:
            op.advance(self.module, receipt, self.step / self.total)

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def state(self) -> bytes:
        """Weights, momenta and the step, as safetensors bytes (equal states give equal bytes)."""
        tensors = {"clock": torch.tensor([self.step, self.total, self.seed, self.began])}
        for name, tensor in self.module.state_dict().items():
            tensors[f"module.{name}"] = tensor
        for name, tensor in self._adapters().items():
            tensors[f"{LESSON}{name}"] = tensor
        for name, parameter in self._learning():
            kept = self.optimizer.state.get(parameter, {})
            for key, short in MOMENTS[self.recipe.optimizer].items():
                if kept.get(key) is not None:
                    tensors[f"{short}.{name}"] = kept[key]
        return write_tensors(
            {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        )

    def _adapters(self) -> dict[str, Tensor]:
        return {} if self.lesson is None else self.lesson.adapters.state_dict()

    def load(self, state: bytes) -> None:
        """Go on from `state()` of a training with the same network, epochs and seed.

        Raises UserError if it is no such state or belongs to another network or training.
        """
        try:
            tensors = read_tensors(state)
        except SafetensorError as error:
            raise UserError(f"training state: not readable as safetensors ({error})") from error
        clock = tensors.pop("clock", torch.zeros(0)).tolist()
        if clock[1:3] != [self.total, self.seed]:
            raise UserError(
                f"training state: of [step, steps, seed] {clock[:3]}, this training has {[self.total, self.seed]}"
            )
        weights = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("module.")}
        adapters = {name[len(LESSON) :]: tensor for name, tensor in tensors.items() if name.startswith(LESSON)}
        try:
            fill(self.module, weights)
            if self.lesson is not None:
                self.lesson.adapters.load_state_dict(adapters)
        except RuntimeError as error:
            raise UserError("training state: " + " ".join(str(error).split())[:300]) from error
        for name, parameter in self._learning():
            self.optimizer.state.pop(parameter, None)
            for key, short in MOMENTS[self.recipe.optimizer].items():
                if (moment := tensors.get(f"{short}.{name}")) is not None:  # in the parameter's own memory layout
                    like = torch.empty_like(parameter if moment.shape == parameter.shape else moment)
                    self.optimizer.state[parameter][key] = like.copy_(moment).detach()
        self.step, self.began = int(clock[0]), int(clock[-1])


def _optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _arguments(inputs: Any) -> tuple[Tensor, ...]:
    """A network's arguments from a batch's inputs."""
    return tuple(map(_as_images, several(inputs)))


def _as_images(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def reestimate_batchnorm(
    module: nn.Module, task: Task, batches: int, pause: Pause = at_once, *, size: int = 64
) -> None:
    """Replace running statistics by the mean over `batches` training batches; nothing without batch norm.

    Batches as training has them, shuffled and augmented: statistics of plain ones cost a half-trained ResNet-56 of 14
    blocks 0.3 to 0.6 points, those of augmented ones none.

    The population's statistics rather than a moving average of past weights' (Wu and Johnson 2021, "Rethinking
    'Batch' in BatchNorm", section 3). Everything but batch normalisation runs as in inference.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    training = {m: m.training for m in module.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.training = True
    try:
        with torch.no_grad():
            for inputs, _ in islice(task.batches("train", size, seed=0), batches):
                pause()
                if batch_size(inputs) > 1:
                    module(*several(inputs))
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for part, flag in training.items():
            part.training = flag
