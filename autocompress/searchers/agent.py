"""The agent's network: a score for each choice, from features alone, so that it fits every space (numpy, no torch).

Two hidden layers of tanh, one number out; a softmax over the choices of a gene makes them probabilities. It holds
nothing that belongs to one space, so what was learned on one network serves on the next. Learning is PPO's clipped
objective (Schulman et al. 2017, equation 7) with an entropy bonus, by Adam (Kingma and Ba 2015).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from autocompress.store import write_atomic
from autocompress.types import UserError

Array = NDArray[np.floating]
FILE = "agent.safetensors"
FORMAT = "1"
BARRED = -1e9


class Agent:
    """Scores (..., choices) of features (..., choices, width)."""

    def __init__(self, width: int, hidden: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shapes = {"in": (width, hidden), "in0": (hidden,), "mid": (hidden, hidden), "mid0": (hidden,), "out": (hidden,)}
        self.weights: dict[str, Array] = {
            name: np.zeros(shape, dtype=np.float32)
            if name.endswith("0")
            else (rng.normal(size=shape) / math.sqrt(shape[0]) * (0.1 if name == "out" else 1.0)).astype(np.float32)
            for name, shape in shapes.items()
        }
        self.first = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self.steps = 0

    def part(self, features: Array, start: int = 0) -> Array:
        """What features (..., n), which are those from number `start` on, add to the first layer."""
        return features.astype(np.float32) @ self.weights["in"][start : start + features.shape[-1]]

    def scores(self, added: Array) -> tuple[Array, tuple[Array, Array]]:
        """Scores of what all `part`s add up to, and the hidden values that `learn` needs."""
        w = self.weights
        one = np.tanh(added + w["in0"])
        two = np.tanh(one @ w["mid"] + w["mid0"])
        return two @ w["out"], (one, two)

    def logs(self, added: Array, barred: Array) -> Array:
        """Log-probabilities (..., choices); `barred` is 0 or BARRED."""
        return _normal(self.scores(added)[0] + barred.astype(np.float32))

    def learn(
        self,
        features: Array,
        barred: Array,
        action: NDArray[np.int64],
        behaviour: Array,
        advantage: Array,
        *,
        rate: float,
        entropy: float,
        clip: float = 0.2,
        imitate: float = 0.0,
    ) -> None:
        """One step on (n, choices, width) decisions; `behaviour` and `advantage` are (n,).

        Each decision raises min(r A, clip(r) A) with r the ratio of its probability now and then; `imitate` also raises
        the logarithm itself where A is positive (Oh et al. 2018), and `entropy` the distribution's entropy.
        """
        if not len(action):
            return
        raw, (one, two) = self.scores(self.part(features))
        logs = _normal(raw + barred.astype(np.float32))
        p = np.exp(logs)
        rows = np.arange(len(action))
        ratio = np.exp(np.clip(logs[rows, action] - behaviour, -5.0, 5.0))
        held = ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
        # Derivative of the objective by the log-probability of the action, then by the scores.
        by_log = np.where(held, 0.0, ratio * advantage) + imitate * np.maximum(advantage, 0.0)
        by_score = -p * by_log[:, None]
        by_score[rows, action] += by_log
        uncertain = -(p * np.maximum(logs, -30.0)).sum(axis=-1, keepdims=True)
        by_score += entropy * -p * (np.maximum(logs, -30.0) + uncertain)
        by_score = np.where(barred < 0, 0.0, by_score) / len(action)
        self._ascend(self._slopes(features.astype(np.float32), one, two, by_score.astype(np.float32)), rate)

    def _slopes(self, features: Array, one: Array, two: Array, by_score: Array) -> dict[str, Array]:
        by_two = by_score[..., None] * self.weights["out"] * (1 - two**2)
        by_one = (by_two @ self.weights["mid"].T) * (1 - one**2)
        hidden, width = one.shape[-1], features.shape[-1]
        return {
            "in": features.reshape(-1, width).T @ by_one.reshape(-1, hidden),
            "in0": by_one.reshape(-1, hidden).sum(axis=0),
            "mid": one.reshape(-1, hidden).T @ by_two.reshape(-1, hidden),
            "mid0": by_two.reshape(-1, hidden).sum(axis=0),
            "out": (by_score[..., None] * two).reshape(-1, hidden).sum(axis=0),
        }

    def _ascend(self, slopes: dict[str, Array], rate: float) -> None:
        self.steps += 1
        size = math.sqrt(sum(float((slope**2).sum()) for slope in slopes.values()))
        shrink = min(1.0, 0.5 / max(size, 1e-12))
        for name, slope in slopes.items():
            self.first[name] = 0.9 * self.first[name] + 0.1 * shrink * slope
            self.second[name] = 0.99 * self.second[name] + 0.01 * (shrink * slope) ** 2
            mean, spread = self.first[name] / (1 - 0.9**self.steps), self.second[name] / (1 - 0.99**self.steps)
            self.weights[name] = (self.weights[name] + rate * mean / (np.sqrt(spread) + 1e-8)).astype(np.float32)

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write the weights as safetensors; `about` (JSON) says where they were learned."""
        note = {"format": FORMAT, "about": json.dumps(about, sort_keys=True)}
        write_atomic(path, save({name: np.ascontiguousarray(v) for name, v in self.weights.items()}, metadata=note))

    def load(self, path: Path) -> dict[str, Any]:
        """Take over an agent's weights; says where they were learned. Raises UserError for a file that does not fit."""
        path = path / FILE if path.is_dir() else path
        try:
            with safe_open(path, framework="numpy") as file:
                note = file.metadata() or {}
                found = {name: np.asarray(file.get_tensor(name), dtype=np.float32) for name in file.keys()}  # noqa: SIM118
            about: dict[str, Any] = json.loads(note.get("about", "{}"))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"policy_gradient: option agent: {path} is no agent: {error}") from error
        mine = {name: value.shape for name, value in self.weights.items()}
        if note.get("format") != FORMAT or {name: value.shape for name, value in found.items()} != mine:
            raise UserError(
                f"policy_gradient: option agent: {path} was saved by another version or with another `hidden`: "
                f"train it again, or leave the option out"
            )
        self.weights = found
        return about


def _normal(scores: Array) -> Array:
    high = scores - scores.max(axis=-1, keepdims=True)
    return high - np.log(np.exp(high).sum(axis=-1, keepdims=True))
