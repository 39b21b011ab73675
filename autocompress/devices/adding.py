"""`autocompress device add` and `device check`: a survey makes a profile; whether it still holds there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from autocompress import load, registry, shelves
from autocompress.devices import Device, Unreachable, host_of
from autocompress.devices.cores import plan_cores
from autocompress.devices.findings import Survey
from autocompress.devices.fingerprint import check_expects, identity, resolve_local, suited
from autocompress.devices.gate import Gate, HostLock
from autocompress.devices.statistics import DISTURBED
from autocompress.devices.survey import SECONDS, Say, quiet, survey
from autocompress.spacefile import flow
from autocompress.store import write_atomic
from autocompress.types import Profile, Reach, Record, TrialFailure, UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NOISE_PCT, DRIFT_PCT = 2.0, 10.0  # beyond which a device is not quiet
PATIENCE_S = 600.0


def wanted(
    name: str,
    *,
    local: bool = False,
    ssh: str = "",
    adb: str = "",
    ray: str = "",
    port: int | None = None,
    identity_file: str = "",
    python: str = "",
    like: str = "",
    threads: int | None = None,
    batch: int | None = None,
    provider: str = "",
) -> Profile:
    """What is known of a device before it is looked at. `like` is a profile whose facts it starts from.

    Raises UserError for a name that no file can have, none or several ways to reach it, options that do not belong.
    """
    if not NAME.fullmatch(name) or name.endswith((".yaml", ".yml")):
        raise UserError(f"device name {name!r}: use letters, digits, `.`, `_` and `-`, e.g. pi-kitchen")
    if name in shelves.names(shelves.PROFILES):
        raise UserError(f"{name!r} is a profile of the package; choose another name for your device")
    ways = {"local": "this" if local else "", "ssh": ssh, "adb": adb, "ray": ray}
    given = [way for way, where in ways.items() if where]
    if len(given) != 1:
        raise UserError(
            "say how the device is reached, by one of --ssh user@host, --adb SERIAL, --local, --ray RESOURCE"
        )
    device = given[0]
    for option, value in (("--port", port), ("--identity", identity_file)):
        if value and device != "ssh":
            raise UserError(f"{option} belongs to --ssh")
    if ways[device].startswith("-"):
        raise UserError(f"--{device} {ways[device]!r}: what begins with a dash is no address")
    base = load.profile(like) if like else Profile(name=name)
    reach: dict[str, Any] = {"ssh": ssh, "adb": adb, "resource": ray, "port": port, "identity": identity_file}
    reach |= {"python": _over_there(python) if device == "ssh" else python} if python else {}
    changes: dict[str, Any] = {"name": name, "device": device, "about": "", "reach": Reach(**reach)}
    changes |= {key: value for key, value in (("threads", threads), ("batch", batch)) if value is not None}
    if provider:
        changes["provider"] = provider if provider.endswith("ExecutionProvider") else f"{provider}ExecutionProvider"
        changes |= {"provider_options": {}} if changes["provider"] != base.provider else {}
    registry.check("device", device)
    return base.model_copy(update=changes)


def _over_there(python: str) -> str:
    """A path below the home folder means the one over there: `~` was expanded here by the shell."""
    path, home = Path(python), Path.home()
    return str(path.relative_to(home)) if path.is_relative_to(home) and path != home else python


def look(profile: Profile, *, seconds: float = SECONDS, say: Say = lambda _: None) -> Survey:
    """Survey the device of a profile, alone on its host.

    Raises Unreachable, UserError where the profile does not fit what is there, TrialFailure if nothing runs.
    """
    with reached(profile) as device:
        facts = device.fingerprint()
        check_expects(profile, facts)
        believed = profile if "numeric" in profile.model_fields_set else _with(profile, numeric=suited(facts))
        with alone(profile) as cores:
            found = survey(device, believed, seconds=seconds, cores=cores, say=say)
    threads = "all threads" if not profile.threads else f"{profile.threads} thread{'s' * (profile.threads > 1)}"
    what = [facts.get("processor") or facts.get("device") or "a device", f"{facts.get('cores', '?')} cores", threads]
    what += [f"batch {profile.batch}"] * (profile.batch > 1) + [profile.provider.removesuffix("ExecutionProvider")]
    return found.model_copy(update={"profile": _with(found.profile, about=", ".join(map(str, what)))})


@contextmanager
def reached(profile: Profile) -> Iterator[Device]:
    """The device of a profile, closed afterwards."""
    load.check_reach(profile)
    resolved = resolve_local(profile)
    if not host_of(profile):
        plan_cores([resolved])  # too few cores are said before anything is started
    made = registry.call("device", profile.device, registry.resolve("device", profile.device), resolved)
    device: Device = registry.genuine("device", profile.device, made)
    close: Callable[[], None] = getattr(device, "close", lambda: None)
    try:
        yield device
    finally:
        close()


@contextmanager
def alone(profile: Profile) -> Iterator[tuple[int, ...]]:
    """The cores to measure on, nobody else measuring on this host meanwhile; another host has a lock of its own."""
    if host_of(profile):
        yield ()
        return
    plan = plan_cores([resolve_local(profile)])
    with ExitStack() as held:
        try:
            if plan.quiet:
                held.enter_context(Gate().quiet(PATIENCE_S))
            held.enter_context(HostLock().held(f"device {profile.name}", PATIENCE_S))
        except TimeoutError as error:
            raise TrialFailure(f"could not measure on {profile.name}: {error}") from error
        yield plan.station


# --- the file ---------------------------------------------------------------------------------------------------------


def text(profile: Profile) -> str:
    """A profile as its YAML file writes it, most telling keys first, what was measured last."""
    given = profile.model_dump(mode="json", exclude_defaults=True)
    always = ("name", "about", "device", "provider", "threads", "batch", "types", "numeric", "channel_multiple")
    whole = profile.model_dump(mode="json")
    keys = [*always, *(key for key in given if key not in always and key != "measured"), "measured"]
    lines: list[str] = []
    for key in keys:
        value = whole[key] if key in always else given.get(key)
        if value is None:
            continue
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {flow(name)}: {flow(one)}" for name, one in value.items())] if value else []
        else:
            lines.append(f"{key}: {flow(value)}")
    return "\n".join(lines) + "\n"


def place(name: str, out: Path | None = None, *, force: bool = False) -> Path:
    """Where a new profile goes: `out`, else the user's shelf. Raises UserError if something is there already."""
    path = out or shelves.own_profiles() / f"{name}.yaml"
    if out is not None and out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: a profile is a file ending in .yaml")
    if path.exists() and not force:
        raise UserError(f"{path} is there already; --force writes over it")
    return path


def save(profile: Profile, path: Path) -> None:
    """Write it, and read it again as everybody else will."""
    write_atomic(path, text(profile).encode())
    load.profile(path.resolve())


# --- check ------------------------------------------------------------------------------------------------------------


class Fact(Record):
    """One thing that a check looked at."""

    what: str
    ok: bool
    said: str


def check(profile: Profile, *, seconds: float = 3.0) -> Iterator[Fact]:
    """Whether a device answers, is the one it was, has the runtime it had, and is quiet; ends at the first silence."""
    try:
        with reached(profile) as device:
            yield from _facts(profile, device, seconds)
    except (Unreachable, UserError, TrialFailure) as error:
        yield Fact(what="reachable" if isinstance(error, Unreachable) else "usable", ok=False, said=str(error))


def _facts(profile: Profile, device: Device, seconds: float) -> Iterator[Fact]:
    facts = device.fingerprint()
    way = host_of(profile) or ("this host" if profile.device == "local" else profile.device)
    yield Fact(what="reachable", ok=True, said=f"{way}: {facts.get('processor', 'unknown processor')}")
    check_expects(profile, facts)
    found = identity(facts)
    if not profile.fingerprint:
        yield Fact(what="device", ok=True, said=f"{found}; the profile is not pinned to a device")
    else:
        same = found == profile.fingerprint
        said = f"{found}, the one it was made for" if same else f"{found}, but made for {profile.fingerprint}"
        yield Fact(what="device", ok=same, said=said)
    for what, key in (("runtime", "onnxruntime"), ("governor", "governor"), ("clock", "max_mhz")):
        then, now = profile.measured.get(key), facts.get(key)
        if now is None and then is None:
            continue
        same = then is None or then == now
        changed = "" if same else f", was {then}: run `autocompress device add {profile.name} ... --force`"
        yield Fact(what=what, ok=same, said=f"{'onnxruntime ' * (key == 'onnxruntime')}{now}{changed}")
    with alone(profile) as cores:
        seen = quiet(device, profile.batch, seconds=seconds, cores=cores)
    noise = 100 * float(np.max(np.abs(np.array(seen.ratios) - 1)))
    then = profile.measured.get("noise_pct")
    before = f", {then:g} % when it was added" if isinstance(then, float | int) else ""
    said = f"a file differs from itself by {noise:.2f} % at most{before}"
    yield Fact(what="noise", ok=noise <= NOISE_PCT, said=said)
    said = f"the same file {abs(100 * seen.drift):.1f} % {'slower' if seen.drift > 0 else 'faster'} at the end"
    yield Fact(what="drift", ok=abs(100 * seen.drift) <= DRIFT_PCT, said=said)
    said = f"another process had a core in {100 * seen.disturbed:.0f} % of the runs"
    yield Fact(what="alone", ok=seen.disturbed <= DISTURBED, said=said)


def _with(profile: Profile, **changes: Any) -> Profile:
    return profile.model_copy(update=changes)
