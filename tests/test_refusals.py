"""What a search cannot be asked for is refused at its start: no parent is trained, nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress import load
from autocompress.parts import parts
from autocompress.types import Gene, Space, UserError
from tests.small_search import builder, job

ROOT = Path(__file__).parent.parent
JOB = """\
task: digits
model: {{builder: "{model}", epochs: 50}}
space: {space}
devices: [{{profile: local-1t, speedup: 2}}]
search: {{searcher: {searcher}, options: {options}, cost: {{trials: 1, minutes: 1}}}}
out: {out}
"""
SPACE = "name: {name}\nbuilder: convnet\npolicy:\n{rows}"


def started(folder: Path, jobs: list[str], *missing: str) -> str:
    """What one process says that searches by every job in turn, the packages in `missing` not being installed."""
    script = "import sys\n"
    script += "".join(f"sys.modules[{name!r}] = None\n" for name in missing)  # as Python marks what is not there
    script += "from autocompress.cli import main\nfor job in sys.argv[1:]:\n"
    script += "    sys.argv = ['autocompress', 'search', '--serial', job]\n"
    script += "    try: main()\n    except SystemExit as end: print('exit', end.code, flush=True)\n"
    found = subprocess.run(
        [sys.executable, "-c", script, *jobs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300", "NO_COLOR": "1"},
        check=False,
        timeout=150,
    )
    return found.stdout


def written(folder: Path, name: str, **asked: str) -> str:
    usual = {"model": "convnet", "space": "convnet", "searcher": "random", "options": "{}", "out": f"out-{name}"}
    (folder / f"{name}.yaml").write_text(JOB.format(**(usual | asked)))
    return f"{name}.yaml"


def test_choices_out_of_range_are_refused_by_file_line_key_and_what_is_permitted(tmp_path):
    rows = """\
  - {sites: "stages.*.conv1", op: prune, param: ratio, choices: [0.0, 1.5]}
  - {sites: "head", op: quantize, param: bits, choices: [float, int3]}
  - {sites: "head", op: lowrank, param: depth, choices: [1.0, 0.5]}
  - {sites: "head", op: lowrank, param: rank, choices: [1.0, 0]}
  - {sites: ".", op: distill, param: weight, choices: [0.0, 2.0]}
  - {sites: ".", op: store, param: codec, choices: [none, rar]}
  - {sites: "head", op: sparsify, param: pattern, choices: [unstructured, "3:4"]}
  - {sites: ".", op: qat, param: bits, choices: [float, int2]}
  - {sites: ".", op: prune, param: schedule, choices: [oneshot, slow]}
  - {sites: "stages.*", op: replace, param: kind, choices: [keep, bigger]}
  - {sites: "head", op: quantize, param: equalize, choices: [false, true]}
"""
    (tmp_path / "mine.yaml").write_text(SPACE.format(name="mine", rows=rows))
    said = started(tmp_path, [written(tmp_path, "job", space="mine.yaml")]).splitlines()
    told = [
        "ratio 1.5 is no share in [0, 1)",
        "bits = 'int3'; choose float, int8, int8-dynamic, int4, float16, bfloat16",
        "op 'lowrank' has no parameter 'depth'; known: rank, method, data",
        "rank 0 is no share in (0, 1]",
        "weight 2.0: Input should be less than or equal to 1",
        "codec = 'rar'; choose none, zstd, sparse, codebook, pow2",
        "pattern = '3:4'; choose one of unstructured, 2:4, 4:8",
        "bits = 'int2'; choose float or int8",
        "schedule 'slow'; choose one of oneshot, gradual",
        "kind 'bigger'; choose one of keep, separable, shuffle, bottleneck, smaller",
        "equalize is for the whole network, write `sites: .`",
    ]
    assert said[-1] == "exit 2"
    assert len(said) == len(told) + 1
    for number, (line, words) in enumerate(zip(said, told, strict=False)):
        assert line.startswith(f"{tmp_path / 'mine.yaml'}:{number + 4}: policy[{number}]: "), line
        assert words in line
    assert not (tmp_path / "out-job").exists()


def test_packages_that_a_search_will_need_are_missed_at_its_start(tmp_path):
    zstd = '  - {sites: ".", op: store, param: codec, choices: [none, sparse, zstd]}\n'
    (tmp_path / "packed.yaml").write_text(SPACE.format(name="packed", rows=zstd))
    jobs = [
        written(tmp_path, "bayes", searcher="optuna"),
        written(tmp_path, "packed-job", space="packed.yaml"),
        written(tmp_path, "pictures", model="timm:resnet18", space="auto"),
        written(tmp_path, "words", model="hf:bert", space="auto"),
        written(tmp_path, "nas", model="nni:MobileNetV3Space", space="auto"),
        written(tmp_path, "mistaken", searcher="evolution", options="{population: 1}"),
    ]
    said = started(tmp_path, jobs, "optuna", "zstandard", "timm", "transformers", "nni").splitlines()
    told = [
        "searcher 'optuna' needs Optuna 5 or newer: pip install 'autocompress[optuna]'",
        "packed.yaml:4: policy[0]: store: zstd needs one more package: pip install 'autocompress[storage]'",
        "model 'timm:resnet18' needs more packages: pip install 'autocompress[timm]'",
        "model 'hf:bert' needs more packages: pip install 'autocompress[hf]'",
        "model 'nni:MobileNetV3Space' needs more packages: pip install 'autocompress[nni]'",
        "population",
    ]
    assert said[1::2] == ["exit 2"] * len(told), said
    for line, words in zip(said[::2], told, strict=True):
        assert words in line
    assert not list(tmp_path.glob("out-*"))


@pytest.mark.parametrize(
    ("gene", "told"),
    [
        ({"op": "prune", "param": "ratio", "choices": (0.0, -0.5)}, "ratio -0.5 is no share"),
        ({"op": "prune", "param": "share", "choices": (0.0, 0.5)}, "no parameter 'share'"),
        ({"op": "shave", "param": "ratio", "choices": (0.0, 0.5)}, "unknown op 'shave'"),
    ],
)
def test_a_space_that_is_an_object_is_held_to_the_same(tmp_path, gene, told):
    (made,) = (Gene(name="one", kind="policy", site="head", **gene),)
    with pytest.raises(UserError, match=told) as found:
        parts(job(tmp_path / "out"), builder=builder(), space=Space(name="mine", genes=(made,)))
    assert str(found.value).startswith("space 'mine', gene 'one': ")
    load.check_space(Space(name="mine", genes=()))
