"""Networks that are named: torchvision's, timm's, Hugging Face's encoders. Nothing is downloaded unless asked for."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.registry import optional
from autocompress.shelves import suggest
from autocompress.tasks import InputSpec
from autocompress.types import UserError
from autocompress.vision import import_torchvision

PICTURE, TOKENS = (3, 224, 224), 128  # what networks are fed that do not say it themselves


def torchvision(name: str, **options: Any) -> nn.Module:
    """A network that `torchvision.models.list_models()` lists, untrained unless `weights` asks for a download.

    Raises UserError for other names, with near ones.
    """
    models = import_torchvision().models
    if name not in (known := models.list_models()):
        raise UserError(f"torchvision has no network {name!r}; {suggest(name, known)}")
    taken = inspect.signature(models.get_model_builder(name)).parameters
    untrained = {key: None for key in ("weights", "weights_backbone") if key in taken}
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce another initialisation than the one they are made with
        warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
        return models.get_model(name, **{**untrained, **options})


def timm(name: str, **options: Any) -> nn.Module:
    """A network that `timm.list_models()` lists, untrained unless `pretrained` asks for a download.

    It is made to be exported: attention and activations written out. Raises UserError for other names, with near ones.
    """
    import_torchvision()  # which timm imports
    library = optional("timm", f"model 'timm:{name}'")
    if not library.is_model(name):
        raise UserError(f"timm has no network {name!r}; {suggest(name, library.list_models())}")
    return library.create_model(name, **{"pretrained": False, "exportable": True, **options})


def usual_input(name: str, options: Mapping[str, Any]) -> InputSpec | None:
    """What a named network is fed where no task says so: pictures of its own size, tokens; None where that is open."""
    source, _, rest = name.partition(":")
    if source == "torchvision":
        return InputSpec(shape=PICTURE)
    if source == "timm":
        import_torchvision()
        library = optional("timm", f"model {name!r}")
        found = library.get_pretrained_cfg(rest) if library.is_model(rest) else None
        return InputSpec(shape=tuple(found.input_size) if found else PICTURE)
    if source == "hf":
        import_torchvision()
        library = optional("transformers", f"model {name!r}")
        with _quiet(library.utils.logging):
            config = _config(library, rest, options)
        if config.model_type not in _names(library, "IMAGE"):
            length = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
            return InputSpec(name="input_ids", shape=(length,), dtype="int64", layout="NT")
        size = getattr(config, "image_size", PICTURE[-1])
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return InputSpec(shape=(getattr(config, "num_channels", PICTURE[0]), *sides))
    return None


def hugging_face(where: str, **options: Any) -> nn.Module:
    """A classification network of transformers: from a local folder, a config file, or an architecture and `options`.

    `where` is a folder with config.json (and weights, which are loaded), a .json file, or an architecture such as
    `bert` or `vit`, which gets its usual config. Options go into the config: hidden_size, num_hidden_layers,
    num_labels ... Attention is written out, nothing is downloaded, no code beside the weights is run. Raises UserError
    for what is not there, for options that the config does not have, for weights that do not fill the encoder.
    """
    import_torchvision()  # which image networks of transformers import
    library = optional("transformers", f"model 'hf:{where}'")
    with _quiet(library.utils.logging):
        config = _config(library, where, options)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # a classifier keeps nothing from word to word
        kind = _kind(library, where, config)
        folder = Path(where).expanduser()
        if folder.is_dir() and _has_weights(folder):
            return _loaded(kind, folder, config)
        return kind.from_config(config, attn_implementation="eager", trust_remote_code=False)


def _config(library: Any, where: str, options: Mapping[str, Any]) -> Any:
    """The config of a folder, a file or an architecture, with options in it."""
    path, auto = Path(where).expanduser(), library.AutoConfig
    file = path / "config.json" if path.is_dir() else path
    local = {"local_files_only": True, "trust_remote_code": False}
    if file.is_file():
        try:
            usual = auto.from_pretrained(str(path), **local)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{file}: is no config that transformers knows: {_line(error)}") from error
    elif path.is_dir():
        raise UserError(f"model 'hf:{where}': there is no config.json in {path}")
    elif where in (known := _architectures(library)):
        usual = auto.for_model(where)
    else:
        raise UserError(
            f"model 'hf:{where}': neither a local folder with config.json nor an architecture; {suggest(where, known)} "
            "(nothing is downloaded: save the network with save_pretrained() and name the folder)"
        )
    known = sorted({"num_labels", *usual.attribute_map, *usual.to_dict()})
    if strange := [option for option in options if option not in known]:
        raise UserError(f"model.options: 'hf:{where}' has no option {strange[0]!r}; {suggest(strange[0], known)}")
    if not options:
        return usual
    return auto.from_pretrained(str(path), **options, **local) if file.is_file() else auto.for_model(where, **options)


def _architectures(library: Any) -> list[str]:
    """Names of the architectures with a classification head for images or texts."""
    return sorted({*_names(library, "IMAGE"), *_names(library, "SEQUENCE")})


def _names(library: Any, what: str) -> Mapping[str, Any]:
    modeling = library.models.auto.modeling_auto
    return getattr(modeling, f"MODEL_FOR_{what}_CLASSIFICATION_MAPPING_NAMES")


def _kind(library: Any, where: str, config: Any) -> Any:
    """The class that makes a classification network of the config."""
    config.architectures = config.architectures or []  # transformers 5.23 walks over None where an architecture has two
    if config.model_type in _names(library, "IMAGE"):
        return library.AutoModelForImageClassification
    if config.model_type in _names(library, "SEQUENCE"):
        return library.AutoModelForSequenceClassification
    raise UserError(f"model 'hf:{where}': transformers has no classification network of type {config.model_type!r}")


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(name), None) for name in ("model*.safetensors", "pytorch_model*.bin"))


def _loaded(kind: Any, folder: Path, config: Any) -> nn.Module:
    """The folder's weights; a head or pooler that they lack keeps its random numbers, to be trained."""
    try:
        module, found = kind.from_pretrained(
            str(folder),
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation="eager",
            dtype=torch.float32,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"model 'hf:{folder}': its weights cannot be loaded: {_line(error)}") from error
    body = f"{module.base_model_prefix}."
    missing = [name for name in sorted(found["missing_keys"]) if name.startswith(body) and ".pooler." not in name]
    if missing:
        raise UserError(f"model 'hf:{folder}': the weights of {missing[0]} and {len(missing) - 1} more are missing")
    return module


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' remarks and progress bars, its settings restored afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
