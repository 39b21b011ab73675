import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autocompress import load, reader, shelves
from autocompress.registry import BUILT_IN
from autocompress.space import decode, encode
from autocompress.types import Budget, Choice, Job, Profile, Rule, Site, Space, UserError

JOB = """\
task: digits
model: convnet
space: {space}
devices:
  - {{profile: local-1t, speedup: 3}}
quality: {{max_drop: 0.01}}
search: {{seed: 3, cost: {{trials: 5, minutes: 0.5}}}}
out: runs/x
"""


class Small:
    """A builder of closed form: knobs and sites are data, `build` only judges its choices."""

    name = "small"
    knobs: dict[str, Choice] = {"depth": 2, "kind": "plain", "gate": False}
    allowed: dict[str, tuple[Choice, ...]] = {"depth": (1, 2), "kind": ("plain", "residual"), "gate": (False, True)}

    def build(self, arch):
        for name, value in arch.items():
            if value not in self.allowed[name]:
                raise UserError(f"{name} cannot be {value}")

    def sites(self):
        both = ("prune", "quantize", "lowrank")
        return (
            Site(name="stem", kind="conv", ops=("quantize",)),
            Site(name="body.0", kind="conv", ops=both),
            Site(name="body.1", kind="conv", ops=both, when={"depth": (2,)}),
            Site(name="head", kind="linear", ops=("quantize", "lowrank")),
        )

    def inherit(self, child, parent, arch):
        raise NotImplementedError


def space(tmp_path: Path, body: str) -> Space:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbuilder: small\n" + body)
    return load.space(path, Small())


def genes(found: Space):
    return {gene.name: gene for gene in found.genes}


@pytest.fixture
def job_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\nbuilder: convnet\n")
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(space="mine.yaml"))
    return path


# --- job ----------------------------------------------------------------------------------------------------------


def test_a_job_is_read_with_its_paths_made_absolute(job_file, tmp_path):
    job = load.job(job_file)
    assert job.model.builder == "convnet"
    assert job.space == str(tmp_path / "mine.yaml")
    assert job.devices[0].profile == "local-1t"
    assert job.out == "runs/x"
    assert job.search.cost.trials == 5


def test_changes_take_the_place_of_what_the_file_says(job_file):
    job = load.job(job_file, {"search.seed": 9, "search.fidelity.keep": 0.25, "out": "elsewhere"})
    assert (job.search.seed, job.search.fidelity.keep, job.out) == (9, 0.25, "elsewhere")
    with pytest.raises(UserError, match=r"search\.seed: must be greater than or equal to 0, not -1"):
        load.job(job_file, {"search.seed": -1})


def test_weights_are_looked_for_beside_the_job(job_file, tmp_path):
    with pytest.raises(UserError, match=r"model\.weights: there is no file .*w\.safetensors"):
        load.job(job_file, {"model.weights": "w.safetensors"})
    (tmp_path / "w.safetensors").write_bytes(b"")
    assert load.job(job_file, {"model.weights": "w.safetensors"}).model.weights == str(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("task: digits", "task: digit", "job.yaml:1: task: unknown task 'digit'; did you mean 'digits'?"),
        (
            "model: convnet",
            "model: {builder: convnut}",
            "job.yaml:2: model.builder: unknown builder 'convnut'; did you",
        ),
        ("mine.yaml", "nowhere.yaml", "job.yaml:3: space: search space 'nowhere.yaml': there is no file"),
        ("local-1t", "local-9t", "job.yaml:5: devices[0].profile: unknown hardware profile 'local-9t'; did you mean"),
        ("speedup", "speadup", "job.yaml:5: devices[0].speadup: unknown key; did you mean 'speedup'?"),
        ("speedup: 3", "speedup: three", 'job.yaml:5: devices[0].speedup: must be a number, not "three"'),
        ("speedup: 3", "speedup: true", "job.yaml:5: devices[0].speedup: must be a number, not true"),
        ("speedup: 3", "speedup: 0", "job.yaml:5: devices[0].speedup: must be greater than 0, not 0"),
        ("max_drop: 0.01", "max_drop: 0.01, min: 0.9", "job.yaml:6: quality: give exactly one of `max_drop` and `min`"),
        ("trials: 5", "trials: no", 'job.yaml:7: search.cost.trials: must be a whole number, not "no"'),
        ("out: runs/x", "", "job.yaml: out: missing"),
        ("out: runs/x", "out: 8", "job.yaml:8: out: must be text (put it in quotes), not 8"),
        ("task: digits", "task: digits\ntask: digits", "job.yaml:2: key 'task' occurs twice (first in line 1)"),
        ("task: digits", "task: &a digits", "job.yaml:1: anchors and aliases"),
        ("task: digits", "task: *a", "job.yaml:1: anchors and aliases"),
        ("task: digits", "task: !!python/name:os.system digits", "job.yaml:1: tags (!) are not used here"),
        ("task: digits", "<<: {task: digits}", "job.yaml:1: merge keys (<<) are not used here"),
        ("task: digits", "true: digits", "job.yaml:1: a key must be text: write 'true' with quotes"),
        ("out: runs/x", "out: x\n---\nout: y", "job.yaml:9: more than one document (---)"),
        ("devices:", "devices: {", "job.yaml:"),
        ("\ntask", "\ttask", "job.yaml:"),
    ],
)
def test_a_problem_is_one_line_with_file_line_and_key(job_file, old, new, told):
    text = "\n" + job_file.read_text()
    job_file.write_text(text.replace(old, new).removeprefix("\n"))
    if "\t" in new:
        job_file.write_text("\t" + job_file.read_text())
    with pytest.raises(UserError) as caught:
        load.job(job_file)
    assert "\n" not in str(caught.value)
    assert told in str(caught.value)


def test_all_problems_are_told_at_once(job_file):
    job_file.write_text(job_file.read_text().replace("digits", "faces").replace("local-1t", "phone"))
    with pytest.raises(UserError) as caught:
        load.job(job_file)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"- a\n", b"just text", b"[" * 500, b"x" * 1_000_001])
def test_what_is_no_job_at_all_is_said_in_one_line(tmp_path, content):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load.job(path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load.job(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load.job(tmp_path)


# --- YAML ---------------------------------------------------------------------------------------------------------


def test_scalars_are_those_of_yaml_1_2():
    data, lines = reader.parse("a: [off, no, yes, true, 1e-3, 010, 12:30, 2024-01-01, ~, .5, '1']\nb: {c: x}\n", "t")
    assert data["a"] == ["off", "no", "yes", True, 0.001, 10, "12:30", "2024-01-01", None, 0.5, "1"]
    assert (lines[("b", "c")], lines[("a", 3)]) == (2, 1)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["digits", "local-1t"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*Job.model_fields, "profile", "min", "rungs", "x"]), inner, max_size=5)
    ),
    max_leaves=12,
)


def is_record_or_user_error(path: Path):
    for read in (load.job, load.profile, load.space_file, lambda it: load.space(it, Small())):
        try:
            read(path)
        except UserError:
            continue


@given(
    st.text() | st.text(alphabet="{}[]:-#&*!|>'\"%@`,?\n\t ab01.~<=") | st.binary().map(lambda it: it.decode("latin-1"))
)
def test_any_text_gives_a_record_or_a_user_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    is_record_or_user_error(path)


@given(
    st.dictionaries(
        st.sampled_from([*Job.model_fields, *load.SpaceFile.model_fields, *Profile.model_fields]), json_like
    )
)
def test_any_data_gives_a_record_or_a_user_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "any.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    is_record_or_user_error(path)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_record_or_a_user_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "any.yaml"
    path.write_bytes(data)
    is_record_or_user_error(path)


@given(st.text(alphabet=string.printable + "\0~/é", max_size=300))
def test_any_name_gives_a_record_or_a_user_error(name):
    for read in (load.profile, load.space_file):
        try:
            read(name)
        except UserError:
            continue


# --- space ----------------------------------------------------------------------------------------------------------


def test_rows_spread_over_the_sites_that_a_glob_names_and_that_know_the_op(tmp_path):
    found = space(
        tmp_path,
        "arch:\n  depth: [2, 1]\n"
        "policy:\n"
        "  - {sites: '*', op: quantize, param: bits, choices: [float, int8]}\n"
        "  - {sites: ['body.*', head], op: lowrank, param: rank, choices: [1.0, 0.5]}\n"
        "  - {sites: ., op: distill, param: weight, choices: [0.0, 0.5]}\n",
    )
    assert [gene.name for gene in found.genes] == [
        "depth",
        *(f"quantize.bits@{site}" for site in ("stem", "body.0", "body.1", "head")),
        *(f"lowrank.rank@{site}" for site in ("body.0", "body.1", "head")),
        "distill.weight@.",
    ]
    gene = genes(found)["lowrank.rank@body.1"]
    assert (gene.site, gene.op, gene.param, gene.choices) == ("body.1", "lowrank", "rank", (1.0, 0.5))
    assert gene.when == {"depth": (2,)}
    assert genes(found)["quantize.bits@head"].when == {}


def test_rules_of_every_candidate(tmp_path):
    body = "policy:\n  - {sites: head, op: quantize, param: bits, choices: [float, int8]}\n"
    always = "always:\n  - {op: distill, site: '.', settings: {weight: 0.5, kind: both}}\n"
    found = space(tmp_path, body + always)
    taught = Rule(site=".", op="distill", settings={"weight": 0.5, "kind": "both"})
    assert found.always == (taught,)
    assert [rule.op for rule in decode(found, (1,)).policy.rules] == ["quantize", "distill"]
    assert encode(found, decode(found, (1,))) == (1,)
    with pytest.raises(ValueError, match="both speak of quantize at 'head'"):
        Space(name="x", genes=found.genes, always=(Rule(site="head", op="quantize", settings={"bits": "int8"}),))


def test_when_speaks_of_knobs_siblings_other_ops_and_full_names(tmp_path):
    found = genes(
        space(
            tmp_path,
            "arch:\n  depth: [2, 1]\n  kind: {choices: [plain, residual], when: {depth: 2}}\n"
            "policy:\n"
            "  - {sites: 'body.*', op: prune, param: ratio, choices: [0.0, 0.25, 0.5]}\n"
            "  - {sites: 'body.*', op: prune, param: importance, choices: [l2, l1], when: {ratio: [0.25, 0.5]}}\n"
            "  - {sites: 'body.*', op: lowrank, param: rank, choices: [1.0, 0.5], when: {prune.ratio: 0.0}}\n"
            "  - {sites: 'body.*', op: quantize, param: bits, choices: [float, int8],"
            " when: {'lowrank.rank@{site}': 0.5, kind: plain, depth: [1, 2]}}\n"
            "  - {sites: ., op: distill, param: weight, choices: [0.0, 0.5]}\n"
            "  - {sites: ., op: distill, param: temperature, choices: [1.0, 4.0], when: {weight: 0.5}}\n",
        )
    )
    assert found["kind"].when == {"depth": (2,)}
    assert found["prune.importance@body.0"].when == {"prune.ratio@body.0": (0.25, 0.5)}
    assert found["lowrank.rank@body.1"].when == {"prune.ratio@body.1": (0.0,), "depth": (2,)}
    assert found["quantize.bits@body.0"].when == {"lowrank.rank@body.0": (0.5,), "kind": ("plain",)}
    assert found["distill.temperature@."].when == {"distill.weight@.": (0.5,)}


def test_conditions_on_what_the_space_leaves_out_stand_at_the_parents_choice(tmp_path):
    rows = "policy:\n  - {sites: 'body.*', op: prune, param: ratio, choices: [0.0, 0.5], when: {kind: WHEN}}\n"
    kept = genes(space(tmp_path, rows.replace("WHEN", "plain")))
    assert {name: gene.when for name, gene in kept.items()} == {"prune.ratio@body.0": {}, "prune.ratio@body.1": {}}
    assert space(tmp_path, rows.replace("WHEN", "residual")).genes == ()
    # an op that cannot act at `head` leaves that site at its first choice
    found = genes(
        space(
            tmp_path,
            "policy:\n"
            "  - {sites: '*', op: prune, param: ratio, choices: [0.0, 0.5]}\n"
            "  - {sites: '*', op: lowrank, param: rank, choices: [1.0, 0.5], when: {prune.ratio: 0.0}}\n",
        )
    )
    assert found["lowrank.rank@head"].when == {}
    assert found["lowrank.rank@body.0"].when == {"prune.ratio@body.0": (0.0,)}


def test_a_site_condition_meets_the_choices_that_the_space_offers(tmp_path):
    row = "policy:\n  - {sites: body.1, op: prune, param: ratio, choices: [0.0, 0.5], when: {depth: WHEN}}\n"
    assert space(tmp_path, "arch: {depth: [2]}\n" + row.replace("WHEN", "2")).genes[1].when == {}
    assert len(space(tmp_path, "arch: {depth: [2, 1]}\n" + row.replace("WHEN", "1")).genes) == 1


ROW = "policy:\n  - {sites: 'body.*', op: prune, param: ratio, choices: [0.0, 0.5]}\n"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("arch: {dept: [2, 1]}", "arch.dept: builder 'small' has no such knob; did you mean 'depth'?"),
        ("arch: {depth: [1, 2]}", "arch.depth: the first choice must be the parent's own, 2"),
        ("arch: {gate: [0, true]}", "arch.gate: the first choice must be the parent's own, false"),
        ("arch: {depth: [2, 7]}", "arch.depth: depth cannot be 7"),
        ("arch: {depth: [2, 1, 1.0]}", "arch.depth: choice 1.0 occurs twice"),
        ("arch: {depth: []}", "arch.depth: choices: must not be empty"),
        ("arch: {depth: [2, [1]]}", "must be true, false, a number or text, not [1]"),
        ("arch: {depth: 2}", "arch.depth: must be a mapping of keys, not 2"),
        (ROW.replace("body.*", "bodie.0"), "sites: 'bodie.0' matches nothing in the network; did you mean 'body.0'"),
        (
            ROW.replace("body.*", "stem"),
            "op 'prune' can act on none of the 1 sites that 'stem' matches (possible there",
        ),
        (ROW.replace("'body.*'", "."), "op 'prune' acts on single sites; write `sites: '*'`"),
        (ROW.replace("op: prune", "op: prun"), "unknown op 'prun'; did you mean 'prune'?"),
        (ROW.replace("ratio", "ration"), "op 'prune' has no parameter 'ration'; did you mean 'ratio'?"),
        (ROW.replace("[0.0, 0.5]", "[0.5, 0.0]"), "the first choice must be 0.0, which leaves the network alone"),
        (ROW + ROW.removeprefix("policy:\n"), "gene 'prune.ratio@body.0' is already made by an earlier row"),
        (ROW.replace("]}", "], when: {dept: 1}}"), "when: 'dept' is no knob of an earlier row"),
        (ROW.replace("]}", "], wen: {depth: 1}}"), "policy[0].wen: unknown key; did you mean 'when'?"),
        ("arch: {depth: [2, 1]}\n" + ROW.replace("]}", "], when: {depth: 3}}"), "3 is not a choice of 'depth' (2, 1)"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, body, told):
    with pytest.raises(UserError) as caught:
        space(tmp_path, body)
    text = str(caught.value)
    assert "\n" not in text
    assert f"mine.yaml:{4 if 'policy:' in body and 'arch' not in body and body.count('- ') == 1 else ''}" in text
    assert told in text.replace("arch.depth.choices:", "arch.depth: choices:")


def test_settings_of_the_whole_network_stand_at_its_dot(tmp_path):
    found = genes(space(tmp_path, "policy:\n  - {sites: ., op: quantize, param: equalize, choices: [false, true]}\n"))
    assert [(gene.site, gene.op, gene.param) for gene in found.values()] == [(".", "quantize", "equalize")]
    with pytest.raises(UserError, match="acts on single sites"):
        space(tmp_path, "policy:\n  - {sites: ., op: quantize, param: bits, choices: [float, int8]}\n")


def test_what_a_strangers_builder_raises_is_one_line(tmp_path, monkeypatch):
    def build(_self, arch):
        raise ZeroDivisionError(f"{len(arch)} knob\nmore")

    monkeypatch.setattr(Small, "build", build)
    with pytest.raises(UserError) as caught:
        space(tmp_path, "arch: {depth: [2, 1]}")
    told = "mine.yaml:3: arch.depth: the builder cannot build depth 1: ZeroDivisionError: 1 knob"
    assert str(caught.value).endswith(told)


def test_a_space_of_another_builder_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nbuilder: large\n")
    with pytest.raises(UserError, match="this space is for builder 'large', not 'small'"):
        load.space(path, Small())


# --- shelves --------------------------------------------------------------------------------------------------------


def test_both_shelves_are_readable_and_files_are_named_after_their_records():
    assert {"local-1t", "local-2t", "x86-vnni-1t"} <= set(load.profiles())
    for name in load.profiles():
        assert load.profile(name).name == name
        assert load.profile(name).about
    assert "convnet" in load.spaces()
    for name in load.spaces():
        file = load.space_file(name)
        assert file.name == name
        assert file.about
        assert file.builder in BUILT_IN["builder"]


def test_targets_name_budgets_after_their_profiles(tmp_path):
    path = tmp_path / "far.yaml"
    path.write_text("name: phone\nthreads: 4\n")
    (tmp_path / "job.yaml").write_text(
        JOB.format(space="convnet").replace("quality:", "  - {profile: far.yaml, latency_ms: 2}\nquality:")
    )
    job = load.job(tmp_path / "job.yaml")
    profiles, budgets = load.targets(job.devices)
    assert [profile.name for profile in profiles] == ["local-1t", "phone"]
    assert [budget.profile for budget in budgets] == ["local-1t", "phone"]
    assert budgets[1].latency_ms == 2
    with pytest.raises(UserError, match="two profiles are called 'phone'"):
        load.targets([job.devices[1], job.devices[1]])


@pytest.mark.parametrize(
    ("asked", "there", "holds"), [(None, 200, 200), (100, 200, 100), (300, 200, 200), (9, None, 9)]
)
def test_a_profiles_memory_bounds_every_budget(tmp_path, asked, there, holds):
    limit = "" if there is None else f"memory_mb: {there}\n"
    (tmp_path / "pi.yaml").write_text(f"name: pi\n{limit}")
    _, (budget,) = load.targets([Budget(profile=str(tmp_path / "pi.yaml"), speedup=2, memory_mb=asked)])
    assert budget == Budget(profile="pi", speedup=2, memory_mb=holds)


def test_a_profile_of_an_unknown_device_is_refused(tmp_path):
    path = tmp_path / "far.yaml"
    path.write_text("name: far\ndevice: locl\n")
    with pytest.raises(UserError, match="device: unknown device 'locl'; did you mean 'local'"):
        load.profile(path)


def test_the_example_job_is_valid():
    example = Path(__file__).parent.parent / "examples" / "digits.yaml"
    job = load.job(example)
    assert [budget.profile for budget in job.devices] == ["local-1t", "local-2t"]
    assert shelves.is_name(job.space)
