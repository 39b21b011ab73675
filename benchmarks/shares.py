"""Where the time of a search went, from its folder: training, measuring, export, engine; and how busy the workers were.

    python benchmarks/shares.py OUT [--workers N] [--json FILE]

Work is what trials report (every attempt of each counts, the journal has them all) until the closing rounds begin, for
these use threads instead of workers. `engine` is what the controller took to decide and to write, the searcher and the
terminal included, in the process that finished the run; its share is of the wall time. A worker is busy while it works
on a trial's stage.

`--json` keys: minutes, workers, busy (share of the workers' time), engine_s, engine (share of the wall time), stages
(share of the work by name).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autocompress import journal
from autocompress.controller import FINALS


def told(out: Path, workers: int) -> dict[str, Any]:
    """The figures of one search."""
    events = journal.read(out / "journal.jsonl").events
    work: dict[tuple[int, int], Counter[str]] = {}
    end = began = 0.0
    for event in events[1:]:
        if event.get("state") == FINALS:
            break
        began = began or float(event.get("at", 0.0))
        end = max(end, float(event.get("at", 0.0)))
        seconds = (event.get("outcome") or {}).get("seconds")
        if seconds and event["number"] > 0:
            work[event["number"], event.get("attempt", 0)] = Counter(seconds)
    stages = sum(work.values(), Counter())
    spent = sum(stages.values())
    engine = float(json.loads((out / "summary.json").read_bytes())["seconds"].get("engine", 0.0))
    return {
        "minutes": end / 60,
        "workers": workers,
        "busy": spent / (workers * max(end - began, 1e-9)),
        "engine_s": engine,
        "engine": engine / max(end, 1e-9),
        "stages": {name: value / max(spent, 1e-9) for name, value in stages.most_common()},
    }


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = told(asked.out, asked.workers)
    view = Table("", "share")
    for name, share in found["stages"].items():
        view.add_row(f"{name}, of the work", f"{100 * share:.1f} %")
    view.add_row(f"{asked.workers} workers busy, of their time", f"{100 * found['busy']:.1f} %")
    view.add_row(f"engine ({found['engine_s']:.1f} s), of the wall time", f"{100 * found['engine']:.2f} %")
    Console().print(view)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
