"""Whether trainers on cores of their own slow the station's, and what it helps that they pause.

    python benchmarks/pausing.py --state FOLDER [--files 5] [--times 20] [--json FILE]

Files of random policies of CIFAR's ResNet-20 (`subjects.py`) are read `--times` times each beside a training loop on
every core that the station does not own, by two stations in turn: one for which the loops pause where the baseline is
slower than it was, as a search's trainers do, and one that they do not listen to. What is true of a file is the median
of twelve readings without any loop, half of them before, half after. Where cores share no physical ones the two agree.

Per station: how far readings are from that (median, 95th percentile, share of them by more than 5 %), the share that
was noisy, for which the loops paused, and its seconds a reading.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from measuring import PROFILE, Lab, trainers
from rich.console import Console
from rich.table import Table

from autocompress.devices.gate import Gate
from autocompress.devices.station import Station
from autocompress.store import make_folder
from autocompress.types import Reading

NETWORK = "resnet20"
FAR = 0.05


def main() -> None:
    """Read, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="folder of files and readings")
    parser.add_argument("--files", type=int, default=5)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.state.mkdir(parents=True, exist_ok=True)
    lab = Lab(asked.state)
    files = {key: model for _, model, key in lab.take(NETWORK, asked.files)}
    with lab.station(NETWORK, "pausing") as heard:
        deaf = Gate(make_folder(asked.state / "nobody", "choose another --state"))  # a gate that no trainer knows
        unheard = Station([lab.profile], lab.plan, lab.baseline(NETWORK), lab.folder / "cache" / "unheard", gate=deaf)
        stations = {"pause": heard, "do not": unheard}

        def read(station: Station, name: str) -> dict[str, Reading]:
            """Of each file; a key that nothing was kept under."""
            return {key: station.measure(PROFILE, model, f"{key} {name}") for key, model in files.items()}

        try:
            alone = [read(one, f"before {i}") for i in range(3) for one in stations.values()]
            beside: dict[str, list[dict[str, Reading]]] = {name: [] for name in stations}
            with trainers(lab.plan.trainers):
                for i in range(asked.times):
                    for name, one in stations.items():
                        beside[name].append(read(one, f"beside {i}"))
            alone += [read(heard, f"after {i}") for i in range(6)]
        finally:
            unheard.close()
    true = {key: statistics.median(one[key].ratio.value for one in alone) for key in files}
    table = Table(
        "trainers", "median", "p95", f"off by > {FAR:.0%}", "noisy", "paused for", "s", title="Beside trainers"
    )
    figures: dict[str, dict[str, float]] = {}
    for name, rounds in {"none": alone, **beside}.items():
        every = [(reading, true[key]) for one in rounds for key, reading in one.items()]
        off = np.array([abs(reading.ratio.value / truth - 1) for reading, truth in every])
        figures[name] = {
            "median": float(np.median(off)),
            "p95": float(np.quantile(off, 0.95)),
            "far": float(np.mean(off > FAR)),
            "noisy": statistics.fmean(reading.noisy for reading, _ in every),
            "paused": statistics.fmean(reading.quiet for reading, _ in every) if name == "pause" else 0.0,
            "seconds": statistics.fmean(reading.seconds for reading, _ in every),
            "readings": len(every),
        }
        *shares, seconds, _ = figures[name].values()
        table.add_row(name, *(f"{share:.1%}" for share in shares), f"{seconds:.2f}")
    Console().print(table)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
