"""The shelf of hardware profiles, the user's own shelves, and what a profile says of its target."""

from pathlib import Path

import pytest

from autocompress import load, registry, shelves
from autocompress.devices import smallnets
from autocompress.devices.cores import Cores, all_threads, plan_cores
from autocompress.devices.fingerprint import check_expects, check_same, host, identity, resolve_local
from autocompress.devices.station import Station, measure_file
from autocompress.types import Budget, Profile, Reach, UserError

SHELF = Path(__file__).parent.parent / "hardware_profiles"
NAMES = sorted(path.stem for path in SHELF.glob("*.yaml"))
HERE = {"flags": ["avx2", "avx512_vnni"], "machine": "x86_64", "system": "Linux", "processor": "some x86"}
PI = {"flags": ["asimd", "asimddp"], "machine": "aarch64", "system": "Linux", "processor": "0xd0b"}
MAC = {"flags": ["asimd", "asimddp"], "machine": "arm64", "system": "Darwin", "processor": "Apple M2"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home and a current folder with nothing in them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(folder: Path, name: str, text: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text or f"name: {name}\nthreads: 3\n")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_of_the_shelf_parses_and_says_what_it_is(name: str) -> None:
    one = load.profile(name)
    assert one.name == name
    assert one.about.endswith((".", "`."))
    assert one.template == ("not yet measured" in one.about)
    assert not one.measured  # no number of a device is shipped
    assert one.provider.endswith("ExecutionProvider")
    assert one.fingerprint == ""
    assert {"float32", "int8", "float16"} >= set(one.types)
    assert one.template or one.device == "local"


def test_the_shelf_has_what_was_promised() -> None:
    assert {
        "local-1t",
        "local-2t",
        "local-all",
        "local-batch8",
        "local-all-batch8",
        "raspberry-pi-4",
        "raspberry-pi-5",
    } <= set(NAMES)
    assert {f"x86-{kind}-{form}" for kind in ("vnni", "avx2") for form in ("1t", "all", "batch8")} <= set(NAMES)
    assert {"jetson-orin-cuda", "jetson-orin-tensorrt", "apple-silicon-cpu", "apple-silicon-coreml"} <= set(NAMES)
    assert {"openvino-cpu", "cuda", "android-cpu", "android-nnapi", "android-qnn"} <= set(NAMES)
    assert load.profile("x86-avx2-1t").numeric.reduce_range
    assert not load.profile("x86-vnni-all").numeric.reduce_range
    assert load.profile("raspberry-pi-5").numeric.activation == "int8"


# --- whose reading it would be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "facts", "said"),
    [
        ("x86-avx2-1t", HERE, "without avx512_vnni or avx_vnni"),
        ("raspberry-pi-4", PI, "without asimddp"),
        ("raspberry-pi-5", HERE, "with aarch64"),
        ("apple-silicon-cpu", HERE, "with darwin"),
        ("jetson-orin-cuda", HERE, "with aarch64"),
        ("x86-vnni-1t", PI, "with avx512_vnni or avx_vnni"),
    ],
)
def test_a_host_that_does_not_fit_is_refused_in_one_line(name: str, facts: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_expects(load.profile(name), facts)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "facts"), [("x86-vnni-1t", HERE), ("raspberry-pi-5", PI), ("apple-silicon-coreml", MAC)]
)
def test_a_host_that_fits_is_taken(name: str, facts: dict) -> None:
    check_expects(load.profile(name), facts)


def test_templates_are_refused_when_measured_here(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"any")
    for name, way in (("raspberry-pi-5", "--ssh user@host"), ("android-qnn", "--adb SERIAL")):
        with pytest.raises(UserError, match=f"'{name}' is a template, not yet measured, .*{way} --like {name}"):
            load.targets([Budget(profile=name)])
    if host()["machine"] != "arm64":
        with pytest.raises(UserError, match="'apple-silicon-cpu' expects a processor with darwin, which this one"):
            measure_file(model, "apple-silicon-cpu")


def test_a_provider_that_is_not_built_in_is_one_line(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"any")
    with pytest.raises(UserError, match=r"'cuda' wants CUDAExecutionProvider, but the onnxruntime installed here"):
        measure_file(model, "cuda")


# --- threads ----------------------------------------------------------------------------------------------------------


def cores(*siblings: set[int], quota: float | None = None) -> Cores:
    found = {core: frozenset(group) for group in siblings for core in group}
    return Cores(tuple(sorted(found)), found, {}, quota, affinity=True)


def test_all_threads_are_one_per_physical_core_within_the_quota() -> None:
    assert all_threads(cores({0}, {1}, {2}, {3})) == 4
    assert all_threads(cores({0, 4}, {1, 5}, {2, 6}, {3, 7})) == 4
    assert all_threads(cores({0}, {1}, {2}, {3}, quota=2.5)) == 2
    assert all_threads(cores({0}, quota=0.5)) == 1
    every = Profile(name="all", threads=0)
    plan = plan_cores([every, Profile(name="one")], cores({0, 2}, {1, 3}))
    assert len(plan.station) == 2
    assert len(plan_cores([every, Profile(name="three", threads=3)], cores({0, 2}, {1, 3})).station) == 3


def test_all_threads_are_resolved_for_this_host_alone() -> None:
    here = resolve_local(load.profile("local-all"))
    assert here.threads == all_threads() > 0
    assert resolve_local(here) == here
    away = Profile(name="pi", device="ssh", threads=0, reach=Reach(ssh="pi"))
    assert resolve_local(away) is away
    with pytest.raises(UserError, match="threads: must be greater than or equal to 0"):
        load.reader.check({"name": "x", "threads": -1}, Profile, "x.yaml")


def test_fewer_cores_than_threads_is_one_line() -> None:
    with pytest.raises(UserError, match="'many' measures with 64 threads, but 2 of this machine's cores") as caught:
        plan_cores([Profile(name="many", threads=64)], cores({0}, {1}))
    assert "\n" not in str(caught.value)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_another_runtime_is_the_same_device_and_another_processor_is_not() -> None:
    facts = {**host(), "onnxruntime": "1.20.0", "provider": "CPUExecutionProvider"}
    pinned = Profile(name="mine", fingerprint=identity(facts))
    later = {**facts, "onnxruntime": "1.31.1", "kernel": "7.0", "governor": "performance"}
    assert check_same(pinned, later)
    assert check_same(Profile(name="any"), {"processor": "whatever"})
    other = {**facts, "processor": "another one"}
    with pytest.raises(UserError, match=r"'mine' was made for another device .*another one.*--as-is"):
        check_same(pinned, other)
    assert not check_same(pinned, other, as_is=True)


def test_another_device_is_refused_by_a_station_or_marked(tmp_path: Path, monkeypatch) -> None:
    for name in ("AUTOCOMPRESS_CACHE", "TMPDIR"):  # nobody else's measurements are waited for
        monkeypatch.setenv(name, str(tmp_path))
    model = tmp_path / "model.onnx"
    model.write_bytes(smallnets.nothing())
    pinned = Profile(name="mine", fingerprint="0123456789ab")
    with pytest.raises(UserError, match="'mine' was made for another device"):
        measure_file(model, pinned, seconds=0.1)
    with pytest.raises(UserError, match="'mine' was made for another device"):
        Station([pinned], plan_cores([pinned]), model, tmp_path / "cache")
    assert measure_file(model, pinned.model_copy(update={"as_is": True}), seconds=0.1).as_is
    own = Profile(name="mine", fingerprint=identity(host()))
    assert not measure_file(model, own, seconds=0.1).as_is
    taken = own.model_copy(update={"fingerprint": "0123456789ab", "as_is": True})
    for _ in range(2):  # measured, and from the cache
        station = Station([taken], plan_cores([taken]), model, tmp_path / "cache")
        assert station.measure("mine", model.read_bytes(), seconds=0.2).as_is
        station.close()


def test_a_budget_takes_a_device_as_it_is(home: Path) -> None:
    put(home / "hardware_profiles", "mine", "name: mine\nfingerprint: 0123456789ab\n")
    assert not load.targets([Budget(profile="mine")])[0][0].as_is
    assert load.targets([Budget(profile="mine", as_is=True)])[0][0].as_is


# --- shelves of the user ----------------------------------------------------------------------------------------------


def test_a_users_profiles_are_found_beside_the_job_here_and_in_the_configuration(home: Path) -> None:
    mine = put(home / "config" / "autocompress" / "profiles", "mine")
    assert load.profile("mine").threads == 3
    assert shelves.find(shelves.PROFILES, "mine") == mine
    here = put(home / "hardware_profiles", "mine")
    assert shelves.find(shelves.PROFILES, "mine").resolve() == here
    beside = put(home / "jobs" / "hardware_profiles", "mine")
    assert shelves.find(shelves.PROFILES, "mine", home / "jobs") == beside
    assert "mine" in load.profiles()
    assert "local-1t" in load.profiles()
    assert not shelves.ours(shelves.PROFILES, beside)


def test_a_job_holds_where_its_profile_lay(home: Path, monkeypatch) -> None:
    beside = put(home / "jobs" / "hardware_profiles", "mine")
    job = home / "jobs" / "job.yaml"
    job.write_text(
        "task: digits\nmodel: convnet\nspace: convnet\nout: x\n"
        "devices: [{profile: mine, speedup: 2}, {profile: local-1t, speedup: 2}]\n"
    )
    read = load.job(job)
    assert [one.profile for one in read.devices] == [str(beside), "local-1t"]
    monkeypatch.chdir("/")
    profiles, budgets = load.targets(read.devices)
    assert [one.name for one in profiles] == [one.profile for one in budgets] == ["mine", "local-1t"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: mine\nthread: 2\n", "mine.yaml:2: thread: unknown key; did you mean 'threads'"),
        ("name: mine\nthreads: many\n", 'mine.yaml:2: threads: must be a whole number, not "many"'),
        ("name: mine\nnumeric: {activation: int4}\n", "mine.yaml:2: numeric.activation: must be 'uint8' or 'int8'"),
        ("name: mine\ndevice: shh\n", "unknown device 'shh'; did you mean 'ssh'"),
        ("[1, 2]\n", "must be keys with values"),
        ("name: mine\nreach: {port: 99999}\n", "mine.yaml:2: reach.port: must be less than or equal to 65535"),
    ],
)
def test_a_malformed_profile_is_one_line(home: Path, text: str, said: str) -> None:
    put(home / "config" / "autocompress" / "profiles", "mine", text)
    if said.startswith("unknown device") and "ssh" not in registry.names("device"):
        pytest.skip("no such device here")
    with pytest.raises(UserError) as caught:
        load.profile("mine")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_names_near_ones_of_all_shelves(home: Path) -> None:
    put(home / "config" / "autocompress" / "profiles", "kitchen-pi")
    with pytest.raises(UserError, match="unknown hardware profile 'kitchen-p'; did you mean 'kitchen-pi'"):
        load.profile("kitchen-p")
