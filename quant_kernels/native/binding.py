"""Finding, loading and calling the compiled library.

Invariant: every function here checks shapes, dtypes, strides and the range of sizes before it hands out an address; C
checks nothing. Threads are torch's own, as many as `torch.get_num_threads()` says at each call.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from functools import lru_cache
from pathlib import Path

import torch

from quant_kernels.native import library_file
from quant_kernels.native.structures import CHUNK, VERSION, Layer, Level, Number, Sequence, Stack, Weight

logger = logging.getLogger(__name__)

HOW_TO_BUILD = "install a C compiler (Debian, Ubuntu: sudo apt install gcc) and install qengine again"
_OPENMP_NAMES = ("libgomp.so.1", "libomp.so", "libomp.so.5", "libiomp5.so")
_NUMBERS = {torch.float32: Number.FLOAT32, torch.bfloat16: Number.BFLOAT16}
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "qk_best_level": (_INT, ()),
    "qk_set_openmp": (None, (_POINTER, _POINTER)),
    "qk_pack": (None, (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT)),
    "qk_unblock": (None, (_POINTER, _LONG, _LONG, _INT, _POINTER, _POINTER, _POINTER, _LONG, _INT)),
    "qk_linear_room": (_LONG, (_LONG, _LONG, _LONG, _INT)),
    "qk_linear": (
        None,
        (_POINTER, _POINTER, _LONG, _INT, _LONG, _LONG, _POINTER, _LONG, _INT, _POINTER, _INT, _INT),
    ),
    "qk_dense_room": (_LONG, (_LONG, _INT)),
    "qk_dense": (None, (*[_POINTER] * 3, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT, _INT)),
    "qk_stack_room": (_LONG, (_POINTER, _LONG, _INT)),
    "qk_run_stack": (None, (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT, _INT)),
    "qk_sizes": (None, (ctypes.POINTER(_LONG),)),
    "qk_quantize": (None, (_POINTER, _LONG, _POINTER, _INT, _POINTER, _INT)),
    "qk_silu_mul": (None, (_POINTER, _POINTER, _LONG, _POINTER, _INT)),
    "qk_rms_norm": (None, (_POINTER, _POINTER, _LONG, _FLOAT, _POINTER, _INT)),
}


class Library:
    """The loaded library at one instruction set.

    Attributes:
        level: that it runs with.
    """

    def __init__(self, functions: ctypes.CDLL, level: Level, max_threads: int | None = None) -> None:
        self.functions = functions
        self.level = level
        self._max_threads = max_threads
        self._rooms = threading.local()

    def at(self, level: Level, max_threads: int | None = None) -> Library:
        """The same library with another instruction set, which the processor must have, and fewer threads."""
        return Library(self.functions, level, max_threads)

    @property
    def num_threads(self) -> int:
        """That a call made now would run on."""
        wanted = torch.get_num_threads()
        return wanted if self._max_threads is None else min(wanted, self._max_threads)

    def room(self, num_bytes: int) -> int:
        """The address of so many bytes that this thread may use until its next call; aligned to 64."""
        held: torch.Tensor | None = getattr(self._rooms, "held", None)
        if held is None or held.numel() < num_bytes:
            held = self._rooms.held = None  # Never the old one and the new one at once.
            held = self._rooms.held = torch.empty(num_bytes, dtype=torch.uint8)
        return held.data_ptr()

    def linear(self, weight: Weight, x: torch.Tensor, inputs: int, dtype: torch.dtype) -> torch.Tensor:
        """x [M, inputs] float32 or bfloat16 to [M, N] in `dtype`, one of the two."""
        if x.dim() != 2 or x.shape[1] != inputs or x.dtype not in _NUMBERS or x.device.type != "cpu":
            raise ValueError(
                f"x is {str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}, expected [rows, {inputs}] "
                "in float32 or bfloat16 on the CPU"
            )
        x = x if x.stride(1) == 1 and x.stride(0) >= inputs else x.contiguous()
        rows, threads = len(x), self.num_threads
        y = torch.empty(rows, weight.n, dtype=dtype)
        if rows == 0:
            return y
        room = self.room(self.functions.qk_linear_room(rows, inputs, weight.k, threads))
        self.functions.qk_linear(
            ctypes.addressof(weight),
            x.data_ptr(),
            x.stride(0),
            _NUMBERS[x.dtype],
            rows,
            inputs,
            y.data_ptr(),
            weight.n,
            _NUMBERS[dtype],
            room,
            self.level,
            threads,
        )
        return y

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] W^T + bias in float32, of a weight bfloat16 [N, K], K a multiple of 8, and a bias float32 [N]."""
        outputs, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or not weight.is_contiguous() or inputs % 8:
            raise ValueError(f"the weight is {weight.dtype} {list(weight.shape)}, expected contiguous bfloat16")
        if bias is not None and (bias.dtype != torch.float32 or bias.shape != (outputs,) or not bias.is_contiguous()):
            raise ValueError(f"the bias is {bias.dtype} {list(bias.shape)}, expected float32 [{outputs}]")
        if x.dim() != 2 or x.shape[1] != inputs or x.device.type != "cpu":
            raise ValueError(f"x is {list(x.shape)} on {x.device}, expected [rows, {inputs}] on the CPU")
        x = x.float().contiguous()
        y = torch.empty(len(x), outputs)
        if y.numel() == 0:
            return y
        threads = self.num_threads
        self.functions.qk_dense(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            len(x),
            inputs,
            outputs,
            y.data_ptr(),
            self.room(self.functions.qk_dense_room(inputs, threads)),
            self.level,
            threads,
        )
        return y

    def pack(
        self, weight: Weight, out: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
    ) -> None:
        """Lay codes and tables out as `src/qk.h` describes: see `quant_kernels.linear.cpu_int8`, which checks them."""
        self.functions.qk_pack(
            ctypes.addressof(weight),
            out.data_ptr(),
            words.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            self.num_threads,
        )

    def unblock(
        self, blocks: torch.Tensor, bits: int, words: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None
    ) -> None:
        """Rows of GGUF blocks to columns of a record; bits are kept.

        Args:
            blocks: uint8 [rows, groups, bytes of a block], contiguous: a float16 scale, a float16 min if there are
                `mins`, and 32 codes of 4 or 8 bits (8 bits are signed).
            words: int32 [groups * bits, rows], which codes are written to as `packing` lays them out, 8 bits plus 128.
            scales, mins: float16 [groups, rows]. Of all three the columns are neighbours.
        """
        rows, groups, block_bytes = blocks.shape
        halves = 1 if mins is None else 2
        tables = (scales,) if mins is None else (scales, mins)
        if bits not in (4, 8) or block_bytes != 2 * halves + bits * CHUNK // 8 or not blocks.is_contiguous():
            raise ValueError(f"blocks {list(blocks.shape)} of {bits} bits with {halves - 1} mins")
        if words.shape != (groups * bits, rows) or any(table.shape != (groups, rows) for table in tables):
            raise ValueError(f"words {list(words.shape)} and scales {list(scales.shape)} for {rows} rows of {groups}")
        if words.dtype != torch.int32 or any(table.dtype != torch.float16 for table in tables):
            raise ValueError(f"words of {words.dtype}, scales of {scales.dtype}")
        columns = words.stride(0)
        if any(table.stride() != (columns, 1) for table in (words, *tables)):
            raise ValueError("the rows of words, scales and mins must lie equally far apart, and columns together")
        self.functions.qk_unblock(
            blocks.data_ptr(),
            rows,
            groups,
            bits,
            words.data_ptr(),
            scales.data_ptr(),
            None if mins is None else mins.data_ptr(),
            columns,
            self.num_threads,
        )

    def run_stack(
        self, stack: Stack, sequences: ctypes.Array[Sequence], residual: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        """All layers of a stack; see `quant_kernels.native.stack`, which checks what it is given."""
        rows, threads = len(residual), self.num_threads
        self.functions.qk_run_stack(
            ctypes.addressof(stack),
            ctypes.addressof(sequences),
            len(sequences),
            rows,
            residual.data_ptr(),
            hidden.data_ptr(),
            self.room(self.stack_room(stack, rows, threads)),
            self.level,
            threads,
        )

    def stack_room(self, stack: Stack, rows: int, threads: int) -> int:
        """Bytes of scratch that a step of so many rows needs."""
        num_bytes: int = self.functions.qk_stack_room(ctypes.addressof(stack), rows, threads)
        return num_bytes

    def quantize(self, x: torch.Tensor, *, is_fine: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [K], K a multiple of 32, as integers.

        Returns:
            int8 [K], or, fine, int16 [K] with the middle two of each four exchanged; and float32 [K / 32, 2], the scale
            of each 32 and their sum.
        """
        _expect_floats(x, 32)
        integers = torch.empty(len(x), dtype=torch.int16 if is_fine else torch.int8)
        tables = torch.empty(len(x) // 32, 2)
        self.functions.qk_quantize(x.data_ptr(), len(x), integers.data_ptr(), is_fine, tables.data_ptr(), self.level)
        return integers, tables

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of float32 [N] each, N a multiple of 8."""
        _expect_floats(gate, 8)
        _expect_floats(up, 8, len(gate))
        out = torch.empty_like(gate)
        self.functions.qk_silu_mul(gate.data_ptr(), up.data_ptr(), len(gate), out.data_ptr(), self.level)
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The norm of float32 [N], N a multiple of 8, times weight [N]."""
        _expect_floats(x, 8)
        _expect_floats(weight, 8, len(x))
        out = torch.empty_like(x)
        self.functions.qk_rms_norm(x.data_ptr(), weight.data_ptr(), len(x), eps, out.data_ptr(), self.level)
        return out


def _expect_floats(x: torch.Tensor, multiple: int, length: int | None = None) -> None:
    wrong_length = x.dim() != 1 or len(x) % multiple or (length is not None and len(x) != length)
    if wrong_length or x.dtype != torch.float32 or not x.is_contiguous() or x.device.type != "cpu":
        wanted = f"a multiple of {multiple}" if length is None else length
        raise ValueError(f"expected contiguous float32 on the CPU, {wanted} numbers; got {x.dtype} {list(x.shape)}")


@lru_cache
def load() -> tuple[Library | None, str]:
    """The library with the best instruction set of this processor, or None and why there is none."""
    path = library_file()
    if path is None:
        return None, f"the CPU kernels were not built; {HOW_TO_BUILD}"
    try:
        functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"the CPU kernels in {path.name} cannot be loaded ({error}); {HOW_TO_BUILD}"
    sizes = (_LONG * 5)()
    functions.qk_sizes(sizes)
    if list(sizes) != [*(ctypes.sizeof(record) for record in (Weight, Layer, Stack, Sequence)), VERSION]:
        return None, f"the CPU kernels in {path.name} are of another version; {HOW_TO_BUILD}"
    _borrow_threads(functions)
    return Library(functions, Level(functions.qk_best_level())), ""


def _borrow_threads(functions: ctypes.CDLL) -> None:
    """Let the library run on the threads of the OpenMP that torch has loaded; without one it makes its own."""
    folder = Path(torch.__file__).parent / "lib"
    for name in (*map(str, sorted(folder.glob("libgomp*.so*"))), *_OPENMP_NAMES):
        try:
            openmp = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            parallel, num_threads = openmp.GOMP_parallel, openmp.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        functions.qk_set_openmp(ctypes.cast(parallel, _POINTER), ctypes.cast(num_threads, _POINTER))
        return
    logger.info("torch's OpenMP was not found: the CPU kernels make threads of their own")
