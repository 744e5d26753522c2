"""Measure, and subtract c·Δ: on a CPU through the Rust kernel, on a device without host syncs.

Owns the arithmetic on flat tensors, not the formula and not where Δ comes from. Sums are taken in
float32 or better whatever the dtypes are. Every tensor here has one dimension and is contiguous.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from drift_fast import _core

logger = logging.getLogger(__name__)

# Elements converted to float32 at a time where a dtype has no exact dot product of its own.
_PIECE = 1 << 24
# A dot product is taken as a product of two matrices with this many rows: measured on an H100 in
# bfloat16 as fast as torch.dot, whose result has three digits, and twice as fast as one row.
_ROWS = 64
# Launches on this many streams keep more of a GPU's memory busy: one axpy of 13 GB took 17.5 ms on
# one stream, 14.2 on two and 13.3 on four of an H100.
_STREAMS = 4
# Tensors up to this size are packed into one, since launching kernels costs more than they do.
SMALL = 1 << 15
_KERNEL_DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


class Sums(NamedTuple):
    """‖x‖ and ⟨x, Δ⟩ of each tensor, vectors of shape [tensors]; NaN for what was not asked for."""

    norm: torch.Tensor
    dot: torch.Tensor


class Arithmetic(Protocol):
    """What a device must be able to do."""

    device: torch.device
    dtype: torch.dtype
    # Of the streams it launches on, as CUDA counts: the lower goes first.
    priority: int
    generation: int

    def apart(self) -> contextlib.AbstractContextManager[None]: ...

    def measure(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor] | None,
        *,
        wide: bool = False,
    ) -> Sums: ...

    def subtract(
        self, tensors: Sequence[torch.Tensor], deltas: Sequence[torch.Tensor], c: torch.Tensor
    ) -> None: ...


class HostArithmetic:
    """Tensors in host memory, through the kernel that measured the delta."""

    device = torch.device("cpu")
    dtype = torch.float64
    priority = 0
    generation = 0

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is recorded here."""
        return contextlib.nullcontext()

    def measure(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor] | None,
        *,
        wide: bool = False,
    ) -> Sums:
        """Return the sums of each tensor with its Δ; NaN where either holds NaN or infinity."""
        left = [_window(tensor) for tensor in tensors]
        right = left if deltas is None else [_window(delta) for delta in deltas]
        sums = _core.measure(left, right, threads=torch.get_num_threads(), float64=wide)
        table = torch.tensor(sums, dtype=torch.float64).reshape(-1, 3)
        dot = torch.full_like(table[:, 2], math.nan) if deltas is None else table[:, 2]
        return Sums(table[:, 0].sqrt(), dot)

    def subtract(
        self, tensors: Sequence[torch.Tensor], deltas: Sequence[torch.Tensor], c: torch.Tensor
    ) -> None:
        """Subtract c·Δ from each tensor in place, computed in float64 and rounded to its dtype."""
        values: list[float] = c.tolist()
        # Exactly no injection: not even the sign of a zero changes.
        moved = [at for at, value in enumerate(values) if value != 0.0]
        # torch rounds the coefficient to a 16-bit tensor's dtype; the kernel does not.
        _core.subtract_scaled(
            [_window(tensors[at]) for at in moved],
            [_window(deltas[at]) for at in moved],
            [values[at] for at in moved],
            threads=torch.get_num_threads(),
        )


class DeviceArithmetic:
    """Tensors on an accelerator; sums and coefficients never leave it, so nothing is waited for."""

    dtype = torch.float32

    def __init__(self, device: torch.device, *, streams: int = _STREAMS, priority: int = 0) -> None:
        self.device = device
        self.priority = priority
        count = streams if device.type == "cuda" and streams > 1 else 0
        self._streams = shared_streams(device, priority, count)
        self._packs: dict[tuple[int, ...], _Pack] = {}
        # Grows whenever packs are let go of: what was recorded with them must not run again.
        self.generation = 0

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Launch on streams of which no kernel is launched otherwise, to record.

        What torch keeps for a stream, such as the workspace of a product, then belongs to what is
        recorded and is not given away when torch is asked to tidy up.
        """
        streams = self._streams
        self._streams = shared_streams(self.device, self.priority, len(streams), "recording")
        try:
            yield
        finally:
            self._streams = streams

    def measure(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor] | None,
        *,
        wide: bool = False,
    ) -> Sums:
        """Return the sums of each tensor with its Δ, in float32.

        `wide` asks for float64 where the device has it, for sums of which a small difference is
        wanted.
        """
        dtype = torch.float64 if wide and self.device.type != "mps" else torch.float32
        norm = torch.zeros(len(tensors), dtype=dtype, device=self.device)
        dot = torch.full_like(norm, math.nan) if deltas is None else torch.zeros_like(norm)
        small, large = _by_size(tensors)
        self._norms_into(norm, tensors)
        if deltas is None:
            return Sums(norm, dot)
        products = self._products(tensors, deltas, large, dtype)
        dots = dot.unbind()
        for at in self._on_streams(large):
            if at in products:
                rows = (tensors[at].view(_ROWS, -1), deltas[at].view(_ROWS, -1).mT)
                torch.mm(*rows, out_dtype=dtype, out=products[at])
            else:
                _dot_into(dots[at], tensors[at], deltas[at])
        if products:
            _scatter(dot, list(products), _traces(products))
        if small:
            pack = self._pack([tensors[at] for at in small])
            left = pack.gather([tensors[at] for at in small], dtype)
            right = pack.gather([deltas[at] for at in small], dtype)
            _scatter(dot, small, (left * right).sum(1))
        return Sums(norm, dot)

    def subtract(
        self, tensors: Sequence[torch.Tensor], deltas: Sequence[torch.Tensor], c: torch.Tensor
    ) -> None:
        """Subtract c·Δ from each tensor in place; c is a float32 vector on the device."""
        small, large = _by_size(tensors)
        values = c.unbind()
        for at in self._on_streams(large):
            _axpy(tensors[at], deltas[at], values[at])
        if small:
            some = [tensors[at] for at in small]
            pack = self._pack(some)
            each = torch.stack([values[at] for at in small])
            moved = pack.flat(some) - pack.spread(each) * pack.flat([deltas[at] for at in small])
            if len({tensor.dtype for tensor in some}) == 1:
                moved = moved.to(some[0].dtype)
            torch._foreach_copy_(some, list(torch.split(moved, pack.sizes)))

    def _norms_into(self, norm: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Write the norm of every tensor, all in one launch where torch can."""
        full = [at for at, tensor in enumerate(tensors) if tensor.numel()]
        if not full:
            return
        some = [tensors[at] for at in full]
        alike = len({tensor.dtype for tensor in some}) == 1
        if alike and norm.dtype == torch.float32 and _has_joint_norm(some[0]):
            found = list(torch._foreach_norm(some, 2, dtype=norm.dtype))
        else:
            found = [torch.linalg.vector_norm(tensor, dtype=norm.dtype) for tensor in some]
        _scatter(norm, full, torch.stack(found))

    def _products(
        self,
        tensors: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor] | None,
        members: Sequence[int],
        dtype: torch.dtype,
    ) -> dict[int, torch.Tensor]:
        """Return room for a product of matrices for each dot product that is taken as one.

        torch.dot of two bfloat16 vectors rounds its result to bfloat16; a product of matrices can
        leave it in float32, in half the time that widening both would take. Its trace is the dot
        product.
        """
        if deltas is None or dtype != torch.float32:
            return {}
        wide = [
            at
            for at in members
            # Rows of a multiple of 16 bytes keep the product's loads aligned.
            if tensors[at].dtype == deltas[at].dtype != dtype
            and tensors[at].numel() % (_ROWS * 8) == 0
            and _has_wide_product(tensors[at])
        ]
        room = torch.empty(len(wide), _ROWS, _ROWS, dtype=dtype, device=self.device)
        return dict(zip(wide, room.unbind(), strict=True))

    def _on_streams(self, members: Sequence[int]) -> Iterator[int]:
        """Yield the members, with another current stream for each share of them."""
        if len(members) < 2 or not self._streams:
            yield from members
            return
        current = torch.cuda.current_stream(self.device)
        for stream in self._streams:
            stream.wait_stream(current)
        try:
            for at, stream in enumerate(self._streams):
                with torch.cuda.stream(stream):
                    yield from members[at :: len(self._streams)]
        finally:
            # Also after a failure: a recording cannot end while a stream has not come back.
            for stream in self._streams:
                current.wait_stream(stream)

    def _pack(self, tensors: Sequence[torch.Tensor]) -> _Pack:
        sizes = tuple(tensor.numel() for tensor in tensors)
        if sizes not in self._packs:
            # Gradients that are missing, now here, now there, make ever new packs.
            if len(self._packs) >= 64:
                self._packs.clear()
                self.generation += 1
            self._packs[sizes] = _Pack(sizes, self.device)
        return self._packs[sizes]


class _Pack:
    """Many small tensors handled as the rows of one matrix, the short ones padded with zeros."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes = list(sizes)
        numel = sum(sizes)
        # Every row's elements in the concatenation, and beyond its end the zero behind the last.
        places = torch.full((len(sizes), max(sizes)), numel)
        rows = torch.empty(numel, dtype=torch.int64)
        start = 0
        for row, size in enumerate(sizes):
            places[row, :size] = torch.arange(start, start + size)
            rows[start : start + size] = row
            start += size
        self._places = _sent(places, device)
        self._rows = _sent(rows, device)

    def flat(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return all elements in a row, as float32."""
        return torch.cat([tensor.view(-1) for tensor in tensors]).float()

    def gather(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix."""
        flat = torch.nn.functional.pad(self.flat(tensors), (0, 1))
        return flat.take(self._places).to(dtype)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return one value for each row as one for each element."""
        return values.index_select(0, self._rows)


def _sent(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device, for which the host does not wait."""
    if device.type == "cuda":
        # Pinned memory that is freed is reused only after the copy from it, which torch watches.
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def make_arithmetic(device: torch.device) -> Arithmetic:
    """Return the arithmetic for a device."""
    return HostArithmetic() if device.type == "cpu" else DeviceArithmetic(device)


def new_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """Return a stream beside the current one; of two, that with the lower number goes first."""
    return torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]


@functools.cache
def shared_streams(
    device: torch.device, priority: int, count: int, use: str = "launching"
) -> list[torch.cuda.Stream]:
    """Return the streams that all injections share for one use.

    torch keeps a workspace of tens of megabytes for each stream on which matrices were multiplied.
    """
    return [new_stream(device, priority) for _ in range(count)]


def norm_of(tensor: torch.Tensor) -> float:
    """Return ‖tensor‖ of a CPU tensor to a millionth, NaN where it holds NaN or infinity."""
    window = _window(tensor)
    ((square, _, _),) = _core.measure([window], [window], threads=torch.get_num_threads())
    return float(square**0.5)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in row-major order: its own memory where it is contiguous."""
    # A step asks for hundreds, and each call takes the host a microsecond or more.
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).view(-1)


@contextlib.contextmanager
def flattened(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Give flat tensors to change in place; a transposed view gets a changed copy back."""
    flats = [flat(tensor) for tensor in tensors]
    copies = [at for at, tensor in enumerate(tensors) if not tensor.is_contiguous()]
    yield flats
    for at in copies:
        tensors[at].copy_(flats[at].view(tensors[at].shape))


def prepare(tensors: Sequence[torch.Tensor]) -> None:
    """Try torch's shortcuts for these dtypes once, which waits for the device."""
    for tensor in tensors:
        _has_fused_step(tensor)
        _has_wide_product(tensor)
        _has_joint_norm(tensor)


def _by_size(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    small = [at for at, tensor in enumerate(tensors) if 0 < tensor.numel() <= SMALL]
    if len(small) < 8:
        small = []
    packed = set(small)
    large = [at for at, t in enumerate(tensors) if at not in packed and t.numel()]
    return small, large


def _scatter(vector: torch.Tensor, members: Sequence[int], values: torch.Tensor) -> None:
    """Write values at some places; a list as index would be copied to the device."""
    if members[-1] - members[0] + 1 == len(members):
        vector[members[0] : members[-1] + 1].copy_(values)
        return
    slots = [vector[at] for at in members]
    torch._foreach_copy_(slots, list(values.to(vector.dtype).unbind()))


def _window(tensor: torch.Tensor) -> tuple[Any, str]:
    """Return a view of a CPU tensor's bytes and the kernel's name of its dtype."""
    return flat(tensor).view(torch.uint8).numpy(), _KERNEL_DTYPES[tensor.dtype]


def _traces(products: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the trace of each product; they lie one behind the other."""
    first = next(iter(products.values()))
    stacked = first.as_strided((len(products), _ROWS), (_ROWS * _ROWS, _ROWS + 1))
    return stacked.sum(1)


def _dot_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Write ⟨left, right⟩, multiplied and summed in `out`'s dtype, to a scalar on the device."""
    dtype = out.dtype
    if left.dtype == right.dtype == dtype:
        out.copy_(torch.dot(left, right))
        return
    starts = range(0, left.numel(), _PIECE)
    pieces = [
        torch.dot(left[at : at + _PIECE].to(dtype), right[at : at + _PIECE].to(dtype))
        for at in starts
    ]
    out.copy_(torch.stack(pieces).sum())


def _axpy(tensor: torch.Tensor, delta: torch.Tensor, c: torch.Tensor) -> None:
    """Compute tensor −= c·delta in place with c a float32 scalar on the device."""
    fused = _has_fused_step(tensor)
    if fused and tensor.dtype == delta.dtype:
        _fused_step(tensor, delta, c)
        return
    for at in range(0, tensor.numel(), _PIECE):
        piece, other = tensor[at : at + _PIECE], delta[at : at + _PIECE]
        if fused:
            _fused_step(piece, other.to(tensor.dtype), c)
        elif tensor.dtype == torch.float32:
            piece.addcmul_(other.float(), c, value=-1.0)
        else:
            # In 16 bits torch would round c itself to the tensor's dtype; in float32 only the
            # result is.
            piece.copy_(torch.addcmul(piece.float(), other.float(), c, value=-1.0))


def _fused_step(tensor: torch.Tensor, delta: torch.Tensor, c: torch.Tensor) -> None:
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


# These shortcuts are newer or less public than the rest of torch, so each is tried once for a
# device and dtype against a known result, at attachment, and left out where it is missing or wrong.


def _has_fused_step(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and _fused_step_works(tensor.device, tensor.dtype)


def _has_wide_product(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and _wide_product_works(tensor.device, tensor.dtype)


def _has_joint_norm(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and _joint_norm_works(tensor.device, tensor.dtype)


@functools.cache
def _fused_step_works(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        tensor = torch.ones(8, dtype=dtype, device=device)
        # 1 − (1 + 2⁻¹²): a coefficient rounded to either 16-bit type would leave zero.
        _fused_step(tensor, tensor.clone(), torch.full((), 1 + 2**-12, device=device))
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
