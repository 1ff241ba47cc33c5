"""The records of `src/qk.h` and `src/stack.c`, field by field. Pointers are addresses that the caller keeps alive."""

from __future__ import annotations

import ctypes
from enum import IntEnum

#: Of the records and functions: QK_VERSION.
VERSION = 2
#: Inputs that share a scale of the activations, and outputs of a block.
CHUNK, COLUMNS = 32, 16
#: Rows (query tokens times heads that share keys) of an attention item, and the largest head.
ITEM_ROWS, MAX_HEAD_DIM = 48, 256


class Level(IntEnum):
    """Instruction sets: plain C, AVX2 with FMA and F16C, AVX-512 with VNNI."""

    PLAIN = 0
    AVX2 = 1
    AVX512 = 2

    @property
    def text(self) -> str:
        """For people."""
        return {Level.PLAIN: "plain C", Level.AVX2: "AVX2", Level.AVX512: "AVX-512 VNNI"}[self]


class ScaleKind(IntEnum):
    """Types of scales and mins."""

    FLOAT16 = 0
    BFLOAT16 = 1
    FLOAT32 = 2


class ZeroKind(IntEnum):
    """How a weight is made of its code: a constant zero point, a table of them, or a min that is added."""

    CONST = 0
    TABLE = 1
    MIN = 2


class Number(IntEnum):
    """Types of activations."""

    FLOAT32 = 0
    BFLOAT16 = 1


class Weight(ctypes.Structure):
    """qk_weight."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("zero_kind", ctypes.c_int32),
        ("zero_const", ctypes.c_int32),
        ("is_fine", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """qk_layer."""

    _fields_ = (
        ("qkv", Weight),
        ("out", Weight),
        ("gate_up", Weight),
        ("down", Weight),
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    )


class Stack(ctypes.Structure):
    """qk_stack."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("norm_eps", ctypes.c_float),
        ("head_norm_eps", ctypes.c_float),
    )


class Sequence(ctypes.Structure):
    """qk_sequence."""

    _fields_ = (
        ("first_row", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
    )
