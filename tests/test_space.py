"""Properties of the joint space: canonical form, variation, decoding, counting."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress import space as sp
from autocompress.types import Candidate, Gene, Policy, Rule, Space, UserError


@st.composite
def spaces(draw: st.DrawFn, largest: int = 7) -> Space:
    """Random spaces whose genes depend on random earlier genes."""
    genes: list[Gene] = []
    for i in range(draw(st.integers(0, largest))):
        choices = tuple(draw(st.sampled_from([(0,), (0, 1), (False, True), (1.0, 0.5, 0.25), ("a", "b", "c", "d")])))
        when = {}
        for other in draw(st.lists(st.sampled_from(genes), max_size=2, unique_by=lambda g: g.name)) if genes else []:
            when[other.name] = tuple(draw(st.lists(st.sampled_from(other.choices), min_size=1, unique=True)))
        if draw(st.booleans()):
            genes.append(Gene(name=f"k{i}", kind="arch", choices=choices, when=when))
        else:
            genes.append(
                Gene(
                    name=f"p{i}",
                    kind="policy",
                    choices=choices,
                    when=when,
                    site=f"s{i // 2}",
                    op="prune",
                    param=f"q{i}",
                )
            )
    return Space(name="drawn", genes=tuple(genes))


@st.composite
def asked(draw: st.DrawFn) -> tuple[Space, tuple[int, ...]]:
    space = draw(spaces())
    return space, tuple(draw(st.integers(0, len(gene.choices) - 1)) for gene in space.genes)


@given(asked())
def test_canonical_is_idempotent_and_genes_that_do_not_apply_stand_at_first(case):
    space, g = case
    once = sp.canonical(space, g)
    assert sp.canonical(space, once) == once
    chosen: dict[str, object] = {}
    for i, gene in enumerate(space.genes):
        applies = all(chosen[other] in allowed for other, allowed in gene.when.items())
        assert sp.active(space, once)[i] == applies
        assert once[i] == (g[i] if applies else 0)
        chosen[gene.name] = gene.choices[once[i]]


def test_a_chain_vanishes_whole():
    space = Space(
        name="chain",
        genes=(
            Gene(name="depth", kind="arch", choices=(2, 1)),
            Gene(name="kind", kind="arch", choices=("plain", "grouped"), when={"depth": (2,)}),
            Gene(name="groups", kind="arch", choices=(1, 2, 4), when={"kind": ("grouped",)}),
        ),
    )
    assert sp.canonical(space, (1, 1, 2)) == (1, 0, 0)
    assert sp.canonical(space, (0, 1, 2)) == (0, 1, 2)
    assert sp.cardinality(space) == 1 + 1 + 3
    assert list(sp.every(space)) == [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0)]


@given(asked())
def test_decode_and_encode_are_inverse_on_canonical(case):
    space, g = case
    candidate = sp.decode(space, g)
    assert sp.encode(space, candidate) == sp.canonical(space, g)
    assert sp.decode(space, sp.encode(space, candidate)) == candidate
    assert sp.decode(space, sp.parent(space)).policy.rules == ()


@given(asked(), st.integers(0, 2**32))
def test_variation_stays_canonical_and_mutation_always_moves(case, seed):
    space, g = case
    rng = Random(seed)
    here = sp.canonical(space, g)
    drawn = sp.sample(space, rng)
    assert drawn == sp.canonical(space, drawn)
    child = sp.crossover(space, here, drawn, rng)
    assert child == sp.canonical(space, child)
    moved = sp.mutate(space, here, rng)
    assert moved == sp.canonical(space, moved)
    assert (moved != here) == (sp.cardinality(space) > 1)


@given(asked())
def test_crossover_of_equals_is_the_same(case):
    space, g = case
    here = sp.canonical(space, g)
    assert sp.crossover(space, here, here, Random(1)) == here


@given(spaces(largest=6))
def test_cardinality_counts_what_every_lists(space):
    listed = list(islice(sp.every(space), 5000))
    assert len(listed) == sp.cardinality(space) == len(set(listed))
    assert listed == sorted(listed)
    assert all(sp.canonical(space, g) == g for g in listed)


def test_cardinality_of_a_large_space_is_exact():
    genes = [Gene(name="depth", kind="arch", choices=tuple(range(10, 0, -1)))]
    for i in range(100):
        site = f"s{i}"
        first = Gene(name=f"{site}.r", kind="policy", choices=(0.0, 0.3, 0.6), site=site, op="prune", param="ratio")
        how = Gene(
            name=f"{site}.i", kind="policy", choices=("l1", "l2"), site=site, op="prune", param="importance",
            when={f"{site}.r": (0.3, 0.6)},
        )  # fmt: skip
        genes += [first, how]
    assert sp.cardinality(Space(name="large", genes=tuple(genes))) == 10 * 5**100


def test_rules_hold_all_params_of_an_op():
    space = Space(
        name="rules",
        genes=(
            Gene(name="a", kind="policy", choices=(0.0, 0.5), site="conv", op="prune", param="ratio"),
            Gene(name="b", kind="policy", choices=("l1", "l2"), site="conv", op="prune", param="importance"),
            Gene(name="c", kind="policy", choices=("float", "int8"), site="conv", op="quantize", param="bits"),
        ),
    )
    assert sp.decode(space, (1, 0, 0)) == Candidate(
        arch={}, policy=Policy(rules=(Rule(site="conv", op="prune", settings={"ratio": 0.5, "importance": "l1"}),))
    )
    assert [rule.op for rule in sp.decode(space, (0, 0, 1)).policy.rules] == ["quantize"]


def test_mutation_changes_about_as_many_genes_as_asked():
    space = Space(name="flat", genes=tuple(Gene(name=f"g{i}", kind="arch", choices=(0, 1, 2)) for i in range(50)))
    rng = Random(0)
    changed = [sum(value != 0 for value in sp.mutate(space, sp.parent(space), rng, 3.0)) for _ in range(400)]
    assert min(changed) >= 1
    assert 2.6 < sum(changed) / len(changed) < 3.4


@pytest.mark.parametrize(
    ("gene", "says"),
    [
        (Gene(name="x", kind="policy", choices=(0,)), "needs `site`"),
        (Gene(name="x", kind="arch", choices=(1, 2, 1.0)), "occurs twice"),
        (Gene(name="x", kind="arch", choices=(1,), when={"flag": (1,)}), "`when` asks 'flag' for 1"),
        (Gene(name="x", kind="policy", choices=(1,), site="s", op="o", param="p"), "already sets 'p' of 'o' at 's'"),
    ],
)
def test_a_space_that_contradicts_itself_is_refused(gene, says):
    flag = Gene(name="flag", kind="arch", choices=(False, True))
    taken = Gene(name="taken", kind="policy", choices=(1,), site="s", op="o", param="p")
    space = Space(name="bad", genes=(flag, taken, gene))
    with pytest.raises(UserError, match=says):
        sp.knobs(space)


def test_wrong_genotypes_and_candidates_are_refused():
    space = Space(name="one", genes=(Gene(name="flag", kind="arch", choices=(False, True)),))
    for wrong in [(), (0, 0), (2,), (-1,)]:
        with pytest.raises(UserError):
            sp.check(space, wrong)
        with pytest.raises(UserError):
            sp.canonical(space, wrong)
    for arch in [{"flg": True}, {"flag": 1}]:
        with pytest.raises(UserError):
            sp.encode(space, Candidate(arch=arch, policy=Policy()))
    with pytest.raises(UserError, match="op 'prune' at site 'conv'"):
        sp.encode(
            space, Candidate(arch={}, policy=Policy(rules=(Rule(site="conv", op="prune", settings={"ratio": 1}),)))
        )
