import sys
from importlib.metadata import EntryPoint

import pytest

from autocompress import registry
from autocompress.types import UserError


@pytest.fixture
def entries(monkeypatch):
    """Publishes entry points for one test: {(group, name): value}, several values for a name by a list."""

    def publish(points):
        def find(group):
            return [
                EntryPoint(name, value, group)
                for (where, name), values in points.items()
                for value in ([values] if isinstance(values, str) else values)
                if where == group
            ]

        monkeypatch.setattr(registry, "entry_points", find)
        registry._entries.cache_clear()

    yield publish
    monkeypatch.undo()
    registry._entries.cache_clear()


@pytest.mark.parametrize("kind", registry.kinds())
def test_every_built_in_resolves_to_something_that_goes_by_its_name(kind):
    for name in registry.BUILT_IN[kind]:
        found = registry.resolve(kind, name)
        assert isinstance(found, type)
        if hasattr(found, "name"):
            assert found.name == name


def test_near_names_are_told():
    with pytest.raises(UserError, match=r"unknown searcher 'evolutoin'; did you mean 'evolution'\? \(or module:attr\)"):
        registry.resolve("searcher", "evolutoin")
    with pytest.raises(UserError, match=r"unknown op 'zzz'; known: block, replace, exit, .* and 3 more$"):
        registry.resolve("op", "zzz", trusted=False)
    with pytest.raises(UserError, match="unknown task 'digit'"):
        registry.check("task", "digit")


def test_own_code_is_found_by_module_and_attribute(tmp_path, monkeypatch):
    members = "name = 'faces'\n    metric = input = batches = loss = quality = None"
    (tmp_path / "mine_a.py").write_text(f"class Faces:\n    {members}\n    class Inner: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.resolve("task", "mine_a:Faces").name == "faces"
    assert registry.make("task", "mine_a:Faces").name == "faces"
    assert registry.resolve("task", "mine_a:Faces.Inner").__name__ == "Inner"
    registry.check("task", "mine_a:Anything")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine_b:Facs", "mine_b has no 'Facs'; did you mean 'Faces'"),
        ("mine_c:Faces", "no module 'mine_c' in the current folder or among the installed packages"),
        ("mine_broken:X", "importing mine_broken failed: ZeroDivisionError"),
        ("mine_needs:X", "importing mine_needs failed: No module named 'surely_not_there'"),
        ("mine b:X", "write module:attr"),
        (":X", "write module:attr"),
        ("mine_b:", "write module:attr"),
    ],
)
def test_own_code_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, name, told):
    (tmp_path / "mine_b.py").write_text("class Faces: pass\n")
    (tmp_path / "mine_broken.py").write_text("1 / 0\n")
    (tmp_path / "mine_needs.py").write_text("import surely_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        registry.resolve("task", name)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_cannot_name_code(tmp_path, monkeypatch):
    (tmp_path / "mine_evil.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="nothing was executed"):
        registry.resolve("op", "mine_evil:Op", trusted=False)
    assert "mine_evil" not in sys.modules


def test_installed_packages_publish_entry_points(entries):
    entries({("autocompress.op", "slim"): "collections:OrderedDict", ("autocompress.task", "x"): "a:b"})
    assert registry.names("op")[-1] == "slim"
    assert registry.resolve("op", "slim", trusted=False).__name__ == "OrderedDict"
    registry.check("op", "slim")
    assert "slim" not in registry.names("task")


def test_an_entry_point_neither_shadows_a_built_in_nor_hides_another(entries):
    entries({("autocompress.op", "prune"): "collections:OrderedDict", ("autocompress.op", "two"): ["a:b", "c:d"]})
    assert registry.resolve("op", "prune").__name__ == "Prune"
    assert registry.names("op").count("prune") == 1
    with pytest.raises(UserError, match="several packages"):
        registry.resolve("op", "two")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN["searcher"], "away", "optuna_is_away:X")
    monkeypatch.setitem(registry.EXTRAS, "optuna_is_away", "optuna")
    with pytest.raises(UserError, match=r"pip install 'autocompress\[optuna\]'"):
        registry.resolve("searcher", "away")


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("task", "os:path", "is no task: it has no name, no metric"),
        ("builder", "os:getcwd", "is no builder: it has no name"),
        ("op", "fractions:Fraction", "is no op: it has no name, no phase"),
        ("task", "weakref:ref", "cannot be made: TypeError"),
    ],
)
def test_code_that_is_no_plug_in_of_its_kind_is_one_line(kind, name, told):
    with pytest.raises(UserError) as error:
        registry.make(kind, name)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_strangers_constructor_raises_is_the_users_to_mend():
    def raising():
        raise ZeroDivisionError("of theirs")

    with pytest.raises(UserError, match="cannot be made: ZeroDivisionError: of theirs"):
        registry.call("op", "mine:Op", raising)
    with pytest.raises(ZeroDivisionError):
        registry.call("op", "prune", raising)
