import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from autocompress import export, registry
from autocompress.models import sources
from autocompress.models.foreign import Foreign
from autocompress.models.trace import still
from autocompress.parts import make_builder
from autocompress.tasks import InputSpec
from autocompress.types import UserError

IMAGE = InputSpec(shape=(3, 64, 64))
TEXT = InputSpec(
    name="input_ids", shape=(12,), dtype="int64", others=(InputSpec(name="attention_mask", shape=(12,), dtype="int64"),)
)
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {**ENCODER, "vocab_size": 50, "max_position_embeddings": 40, "num_labels": 3}
PICTURES = {**ENCODER, "image_size": 64, "patch_size": 16, "num_labels": 3}


def data(spec, size):
    """Random pixels, or words of different lengths with the mask that says so."""
    generator = np.random.default_rng(0)
    if spec is IMAGE:
        return (generator.standard_normal((size, *spec.shape)).astype(np.float32),)
    mask = (np.arange(12) < generator.integers(3, 13, (size, 1))).astype(np.int64)
    return generator.integers(3, 50, (size, 12)) * mask, mask


def drawn(name, spec, options):
    """A builder and its network, no layer of which is all zeros (the heads of some are made so)."""
    builder = make_builder(name, spec, options)
    torch.manual_seed(0)
    module = builder.build({})
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
    return builder, module.eval()


@pytest.mark.filterwarnings("ignore:Maximum recursive depth reached:UserWarning")  # torch-pruning, of deep networks
@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("torchvision:resnet18", IMAGE, {"num_classes": 10}),
        ("torchvision:mobilenet_v3_small", IMAGE, {"num_classes": 10}),
        ("torchvision:vit_b_16", IMAGE, {"num_classes": 10, "image_size": 64}),
        ("torchvision:swin_t", IMAGE, {"num_classes": 10}),
        ("timm:vit_tiny_patch16_224", IMAGE, {"num_classes": 10, "img_size": 64, "depth": 2}),
        ("timm:convnext_atto", IMAGE, {"num_classes": 10, "depths": (1, 1, 1, 1)}),
        ("hf:bert", TEXT, WORDS),
        ("hf:distilbert", TEXT, {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50}),
        ("hf:roberta", TEXT, WORDS),
        ("hf:vit", IMAGE, PICTURES),
        ("hf:deit", IMAGE, PICTURES),
        (
            "hf:swin",
            IMAGE,
            {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64},
        ),
    ],
)
def test_a_named_network_has_sites_and_its_file_agrees(name, spec, options):
    if name.startswith(("timm:", "hf:")):
        pytest.importorskip({"timm": "timm", "hf": "transformers"}[name.partition(":")[0]], reason="needs the extra")
    builder, module = drawn(name, spec, options)
    assert isinstance(builder, Foreign)
    assert builder.name == name
    sites = builder.sites()
    for op in ("prune", "lowrank", "quantize"):
        assert sum(op in site.ops for site in sites) >= 3
    for site in sites:
        assert module.get_submodule(site.name)
    exported = export.export(module, spec, opset=17)
    assert export.parity(module, export.compose(exported), *data(spec, 3)) < 1e-4
    layers = {site.name for site in sites if "quantize" in site.ops}
    assert layers <= set(exported.parts[0].nodes)
    with still(module):
        assert module(*(torch.from_numpy(one) for one in data(spec, 5))).shape[0] == 5


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("torchvision:resnet81", r"torchvision has no network 'resnet81'; did you mean 'resnet"),
        ("timm:resnet18x", "timm has no network 'resnet18x'; did you mean 'resnet18'"),
        ("hf:brt", r"neither a local folder with config.json nor an architecture; did you mean 'bert'"),
        ("hf:google/nowhere", "nothing is downloaded"),
    ],
)
def test_a_name_that_nothing_goes_by(name, told):
    with pytest.raises(UserError, match=told) as error:
        make_builder(name, IMAGE, {}).build({})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("torchvision:resnet18", {"clases": 3}, "cannot be made: TypeError: .*clases"),
        ("timm:resnet18", {"clases": 3}, "cannot be made: TypeError: .*clases"),
        ("hf:bert", {"hiden_size": 32}, r"'hf:bert' has no option 'hiden_size'; did you mean 'hidden_size'"),
        ("hf:bert", {"hidden_size": 33}, "cannot be made: ValueError: The hidden size"),
    ],
)
def test_an_option_that_makes_no_network_is_one_line(name, options, told):
    with pytest.raises(UserError, match=told) as error:
        make_builder(name, IMAGE, options).build({})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("timm:resnet18", "timm", "timm"), ("hf:bert", "transformers", "hf")]
)
def test_a_missing_extra_is_its_pip_line(monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs more packages: pip install 'autocompress\[{extra}\]'"):
        make_builder(name, IMAGE, {}).build({})


def test_a_package_that_no_extra_brings_stays_what_it_is():
    with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
        registry.optional("surely_not_there", "this")


def test_nothing_is_downloaded_unless_asked_for(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError(f"a download was tried: {arguments} {keywords}")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    named = ("resnet18", "googlenet", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large")
    for name in (*(f"torchvision:{one}" for one in named), "timm:resnet18", "hf:bert"):
        assert isinstance(make_builder(name, IMAGE, WORDS if name == "hf:bert" else {}).build({}), nn.Module)


@pytest.fixture
def saved(tmp_path):
    """A folder as save_pretrained() leaves it, and the network that is in it."""
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    torch.manual_seed(1)
    network = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model("bert", **WORDS), attn_implementation="eager"
    ).eval()
    network.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder", network


def test_a_local_folder_gives_its_weights_and_says_nothing(saved, capfd):
    folder, network = saved
    capfd.readouterr()
    module = sources.hugging_face(str(folder))
    assert capfd.readouterr() == ("", "")
    assert module.config._attn_implementation == "eager"
    for name, tensor in network.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)


def test_options_go_into_a_folders_config(saved):
    folder, _ = saved
    module = sources.hugging_face(str(folder), hidden_dropout_prob=0.3)
    assert module.config.hidden_dropout_prob == 0.3
    assert module.num_labels == 3
    with pytest.raises(UserError, match="has no option 'dropuot'"):
        sources.hugging_face(str(folder), dropuot=0.3)


def test_a_config_alone_is_an_untrained_network(saved):
    folder, network = saved
    module = sources.hugging_face(str(folder / "config.json"), num_labels=5)
    assert module.classifier.out_features == 5
    assert not torch.equal(module.bert.pooler.dense.weight, network.bert.pooler.dense.weight)
    (folder / "model.safetensors").unlink()
    assert sources.hugging_face(str(folder)).classifier.out_features == 3


def test_a_body_without_a_head_is_taken_and_a_body_with_holes_is_not(saved):
    from safetensors.torch import load_file, save_file

    folder, network = saved
    file = folder / "model.safetensors"
    tensors = load_file(file)
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith(("classifier", "bert.pooler"))}
    save_file(body, file, metadata={"format": "pt"})
    module = sources.hugging_face(str(folder))
    assert torch.equal(
        module.bert.encoder.layer[0].output.dense.weight, network.bert.encoder.layer[0].output.dense.weight
    )
    holed = {name: tensor for name, tensor in tensors.items() if "layer.1.output.dense" not in name}
    save_file(holed, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"the weights of bert.encoder.layer.1.output.dense.bias and 1 more are missing"
    ):
        sources.hugging_face(str(folder))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no config that transformers knows"),
        (json.dumps({"model_type": "surely_not"}), "is no config that transformers knows"),
        (json.dumps({"model_type": "dinov3_vit_none"}), "is no config that transformers knows"),
        (json.dumps({"model_type": "sam"}), "no classification network of type 'sam'"),
    ],
)
def test_a_folder_whose_config_is_of_no_use(tmp_path, content, told):
    pytest.importorskip("transformers", reason="needs the hf extra")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=told) as error:
        sources.hugging_face(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_config(tmp_path):
    pytest.importorskip("transformers", reason="needs the hf extra")
    with pytest.raises(UserError, match=r"there is no config\.json in"):
        sources.hugging_face(str(tmp_path))


def test_code_beside_the_weights_is_not_run(saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('executed')\n")
    assert type(sources.hugging_face(str(folder))).__module__.startswith("transformers.")


def test_options_of_a_source_travel_in_the_builder():
    builder = make_builder("torchvision:resnet18", IMAGE, {"num_classes": 7})
    assert isinstance(builder.make, functools.partial)
    assert builder.build({}).fc.out_features == 7


def test_torchvision_is_imported_in_a_fresh_process_whatever_torch_it_was_built_for():
    script = "from autocompress.models import sources; print(sources.torchvision('resnet18').fc.out_features)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1000"
