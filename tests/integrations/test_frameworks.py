"""LLaMA-Factory, Axolotl, ms-swift and verl, through the extension point that each documents.

Owns: the settings; each integration against a stand-in of the interface it uses, which runs
everywhere; and, where a framework is installed, one step of its own training loop compared with
the restatement. What a stand-in stands in for is said beside it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch

import drift_fast
from drift_fast.inject.config import InjectionConfig
from drift_fast.integrations.settings import Settings
from support import framework_runs, reference
from support.injection_models import (
    Backbone,
    delta_towards,
    moved_text,
    regression_batch,
    regression_loss,
    saved,
    text_batch,
    tiny_qwen2,
)
from support.processes import TESTS, environment, python, run

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# The learning rate is meant to be absurd, and the forecast of λ says so.
pytestmark = pytest.mark.filterwarnings("ignore::drift_fast.DriftWarning")

RATE = 1e3
OPTIONS: dict[str, Any] = {"alpha": 0.7, "scale": "adaptive"}


# --- settings -----------------------------------------------------------------------------------


def test_every_option_of_an_injection_is_a_setting_but_for_the_frameworks_own_objects() -> None:
    known = set(Settings.names())
    assert known == {"delta", "csv", *InjectionConfig.names()}
    assert {"alpha", "scale", "modules", "layers", "scope", "strict", "mapping"} <= known
    assert not {"model", "optimizer", "scaler", "driver", "self"} & known


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'alhpa'; did you mean 'alpha'"):
        Settings.from_mapping({"delta": "somewhere", "alhpa": 1.0})


@pytest.mark.parametrize("section", [{}, {"delta": None}, {"alpha": 1.0}])
def test_settings_without_a_delta_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="names no delta"):
        Settings.from_mapping(section)


@pytest.mark.parametrize("section", [None, "delta", ["delta"], 3])
def test_a_section_that_is_no_mapping_is_refused(section: Any) -> None:
    with pytest.raises(TypeError, match="must be a mapping"):
        Settings.from_mapping(section)


@pytest.mark.parametrize("delta", ["", 3, ["delta"]])
def test_a_delta_that_is_no_path_is_refused(delta: Any) -> None:
    with pytest.raises(ValueError, match=r"delta must be (text|a directory, Hub id or URL)"):
        Settings.from_mapping({"delta": delta})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("drift.json", '{"delta": "here/delta", "alpha": 0.5, "layers": [0, 1]}'),
        ("drift.yaml", "delta: here/delta\nalpha: 0.5\nlayers: [0, 1]\n"),
        ("drift.yml", "{delta: here/delta, alpha: 0.5, layers: [0, 1]}"),
    ],
)
def test_a_file_is_read_and_its_delta_lies_beside_it(tmp_path: Path, name: str, text: str) -> None:
    if not name.endswith("json"):
        pytest.importorskip("yaml")
    (tmp_path / "here" / "delta").mkdir(parents=True)
    (tmp_path / name).write_text(text)
    settings = Settings.from_file(tmp_path / name)
    assert settings == Settings(delta=str(tmp_path / "here" / "delta"), alpha=0.5, layers=[0, 1])


def test_an_absolute_delta_of_a_file_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "drift.json").write_text(json.dumps({"delta": "/elsewhere/delta"}))
    assert Settings.from_file(tmp_path / "drift.json").delta == "/elsewhere/delta"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("drift.json", "{", "not valid JSON"),
        ("drift.yaml", "delta: [", "not valid YAML"),
        ("drift.yaml", "delta: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("drift.pkl", "", "ends in .json"),
        ("drift.json", '{"delta": "d", "apha": 1}', r"drift.json: got an unexpected option 'apha'"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=complaint):
        Settings.from_file(tmp_path / name)


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRIFT_FAST_CONFIG", raising=False)
    with pytest.raises(drift_fast.DriftError, match="DRIFT_FAST_CONFIG is not set"):
        Settings.from_environment()
    (tmp_path / "drift.json").write_text('{"delta": "d"}')
    monkeypatch.setenv("DRIFT_FAST_CONFIG", str(tmp_path / "drift.json"))
    assert Settings.from_environment().delta == str(tmp_path / "d")


# --- stand-ins ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A tiny Qwen2 in float32, and the directory of its delta."""
    folder = tmp_path_factory.mktemp("pair")
    model = tiny_qwen2()
    expert = saved(moved_text(model), folder / "expert")
    drift_fast.compute_delta(
        expert, saved(model, folder / "multimodal"), folder / "delta", dtype="float32"
    )
    return model, folder / "delta"


def one_step(
    start: torch.nn.Module,
    folder: Path,
    *,
    callbacks: Any = (),
    built: Callable[[Any], Any] = lambda trainer: None,
    trainer_class: Any = None,
    clip: float = 0.0,
    **arguments: Any,
) -> dict[str, Any]:
    """Return the gradient that one step of a Trainer used, from how far it moved weights."""
    model = copy.deepcopy(start)
    before = {name: reference.exact(p) for name, p in model.named_parameters()}
    batch = text_batch(8)
    trainer = (trainer_class or transformers.Trainer)(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=clip,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=[{key: rows[at] for key, rows in batch.items()} for at in range(8)],
        callbacks=list(callbacks),
    )
    built(trainer)
    trainer.train()
    after = {name: reference.exact(p) for name, p in model.named_parameters()}
    return {name: (before[name] - after[name]) / RATE for name in before}


def assert_injected(
    found: dict[str, Any], plain: dict[str, Any], delta: drift_fast.Delta, *, clip: float
) -> None:
    expected = {
        name: reference.inject(gradient, delta[name], **OPTIONS)
        if name in delta.shapes
        else gradient
        for name, gradient in plain.items()
    }
    total, expected = reference.clip(expected, clip)
    assert total > clip
    for name, gradient in found.items():
        error = reference.norm(gradient - expected[name])
        assert error <= 1e-5 * reference.norm(expected[name]) + 1e-9, name


def stand_in(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Put modules in the place of a framework; keys are names with __ for the dots."""
    named = {key.replace("__", "."): members for key, members in modules.items()}
    for name, members in named.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if parent not in named:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def fresh(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """Import an integration anew, against what stands in for its framework."""
    full = f"drift_fast.integrations.{name}"
    monkeypatch.delitem(sys.modules, full, raising=False)
    module = importlib.import_module(full)
    monkeypatch.delitem(sys.modules, full)
    # Axolotl imports the section's schema by its name.
    monkeypatch.setitem(sys.modules, full, module)
    return module


def test_llamafactory_gets_its_arguments_and_a_callback_that_attaches(
    tmp_path: Path, pair: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, delta = pair
    found: dict[str, Any] = {}

    # Of 0.9.5: read_args returns a mapping that it is given; run_exp builds its Trainer with the
    # callbacks it is given and passes the Trainer to nobody.
    def run_exp(args: dict[str, Any], callbacks: list[Any]) -> None:
        assert args == {"stage": "sft"}
        found.update(one_step(model, tmp_path, callbacks=callbacks, clip=0.01, do_train=True))

    stand_in(
        monkeypatch,
        llamafactory__hparams={"read_args": lambda args: args},
        llamafactory__train__tuner={"run_exp": run_exp},
    )
    integration = fresh(monkeypatch, "llamafactory")
    integration.run({"stage": "sft", "drift_fast": {"delta": str(delta), **OPTIONS}})
    assert_injected(found, one_step(model, tmp_path), drift_fast.Delta.open(delta), clip=0.01)
    with pytest.raises(ValueError, match="section `drift_fast:`"):
        integration.run({"stage": "sft"})
    with pytest.raises(ValueError, match="unexpected option 'alhpa'"):
        integration.run({"stage": "sft", "drift_fast": {"delta": str(delta), "alhpa": 1}})


def test_llamafactorys_callback_leaves_runs_that_do_not_train_alone(
    pair: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    integration = fresh(monkeypatch, "llamafactory")
    callback = integration.DriftCallback(Settings(delta=str(pair[1]), **OPTIONS))
    callback.on_init_end(types.SimpleNamespace(do_train=False), None, None)
    assert callback.injection is None
    with pytest.raises(drift_fast.DriftError, match="no Trainer called this callback"):
        callback.on_init_end(types.SimpleNamespace(do_train=True), None, None)


def test_llamafactorys_callback_attaches_to_a_trainer_that_it_joins_later(
    tmp_path: Path, pair: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, delta = pair
    settings = Settings(delta=str(delta), **OPTIONS)
    callback = fresh(monkeypatch, "llamafactory").DriftCallback(settings)
    found = one_step(
        model, tmp_path, built=lambda trainer: trainer.add_callback(callback), clip=0.01
    )
    assert_injected(found, one_step(model, tmp_path), drift_fast.Delta.open(delta), clip=0.01)


def test_swift_registers_a_callback_that_attaches(
    tmp_path: Path, pair: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, delta = pair
    callbacks: dict[str, Any] = {}

    # Of 4.6.0: callbacks are classes under a name, made with (args, trainer) before the Trainer's
    # own __init__ runs.
    class TrainerCallback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self, args: Any, trainer: Any) -> None:
            self.args = args
            self.trainer = trainer

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def __init__(self, **arguments: Any) -> None:
            made = [callbacks["drift_fast"](arguments["args"], self)]
            super().__init__(**{**arguments, "callbacks": made})

    stand_in(
        monkeypatch,
        swift__callbacks={"TrainerCallback": TrainerCallback, "callbacks_map": callbacks},
    )
    fresh(monkeypatch, "swift")
    monkeypatch.delenv("DRIFT_FAST_CONFIG", raising=False)
    with pytest.raises(drift_fast.DriftError, match="DRIFT_FAST_CONFIG is not set"):
        one_step(model, tmp_path, trainer_class=Trainer)
    (tmp_path / "drift.json").write_text(json.dumps({"delta": str(delta), **OPTIONS}))
    monkeypatch.setenv("DRIFT_FAST_CONFIG", str(tmp_path / "drift.json"))
    found = one_step(model, tmp_path, trainer_class=Trainer, clip=0.01)
    assert_injected(found, one_step(model, tmp_path), drift_fast.Delta.open(delta), clip=0.01)


def test_the_packages_own_file_is_refused_as_a_plugin_of_swift() -> None:
    file = Path(drift_fast.__file__).parent / "integrations" / "swift.py"
    spec = importlib.util.spec_from_file_location("_swift_external_0", file)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(drift_fast.DriftError, match="in a directory of its own"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_axolotls_plugin_attaches_and_checks_its_section(
    tmp_path: Path, pair: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydantic")
    model, delta = pair
    # Of 0.19.0: the schema is found by the name that get_input_args returns, and
    # post_trainer_create is called between building the Trainer and train().
    stand_in(monkeypatch, axolotl__integrations__base={"BasePlugin": type("BasePlugin", (), {})})
    integration = fresh(monkeypatch, "axolotl")
    plugin = integration.DriftPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    schema = getattr(importlib.import_module(module), name)
    section = {"delta": str(delta), **OPTIONS}
    cfg = schema(drift_fast=section).model_dump()
    found = one_step(
        model,
        tmp_path,
        built=lambda trainer: plugin.post_trainer_create(cfg, trainer),
        clip=0.01,
    )
    assert_injected(found, one_step(model, tmp_path), drift_fast.Delta.open(delta), clip=0.01)
    with pytest.raises(ValueError, match="unexpected option 'alhpa'"):
        schema(drift_fast={"delta": str(delta), "alhpa": 1.0})
    with pytest.raises(ValueError, match="no section `drift_fast:`"):
        plugin.post_trainer_create({}, None)


def verl_stand_in(monkeypatch: pytest.MonkeyPatch, network: torch.nn.Module) -> Any:
    """Return verl's registry, with the engine of drift_fast, and what logs its metrics."""

    # Of 0.9.1: an engine is looked up by (device, vendor), then by the device alone.
    class EngineRegistry:
        engines: ClassVar[dict[Any, Any]] = {}

        @classmethod
        def register(
            cls, model_type: str, backend: list[str], device: list[str], vendor: str | None = None
        ) -> Callable[[Any], Any]:
            def decorator(engine: Any) -> Any:
                for key in itertools.product([model_type], backend, device, [vendor]):
                    cls.engines[key] = engine
                return engine

            return decorator

        @classmethod
        def get_engine_cls(cls, model_type: str, backend: str) -> Any:
            own = (model_type, backend, "cpu", os.environ["VERL_ENGINE_VENDOR"])
            return cls.engines.get(own) or cls.engines[model_type, backend, "cpu", None]

    # initialize() builds module and optimizer, optimizer_step() clips and steps.
    class FSDPEngineWithLMHead:
        rank = 0
        scaler = None
        optimizer_config = types.SimpleNamespace(clip_grad=0.01, total_training_steps=4)
        engine_config = types.SimpleNamespace(
            strategy="fsdp2", use_orig_params=False, forward_only=False
        )

        def initialize(self) -> None:
            self.module = network
            self.optimizer = torch.optim.SGD(network.parameters(), lr=RATE)

        def train_batch(self, data: Any, loss_function: Any) -> Any:
            self.optimizer.zero_grad()
            loss_function(self.module, data).backward()
            return {"metrics": {"grad_norm": self.optimizer_step()}}

        def optimizer_step(self) -> Any:
            clip = self.optimizer_config.clip_grad
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip)
            self.optimizer.step()
            return norm.item()

        def is_mp_src_rank_with_outputs(self) -> bool:
            return True

        def save_checkpoint(self, local_path: str, **options: Any) -> None:
            Path(local_path).mkdir()
            torch.save(self.module.state_dict(), Path(local_path) / "model.pt")

        def load_checkpoint(self, local_path: str, **options: Any) -> None:
            self.module.load_state_dict(torch.load(Path(local_path) / "model.pt"))

    class Other:
        pass

    for model_type, backend in itertools.product(
        ["language_model", "value_model"], ["fsdp", "fsdp2", "fsdp_turbo", "megatron", "veomni"]
    ):
        EngineRegistry.register(model_type, [backend], ["cpu"])(Other)

    class Metric:
        def __init__(self, aggregation: str, value: float) -> None:
            self.value = value

        @staticmethod
        def aggregate_dp(metrics: list[Any]) -> Any:
            return numpy.mean([metric.value for metric in metrics])

    class Tracking:
        logged: ClassVar[dict[str, Any]] = {}

        def log(self, data: Any, step: int) -> None:
            self.logged.update(data)

    stand_in(
        monkeypatch,
        verl__utils__metric={"Metric": Metric},
        verl__utils__tracking={"Tracking": Tracking},
        verl__workers__engine={"EngineRegistry": EngineRegistry},
        verl__workers__engine__fsdp__transformer_impl={
            "FSDPEngineWithLMHead": FSDPEngineWithLMHead
        },
    )
    # setdefault in the module would outlive the test.
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "drift_fast")
    fresh(monkeypatch, "verl")
    return types.SimpleNamespace(registry=EngineRegistry, tracking=Tracking())


def verl_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    options = {"delta": "delta", "schedule": "linear", **OPTIONS, **options}
    (tmp_path / "drift.json").write_text(json.dumps(options))
    monkeypatch.setenv("DRIFT_FAST_CONFIG", str(tmp_path / "drift.json"))


def test_verls_engine_injects_before_it_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Backbone()
    delta = delta_towards(tmp_path, network, out=tmp_path / "delta")
    verl = verl_stand_in(monkeypatch, network)
    verl_settings(tmp_path, monkeypatch, csv=str(tmp_path / "drift.csv"))
    engine = verl.registry.get_engine_cls("language_model", "fsdp2")()
    engine.initialize()
    before = {name: reference.exact(p) for name, p in network.named_parameters()}
    regression_loss(network, regression_batch()).backward()
    plain = {name: reference.exact(p.grad) for name, p in network.named_parameters()}
    outputs = engine.train_batch(regression_batch(), loss_function=regression_loss)
    found = {
        name: (before[name] - reference.exact(p)) / RATE for name, p in network.named_parameters()
    }
    assert_injected(found, plain, delta, clip=0.01)
    assert engine.injection.steps == 1
    assert "1,progress," in (tmp_path / "drift.csv").read_text()
    # verl's SFT trainer logs what every process has found, as a list.
    metrics = {key: [value, value] for key, value in outputs["metrics"].items() if "/" in key}
    verl.tracking.log(data={"train/loss": 1.0, "other": [1, 2], **metrics}, step=1)
    expected = engine.injection.summary()["progress"]
    assert expected != 0
    logged = verl.tracking.logged["drift/progress"]
    # A number of NumPy's would be written with its type.
    assert (type(logged), logged) == (float, pytest.approx(expected))
    assert verl.tracking.logged["train/loss"] == 1.0
    assert verl.tracking.logged["other"] == [1, 2]
    engine.injection.remove()


def test_verls_checkpoints_hold_the_state_of_the_injection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Backbone()
    delta_towards(tmp_path, network, out=tmp_path / "delta")
    verl = verl_stand_in(monkeypatch, network)
    verl_settings(tmp_path, monkeypatch)
    engine_class = verl.registry.get_engine_cls("language_model", "fsdp")
    engine_class.engine_config.use_orig_params = True
    first = engine_class()
    first.initialize()
    first.train_batch(regression_batch(), loss_function=regression_loss)
    first.save_checkpoint(str(tmp_path / "saved"), global_step=1)
    first.train_batch(regression_batch(), loss_function=regression_loss)
    expected = first.injection.summary()
    first.injection.remove()
    resumed = engine_class()
    resumed.initialize()
    resumed.load_checkpoint(str(tmp_path / "saved"))
    resumed.train_batch(regression_batch(), loss_function=regression_loss)
    assert resumed.injection.steps == 2
    assert resumed.injection.summary() == expected
    resumed.injection.remove()
    (tmp_path / "saved/drift_fast_rank_0.json").write_text("{")
    with pytest.raises(drift_fast.DriftError, match=r"drift_fast_rank_0\.json.*delete the file"):
        engine_class().load_checkpoint(str(tmp_path / "saved"))
    (tmp_path / "saved/drift_fast_rank_0.json").unlink()
    resumed = engine_class()
    resumed.initialize()
    with pytest.warns(drift_fast.DriftWarning, match="schedules start anew"):
        resumed.load_checkpoint(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("model_type", "backend"),
    [
        ("language_model", "fsdp_turbo"),
        ("language_model", "megatron"),
        ("language_model", "veomni"),
        ("value_model", "fsdp2"),
    ],
)
def test_verls_engines_that_do_not_inject_are_refused(
    monkeypatch: pytest.MonkeyPatch, model_type: str, backend: str
) -> None:
    verl = verl_stand_in(monkeypatch, Backbone())
    with pytest.raises(
        drift_fast.DriftError, match=f"Other .a {model_type} .*{backend}.*strategy=fsdp2"
    ):
        verl.registry.get_engine_cls(model_type, backend)


def test_verl_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verl = verl_stand_in(monkeypatch, Backbone())
    engine = verl.registry.get_engine_cls("language_model", "fsdp")()
    monkeypatch.delenv("DRIFT_FAST_CONFIG", raising=False)
    with pytest.raises(drift_fast.DriftError, match="DRIFT_FAST_CONFIG is not set"):
        engine.initialize()
    verl_settings(tmp_path, monkeypatch, scope="microbatch")
    with pytest.raises(drift_fast.DriftError, match='only scope="step"'):
        engine.initialize()
    verl_settings(tmp_path, monkeypatch)
    engine.engine_config.strategy = "fsdp"
    with pytest.raises(drift_fast.DriftError, match=r"set engine\.use_orig_params=true, or"):
        engine.initialize()
    # A reference model does not train.
    engine.engine_config.forward_only = True
    engine.initialize()


def test_another_vendors_engine_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    verl_stand_in(monkeypatch, Backbone())
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "metax")
    with pytest.raises(drift_fast.DriftError, match="VERL_ENGINE_VENDOR is 'metax'"):
        fresh(monkeypatch, "verl")


# --- the real packages --------------------------------------------------------------------------

PACKAGES = {
    "llamafactory": "llamafactory",
    "llamafactory_images": "llamafactory",
    "swift": "ms-swift",
    "axolotl": "axolotl",
}
# Stand-ins and their Δ; with images a Qwen2.5-VL and pictures.
PREPARE = """
import sys
sys.path.insert(0, {folder!r})
import tiny
tiny.pair({out!r}, text_only=True)
tiny.tokenizer().save_pretrained({out!r} + "/multimodal")
"""
PREPARE_IMAGES = """
import sys
sys.path.insert(0, {folder!r} + "/qwen2_5_vl_7b")
import drift_fast, stand_in
stand_in.write({out!r}, samples=8)
pair = [{out!r} + "/reasoning", {out!r} + "/multimodal"]
drift_fast.compute_delta(*pair, {out!r} + "/delta", modules="attn,mlp", dtype="float32")
"""


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("framework", PACKAGES)
def test_a_step_of_the_real_framework_is_injected_then_clipped(
    tmp_path: Path, framework: str
) -> None:
    if not installed(PACKAGES[framework]):
        pytest.skip(f"{PACKAGES[framework]} is not installed; its interface is tested above")
    from safetensors.torch import load_file

    examples = Path(__file__).parents[2] / "examples"
    images = framework.endswith("_images")
    prepare = (PREPARE_IMAGES if images else PREPARE).format(
        folder=str(examples), out=str(tmp_path)
    )
    env = environment(
        WANDB_MODE="disabled", DISABLE_VERSION_CHECK=1, AXOLOTL_DO_NOT_TRACK=1, DO_NOT_TRACK=1
    )
    python(prepare, env=env, limit=250)
    runs = {}
    for how in ("plain", "injected"):
        command = [sys.executable, framework_runs.__file__, framework, tmp_path, how]
        run(*command, env=env, limit=280)
        runs[how] = load_file(tmp_path / f"{how}.safetensors")
    start = load_file(tmp_path / "start.safetensors")
    delta = drift_fast.Delta.open(tmp_path / "delta")
    # Δ has the names on disk, which lack what transformers puts in front of the language model.
    found, plain = (
        {
            name.replace(".language_model.", "."): (
                reference.exact(start[name]) - reference.exact(weight)
            )
            / framework_runs.RATE
            for name, weight in runs[how].items()
        }
        for how in ("injected", "plain")
    )
    assert delta.shapes.keys() <= found.keys()
    assert_injected(found, plain, delta, clip=framework_runs.CLIP)


@pytest.mark.slow
def test_a_step_of_verls_own_engine_is_injected_then_clipped(tmp_path: Path) -> None:
    if not installed("verl"):
        pytest.skip("verl is not installed; its interface is tested above")
    delta_towards(tmp_path, Backbone(), out=tmp_path / "delta")
    (tmp_path / "drift.json").write_text(json.dumps({"delta": "delta", **OPTIONS}))
    env = environment(
        VERL_USE_EXTERNAL_MODULES="drift_fast.integrations.verl",
        DRIFT_FAST_CONFIG=tmp_path / "drift.json",
    )
    run(sys.executable, "-m", "support.framework_verl", tmp_path, cwd=TESTS, env=env, limit=280)
