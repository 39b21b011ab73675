"""A device of your own: anything that can time ONNX files. Name it in a profile as `device: my_device:InProcess`.

Run it on a file: `python examples/my_device.py model.onnx`
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from autocompress.devices import Samples
from autocompress.devices.cores import plan_cores
from autocompress.devices.station import Station
from autocompress.types import Profile


class InProcess:
    """Times files in this very process, one run of each in turn."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def fingerprint(self) -> dict[str, Any]:
        """Readings of another runtime version are not this one's."""
        return {"where": "in process", "onnxruntime": ort.__version__}

    def time(self, models: Sequence[Path], *, rounds: int, seconds: float, cores: Sequence[int] = ()) -> Samples:  # noqa: ARG002
        """Ten runs per round; a station asks again until the ratio's interval is narrow."""
        sessions = {str(model): ort.InferenceSession(str(model)) for model in models}
        feeds: dict[str, dict[str, np.ndarray]] = {}
        for name, session in sessions.items():
            shapes = {i.name: [self.profile.batch, *i.shape[1:]] for i in session.get_inputs()}
            feeds[name] = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        until = time.perf_counter() + seconds
        for _ in range(10 * rounds):
            for name, session in sessions.items():
                began = time.perf_counter()
                session.run(None, feeds[name])
                times[name].append((time.perf_counter() - began) * 1e3)
            if time.perf_counter() > until:
                break
        return Samples(times_ms={name: tuple(row) for name, row in times.items()})


if __name__ == "__main__":
    model = Path(sys.argv[1])
    profile = Profile(name="mine", device="my_device:InProcess")
    station = Station([profile], plan_cores([profile]), baseline=model)
    reading = station.measure("mine", model)
    station.close()
    print(f"{reading.ms.value:.3f} ms [{reading.ms.low:.3f}, {reading.ms.high:.3f}], {reading.samples} runs")
