"""Derived spaces: what genes there are, that equal networks give equal spaces, that files read back the same."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autocompress import auto, load, spacefile
from autocompress.models.convnet import ConvNet
from autocompress.models.foreign import Foreign
from autocompress.space import canonical, cardinality, decode
from autocompress.tasks import InputSpec
from autocompress.types import Gene, Site, Space, UserError


class Given:
    """A builder whose sites and knobs are data."""

    def __init__(self, sites, knobs=None, choices=None):
        self.name, self.knobs = "given", knobs or {}
        self._sites = tuple(sites)
        if choices:
            self.choices = lambda: choices

    def sites(self):
        return self._sites

    def build(self, arch):
        if arch.get("steps", 0) % 2:
            raise ValueError("odd")
        return nn.Identity()

    def inherit(self, child, parent, arch):
        raise NotImplementedError


def layers(count=3, *, prefix="body", channels=64, macs=100, ops=("prune", "lowrank", "quantize"), **more):
    return [
        Site(
            name=f"{prefix}.{n}", kind="conv", ops=ops, macs=macs, in_channels=channels, out_channels=channels, kernel=3
        ).model_copy(update={"depth": n / max(count, 1), **more})
        for n in range(count)
    ]


def genes(found):
    return {gene.name: gene for gene in found.genes}


def reread(space, builder, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(spacefile.text(spacefile.of(space, builder.name, auto.ABOUT)))
    plain = load.space(path, builder)
    path.write_text(spacefile.text(auto.written(space, builder)))
    assert load.space(path, builder) == plain
    return plain


# --- which genes ----------------------------------------------------------------------------------------------------


def test_every_site_is_asked_what_its_ops_can_do():
    found = genes(auto.space(Given(layers(2))))
    assert found["prune.ratio@body.0"].choices == (0.0, 0.25, 0.5, 0.75)
    assert found["lowrank.rank@body.1"].choices == (1.0, 0.5, 0.25)
    assert found["quantize.bits@body.0"].choices == ("float", "int8")
    (taught,) = auto.space(Given(layers(2))).always
    assert (taught.op, taught.settings["kind"]) == ("distill", "both")


@pytest.mark.parametrize(
    ("channels", "multiple", "ratios"),
    [
        (64, 1, (0.25, 0.5, 0.75)),
        (32, 16, (0.5,)),
        (48, 16, (0.25, 0.75)),
        (16, 16, ()),
        (3, 1, (0.25, 0.75)),
        (1, 1, ()),
    ],
)
def test_ratios_differ_by_a_channel_multiple(channels, multiple, ratios):
    found = auto.distinct(channels, auto.RATIOS, multiple)
    kept = [channels, *(int(channels * (1 - ratio) / multiple + 0.5) * multiple for ratio in found)]
    assert all(one - other >= multiple for one, other in pairwise(kept))
    assert kept[-1] > 0
    assert found == ratios


def test_a_rank_that_costs_more_than_the_layer_is_not_asked():
    square = Site(name="fc", kind="linear", ops=("lowrank",), macs=100, in_channels=64, out_channels=64)
    assert not auto.pays(square, 0.5, 1)  # 32 * 128 = 64 * 64
    assert auto.pays(square, 0.25, 1)
    assert genes(auto.space(Given([square])))["lowrank.rank@fc"].choices == (1.0, 0.25)


def test_small_layers_are_not_replaced_or_split():
    ops = ("replace", "lowrank", "quantize")
    sites = [*layers(1, prefix="big", macs=10_000, ops=ops), *layers(1, prefix="small", macs=1, ops=ops)]
    found = genes(auto.space(Given(sites)))
    assert "replace.kind@big.0" in found
    assert "lowrank.rank@big.0" in found
    assert "quantize.bits@small.0" in found
    assert not {"replace.kind@small.0", "lowrank.rank@small.0"} & set(found)


def test_a_site_may_allow_fewer_choices():
    site = layers(1, ops=("replace", "prune"), choices={"replace": ("keep", "smaller"), "prune": (0.0, 0.5)})[0]
    found = genes(auto.space(Given([site])))
    assert found["replace.kind@body.0"].choices == ("keep", "smaller")
    assert found["prune.ratio@body.0"].choices == (0.0, 0.5)


def test_a_dropped_blocks_inner_genes_do_not_apply():
    block = Site(name="body", kind="block", ops=("block",), choices={"block": ("keep", "drop", "merge")})
    space = auto.space(Given([block, *layers(2, ops=("replace", "lowrank", "quantize"))]))
    found = genes(space)
    assert found["block.kind@body"].choices == ("keep", "merge", "drop")
    assert found["quantize.bits@body.0"].when == {"block.kind@body": ("keep", "merge")}
    assert found["lowrank.rank@body.0"].when == {"block.kind@body": ("keep",), "replace.kind@body.0": ("keep",)}
    everything = canonical(space, tuple([2] + [1] * (len(space.genes) - 1)))
    assert {rule.op for rule in decode(space, everything).policy.rules} <= {"block", "distill", "qat"}


def test_an_inner_block_exists_only_in_a_kept_outer_one():
    outer = Site(name="layer", kind="block", ops=("block",), depth=0.2)
    inner = Site(name="layer.attention", kind="block", ops=("block",), depth=0.1)
    found = genes(auto.space(Given([inner, outer, *layers(1)])))
    assert found["block.kind@layer.attention"].when == {"block.kind@layer": ("keep",)}


def test_knobs_come_from_the_builder_or_from_smaller_numbers_it_builds():
    told = auto.space(Given(layers(1), {"width": 8}, {"width": (8, 6), "fixed": (1,)}))
    assert [gene.name for gene in told.genes if gene.kind == "arch"] == ["width"]
    tried = auto.arch_choices(Given(layers(1), {"steps": 8, "name": "x", "on": True}))
    assert tried == {"steps": (8, 6, 4, 2)}


def test_a_site_of_a_shallow_stage_has_the_knobs_conditions():
    site = layers(1)[0].model_copy(update={"when": {"depth": (2, 3)}})
    found = genes(auto.space(Given([site], {"depth": 3}, {"depth": (3, 2, 1)})))
    assert found["quantize.bits@body.0"].when == {"depth": (3, 2)}


# --- tying ----------------------------------------------------------------------------------------------------------


def deep(blocks, each=6):
    return [
        site
        for block in range(blocks)
        for site in layers(each, prefix=f"stages.{block // 8}.{block}", depth=block / blocks)
    ]


def test_a_large_networks_sites_are_tied_below_the_limit():
    space = auto.space(Given(deep(24)))
    assert len(space.genes) <= auto.MOST
    sites = {gene.site for gene in space.genes if gene.op == "quantize"}
    assert "stages.0.0" in sites


def test_tied_sites_never_overlap():
    found = auto.tie({op: {site.name: (site,) for site in deep(40)} for op in auto.ORDER}, auto.MOST)
    assert sum(map(len, found.values())) <= auto.MOST
    for places in found.values():
        assert sum(map(len, places.values())) == 240
        for path in places:
            assert not any(other.startswith(f"{path}.") for other in places)


def test_a_module_with_a_single_site_goes_by_the_sites_name():
    places = {f"a.{n}.conv": () for n in range(2)} | {"a.0.other": (), "b.deep.down.conv": ()}
    assert set(auto.coarser(places)) == {"a.0", "a.1.conv", "b.deep.down.conv"}


def test_sites_that_cannot_be_tied_stay():
    places = {f"layer{n}": () for n in range(4)}
    assert auto.coarser(places) == places
    assert auto.tie({"quantize": places, "prune": {}, "lowrank": {}, "replace": {}}, 2)["quantize"] == places


# --- files ------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = x + self.conv3(torch.relu(self.conv2(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(params=["convnet", "thin convnet", "foreign", "tied"])
def builder(request):
    if request.param == "foreign":
        return Foreign.of(Residual(), InputSpec(shape=(3, 32, 32)))
    if request.param == "tied":
        return Given(deep(40), {"depth": 2}, {"depth": (2, 1)})
    return (
        ConvNet() if request.param == "convnet" else ConvNet(arch={"width.0": 16, "depth.1": 3, "kind.2": "separable"})
    )


def test_a_derived_space_reads_back_as_it_was_written(builder, tmp_path):
    space = auto.space(builder)
    assert reread(space, builder, tmp_path).genes == space.genes
    assert auto.file(builder) == auto.written(space, builder)
    assert cardinality(space) > 1


def test_equal_networks_give_equal_spaces():
    assert auto.space(ConvNet()) == auto.space(ConvNet())
    one, other = (auto.space(Foreign.of(Residual(), InputSpec(shape=(3, 32, 32)))) for _ in range(2))
    assert one == other
    assert Counter(gene.op for gene in one.genes)["quantize"] == 4


def test_every_choice_of_the_convnets_space_is_built():
    builder = ConvNet(size=(8, 8))
    for knob, choices in auto.arch_choices(builder).items():
        assert choices[0] == builder.knobs[knob]
        for choice in choices:
            assert builder.build({knob: choice}) is not None


words = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=6)
values = st.one_of(
    st.booleans(), st.integers(-9, 99), st.floats(-1e6, 1e6), words, st.sampled_from(["1e5", "null", "2:4"])
)


@given(drawn=st.data())
def test_any_space_file_reads_back(drawn, tmp_path_factory):
    def choices():
        return tuple(drawn.draw(st.lists(values, min_size=1, max_size=4)))

    names = drawn.draw(st.lists(words, min_size=1, max_size=4, unique=True))
    rows = tuple(
        load.Row(sites=(name,), op=drawn.draw(words), param=name, choices=choices(), when={name: choices()})
        for name in names
    )
    arch = {name: load.Knob(choices=choices()) for name in names}
    file = load.SpaceFile(name=names[0], about=names[-1], builder="x:y", arch=arch, policy=rows)
    path = tmp_path_factory.mktemp("space") / "any.yaml"
    path.write_text(spacefile.text(file))
    assert repr(load.space_file(path)) == repr(file)


def test_a_module_path_is_one_gene_for_all_sites_under_it(tmp_path):
    path = tmp_path / "tied.yaml"
    head = "name: tied\nbuilder: given\npolicy:\n"
    path.write_text(head + "  - {sites: stages.0, op: quantize, param: bits, choices: [float, int8]}\n")
    builder = Given(deep(9))
    assert [gene.site for gene in load.space(path, builder).genes] == ["stages.0"]
    path.write_text(head + "  - {sites: stages.7, op: quantize, param: bits, choices: [float, int8]}\n")
    with pytest.raises(UserError, match=r"'stages.7' matches nothing"):
        load.space(path, builder)


# --- reducing ---------------------------------------------------------------------------------------------------------


def test_reducing_takes_choices_and_what_hangs_on_them():
    block = Site(name="body", kind="block", ops=("block",), choices={"block": ("keep", "drop")})
    space = auto.space(Given([block, *layers(2)]))
    less = auto.reduce(space, {("block.kind@body", "drop"), ("prune.ratio@body.0", 0.5), ("lowrank.rank@body.0", 0.5)})
    found = genes(less)
    assert "block.kind@body" not in found
    assert found["quantize.bits@body.0"].when == {}
    assert found["prune.ratio@body.0"].choices == (0.0, 0.25, 0.75)
    assert found["lowrank.rank@body.0"].choices == (1.0, 0.25)
    assert auto.reduce(space, ()) == space


def test_a_gene_whose_condition_went_is_gone_too():
    first = Gene(name="a", kind="arch", choices=(1, 2))
    then = Gene(name="b", kind="arch", choices=(1, 2), when={"a": (2,)})
    assert auto.reduce(Space(name="s", genes=(first, then)), {("a", 2)}).genes == ()


def test_a_reduced_space_reads_back(tmp_path):
    builder = ConvNet()
    space = auto.space(builder)
    gone = [(gene.name, gene.choices[-1]) for gene in space.genes if gene.op]
    less = auto.reduce(space, gone)
    assert 0 < len(less.genes) < len(space.genes)
    assert reread(less, builder, tmp_path).genes == less.genes


def test_a_derived_space_asks_of_the_named_ops_alone(tmp_path):
    builder = Given([*layers(3, parameters=9), *layers(3, prefix="tail", parameters=9)], {"steps": 4})
    full = auto.space(builder, small=True)
    few = {gene.site: gene.when for gene in full.genes if gene.param == "weights"}
    assert few == {site.name: {f"quantize.bits@{site.name}": ("int8",)} for site in builder.sites()}
    stages = [
        *layers(6, parameters=9),
        *layers(6, prefix="tail", parameters=9),
        *layers(1, prefix="head", parameters=1),
    ]
    many = auto.space(Given(stages), small=True)
    assert {gene.site: gene.when for gene in many.genes if gene.param == "weights"} == {"body": {}, "tail": {}}
    assert reread(full, builder, tmp_path).genes == full.genes
    some = auto.limited(full, ("quantize", "arch"))
    assert {gene.op for gene in some.genes} == {"quantize", ""}
    assert some.always == full.always
    assert auto.limited(full, tuple({gene.op or "arch" for gene in full.genes})) == full
    with pytest.raises(
        UserError, match=r"search\.ops: the derived space asks nothing of 'pruen'; did you mean 'prune'"
    ):
        auto.limited(full, ("pruen",))
