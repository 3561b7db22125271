"""An experiment as a value: which model, on which data, trained how.

    experiment = Experiment(
        model=ViTConfig(patch_size=1, features=64, depth=4, num_heads=4, mixer="agent_attention"),
        data=attnlab.data.Digits(augment=attnlab.data.Augment(padding=1)),
        task=ClassificationTask(label_smoothing=0.1),
        train=TrainConfig(steps=1000),
    )
    result = run(experiment, "runs/digits")     # again in the same directory: goes on from what is there

Every setting is typed, frozen, and written beside the checkpoints (`experiment.json`), from which `load` makes the same
experiment again. Sizes that follow from the data (image size, classes, vocabulary) are not settings.
"""

import dataclasses
import functools
import importlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import attnlab.data
from attnlab import registry
from attnlab.models.language_model import LanguageModel
from attnlab.models.options import options_of
from attnlab.models.pyramid_vit import PyramidViT
from attnlab.models.sequence_regressor import SequenceRegressor
from attnlab.models.vit import ViT
from attnlab.suggest import suggestion
from attnlab.training import (
    AdversarialTask,
    ClassificationTask,
    LanguageTask,
    RegressionTask,
    RestorationTask,
    TrainConfig,
    TrainResult,
    load_model,
    train,
)

EXPERIMENT_FILE = "experiment.json"


def _parse_json(arguments: list[str]) -> Any:
    try:
        value = json.loads(arguments[0])
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError('not a JSON object, such as \'{"softmax_attention": {"qk_norm": true}}\'')
    return _decode_options(value, "options")


Options = Annotated[
    Mapping[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_parse_json,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [json.dumps(as_dict(value))],
    ),
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of the configurations of models, which `config_class` makes: a model's class, with options as attributes."""

    cls: ClassVar[type[nnx.Module]]

    @property
    def kind(self) -> str:
        """The kind of data that the model takes, as `DatasetInfo` has it."""
        return self.cls.inputs.kind

    @property
    def mixers(self) -> tuple[str, ...]:
        """The names of the mixers, each once; none of a model that has no option `mixer`."""
        mixer = getattr(self, "mixer", ())
        names = (mixer,) if isinstance(mixer, str) else mixer
        return tuple(dict.fromkeys(name for part in names for name in ((part,) if isinstance(part, str) else part)))

    def build(self, info: attnlab.data.DatasetInfo, *, dtype: Any = None, rngs: nnx.Rngs) -> nnx.Module:
        """The model for a dataset, computing in `dtype`; of the mixers' options it is given those of its mixers.

        Raises:
          ValueError: if the data is not of the model's kind, or the options do not fit it.
        """
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if options := arguments.get("mixer_options"):
            used = {mixer: dict(given) for mixer, given in options.items() if mixer in self.mixers}
            arguments["mixer_options"] = used
        return self.cls(**self.cls.inputs.sizes_of(info), **arguments, dtype=dtype, rngs=rngs)


@functools.cache
def config_class(cls: type[nnx.Module]) -> type[ModelConfig]:
    """The configuration of a model's class: its options, with their defaults and descriptions, see `attnlab.models`."""
    fields, lines = [], [f"A `{cls.__name__}`; the attributes are its arguments.", "", "Attributes:"]
    for option in options_of(cls):
        if option.type is Mapping:
            fields.append((option.name, Options, dataclasses.field(default_factory=dict)))
        else:
            default = tuple(option.default) if isinstance(option.default, list) else option.default
            fields.append((option.name, option.type, dataclasses.field(default=default)))
        lines.append(f"  {option.name}: {option.words}")
    namespace = {"__doc__": "\n".join(lines), "__module__": __name__, "cls": cls}
    return dataclasses.make_dataclass(
        f"{cls.__name__}Config", fields, bases=(ModelConfig,), namespace=namespace, frozen=True, kw_only=True
    )


ViTConfig = config_class(ViT)
PyramidViTConfig = config_class(PyramidViT)
LanguageModelConfig = config_class(LanguageModel)
SequenceRegressorConfig = config_class(SequenceRegressor)


def model_config(name: str, **options: Any) -> ModelConfig:
    """The configuration of a registered backbone, such as `model_config("agent_attention.swin", depths=(1, 1, 1, 1))`.

    Raises:
      KeyError: for an unknown name, with the nearest ones.
      ValueError: if it is no backbone that says what it takes, or has no such option.
    """
    variant = registry.get(name)
    if variant.kind is not registry.Kind.BACKBONE or not hasattr(variant.target, "inputs"):
        raise ValueError(f"{name} is a {variant.kind} that does not say what data it takes; name a backbone")
    made = config_class(variant.cls)
    known = [field.name for field in dataclasses.fields(made)]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: {suggestion(option, known)}")
    return made(**options)


_HOSTS = (ViT, PyramidViT, LanguageModel, SequenceRegressor)


def _model_configs() -> dict[str, type[ModelConfig]]:
    registered = (v.target for v in registry.variants(kind=registry.Kind.BACKBONE) if hasattr(v.target, "inputs"))
    return {made.__name__: made for made in map(config_class, (*_HOSTS, *registered))}


AnyTask = ClassificationTask | AdversarialTask | LanguageTask | RegressionTask | RestorationTask
TASKS = {
    "image": ClassificationTask,
    "text": LanguageTask,
    "vectors": RegressionTask,
    "image pairs": RestorationTask,
}
"""What a model is trained for, by the kind of data that it takes."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model, its data, its task, and how it is trained.

    Attributes:
      model: which model.
      data: on which data.
      task: what it is trained for.
      train: how.
    """

    model: ModelConfig
    data: attnlab.data.Source
    task: AnyTask
    train: TrainConfig

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixers of the model, each once; none where it has no such option."""
        return self.model.mixers

    def with_mixer(self, mixer: str) -> "Experiment":
        """The same with another mixer in every layer.

        Raises:
          KeyError: for an unknown name, with the nearest ones.
          ValueError: if the model has no option `mixer`.
        """
        registry.get(mixer)
        if not hasattr(self.model, "mixer"):
            raise ValueError(f"{type(self.model).__name__} has no option mixer")
        return dataclasses.replace(self, model=dataclasses.replace(self.model, mixer=mixer))

    def check(self) -> None:
        """Finds mistakes that need no data.

        Raises:
          KeyError: for a mixer or pooling that is not registered, with the nearest names.
          ValueError: for parts that do not fit together.
        """
        for mixer in self.mixers:
            variant = registry.get(mixer)
            if variant.kind is not registry.Kind.MIXER:
                raise ValueError(f"model.mixer: {mixer} is a {variant.kind}, not a {registry.Kind.MIXER}")
        for mixer in getattr(self.model, "mixer_options", ()):
            registry.get(mixer)
        pooling = getattr(self.model, "pooling", "mean")
        if pooling not in ("mean", "cls"):
            registry.get(pooling)
        wanted = TASKS[self.model.kind]
        if not isinstance(self.task, wanted):
            raise ValueError(f"task: {type(self.model).__name__} is trained for {wanted.__name__}, not {self.task}")
        if isinstance(self.task, AdversarialTask) and (scale := getattr(self.data, "scale", "unit")) != "unit":
            raise ValueError(f"data.scale: AdversarialTask perturbs images in [0, 1], which are 'unit', not {scale!r}")

    def open(self) -> attnlab.data.Dataset:
        """The data.

        Raises:
          DataError: if files are missing or broken.
          ValueError: if the data is not of the model's kind.
        """
        dataset = attnlab.data.open(self.data)
        if dataset.info.kind != self.model.kind:
            raise ValueError(
                f"{type(self.model).__name__} takes {self.model.kind} data; {dataset.info.name} is {dataset.info.kind}"
            )
        return dataset

    def task_for(self, model: nnx.Module) -> AnyTask:
        """The task; without positions for a model whose mixers do not depend on them."""
        if self.model.kind != "text" or getattr(model, "position", None) is not None:
            return self.task
        if any(block.looks_at_positions for block in model.blocks.blocks):
            return self.task
        return dataclasses.replace(self.task, positions=False)


def as_dict(value: Any, where: str = "experiment", *, free: bool = False) -> Any:
    """An experiment, or a part of one, as JSON has it: what `from_dict` makes the same of again.

    Each dataclass says its `type`; among free options, which may hold any (a `Rotary`, a mask), with its module.

    Args:
      value: what to write.
      where: it stands, for messages.
      free: whether it is an option of no known type.

    Raises:
      ValueError: for a value that could not be read again, naming where it stands.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        name = f"{cls.__module__}.{cls.__qualname__}" if free else cls.__name__
        if free and _value_class(name) is not cls:
            raise ValueError(f"{where}: a {name} cannot be read again from {EXPERIMENT_FILE}")
        names = [field.name for field in dataclasses.fields(value)]
        return {"type": name} | {n: as_dict(getattr(value, n), f"{where}.{n}", free=free) for n in names}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where}: keys must be text, not {wrong[0]!r}")
        if isinstance(kind := value.get("type"), str) and (kind == "dtype" or "." in kind):
            raise ValueError(f"{where}: the option type={kind!r} would be taken for a value's class when read again")
        return {key: as_dict(item, f"{where}.{key}", free=True) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_dict(item, f"{where}[{index}]", free=free) for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        return as_dict(value.item(), where, free=free)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if free and _is_dtype(value):
        return {"type": "dtype", "name": jnp.dtype(value).name}
    raise ValueError(f"{where}: {value!r} cannot be read again from {EXPERIMENT_FILE}")


def from_dict(raw: Mapping[str, Any]) -> Experiment:
    """What `as_dict` made of an experiment, as an experiment.

    Raises:
      ValueError: for a type or a field that there is not, with the nearest names.
    """
    return _decode(Experiment, raw, "experiment")


def document(experiment: Experiment, info: attnlab.data.DatasetInfo) -> dict[str, Any]:
    """What `experiment.json` holds: the experiment, and the facts about its data that a model is built from.

    Raises:
      ValueError: as `as_dict`.
    """
    return {"experiment": as_dict(experiment), "dataset": dataclasses.asdict(info)}


def load(path: str | Path) -> tuple[Experiment, attnlab.data.DatasetInfo]:
    """Reads what `document` says, from the `experiment.json` of a run.

    Args:
      path: of the file, or of its directory.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not an experiment.
    """
    path = Path(path)
    path = path / EXPERIMENT_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `attnlab train` writes it into the directory of a run")
    try:
        raw = json.loads(path.read_text())
        info = raw["dataset"]
        info = info | {"image_shape": info["image_shape"] and tuple(info["image_shape"])}
        info = attnlab.data.DatasetInfo(**info | {"class_names": tuple(info["class_names"])})
        return from_dict(raw["experiment"]), info
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an experiment ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def run(
    experiment: Experiment,
    directory: str | Path,
    *,
    dataset: attnlab.data.Dataset | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains an experiment, or goes on from what is in its directory; see `attnlab.training.train`.

    Args:
      experiment: what to train.
      directory: of the run.
      dataset: of the experiment, where it is open already.
      progress: whether to show progress on standard error.

    Raises:
      KeyError: for a mixer that is not registered.
      DataError: if files are missing or broken.
      ConfigMismatch: if the directory holds another run.
      ValueError: for settings that do not fit together, or that could not be read again.
      TrainingInterrupted: after SIGTERM or Ctrl-C, when the state is saved.
      NonFiniteError: at a loss that is infinite or NaN.
    """
    experiment.check()
    dataset = experiment.open() if dataset is None else dataset
    build = functools.partial(experiment.model.build, dataset.info)
    directory = Path(directory)
    settings, files = _settings(experiment), {EXPERIMENT_FILE: document(experiment, dataset.info)}
    task = experiment.task_for(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    return train(build, task, dataset, experiment.train, directory, experiment=settings, files=files, progress=progress)


def save_trained(
    model: nnx.Module,
    experiment: Experiment,
    directory: str | Path,
    *,
    dataset: attnlab.data.Dataset,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes a model that was made elsewhere as the finished run of an experiment, for `load_trained` and `run`.

    Args:
      model: of the kind that `experiment.model` builds.
      experiment: whose steps count as done; with `steps`, and without `ema`.
      directory: of the run; it may not hold one yet.
      dataset: of the experiment, open.
      metrics: of the model's evaluation.

    Raises:
      FileExistsError: if the directory holds checkpoints.
      ValueError: for an experiment with averages, or without `steps`, or that could not be read again.
    """
    from attnlab.training.handover import save_as_run

    settings, task = _settings(experiment), experiment.task_for(model)
    files = {EXPERIMENT_FILE: document(experiment, dataset.info)}
    save_as_run(model, task, dataset, experiment.train, directory, experiment=settings, files=files, metrics=metrics)


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What makes a run of an experiment what it is, besides its task and training."""
    # Threads and processes that read the data change no number, and may differ when a run goes on.
    data = {name: value for name, value in as_dict(experiment.data).items() if name != "loading"}
    return {"model": as_dict(experiment.model), "data": data}


def load_trained(directory: str | Path, *, step: int | Literal["newest", "best"] = "newest") -> nnx.Module:
    """The model of a run, with the parameters of a checkpoint; averaged ones where the run has them.

    Raises:
      FileNotFoundError: if the directory holds no run, or no such checkpoint.
    """
    experiment, info = load(directory)
    return load_model(functools.partial(experiment.model.build, info), directory, step=step)


def _decode(annotation: Any, raw: Any, where: str) -> Any:
    """`raw` as the annotation has it: dataclasses by their `type`, lists as tuples; else as it is."""
    alternatives = _model_configs().values() if annotation is ModelConfig else _alternatives(annotation)
    classes = {cls.__name__: cls for cls in alternatives if dataclasses.is_dataclass(cls)}
    if classes and raw is not None:
        if not isinstance(raw, Mapping) or raw.get("type") not in classes:
            kind = raw.get("type") if isinstance(raw, Mapping) else raw
            raise ValueError(f"{where}: no type is called {kind!r}: {suggestion(str(kind), classes)}")
        cls = classes[raw["type"]]
        hints, names = typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]
        for name in set(raw) - {"type", *names}:
            raise ValueError(f"{where}: {cls.__name__} has no {name!r}: {suggestion(name, names)}")
        given = {name: _decode(hints[name], raw[name], f"{where}.{name}") for name in names if name in raw}
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from error
    if isinstance(raw, list):
        return tuple(_decode(None, item, where) for item in raw)
    return _decode_options(raw, where) if isinstance(raw, Mapping) else raw


def _decode_options(raw: Mapping[str, Any], where: str) -> Any:
    """A mapping of options, or the value of a class that `as_dict` wrote among them."""
    kind = raw.get("type")
    items = {name: _decode(None, item, f"{where}.{name}") for name, item in raw.items() if name != "type"}
    if kind == "dtype":
        return jnp.dtype(items["name"])
    if not isinstance(kind, str) or "." not in kind:
        return items | ({} if kind is None else {"type": kind})
    cls = _value_class(kind)
    if cls is None:
        raise ValueError(f"{where}: no value class is called {kind!r}")
    return cls(**items)


def _value_class(name: str) -> type | None:
    """The dataclass of that module and name, if it is one of these packages; nothing else is imported or called."""
    module, _, cls = name.rpartition(".")
    if module.partition(".")[0] not in ("attnlab", "pallas_kernels"):
        return None
    try:
        found = getattr(importlib.import_module(module), cls, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def _is_dtype(value: Any) -> bool:
    """Whether it is a dtype, or a scalar type such as `jnp.bfloat16`."""
    return isinstance(value, np.dtype) or (isinstance(value, type) and hasattr(value, "dtype"))


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if is_union else (annotation,)
