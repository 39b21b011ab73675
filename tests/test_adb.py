"""A phone over adb: the real client and its server, against a scripted device end (tests/adbd.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autocompress.devices import Device, TellsMemory, Unreachable
from autocompress.devices.adb import AdbDevice
from autocompress.devices.fingerprint import host
from autocompress.devices.local import Unloadable
from autocompress.types import Profile, Reach, TrialFailure, UserError
from tests.adbd import Adbd
from tests.sshd import free_port
from tests.test_ssh import LARGE, SMALL, big, crashing, one_line, until


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adbd]:
    if "adb" in os.environ.get("AUTOCOMPRESS_SKIP", "").split(","):
        pytest.skip("AUTOCOMPRESS_SKIP asks for it")
    client = shutil.which("adb")
    if client is None:
        pytest.fail("no adb client: apt-get install adb, or AUTOCOMPRESS_SKIP=adb")
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))  # a server of our own
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # and its keys
    (tmp_path / "home").mkdir()
    one = Adbd(tmp_path / "phone")
    one.start()
    (one.folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (one.folder / "python").chmod(0o755)
    yield one
    subprocess.run([client, "kill-server"], check=False, capture_output=True)
    one.stop()


def profile(phone: Adbd, **changes: object) -> Profile:
    return Profile(name="phone", device="adb", reach=Reach(adb=f"127.0.0.1:{phone.port}", python="./python"), **changes)


@pytest.fixture
def device(phone: Adbd) -> Iterator[AdbDevice]:
    one = AdbDevice(profile(phone), patience=30)
    yield one
    one.close()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.onnx" for name in ("small", "large", "crash")}
    for path, data in zip(found.values(), (SMALL, LARGE, crashing()), strict=True):
        path.write_bytes(data)
    return found


def works(device: AdbDevice, path: Path) -> bool:
    return device.time([path], rounds=2, seconds=5).blocks == 2


def test_files_are_timed_on_the_phone(device: AdbDevice, phone: Adbd, files: dict[str, Path], tmp_path: Path) -> None:
    assert isinstance(device, Device)
    assert isinstance(device, TellsMemory)
    here = host()
    told = device.fingerprint()
    assert {key: told[key] for key in here} == here
    samples = device.time([files["large"], files["small"]], rounds=4, seconds=10)
    large, small = (samples.times_ms[str(files[name])] for name in ("large", "small"))
    assert np.median(large) > 1.5 * np.median(small)
    assert device.memory([files["small"]])[str(files["small"])] > 0
    assert works(device, big(tmp_path, 5))
    assert len(list((phone.folder / ".cache/autocompress/files").rglob("model.onnx"))) == 3
    device.close()
    until(lambda: not phone.processes())


def test_a_model_that_crashes_or_is_refused(device: AdbDevice, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TrialFailure, match=r"the timing process on 127.0.0.1:\d+ was ended by SIGFPE"):
        device.time([files["small"], files["crash"]], rounds=1, seconds=1)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(Unloadable, match=r"broken.onnx cannot be loaded"):
        works(device, tmp_path / "broken.onnx")
    assert works(device, files["small"])


def test_a_cable_that_is_pulled_and_put_back(device: AdbDevice, phone: Adbd, files: dict[str, Path]) -> None:
    works(device, files["small"])
    began = time.monotonic()
    thread = threading.Timer(0.4, phone.stop)
    thread.start()
    with pytest.raises(Unreachable, match="cannot be reached: ") as caught:
        device.time([files["small"]], rounds=10**6, seconds=30)
    one_line(caught)
    assert time.monotonic() < began + 15
    thread.join()
    with pytest.raises(Unreachable, match=r"cannot be reached: ") as caught:
        works(device, files["small"])
    one_line(caught)
    until(lambda: not phone.processes())
    phone.start()
    assert works(device, files["small"])


def test_what_is_wrong_is_said(phone: Adbd) -> None:
    for serial in ("", "-s", "a b"):
        with pytest.raises(UserError, match=r"reach.adb must be a serial number"):
            AdbDevice(Profile(name="p", device="adb", reach=Reach(adb=serial)))
    with pytest.raises(Unreachable, match="nobody cannot be reached: device 'nobody' not found") as caught:
        AdbDevice(Profile(name="p", device="adb", reach=Reach(adb="nobody"))).fingerprint()
    one_line(caught)
    asked = profile(phone)
    asked = asked.model_copy(update={"reach": asked.reach.model_copy(update={"python": "nopython"})})
    with pytest.raises(UserError, match="nopython cannot be run there") as caught:
        AdbDevice(asked).fingerprint()
    one_line(caught)
    phone.stop()
    phone.features = b"cmd"  # as before Android 7
    phone.start()
    until(lambda: "not found" not in str(state(phone)))
    with pytest.raises(UserError, match="Android 7 or later is needed"):
        AdbDevice(profile(phone)).fingerprint()


def state(phone: Adbd) -> str:
    """As the adb server sees it, connecting anew."""
    address = f"127.0.0.1:{phone.port}"
    subprocess.run(["adb", "disconnect", address], capture_output=True, check=False)
    subprocess.run(["adb", "connect", address], capture_output=True, check=False)
    done = subprocess.run(["adb", "-s", address, "get-state"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
