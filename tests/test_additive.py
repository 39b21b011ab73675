"""A probe's single choices put together, and the candidates that a knapsack over them expects to be best."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from autocompress import space as sp
from autocompress.registry import resolve
from autocompress.searchers.additive import REST, SIZE, additive, rows
from autocompress.searchers.design import bound, device_shares, evenly, first, integers, spread
from autocompress.searchers.knapsack import Knapsack
from autocompress.searchers.outlook import Beliefs
from autocompress.searchers.random import Random as Control
from autocompress.testing import ClosedForm
from autocompress.types import (
    Budget,
    Facts,
    Gene,
    Goal,
    Interval,
    Limit,
    Outcome,
    Probed,
    Quality,
    Reading,
    Site,
    Space,
    State,
    Trial,
)  # fmt: skip


def rank(a, b) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


@pytest.mark.parametrize("size", [20, 60, 200])
def test_whole_candidates_are_ranked_by_single_choices(size):
    problem = ClosedForm(size, devices=2, probe=True, seed=4)
    model = additive(problem.space, problem.facts)
    drawn = spread(problem.space, 80, Random(0))
    expected = model.ratios(rows(problem.space, drawn))
    for device in (0, 1):
        assert rank(expected[:, device], [problem.ratio(g, device) for g in drawn]) > 0.93
    costs = model.costs(rows(problem.space, drawn)).sum(axis=1)
    assert rank(costs, [-problem.quality(g) for g in drawn]) > 0.6
    assert model.ratios(rows(problem.space, [sp.parent(problem.space)])) == pytest.approx(1.0)


def test_without_a_probe_there_is_no_model():
    problem = ClosedForm(20)
    assert additive(problem.space, problem.facts) is None
    assert first(problem.space, problem.facts, problem.goals, 9, Random(3)) == spread(problem.space, 9, Random(3))


def reading(ms: float) -> Reading:
    exact = Interval(value=ms, low=ms, high=ms)
    return Reading(
        profile="d", ms=exact, p95_ms=exact, baseline_ms=exact, ratio=exact.model_copy(update={"value": 1.0}),
        samples=9, rounds=3,
    )  # fmt: skip


def blocks(count: int, *, tried: bool = True) -> tuple[Space, Facts]:
    """A network of equal blocks of 1 ms: each can be dropped, its layer pruned (0.4 ms) and made int8 (0.5 ms)."""
    genes, probe, sites = [], [], []
    for i in range(count):
        name = f"stage.{i}"
        keep = {f"block@{name}": ("keep",)}
        genes.append(
            Gene(name=f"block@{name}", kind="policy", choices=("keep", "drop"), site=name, op="block", param="kind")
        )
        genes.append(
            Gene(
                name=f"prune@{name}", kind="policy", choices=(0.0, 0.5), when=keep, site=f"{name}.conv", op="prune",
                param="ratio",
            )
        )  # fmt: skip
        genes.append(
            Gene(
                name=f"bits@{name}", kind="policy", choices=("float", "int8"), when=keep, site=name, op="quantize",
                param="bits",
            )
        )  # fmt: skip
        probe.append(Probed(gene=f"block@{name}", choice="drop", kl=0.1, ms={"d": 1.0}, best_ms={"d": 0.5}))
        probe.append(Probed(gene=f"prune@{name}", choice=0.5, kl=0.05, ms={"d": 0.4}, best_ms={"d": 0.2}))
        look = {"kl": 0.01, "ms": {"d": 0.3}, "best_ms": {"d": 0.7}} if tried else {"why": "not tried"}
        probe.append(Probed(gene=f"bits@{name}", choice="int8", **look))
        depth = i / max(1, count - 1)
        sites.append(Site(name=name, kind="block", ops=("block",), depth=depth))
        sites.append(Site(name=f"{name}.conv", kind="conv", ops=("prune", "quantize"), macs=100, depth=depth))
    space = Space(name="blocks", genes=tuple(genes))
    return space, Facts(sites=tuple(sites), baseline={"d": reading(float(count))}, probe=tuple(probe))


def test_ops_at_one_place_shrink_what_is_left_and_a_dropped_block_leaves_nothing():
    space, facts = blocks(4)
    model = additive(space, facts)
    parent = [0] * 12

    def ratio(**chosen: int) -> float:
        values = list(parent)
        for name, value in chosen.items():
            values[["block", "prune", "bits"].index(name)] = value
        return float(model.ratios(rows(space, [sp.canonical(space, tuple(values))]))[0, 0])

    pruned, both, dropped = ratio(prune=1), ratio(prune=1, bits=1), ratio(block=1)
    assert pruned == pytest.approx(1 - (1 - REST) * 0.4 / 4)
    assert both > pruned - (1 - REST) * 0.5 / 4  # not the sum of both gains
    assert ratio(block=1, prune=1, bits=1) == dropped == pytest.approx(1 - (1 - REST) / 4)
    integers_everywhere = [0, 0, 1] * 4
    whole = float(model.ratios(rows(space, [tuple(integers_everywhere)]))[0, 0])
    assert whole == pytest.approx(REST + (1 - REST) * 0.5 + model.devices[0].border, abs=0.01)


def test_what_the_probe_had_no_time_for_counts_as_its_like():
    space, facts = blocks(4, tried=False)
    cut = Probed(gene="prune@stage.3", choice=0.5, why="not tried: the time was up")
    facts = facts.model_copy(update={"probe": tuple(cut if p.gene == cut.gene else p for p in facts.probe)})
    model = additive(space, facts)
    alone = [tuple(int(i == at) for i in range(12)) for at in (1, 10)]
    found = model.ratios(rows(space, alone))[:, 0]
    assert found[0] == pytest.approx(found[1])
    costs = model.costs(rows(space, alone)).sum(axis=1)
    assert costs[0] == pytest.approx(costs[1])
    # integers were not tried at all: what dropping gains among them says what they take
    whole = float(model.ratios(rows(space, [(0, 0, 1) * 4]))[0, 0])
    assert whole == pytest.approx(REST + (1 - REST) * 0.5, abs=0.01)
    assert 0 < model.costs(rows(space, [(0, 0, 1) * 4])).sum() < costs[0] * 4


def test_a_cut_that_reaches_other_blocks_is_no_time_of_its_own_place():
    space, facts = blocks(4)
    stem = Gene(
        name="prune@stem", kind="policy", choices=(0.0, 0.5), site="stem", op="prune", param="ratio",
    )  # fmt: skip
    space = space.model_copy(update={"genes": (stem, *space.genes)})
    reach = tuple(f"stage.{i}.conv" for i in range(4))
    wide = Probed(gene="prune@stem", choice=0.5, kl=0.1, ms={"d": 2.0}, best_ms={"d": 1.0}, reach=reach)
    site = Site(name="stem", kind="conv", ops=("prune",), macs=10)
    facts = facts.model_copy(update={"probe": (wide, *facts.probe), "sites": (site, *facts.sites)})
    model = additive(space, facts)
    assert model.devices[0].floats[model.places.index("stem")] < 0.05
    everything = [(0, *(1, 0, 0) * 4), (1, *(0, 0, 0) * 4), (1, *(1, 0, 0) * 2, *(0, 0, 0) * 2)]
    dropped, cut, both = model.ratios(rows(space, everything))[:, 0]
    assert dropped < 0.1
    assert cut == pytest.approx(0.5, abs=0.03)
    assert both == pytest.approx(0.25, abs=0.04)  # of what is left, half


def test_the_knapsack_walks_from_nothing_to_everything_and_spaces_its_drops():
    space, facts = blocks(8)
    front = Knapsack(additive(space, facts)).front(np.ones(1))
    assert front[0] == sp.parent(space) or sum(front[0]) < 8
    ratios = additive(space, facts).ratios(rows(space, front))[:, 0]
    assert (np.diff(ratios) < 0).all()
    assert all(front[-1][i] == 1 for i in range(0, 24, 3))  # every block dropped


def test_random_search_may_begin_with_them_as_a_control():
    problem = ClosedForm(20, probe=True)
    plain = Control(problem.space, problem.goals, problem.limit, problem.facts, 0)
    begun = Control(problem.space, problem.goals, problem.limit, problem.facts, 0, design=4)
    asked = [begun.ask(number, []).genotype for number in range(1, 7)]
    assert tuple(asked[:4]) == first(problem.space, problem.facts, problem.goals, 4, Random("0:design"))
    assert asked[4:] == [plain.ask(number, []).genotype for number in (5, 6)]


@pytest.mark.parametrize("size", [20, 60, 200])
def test_the_first_asks_from_a_probe_beat_spread_ones(size):
    problem = ClosedForm(size, probe=True, seed=7)
    fed = first(problem.space, problem.facts, problem.goals, 12, Random(0))
    assert fed[0] == integers(problem.space)
    assert len(set(fed)) == len(fed) == 12
    assert all(sp.canonical(problem.space, g) == g for g in fed)
    blind = spread(problem.space, 12, Random(0))
    reached = [problem.hypervolume([problem.trial(1, g) for g in gs]) for gs in (fed, blind)]
    assert reached[0] > reached[1] + 0.05


def test_every_goal_gets_its_share_down_to_beyond_its_budget():
    problem = ClosedForm(60, devices=2, speedup=2.5, probe=True, seed=1)
    model = additive(problem.space, problem.facts)
    fed = first(problem.space, problem.facts, problem.goals, 20, Random(0))
    for goal in problem.goals:
        assert bound(goal, problem.facts.baseline) == pytest.approx(0.4)
        expected = model.ratios(rows(problem.space, fed)) @ device_shares(model, goal)
        assert (expected < 0.2).any()
        assert ((expected > 0.2) & (expected < 0.6)).sum() >= 3


def layered() -> tuple[Space, Facts]:
    """Blocks of 1 ms: two layers, of 0.75 and 0.25 ms, are made int8 one by one; each then takes half of its time."""
    genes, probe, sites = [], [], []
    for i in range(4):
        name = f"stage.{i}"
        keep = {f"block@{name}": ("keep",)}
        genes.append(
            Gene(name=f"block@{name}", kind="policy", choices=("keep", "drop"), site=name, op="block", param="kind")
        )
        probe.append(Probed(gene=f"block@{name}", choice="drop", kl=0.1, ms={"d": 1.0}, smaller=0.25))
        sites.append(Site(name=name, kind="block", ops=("block",), depth=i / 3))
        for part, share in (("a", 3), ("b", 1)):
            site, gene = f"{name}.{part}", f"bits@{name}.{part}"
            choices = ("float", "int8")
            genes.append(
                Gene(name=gene, kind="policy", choices=choices, when=keep, site=site, op="quantize", param="bits")
            )
            gains = {"ms": {"d": share / 8}, "best_ms": {"d": share / 8}, "smaller": 0.75 * share / 16}
            probe.append(Probed(gene=gene, choice="int8", kl=0.001, **gains))
            sites.append(Site(name=site, kind="conv", macs=100 * share, parameters=10 * share, depth=i / 3))
    facts = Facts(sites=tuple(sites), baseline={"d": reading(4.0)}, probe=tuple(probe))
    return Space(name="layered", genes=tuple(genes)), facts


def test_integers_of_a_blocks_layers_add_up():
    space, facts = layered()
    model = additive(space, facts)
    whole, first_layers = integers(space), tuple(int(gene.name.endswith(".a")) for gene in space.genes)
    ratios = model.ratios(rows(space, [sp.parent(space), first_layers, whole]))
    assert ratios[:, 0] == pytest.approx([1.0, 1 - 0.75 / 2, 0.5], abs=2 * REST)
    assert ratios[:, 1] == pytest.approx([1.0, 1 - 0.75 * 0.75, 0.25], abs=0.01)
    # and the knapsack, to which they are nearly free, takes them before it drops anything
    solved = Knapsack(model).front(np.array([1.0, 0.0]))
    kept = [g for g in solved if not any(v for v, gene in zip(g, space.genes, strict=True) if gene.op == "block")]
    assert whole in kept


def test_what_all_integers_take_is_what_was_measured():
    space, facts = layered()
    ratios = {}
    for told in ({}, {"d": 0.4}):
        model = additive(space, facts.model_copy(update={"integers": told}))
        first_layers = tuple(int(gene.name.endswith(".a")) for gene in space.genes)
        ratios[len(told)] = model.ratios(rows(space, [sp.parent(space), first_layers, integers(space)]))[:, 0]
    assert ratios[1] == pytest.approx([1.0, 1 - 0.75 * 0.6, 0.4], abs=REST)
    assert ratios[0][2] == pytest.approx(0.5, abs=2 * REST)


def test_questions_that_do_not_fit_into_a_place_are_those_that_gain_least():
    space, facts = layered()
    many = tuple(f"form{i}" for i in range(400))
    extra = Gene(
        name="r@stage.0.a", kind="policy", choices=("as_is", *many), site="stage.0.a", op="replace", param="kind"
    )
    tried = (Probed(gene=extra.name, choice=form, kl=0.1, ms={"d": 0.01}, best_ms={"d": 0.01}) for form in many)
    space = space.model_copy(update={"genes": (*space.genes, extra)})
    model = additive(space, facts.model_copy(update={"probe": (*facts.probe, *tried)}))
    taken = {space.genes[i].name for i in Knapsack(model).items[0].genes}
    assert taken == {"block@stage.0", "bits@stage.0.a", "bits@stage.0.b"}


def test_blocks_are_dropped_evenly_too():
    space, facts = blocks(6)
    goals = ClosedForm(10).goals
    half = next(g for g in evenly(space) if sum(g[0::3]) == 3)
    assert half[0::3] == (0, 1, 0, 1, 0, 1)
    assert all(half[i + 2] == 1 for i in range(0, 18, 3) if not half[i])  # what is left in integers
    assert first(space, facts, goals, 6, Random(0))[0] == integers(space)


def test_depths_stay_few_however_many_stages_there_are():
    def staged(stages: int, each: int) -> Space:
        names = [f"s{i}.{j}" for i in range(stages) for j in range(each)]
        return Space(
            name="staged",
            genes=tuple(
                Gene(name=n, kind="policy", choices=("keep", "drop"), site=n, op="block", param="kind") for n in names
            ),
        )

    assert len(set(evenly(staged(3, 8)))) == 8**3 - 1
    assert 4 < len(set(evenly(staged(40, 8)))) <= 13
    assert {sum(g) for g in evenly(staged(40, 1))} == {40}
    assert list(evenly(Space(name="none", genes=()))) == []


WEIGHTS = (1, 1, 1, 1, 4, 4, 4, 4)  # megabytes of eight blocks


def sized_blocks() -> tuple[Space, Facts]:
    """Eight blocks as above, of which the last four hold most of the weights."""
    space, facts = blocks(8)
    saved = {"drop": 1.0, 0.5: 0.5, "int8": 0.75}

    def with_size(one: Probed) -> Probed:
        weight = WEIGHTS[int(one.gene.rpartition(".")[2])] / sum(WEIGHTS)
        return one.model_copy(update={"smaller": saved[one.choice] * weight})

    probe = tuple(with_size(one) for one in facts.probe)
    return space, facts.model_copy(update={"probe": probe, "baseline_size_mb": float(sum(WEIGHTS))})


def measured(g: tuple[int, ...]) -> tuple[float, float, float]:
    """Quality, latency ratio and megabytes of a candidate of them."""
    lost, ms, mb = 0.0, 0.2, 0.3
    for (dropped, pruned, integers_), weight in zip(zip(g[::3], g[1::3], g[2::3], strict=True), WEIGHTS, strict=True):
        lost += 0.03 if dropped else 0.012 * pruned + 0.002 * integers_
        ms += 0.0 if dropped else (1 - 0.4 * pruned) * (1 - 0.5 * integers_)
        mb += 0.0 if dropped else weight * (1 - 0.5 * pruned) * (1 - 0.75 * integers_)
    return 0.9 - lost, ms / 8.2, mb


def goal_of(size_mb: float | None) -> Goal:
    return Goal(name="d", budgets=(Budget(profile="d", speedup=2.5, size_mb=size_mb),))


def test_a_bound_on_the_size_takes_weights_where_they_are():
    space, facts = sized_blocks()
    model = additive(space, facts)
    assert [device.profile for device in model.devices] == ["d", SIZE]
    halves = [(0, 1, 0) * 4 + (0, 0, 0) * 4, (0, 0, 0) * 4 + (0, 1, 0) * 4]
    (_, light), (_, heavy) = model.ratios(rows(space, halves))
    assert 1 - heavy == pytest.approx(4 * (1 - light), rel=0.01)
    plain, small = (first(space, facts, (goal_of(mb),), 12, Random(0)) for mb in (None, 2.0))
    held = [[measured(g)[2] <= 2.0 for g in found] for found in (plain, small)]
    assert sum(held[1]) > sum(held[0])
    assert np.mean(held[1][1:]) > 0.6
    best = [max(q for q, ratio, mb in map(measured, found) if mb <= 2.0 and ratio <= 0.4) for found in (plain, small)]
    assert best[1] >= best[0]


@pytest.mark.parametrize("name", ["evolution", "gradient", "policy_gradient"])
def test_searchers_learn_the_size(name):
    space, facts = sized_blocks()
    limit = Limit(metric="accuracy", floor=0.6)
    goal = goal_of(1.5)
    facts = facts.model_copy(update={"probe": ()})  # told by trials alone
    searcher = resolve("searcher", name)(space, (goal,), limit, facts, seed=1)
    held = []
    for number in range(1, 41):
        g = searcher.ask(number, []).genotype
        quality, ratio, mb = measured(g)
        exact = Interval(value=ratio, low=ratio, high=ratio)
        seen = reading(8.2 * ratio).model_copy(update={"ratio": exact})
        score = Quality(
            metric="accuracy", split="selection", value=Interval(value=quality, low=quality, high=quality), samples=100
        )
        outcome = Outcome(fidelity=1.0, readings={"d": seen}, quality={"d": score}, size_mb={"d": mb})
        searcher.tell(Trial(number=number, genotype=g, state=State.DONE, outcome=outcome))
        held.append(mb <= 1.5 and ratio <= 0.4)
    assert np.mean(held[20:]) >= 0.5


def test_the_control_says_nothing_of_how_far_candidates_are_trained():
    space, facts = sized_blocks()
    limit = Limit(metric="accuracy", floor=0.88)
    beliefs = Beliefs(space, (goal_of(None),), limit, facts)

    def tell(number: int, g: tuple[int, ...], quality: float, fidelity: float) -> None:
        _, ratio, mb = measured(g)
        seen = reading(8.2 * ratio).model_copy(update={"ratio": Interval(value=ratio, low=ratio, high=ratio)})
        value = Interval(value=quality, low=quality, high=quality)
        score = Quality(metric="accuracy", split="selection", value=value, samples=100)
        outcome = Outcome(fidelity=fidelity, readings={"d": seen}, quality={"d": score}, size_mb={"d": mb})
        beliefs.tell(number, Trial(number=number, genotype=g, state=State.STOPPED, outcome=outcome))

    tell(0, sp.parent(space), 0.9, 1.0)
    drawn = spread(space, 24, Random(1))
    for number, g in enumerate(drawn[1:], 1):
        quality = measured(g)[0] - (0.4 if number % 3 else 0.2)  # a third of them is trained a little longer
        tell(number, g, quality, 0.001 if number % 3 else 0.003)
    outlook = beliefs.about(0)
    assert outlook is not None
    expected = outlook.loss(rows(space, drawn[1:]))
    assert (expected > 1).all()  # nobody has come near the floor yet, so nobody is expected there
    assert rank(expected, [-measured(g)[0] for g in drawn[1:]]) > 0.7
