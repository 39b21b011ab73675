"""Quality of a file, and how each sample fared, by asking the file once."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from autocompress.tasks import Predict, Scored, Task, batch_size
from autocompress.types import Quality

SAME = 1e-6
"""How far the mean of the scores may be from the quality that they are said to make up."""


def judged(task: Task, predict: Predict, split: str) -> tuple[Quality, NDArray[Any] | None]:
    """Quality, and the scores (n,) behind it where the task tells them; None where these are of another measure.

    A task that takes over `scores` of one of this package's and measures something else is judged by what it measures.
    """
    if not isinstance(task, Scored):
        return task.quality(predict, split), None
    answers: list[tuple[int, Any]] = []

    def recorded(inputs: Any) -> Any:
        answers.append((batch_size(inputs), predict(inputs)))
        return answers[-1][1]

    quality = task.quality(recorded, split)
    answers.reverse()

    def told(inputs: Any) -> Any:
        if answers and answers[-1][0] == batch_size(inputs):
            return answers.pop()[1]
        answers.clear()  # in other batches than `quality` has them
        return predict(inputs)

    scores = task.scores(told, split)
    same = len(scores) == quality.samples and abs(float(scores.mean(dtype=float)) - quality.value.value) <= SAME
    return quality, scores if same else None
