"""A platform for verl that is a CPU, through its own interface for platforms.

verl imports this where VERL_USE_EXTERNAL_MODULES names it.
"""

import contextlib
import os
import types

import torch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase


def _nothing(*arguments, **keywords):
    return None


def _here(*arguments, **keywords):
    """Return where a tensor goes: verl moves tensors to what it takes for a GPU's number."""
    return "cpu"


def _zero(*arguments, **keywords):
    return 0


# What verl asks of torch.cuda, and a CPU has another answer to.
_MODULE = types.SimpleNamespace(
    is_available=lambda: True,
    current_device=_here,
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    memory_allocated=_zero,
    memory_reserved=_zero,
    max_memory_allocated=_zero,
    max_memory_reserved=_zero,
    mem_get_info=lambda *arguments: (0, 0),
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
    get_device_name=lambda *arguments: "CPU",
)


class _Cpu(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = _MODULE
    current_device = _here
    device_count = _zero
    set_device = synchronize = empty_cache = set_allocator_settings = _nothing
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    profiler_start = profiler_stop = _nothing

    def is_available(self):
        return True

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CPU_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "CPU"

    def ray_noset_envvars(self):
        return []

    def nvtx_range(self, msg):
        return contextlib.nullcontext()


# What Ray and the inference engines ask for is not asked here.
_Cpu.__abstractmethods__ = frozenset()
platform_manager.set_platform(_Cpu())
# verl registers its engine for GPUs only, and looks it up by this name.
os.environ["VERL_ENGINE_DEVICE"] = "cuda"

# verl joins processes with one backend for CPUs and one for its device, which are the same here.
_join = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, **more: _join("gloo", **more)
