"""The probe and what it stands on: times by site, single layers' times, divergence, what leaves the space."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from autocompress import auto, export, latency, load
from autocompress import probe as probing
from autocompress.answers import Answers
from autocompress.controller import Header
from autocompress.devices.fingerprint import resolve_local
from autocompress.devices.layers import Layer, Table, network
from autocompress.devices.profiler import Times, ratio, site_latency
from autocompress.journal import read
from autocompress.models.foreign import Foreign
from autocompress.parts import make_ops, make_searcher
from autocompress.pipeline import FirstLook, Work, export_float, finish
from autocompress.probe import probe, reduced
from autocompress.run import resume, run
from autocompress.tasks import InputSpec
from autocompress.tasks.digits import Digits
from autocompress.types import (
    Budget,
    Cost,
    Facts,
    Gene,
    Numeric,
    Policy,
    QualityLimit,
    Rule,
    Site,
    Space,
    TrialFailure,
    UserError,
)  # fmt: skip
from tests import small_search


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(16, 96, 3, padding=1)
        self.norm = nn.BatchNorm2d(96)
        self.back = nn.Conv2d(96, 16, 1)

    def forward(self, x):
        return x + self.back(torch.relu(self.norm(self.wide(x))))


class Net(nn.Module):
    """A residual block with a wide layer, which pays when it is pruned, between two small ones."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = Block()
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def work():
    torch.manual_seed(0)
    task = Digits()
    builder = Foreign.of(Net(), task.input)
    return Work(
        builder=builder,
        task=task,
        ops=make_ops(("block", "replace", "prune", "lowrank", "quantize", "distill")),
        parent=builder.build({}).eval(),
        profiles=(resolve_local(load.profile("local-1t")),),
    )


@pytest.fixture(scope="module")
def space(work):
    full = auto.space(work.builder)
    return full.model_copy(update={"genes": tuple(g for g in full.genes if not g.op or g.op in work.ops)})


# --- times --------------------------------------------------------------------------------------------------------


def everything(work):
    sites = [site.name for site in work.builder.sites() if "quantize" in site.ops]
    return Policy(rules=tuple(Rule(site=name, op="quantize", settings={"bits": "int8"}) for name in sites))


def test_times_are_told_apart_by_site_also_where_layers_are_fused(work):
    exported = export_float(work, work.parent)
    integers = finish(work, exported, everything(work), work.profiles[0], FirstLook(work.task)).model
    for model in (export.compose(exported), integers):
        times = site_latency(model, exported.parts[0].nodes, seconds=0.1)
        assert set(times.sites) == {"stem", "body.wide", "body.back", "head"}
        assert max(times.sites, key=lambda name: times.sites[name]) == "body.wide"
        assert times.rest >= 0
        assert times.total == pytest.approx(sum(times.sites.values()) + times.rest)


def test_a_file_that_does_not_load_is_a_trial_failure():
    with pytest.raises(TrialFailure, match="onnxruntime cannot"):
        site_latency(b"none", {})
    with pytest.raises(TrialFailure, match="onnxruntime cannot"):
        ratio(b"none", b"none")


def test_a_larger_network_is_slower(work):
    small, large = (
        export.compose(export.export(nn.Conv2d(1, width, 3, padding=1), InputSpec(shape=(1, 64, 64)), opset=17))
        for width in (8, 256)
    )
    assert ratio(large, small, seconds=0.05) > 2
    # idle threads of one session take no core from the other's
    assert ratio(large, small, threads=2, seconds=0.05) > 1.5


@given(
    channels=st.integers(1, 4),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
def test_shapes_of_layers_are_torchs(channels, groups, kernel, stride, padding, dilation):
    conv = nn.Conv2d(channels * groups, 2 * groups, kernel, stride, padding, dilation, groups)
    _, (used,) = latency.run(conv, (torch.zeros(3, channels * groups, 9, 8),))
    assert (3, *used.layer.output) == tuple(conv(torch.zeros(3, channels * groups, 9, 8)).shape)
    assert used.layer.weight == tuple(conv.weight.shape)
    positions = used.layer.output[1] * used.layer.output[2]
    assert used.macs == positions * 2 * groups * channels * kernel**2


def test_convolutions_over_lines_are_layers_too():
    conv = nn.Conv1d(4, 6, 3, padding="same", dilation=2)
    _, (used,) = latency.run(conv, (torch.zeros(2, 4, 10),))
    assert used.layer.output == (6, 10)
    assert used.macs == 10 * 6 * 4 * 3
    table = Table()
    table.learn([used.layer])
    table.learn([used.layer], Numeric())
    assert table.ms(used.layer)
    _, none = latency.run(nn.ConvTranspose2d(4, 6, 3), (torch.zeros(2, 4, 10, 10),))
    assert none == ()


def test_windows_and_tokens_count_once_for_each_example():
    _, (used,) = latency.run(nn.Linear(6, 4), (torch.zeros(2, 5, 6),))
    assert used.layer == Layer((5, 6), (4, 6))
    assert used.macs == 5 * 24

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.conv(x.reshape(-1, 1, 2, 4))

    _, (used,) = latency.run(Windows(), (torch.zeros(3, 1, 4, 4),))
    assert used.times == 2
    assert used.macs == 2 * 2 * 8


@pytest.mark.parametrize("numeric", [None, Numeric(), Numeric(activation="int8", per_channel=False, weight="uint8")])
def test_layers_are_measured_once_side_by_side(numeric, monkeypatch):
    layers = [
        Layer((8, 16, 16), (32, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
        Layer((16, 8, 8), (16, 1, 3, 3), (2, 2), (1, 1), (1, 1), 16),
        Layer((49, 64), (32, 64)),
        Layer((64,), (10, 64)),
    ]
    table = Table()
    table.learn(layers, numeric)
    assert all((table.ms(layer, numeric) or 0) > 0 for layer in layers)
    monkeypatch.setattr("autocompress.devices.layers.network", None)
    table.learn(layers, numeric)
    assert table.ms(Layer((1,), (1, 1)), numeric) is None


def test_a_large_table_is_measured_in_portions(monkeypatch):
    made = []
    monkeypatch.setattr("autocompress.devices.layers.VALUES", 100)
    monkeypatch.setattr(
        "autocompress.devices.layers.network", lambda some, *rest: made.append(len(some)) or network(some, *rest)
    )
    Table().learn([Layer((40 + n,), (10, 40 + n)) for n in range(4)])
    assert made == [1, 1, 1, 1]


def test_changed_layers_are_timed_in_proportion_to_their_sites():
    parent = (latency.Used("a", Layer((8,), (8, 8))), latency.Used("b", Layer((8,), (4, 8))))
    table = Table()
    table.known = {(parent[0].layer, None): 2.0, (parent[1].layer, None): 1.0, (Layer((8,), (2, 8)), None): 0.5}
    times = Times({"a": 4.0, "b": 1.0}, rest=1.0)
    model = latency.Proportions(parent, table, Numeric(), times, None)
    assert model.gained(parent, integers=False) == 0
    assert model.gained(parent[:1], integers=False) == pytest.approx(1.0)
    thin = (latency.Used("a.first", Layer((8,), (2, 8))), latency.Used("a.second", Layer((8,), (2, 8))), parent[1])
    assert model.gained(thin, integers=False) == pytest.approx(4.0 * (2.0 - 1.0) / 2.0)
    assert model.gained(thin, integers=True) is None
    unknown = (latency.Used("a", Layer((8,), (1, 8))), parent[1])  # 8 of 64 multiply-adds, at 3 ms per 96
    assert model.gained(unknown, integers=False) == pytest.approx(4.0 * (2.0 - 0.25) / 2.0)


def test_a_layer_that_cannot_be_measured_does_not_spoil_the_others():
    good, bad = Layer((8,), (4, 8)), Layer((8, 4, 4), (4, 7, 3, 3), (1, 1), (1, 1), (1, 1))
    table = Table()
    table.learn([good, bad])
    assert table.ms(good) is not None
    assert table.ms(bad) is None


# --- divergence -----------------------------------------------------------------------------------------------------


def test_divergence_is_kl_of_class_scores():
    parent, other = torch.randn(32, 10), torch.randn(32, 10)
    answers = Answers([parent], classes=True)
    expected = torch.nn.functional.kl_div(other.log_softmax(1), parent.softmax(1), reduction="batchmean")
    assert answers.divergence([other]) == pytest.approx(float(expected), rel=1e-5)
    assert answers.divergence([parent + 3]) == pytest.approx(0, abs=1e-6)
    assert 0 < answers.constant() < answers.divergence([other * 3])


def test_divergence_of_regression_counts_in_standard_deviations():
    parent = torch.randn(1000, 3) * 7
    answers = Answers([parent], classes=False)
    assert answers.divergence([parent.mean() + 0 * parent]) == pytest.approx(0.5, rel=1e-3)
    assert answers.constant() == 0.5


# --- the probe ------------------------------------------------------------------------------------------------------


def facts(work):
    return Facts(sites=work.builder.sites(), parent="0")


def test_what_never_pays_leaves_the_space(work, space, tmp_path, monkeypatch):
    said = []
    steps: list[tuple[str, int, int, float]] = []
    found = probe(
        work, space, facts(work), (), seconds=60, folder=tmp_path, say=said.append, step=lambda *one: steps.append(one)
    )
    names = [gene.name for gene in space.genes]
    assert steps[0][:2] == ("the network as it is", 0)
    for what in ("latency", "quality"):
        told = [step for step in steps if step[0].startswith(f"{what}: ")]
        assert told
        assert [done for _, done, _, _ in told] == list(range(len(told)))
        assert {total for _, _, total, _ in told} == {len(told)}
        assert all(words.split(": ")[1].split(" = ")[0] in names for words, _, _, _ in told)
    assert all(0 <= left <= 60 for _, _, _, left in steps)
    by = {(one.gene, one.choice): one for one in found.probed}
    wanted = {(g.name, c) for g in space.genes for c in g.choices[1:] if g.op != "distill"}
    assert set(by) == wanted
    assert all(one.kl is not None or one.why for one in found.probed)
    assert all(list(one.ms) == ["local-1t"] for one in found.probed)
    # 96 channels to 24 is a quarter of the work; the untrained network's answers hardly change
    assert by["prune.ratio@body.wide", 0.75].ms["local-1t"] > 0
    assert by["prune.ratio@body.wide", 0.75].kept
    assert by["block.kind@body", "drop"].ms["local-1t"] > by["prune.ratio@body.wide", 0.75].ms["local-1t"]
    assert all(one.why for one in found.probed if not one.kept)
    left = {gene.name: gene.choices for gene in found.space.genes}
    for one in found.probed:
        assert (one.choice in left.get(one.gene, ())) == one.kept
    assert found.space.always == space.always
    assert len(said) == 1
    assert "never pay" in str(found)
    assert list(found.integers) == ["local-1t"]
    assert 0.1 < found.integers["local-1t"] < 10
    assert found.facts == {"probe": found.probed, "integers": found.integers}
    # a second start of the same run reads what the first one found
    monkeypatch.setattr(probing._Probe, "go", None)
    again = probe(work, space, facts(work), (), seconds=60, folder=tmp_path)
    assert again.probed == found.probed
    assert again.integers == found.integers
    assert again.space == found.space
    (tmp_path / probing.FILE).write_text("{")
    with pytest.raises(TypeError):
        probe(work, space, facts(work), (), seconds=60, folder=tmp_path)


def test_of_equal_sites_an_equal_share_is_asked_first(work, space):
    names = [f"stage.{i}" for i in range(4)] + ["head"]
    sites = tuple(Site(name=n, kind="conv", macs=9 if n == "head" else 5, parameters=3) for n in names)
    genes = tuple(
        Gene(name=f"prune@{n}", kind="policy", choices=(0.0, 0.5), site=n, op="prune", param="ratio") for n in names
    )
    asked = probing._Probe(
        work, Space(name="s", genes=genes), Facts(sites=sites), 0.0, small=False, say=print, step=print
    )
    assert [one.gene.site for one in asked.questions()] == ["head", *names[:4]]
    twice = tuple(g for gene in genes for g in (gene, gene.model_copy(update={"name": f"{gene.name}b", "param": "b"})))
    asked.space = Space(name="s", genes=twice)
    order = [one.gene.site for one in asked.questions()]
    assert order[:4] == ["head", "head", "stage.0", "stage.0"]
    knob = Gene(name="depth", kind="arch", choices=(4, 3, 2))
    asked.space = Space(name="s", genes=(*genes, knob))
    assert asked.questions()[0].gene.name == "depth"


def test_what_a_choice_changes_elsewhere_is_told(work, space):
    found = probe(work, space, facts(work), (), seconds=60)
    layers = {s.name for s in work.builder.sites() if s.kind != "block"}
    reaching = [one for one in found.probed if one.reach]
    assert reaching, found.probed
    for one in reaching:
        site = next(gene.site for gene in space.genes if gene.name == one.gene)
        assert all(not f"{name}.".startswith(f"{site}.") for name in one.reach)
        assert set(one.reach) <= layers


def test_without_time_nothing_leaves(work, space):
    found = probe(work, space, facts(work), (), seconds=0)
    assert found.space == space
    assert all(one.kept and one.kl is None and "time" in one.why for one in found.probed)
    assert json.dumps([one.model_dump() for one in found.probed], allow_nan=False)


def test_a_choice_that_cannot_be_made_leaves_with_its_reason(work, space):
    class Broken:
        name, phase, params = "prune", "structure", {"ratio": 0.0}

        def decide(self, *args):
            raise RuntimeError("no such luck\nat all")

    broken = replace(work, ops={**work.ops, "prune": Broken()})
    genes = tuple(gene.model_copy(update={"when": {}}) for gene in space.genes if gene.op == "prune")
    found = probe(broken, space.model_copy(update={"genes": genes}), facts(work), (), seconds=30)
    assert found.space.genes == ()
    assert {one.why for one in found.probed} == {"RuntimeError: no such luck at all"}


def test_where_size_is_bounded_smaller_is_a_gain():
    gene = SimpleNamespace(kind="policy")
    one = probing.Tried(gene, 0.5, 0, kl=0.1, gained={"p": -0.1}, best_gained={"p": -0.1}, smaller=0.2)
    assert not one.pays(1.0, small=False)
    assert one.pays(1.0, small=True)
    one.kl = 2.0
    assert not one.pays(1.0, small=True)
    one.best_kl = 0.1
    assert one.pays_on_top(1.0, small=True)


def test_integers_that_pay_only_together_stay():
    one = probing.Tried(SimpleNamespace(kind="policy"), "int8", 0, kl=0.0, gained={"p": -0.05}, best_gained={"p": 0.02})
    assert not one.pays(1.0, small=False)
    assert one.pays_on_top(1.0, small=False)


def test_integers_are_judged_beside_integers_also_where_size_is_bounded(work, space):
    small = (Budget(profile="local-1t", speedup=2, size_mb=0.01),)
    found = probe(work, space, facts(work), small, seconds=60)
    slower = [one for one in found.probed if one.choice == "int8" and one.ms and one.ms["local-1t"] < 0]
    assert all(one.best_ms for one in slower), slower
    assert all(one.smaller is not None for one in found.probed if one.ms)


# --- in a search ------------------------------------------------------------------------------------------------------


def test_a_search_of_a_derived_space_writes_what_it_searched_and_resumes(tmp_path, monkeypatch):
    out, builder = tmp_path / "out", small_search.builder()
    job = small_search.job(out, probe=2.0, cost=Cost(trials=1)).model_copy(
        update={"space": "auto", "quality": QualityLimit(min=1.0)}  # which nothing meets, so nothing is certified
    )
    run(job, builder=builder, serial=True, console=Console(quiet=True))
    header = Header.model_validate(read(out / "journal.jsonl").events[0])
    assert header.facts.probe
    assert header.space == reduced(auto.space(builder), header.facts.probe)
    assert load.space(out / "space.yaml", builder) == header.space

    class StoppedError(Exception):
        pass

    def stop(controller, *others):
        raise StoppedError

    resumed = []
    monkeypatch.setattr("autocompress.run._Run.execute", stop)
    monkeypatch.setattr("autocompress.run.make_searcher", lambda one: resumed.append(one) or make_searcher(one))
    with pytest.raises(StoppedError):
        resume(out, builder=builder, serial=True, trials=2, console=Console(quiet=True))
    assert [one.space for one in resumed] == [header.space]
    with pytest.raises(UserError, match="weights of another network"):
        resume(out, builder=small_search.ConvNet(arch={"depth.0": 1}), serial=True, console=Console(quiet=True))
