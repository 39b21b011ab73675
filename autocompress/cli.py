"""The command line. Exit codes: 0 done, 1 a limit that was to be held fails, 2 yours to mend, 70 a bug, 130 Ctrl-C.

`search`, `resume` and `measure` are done with 0 whether or not anything could be certified.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

import autocompress
from autocompress.types import LimitError, Profile, TrialFailure, UserError

app = typer.Typer(
    name="autocompress",
    help="Search architecture and compression policy together, scored on the ONNX file that ships.",
    epilog="First steps: autocompress search examples/digits.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_errors = Console(stderr=True, emoji=False, highlight=False, soft_wrap=True)
_debug = False
_YOURS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="YAML file that says what to search, e.g. digits.yaml.")]
Address = Annotated[
    str | None, typer.Option(metavar="HOST:6379", help="Use this running Ray cluster instead of one of our own.")
]
Serial = Annotated[bool, typer.Option("--serial", help="One candidate after another in this process, without Ray.")]
AsIs = Annotated[
    bool, typer.Option("--as-is", help="Measure on a device that is not the one its profile was made for, too.")
]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a search (`out` in its job).")]


def main() -> None:
    """The console script: runs a command; what the user can mend becomes a red line, never a traceback."""
    # As `python -m` does: `module:attr` in a job finds the user's own code, installed packages come first.
    sys.path.append(str(Path.cwd()))
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except LimitError as error:
        _fail(str(error), 1)
    except TrialFailure as error:  # a file given to `measure` or `apply` that does not run
        _fail(str(error), 2)
    except OSError as error:
        if _debug or error.errno not in _YOURS:
            _bug(error)
        _fail(f"{error.filename or 'writing'}: {error.strerror}", 2)
    except Exception as error:  # noqa: BLE001  # the last line: logged, shown and given its own exit code
        _bug(error)


def _bug(error: Exception) -> NoReturn:
    if _debug:
        raise error
    _fail(f"{type(error).__name__}: {_first_line(error)}\nThis is a bug of autocompress; {_log(error)}", 70)


def _fail(text: str, code: int) -> NoReturn:
    for line in text.splitlines():
        _errors.print(line, style="red", markup=False)
    sys.exit(code)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def _log(error: Exception) -> str:
    report = (
        f"autocompress {autocompress.__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"arguments: {sys.argv[1:]}\n\n{''.join(traceback.format_exception(error))}"
    )
    try:
        handle, name = tempfile.mkstemp(prefix="autocompress-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(report)
    except OSError:
        return "run the command again as `autocompress --debug ...` to see where."
    return f"please report it with {name} (or see it with `autocompress --debug ...`)."


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"autocompress {autocompress.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
    _asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    global _debug  # noqa: PLW0603  # read by `main` after the command is gone
    _debug = debug


@app.command(epilog="Example: autocompress search examples/digits.yaml --trials 20 --out runs/first")
def search(
    job: JobFile,
    out: Annotated[str | None, typer.Option(help="Folder for results, relative to the current one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of searcher and training.")] = None,
    searcher: Annotated[
        str | None, typer.Option(help="evolution, portfolio, policy_gradient, gradient, random, optuna or module:attr.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="How many candidates at most.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long the search may take.")] = None,
    workers: Annotated[int | None, typer.Option(help="Candidates evaluated at the same time.")] = None,
    warm: Annotated[
        list[str] | None, typer.Option(metavar="OUT", help="Begin with an earlier search's trials; may be repeated.")
    ] = None,
    address: Address = None,
    serial: Serial = False,
    as_is: AsIs = False,
) -> None:
    """Search for the best model per device. Options take the place of what JOB says."""
    _one_way(address, serial)
    record = _job(
        job,
        {
            "out": out,
            "search.seed": seed,
            "search.searcher": searcher,
            "search.cost.trials": trials,
            "search.cost.minutes": minutes,
            "search.workers": workers,
            "search.warm": warm or None,
        },
    )
    if as_is:
        devices = tuple(budget.model_copy(update={"as_is": True}) for budget in record.devices)
        record = record.model_copy(update={"devices": devices})
    from autocompress.run import run

    run(record, address=address, serial=serial, console=Console(emoji=False))


@app.command(epilog="Example: autocompress resume runs/digits --minutes 10")
def resume(
    out: OutFolder,
    trials: Annotated[int | None, typer.Option(min=1, help="How many candidates at most, over all.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="How long the search may take, over all.")] = None,
    address: Address = None,
    serial: Serial = False,
) -> None:
    """Go on with an interrupted search: nothing that its journal holds is lost or done twice."""
    _one_way(address, serial)
    from autocompress.run import resume as go_on

    go_on(out, trials=trials, minutes=minutes, address=address, serial=serial, console=Console(emoji=False))


@app.command(epilog="Example: autocompress report runs/digits")
def report(out: OutFolder) -> None:
    """Write OUT/report.html again from what the search found so far."""
    from autocompress.report import write

    typer.echo(write(out))


@app.command(epilog="Example: autocompress measure runs/digits --profile pi --speedup 3")
def measure(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx|OUT", help="File to time; or folder of a search, whose front to time.")
    ],
    profile: Annotated[str, typer.Option(help="Target: a name from `autocompress profiles`, or a YAML file.")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE.onnx", help="File to compare with (else the model itself).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure a file.")] = 3.0,
    speedup: Annotated[
        float | None, typer.Option(help="OUT: what the target asks, against the uncompressed file.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="OUT: median milliseconds at most.")] = None,
    p95_ms: Annotated[float | None, typer.Option(help="OUT: 95th percentile at most.")] = None,
    throughput: Annotated[float | None, typer.Option(help="OUT: samples per second at least.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="OUT: megabytes of the file at most.")] = None,
    memory_mb: Annotated[float | None, typer.Option(help="OUT: megabytes of memory at most.")] = None,
    as_is: AsIs = False,
    json: Annotated[bool, typer.Option("--json", help="The whole reading as JSON.")] = False,
) -> None:
    """Time an ONNX file on a target, interleaved with a baseline; or a search's front, ranked by the target's budget.

    OUT: files are those of the search, or made from its receipts where the target computes integers in another way.
    The table goes to OUT/devices/PROFILE, the best, certified, to OUT/best/PROFILE. Nothing is searched.
    """
    from autocompress.devices.station import measure_file
    from autocompress.load import profile as load_profile

    target = load_profile(profile)
    target = target.model_copy(update={"as_is": True}) if as_is else target
    asked = {
        "speedup": speedup,
        "latency_ms": latency_ms,
        "p95_ms": p95_ms,
        "throughput": throughput,
        "size_mb": size_mb,
        "memory_mb": memory_mb,
    }
    bounds = {name: value for name, value in asked.items() if value is not None}
    if model.is_dir():
        if baseline is not None:
            raise UserError("--baseline is for a file: a search's folder has its own")
        from autocompress.remeasure import remeasure

        found = remeasure(model, target, budget=bounds, say=(lambda _: None) if json else typer.echo)
        typer.echo(found.model_dump_json(indent=2) if json else str(found))
        return
    if bounds:
        raise UserError(f"--{next(iter(bounds)).replace('_', '-')} is for a search's folder: {model} is measured alone")
    reading = measure_file(model, target, baseline=baseline, seconds=seconds)
    if json:
        typer.echo(reading.model_dump_json(indent=2))
        return
    ms, ratio = reading.ms, reading.ratio
    typer.echo(
        f"{reading.profile}: median {ms.value:.3f} ms [{ms.low:.3f}, {ms.high:.3f}], p95 {reading.p95_ms.value:.3f} ms"
    )
    if baseline is not None:
        typer.echo(
            f"{reading.speedup:.2f}x the baseline's speed (ratio {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}])"
        )
    cores = ", ".join(map(str, reading.cores)) or "any"
    noisy = "; noisy: not to be relied on" if reading.noisy else ""
    other = "; on another device than the profile was made for" if reading.as_is else ""
    typer.echo(f"{reading.samples} runs in {reading.rounds} rounds on core {cores}{noisy}{other}")


@app.command(epilog="Example: autocompress apply runs/digits/best/local-1t --weights new.safetensors --out next")
def apply(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder under OUT/best.")],
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Retrained weights of the same network (.safetensors).")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the new artifact.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="Quality that may be lost, as a fraction: 0.01 is one point.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="PROFILE", help="Your own profile (a name or a file) of a device that ARTIFACT names."),
    ] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE", help="Import builder and task from this package if ARTIFACT names it."),
    ] = None,
    as_is: AsIs = False,
) -> None:
    """Apply a found policy to new weights of the same network; without --weights, make the artifact again.

    Exits with 1 and the reason when quality or a budget does not hold.
    """
    from autocompress.reuse import apply as enact

    done = enact(
        artifact,
        weights=weights,
        out=out,
        max_drop=max_drop,
        devices=device or (),
        trust=trust or (),
        as_is=as_is,
        say=typer.echo,
    )
    typer.echo(str(done))


@app.command(epilog="Example: autocompress verify runs/digits/best/local-1t --json")
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder under OUT/best.")],
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="PROFILE", help="Measure on this target (a name or a file); else on all of ARTIFACT's."),
    ] = None,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Measure the quality again.")] = True,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE.onnx", help="The uncompressed file, where ARTIFACT has left OUT.")
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Fresh timing processes per device.")] = 5,
    as_is: AsIs = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE", help="Import builder and task from this package if ARTIFACT names it."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything that was found as JSON.")] = False,
) -> None:
    """Check ARTIFACT: hashes, answers, latency, quality and budgets, measured again. Exits with 1 if one fails."""
    from rich.table import Column, Table
    from rich.text import Text

    from autocompress.verify import Check
    from autocompress.verify import verify as check_again

    console = Console(emoji=False, highlight=False)

    def say(check: Check) -> None:
        if console.is_terminal:  # what is long goes on under its beginning
            style = {"ok": "green", "failed": "red"}.get(check.status, "dim")
            row = Table.grid(Column(width=8), Column(width=11), Column(ratio=1), expand=True)
            row.add_row(Text(check.status, style), Text(check.name), Text(check.about))
            console.print(row)
        else:
            typer.echo(check)

    with nullcontext() if json or not console.is_terminal else console.status("checking"):
        found = check_again(
            artifact,
            devices=device or (),
            baseline=baseline,
            quality=quality,
            trust=trust or (),
            sessions=sessions,
            as_is=as_is,
            say=(lambda _: None) if json else say,
        )
    typer.echo(found.model_dump_json(indent=2) if json else found.verdict)
    if not found.passed:
        raise typer.Exit(1)


Shape = Annotated[
    str | None,
    typer.Option(metavar="C,H,W", help="What a network given by name is fed; its own usual input if left out."),
]
Classes = Annotated[int | None, typer.Option(min=1, help="Classes of a network given by name.")]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]


@app.command(epilog="Example: autocompress init torchvision:resnet18 --classes 10 --out job.yaml")
def init(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="torchvision:NAME, timm:NAME, hf:FOLDER, convnet or package:function."),
    ],
    task: Annotated[str | None, typer.Option(help="images, text, digits or package:class.")] = None,
    shape: Shape = None,
    classes: Classes = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write it; else it is printed.")] = None,
    force: Force = False,
) -> None:
    """Write a job file to start from: everything that can be said of MODEL, comments for what you fill in."""
    from autocompress.start import job_text, write_new

    text = job_text(model, task=task, shape=_sizes(shape), classes=classes, file=str(out or "job.yaml"))
    if out is None:
        typer.echo(text, nl=False)
        return
    write_new(out, text, force=force)
    typer.echo(f"{out} is written; fill in what its comments say, then: autocompress check {out}")


@app.command(epilog="Example: autocompress space torchvision:resnet18 --out mine.yaml")
def space(
    model: Annotated[str, typer.Argument(metavar="MODEL|JOB", help="A network's name as for `init`, or a job file.")],
    shape: Shape = None,
    dtype: Annotated[str | None, typer.Option(help="Of the input: float32, or int64 for tokens.")] = None,
    classes: Classes = None,
    profile: Annotated[
        str | None, typer.Option(help="Whose threads and batch to time with (default local-1t).")
    ] = None,
    time: Annotated[bool, typer.Option("--time/--no-time", help="Export it and time every site here.")] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the space to this YAML file.")] = None,
    force: Force = False,
) -> None:
    """Show a network's sites (shapes, parameters, multiply-adds, share of the latency, ops) and its search space."""
    from autocompress import auto, sitetable, spacefile
    from autocompress.start import subject, write_new

    if out is not None and out.exists() and not force:
        write_new(out, "", force=False)  # said before anything is computed
    found = subject(model, shape=_sizes(shape), dtype=dtype, classes=classes, profile=profile)
    console = Console(emoji=False)
    figures = sitetable.figures(found.builder, found.spec, found.profile if time else None)
    console.print(sitetable.show(figures, console.width, found.builder.name, found.space))
    if out is not None:
        write_new(out, spacefile.text(auto.written(found.space, found.builder)), force=force)
        console.print(f"{out} is written; name it in a job's `space`", highlight=False)


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--shape {text!r}: give sizes without the batch, e.g. 3,224,224")
    return tuple(int(part) for part in parts)


@app.command(epilog="Example: autocompress spaces convnet > mine.yaml")
def spaces(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one's file.")] = None) -> None:
    """List the search spaces that come with the package, or show one as a start for your own."""
    from autocompress import load, shelves

    if name is not None:
        typer.echo(shelves.find(shelves.SPACES, name).read_text(encoding="utf-8"), nl=False)
        return
    for one in load.spaces():
        typer.echo(f"{one:<16} {load.space_file(one).about}")


@app.command(epilog="Example: autocompress profiles x86-vnni-1t")
def profiles(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one's file.")] = None,
) -> None:
    """List your devices and the hardware profiles that come with the package, or show one as a start for your own."""
    from autocompress import load, shelves

    if name is not None:
        typer.echo(shelves.find(shelves.PROFILES, name).read_text(encoding="utf-8"), nl=False)
        return
    for one, path in sorted(shelves.files(shelves.PROFILES).items()):
        own = "" if shelves.ours(shelves.PROFILES, path) else f" ({path})"
        try:
            typer.echo(f"{one:<24} {load.profile(path.resolve()).about}{own}")
        except UserError as error:  # one broken file does not hide the others
            _errors.print(str(error), style="red", markup=False)


device_app = typer.Typer(
    help="Devices of your own: add one, check whether it is fit to measure on, list them.", no_args_is_help=True
)
app.add_typer(device_app, name="device")


@device_app.command(
    "add", epilog="Example: autocompress device add pi --ssh pi@raspberrypi.local --like raspberry-pi-5"
)
def device_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What jobs call it.")],
    ssh: Annotated[
        str, typer.Option(metavar="USER@HOST", help="Reached by OpenSSH; also a Host of your ssh configuration.")
    ] = "",
    adb: Annotated[str, typer.Option(metavar="SERIAL", help="A phone, as `adb devices` names it.")] = "",
    local: Annotated[bool, typer.Option("--local", help="This machine.")] = False,
    ray: Annotated[str, typer.Option(metavar="RESOURCE", help="The Ray node that holds it, e.g. device:pi.")] = "",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the ssh server.")] = None,
    identity: Annotated[str, typer.Option(metavar="FILE", help="Private key for ssh.")] = "",
    python: Annotated[
        str, typer.Option(help="Python over there, with numpy and onnxruntime, e.g. venv/bin/python.")
    ] = "",
    like: Annotated[str, typer.Option(metavar="PROFILE", help="Start from what this profile says.")] = "",
    threads: Annotated[int | None, typer.Option(min=0, help="0: all it has.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in one run.")] = None,
    provider: Annotated[str, typer.Option(help="Of onnxruntime, e.g. CUDA or CoreML; else CPU.")] = "",
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Of timing; loading comes on top.")] = 30.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Else ~/.config/autocompress/profiles/NAME.yaml.")
    ] = None,
    force: Force = False,
    json: Annotated[bool, typer.Option("--json", help="Everything that was found as JSON.")] = False,
) -> None:
    """Look at a device, write its profile, and say what will and what will not pay off there."""
    from autocompress.devices import adding, shown

    wanted = adding.wanted(
        name,
        ssh=ssh,
        adb=adb,
        local=local,
        ray=ray,
        port=port,
        identity_file=identity,
        python=python,
        like=like,
        threads=threads,
        batch=batch,
        provider=provider,
    )
    path = adding.place(name, out, force=force)
    with _errors.status(f"{name}: looking") as status:
        found = adding.look(wanted, seconds=seconds, say=lambda what: status.update(f"{name}: {what}"))
    adding.save(found.profile, path)
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        Console(emoji=False, highlight=False).print(shown.show(found, path))


@device_app.command("check", epilog="Example: autocompress device check pi")
def device_check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A profile's name or file.")],
    seconds: Annotated[float, typer.Option(min=0.5, max=600, help="Of timing.")] = 3.0,
    json: Annotated[bool, typer.Option("--json", help="The facts as JSON, one a line.")] = False,
) -> None:
    """Say whether a device answers, is the one it was, and is quiet. Exits with 1 if not."""
    from autocompress.devices import adding, shown
    from autocompress.load import profile as load_profile

    console, good = Console(emoji=False, highlight=False, soft_wrap=True), True
    for fact in adding.check(load_profile(name), seconds=seconds):
        good &= fact.ok
        if json:
            typer.echo(fact.model_dump_json())
        else:
            console.print(shown.fact(fact))
    if not good:
        raise typer.Exit(1)


@device_app.command("list", epilog="Example: autocompress device list")
def device_list(
    json: Annotated[bool, typer.Option("--json", help="Their profiles as JSON, one a line.")] = False,
) -> None:
    """List your own devices; `autocompress profiles` shows those of the package, too."""
    from autocompress import load, shelves
    from autocompress.devices import shown

    files = sorted(shelves.files(shelves.PROFILES).items())
    own: list[tuple[Profile, Path]] = []
    for path in (path for _, path in files if not shelves.ours(shelves.PROFILES, path)):
        try:
            own.append((load.profile(path.resolve()), path))
        except UserError as error:  # one broken file does not hide the others
            _errors.print(str(error), style="red", markup=False)
    if json:
        for profile, _ in own:
            typer.echo(profile.model_dump_json())
    elif own:
        Console(emoji=False, highlight=False).print(shown.listed(own))
    else:
        typer.echo(
            "no device yet; add one by `autocompress device add NAME --ssh user@host` (or --local, --adb, --ray)"
        )


@app.command(epilog="Example: autocompress check examples/digits.yaml")
def check(job: JobFile) -> None:
    """Say what is wrong with JOB, or what its search will take, without running it."""
    record = _job(job, {})
    from autocompress.estimate import estimate

    typer.echo(str(estimate(record)))


def _one_way(address: str | None, serial: bool) -> None:
    if serial and address:
        raise UserError("--serial and --address exclude one another: a cluster is used through Ray")


def _job(path: Path, changes: dict[str, Any]) -> autocompress.Job:
    from autocompress.load import job

    return job(path, {key: value for key, value in changes.items() if value is not None})


if __name__ == "__main__":
    main()
