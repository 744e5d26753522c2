"""Accelerate, Trainer, TRL and Lightning, each from its own entry point."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from parity.loops import sgd, trained, weights_of
from parity.sharded import (
    decoder_of,
    full_weights,
    shard,
    zero_configuration,
    zero_weights,
)
from parity.stacks import Cell
from parity.world import LEARNING_RATE, SEQUENCES, Gradients

BLOCK = "Qwen2DecoderLayer"


def _per_process(cell: Cell) -> int:
    return SEQUENCES // (cell.accumulation * cell.size)


def _forget_state() -> None:
    """Accelerate keeps its first configuration for the process's life otherwise."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def _fsdp_without_accelerators() -> Iterator[None]:
    """Lift Accelerate's rule that FSDP is for accelerators, which it ignores plugins by."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def lifted(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    with mock.patch.object(AcceleratorState, "__init__", lifted):
        yield


def accelerate(cell: Cell) -> Gradients:
    with _fsdp_without_accelerators():
        return _accelerate(cell)


def _accelerate(cell: Cell) -> Gradients:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    _forget_state()
    plugin = None
    if "fsdp" in cell.options:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[BLOCK],
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=cell.accumulation, fsdp_plugin=plugin
    )
    model = cell.world.model()
    loader = DataLoader(cell.samples, batch_size=_per_process(cell))
    model, optimizer, loader = accelerator.prepare(model, sgd(model.parameters()), loader)
    injection = cell.injection(model)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                injection.step()
            optimizer.step()
            optimizer.zero_grad()
    return full_weights(model) if plugin else weights_of(model)


def _training_arguments(cell: Cell, folder: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "output_dir": folder,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "per_device_train_batch_size": _per_process(cell),
        "gradient_accumulation_steps": cell.accumulation,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    if cell.size > 1:
        options["ddp_backend"] = "gloo"
    if "fsdp" in cell.options:
        options |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": [BLOCK],
                "cpu_ram_efficient_loading": False,
            },
        }
    if "zero" in cell.options:
        configuration = zero_configuration(cell, cell.options["zero"])
        configuration["optimizer"] = {"type": "SGD", "params": {"lr": LEARNING_RATE}}
        options["deepspeed"] = configuration
    return options


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    _forget_state()
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def trainer(cell: Cell) -> Gradients:
    from transformers import Trainer, TrainingArguments

    with _folder() as folder, _fsdp_without_accelerators():
        arguments = TrainingArguments(**_training_arguments(cell, folder))
        owner = Trainer(model=cell.model(), args=arguments, train_dataset=cell.samples)
        cell.attach(owner)
        owner.train()
    if "fsdp" in cell.options:
        return full_weights(owner.model_wrapped)
    if "zero" in cell.options:
        return zero_weights(owner.model, cell.options["zero"])
    return weights_of(owner.model)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"<{index}>": index for index in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<3>")),
        bos_token="<0>",
        eos_token="<1>",
        pad_token="<2>",
        unk_token="<3>",
    )


def sft_trainer(cell: Cell) -> Gradients:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": sample["input_ids"].tolist()} for sample in cell.samples]
    with _folder() as folder:
        arguments = SFTConfig(
            **_training_arguments(cell, folder), bf16=False, gradient_checkpointing=False
        )
        owner = SFTTrainer(
            model=cell.world.model(),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(),
        )
        cell.attach(owner)
        owner.train()
    return weights_of(owner.model)


def _strategy(cell: Cell) -> Any:
    """Return the Lightning strategy that the options name, on processes that are started here."""
    from lightning.pytorch import strategies

    name = cell.options.get("strategy", "auto")
    if name == "fsdp1":
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        layer = type(decoder_of(cell.model()).layers[0])
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={layer})
        return strategies.FSDPStrategy(auto_wrap_policy=policy, process_group_backend="gloo")
    if name == "fsdp2":
        return strategies.ModelParallelStrategy(
            data_parallel_size=cell.size, tensor_parallel_size=1, process_group_backend="gloo"
        )
    if name == "deepspeed":
        configuration = zero_configuration(cell, cell.options["zero"])
        # Lightning states these itself.
        for key in ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size"):
            del configuration[key]
        return strategies.DeepSpeedStrategy(config=configuration, process_group_backend="gloo")
    return name


@contextlib.contextmanager
def _lightning_without_accelerators() -> Iterator[None]:
    """Lift Lightning's rules that FSDPStrategy and DeepSpeedStrategy are for CUDA."""

    def shard_on_the_cpu(self: Any, module: Any, **options: Any) -> None:
        shard_anywhere(self, module, **{**options, "device_id": torch.device("cpu")})

    shard_anywhere = FullyShardedDataParallel.__init__
    from lightning.pytorch.strategies import DeepSpeedStrategy, deepspeed
    from lightning.pytorch.trainer.connectors import accelerator_connector

    connector = accelerator_connector._AcceleratorConnector
    with (
        mock.patch.object(connector, "_check_strategy_and_fallback"),
        mock.patch.object(DeepSpeedStrategy, "setup_environment", _set_up_on_the_cpu),
        mock.patch.object(DeepSpeedStrategy, "root_device", torch.device("cpu", 0)),
        mock.patch.object(deepspeed, "_validate_device_index_selection"),
        mock.patch.object(FullyShardedDataParallel, "__init__", shard_on_the_cpu),
    ):
        yield


def _set_up_on_the_cpu(strategy: Any) -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    super(DeepSpeedStrategy, strategy).setup_environment()


def lightning(cell: Cell) -> Gradients:
    from lightning.pytorch import LightningModule, Trainer

    from drift_fast.integrations.lightning import DriftCallback

    name = cell.options.get("strategy")

    class Module(LightningModule):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def configure_model(self) -> None:
            if name == "fsdp2":
                shard(self.model, decoder_of(self.model), cell.size)

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            # Both Lightning 2.6 and DeepSpeed divide it by the number of micro-batches.
            return loss * cell.accumulation if name == "deepspeed" else loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(trained(self))

        def on_train_end(self) -> None:
            logged = self.trainer.callback_metrics
            assert cell.alpha is None or "drift/progress" in logged, list(logged)
            # Before Lightning puts the strategy away.
            if name == "fsdp1":
                with FullyShardedDataParallel.summon_full_params(
                    self.trainer.strategy.model, writeback=False
                ):
                    found.update(weights_of(self.model))
            elif name == "deepspeed":
                found.update(zero_weights(self.model, cell.options["zero"]))
            else:
                found.update((full_weights if name == "fsdp2" else weights_of)(self.model))

    found: Gradients = {}
    module = Module(cell.model())
    callbacks = [] if cell.alpha is None else [cell.callback(DriftCallback)]
    with _lightning_without_accelerators():
        owner = Trainer(
            callbacks=callbacks,
            accelerator="cpu",
            devices=cell.size,
            strategy=_strategy(cell),
            max_steps=1,
            log_every_n_steps=1,
            accumulate_grad_batches=cell.accumulation,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        owner.fit(module, DataLoader(cell.samples, batch_size=_per_process(cell)))
    return found
