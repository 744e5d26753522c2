"""Torch's shortcuts on an accelerator, newer or less public than the rest of torch.

Each is tried once for a device and dtype against a known result, when an injection is attached, and
left out where it is missing or wrong.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)


def prepare(tensors: Sequence[torch.Tensor]) -> None:
    """Try torch's shortcuts for these dtypes once, which waits for the device."""
    for tensor in tensors:
        has_fused_step(tensor)
        has_wide_product(tensor)
        has_joint_norm(tensor)


def fused_step(tensor: torch.Tensor, delta: torch.Tensor, c: torch.Tensor) -> None:
    """Subtract c·delta through torch's fused SGD, whose learning rate may stay on the device.

    It computes in float32 and rounds once, in the fewest passes over memory that torch offers.
    """
    torch._fused_sgd_(
        [tensor],
        [delta],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=c,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def has_fused_step(tensor: torch.Tensor) -> bool:
    """Whether `fused_step` works for a tensor's device and dtype."""
    return tensor.device.type == "cuda" and _fused_step_works(tensor.device, tensor.dtype)


def has_wide_product(tensor: torch.Tensor) -> bool:
    """Whether torch.mm leaves the product of two 16-bit matrices in float32."""
    return tensor.device.type == "cuda" and _wide_product_works(tensor.device, tensor.dtype)


def has_joint_norm(tensor: torch.Tensor) -> bool:
    """Whether one launch takes the norms of many tensors in float32."""
    return tensor.device.type == "cuda" and _joint_norm_works(tensor.device, tensor.dtype)


@functools.cache
def _fused_step_works(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        tensor = torch.ones(8, dtype=dtype, device=device)
        # 1 − (1 + 2⁻¹²): a coefficient rounded to either 16-bit type would leave zero.
        fused_step(tensor, tensor.clone(), torch.full((), 1 + 2**-12, device=device))
        return tensor.tolist() == [-(2.0**-12)] * 8
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("no fused step for %s on %s, taking the slower one: %s", dtype, device, error)
        return False


@functools.cache
def _wide_product_works(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        left = torch.ones(1, 2049, dtype=dtype, device=device)
        product = torch.empty(1, 1, device=device)
        torch.mm(left, left.mT.contiguous(), out_dtype=torch.float32, out=product)
        # 2049 has one bit more than either 16-bit type.
        return product.dtype == torch.float32 and product.item() == 2049.0
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("no wide product for %s on %s, widening instead: %s", dtype, device, error)
        return False


@functools.cache
def _joint_norm_works(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        tensor = torch.ones(2049, dtype=dtype, device=device)
        norms = torch._foreach_norm([tensor, tensor[:16]], 2, dtype=torch.float32)
        right = [math.isclose(n.item(), m**0.5, rel_tol=1e-6) for n, m in zip(norms, (2049, 16))]  # noqa: B905
        return all(right) and norms[0].dtype == torch.float32
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("no joint norm for %s on %s, one after the other: %s", dtype, device, error)
        return False
