"""What is asked of a target before and beside timing; its standard library alone, Python 3.9 or later.

It is not left there: the source travels on stdin to `python3 -I -c BOOT LENGTH COMMAND ...`, before what it reads.

    probe FOLDER MODULE ...
                        -> {"facts": {...}, "folder": "/.../autocompress", "python": "3.11.2", "missing": []}
    put FOLDER KEY NAME SHA256 SIZE KEEP        with the file's bytes on stdin
                        -> {"path": "/.../KEY/NAME"} or {"error": "...", "full": true}

Files lie in FOLDER/files/KEY/. A file gets its name only when all of it is there and has the hash; the least lately
used KEYs make room where more than KEEP bytes, or more than the disk has, would be taken.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BOOT = (
    "import sys;sys.version_info<(3,9)and sys.exit('Python %d.%d is too old'%sys.version_info[:2]);"
    "n=int(sys.argv[1]);sys.argv[0:2]=['there'];exec(compile(sys.stdin.buffer.read(n),'there.py','exec'))"
)
MARK = "autocompress "  # before an answer, as a login shell may print what it likes
FLAGS = frozenset(
    {"avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"}
    | {"avx_vnni_int8", "amx_tile", "amx_int8", "amx_bf16"}
    | {"asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"}
)
OLD_PART_S = 3600.0  # what was being copied that long ago is no more
KEPT = "bench"  # keys that begin so stay
SPARE = 16 << 20  # bytes that are always left free


def facts(root: Path = Path("/")) -> dict[str, Any]:
    """Processor, its flags of interest, cores, memory, kernel and governor, as JSON. `root` is for tests."""
    name, flags = processor(root)
    scaling = root / "sys/devices/system/cpu/cpu0/cpufreq"
    fastest = text(scaling / "cpuinfo_max_freq")
    return {
        "processor": name,
        "machine": platform.machine().lower(),
        "flags": sorted(flags & FLAGS),
        "cores": os.cpu_count() or 1,
        "physical_cores": physical_cores(root),
        "memory_gib": round(memory() / 2**30) or round(memory() / 2**30, 1),
        "system": platform.system(),
        "kernel": platform.release(),
        "governor": text(scaling / "scaling_governor"),
        "max_mhz": round(int(fastest) / 1e3) if fastest else None,
    }


def text(path: Path) -> str | None:
    """A small file of the system, None where it is not there or not ours to read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def processor(root: Path) -> tuple[str, set[str]]:
    """Model name and all flags, as Linux or macOS tell them."""
    listing = text(root / "proc/cpuinfo")
    if listing is not None:
        rows = [line.partition(":") for line in listing.splitlines()]
        pairs = {key.strip().lower(): value.strip() for key, _, value in reversed(rows)}
        name = pairs.get("model name") or pairs.get("cpu part") or platform.machine()
        return name, set((pairs.get("flags") or pairs.get("features") or "").split())
    if platform.system() == "Darwin":
        arm = platform.machine() == "arm64"
        return sysctl("machdep.cpu.brand_string") or platform.machine(), {"asimd", "asimddp"} if arm else set()
    return platform.processor() or platform.machine(), set()


def sysctl(name: str) -> str:
    """What macOS says of itself, empty where it does not."""
    told = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return told.stdout.strip()


def physical_cores(root: Path) -> int | None:
    """Cores that are not hyper-threads of one another, None where that is not told."""
    groups: set[str] = set()
    for core in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        told = text(core / "topology/core_cpus_list") or text(core / "topology/thread_siblings_list")
        if told:
            groups.add(told)
    if groups:
        return len(groups)
    if platform.system() == "Darwin":
        told = sysctl("hw.physicalcpu")
        return int(told) if told.isdigit() else None
    return None


def memory() -> int:
    """Bytes of main memory, 0 where that is not told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def probe(folder: str, *modules: str) -> dict[str, Any]:
    """The target and what it lacks."""
    place = Path(folder).expanduser().resolve()
    answer: dict[str, Any] = {
        "facts": facts(),
        "folder": str(place),
        "python": platform.python_version(),
        "executable": sys.executable,
        "missing": [name for name in modules if importlib.util.find_spec(name) is None],
    }
    try:
        (place / "files").mkdir(parents=True, exist_ok=True)
        if not os.access(place / "files", os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(place / "files"))
    except OSError as error:
        answer["error"] = f"cannot use the folder {place}: {error.strerror or error}"
    return answer


def put(folder: str, key: str, name: str, sha: str, size: str, keep: str) -> dict[str, Any]:
    """Take a file from stdin."""
    place = Path(folder, "files", key)
    part = place / f".{name}.{os.getpid()}.part"
    found, left = hashlib.sha256(), int(size)
    try:
        make_room(Path(folder, "files"), key, left, int(keep))
        place.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            while left:
                piece = sys.stdin.buffer.read(min(left, 1 << 20))
                if not piece:
                    return {"error": f"{left} of {size} bytes did not arrive", "full": False}
                found.update(piece)
                file.write(piece)
                left -= len(piece)
            file.flush()
            os.fsync(file.fileno())
        if found.hexdigest() != sha:
            return {"error": "what arrived is not what was sent", "full": False}
        part.replace(place / name)
        os.utime(place)
    except OSError as error:
        free = shutil.disk_usage(folder).free / 1e6
        words = f"{error.strerror or error} ({int(size) / 1e6:.1f} MB to write, {free:.1f} MB free in {folder})"
        return {"error": words, "full": True}
    finally:
        if part.exists():
            part.unlink()
    return {"path": str(place / name)}


def make_room(files: Path, key: str, size: int, keep: int) -> None:
    """Delete the least lately used keys until `size` more bytes fit within `keep` and onto the disk."""
    old = time.time() - OLD_PART_S
    taken: list[tuple[float, int, Path]] = []
    for place in files.iterdir():
        inside = [(path, path.stat()) for path in place.iterdir()]
        for path, found in inside:
            if path.name.endswith(".part") and found.st_mtime < old:
                path.unlink()
        if place.name != key and not place.name.startswith(KEPT):
            taken.append((place.stat().st_mtime, sum(found.st_size for _, found in inside), place))
    total = sum(one for _, one, _ in taken)
    for _, bytes_, place in sorted(taken):
        if total + size <= keep and shutil.disk_usage(files).free >= size + SPARE:
            return
        shutil.rmtree(place, ignore_errors=True)
        total -= bytes_


def main() -> None:
    """One command, one answer."""
    command = {"probe": probe, "put": put}[sys.argv[1]]
    sys.stdout.write(MARK + json.dumps(command(*sys.argv[2:])) + "\n")


if __name__ == "__main__":
    main()
