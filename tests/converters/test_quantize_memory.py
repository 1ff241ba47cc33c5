"""The memory that is foreseen against what a process of its own really took."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.quantize import quantize
from converters.quantize_memory import plan_memory
from converters.skeleton import Skeleton
from converters.source import LinearSlot
from tests.converters.tiny_models import Letters, make_model, save_model, write_texts


def _quantize(model: Path, out: Path, method: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    done = quantize(
        model,
        out,
        method=method,
        group_size=64,
        calibration=str(model.parent / "texts.jsonl"),
        seq_len=512,
        device="cpu",
        encoder=Letters(),
    )
    pipe.send((done.planned.host, done.host_bytes))


@pytest.mark.parametrize(
    ("method", "num_layers"), [("rtn", 1), ("awq", 1), ("gptq", 1), ("auto", 1), pytest.param("rtn", 24, id="rtn-deep")]
)
def test_the_process_takes_what_was_foreseen(tmp_path: Path, method: str, num_layers: int) -> None:
    """A layer that is small, and yet its Hessians and activations are a good part of the process; and many of them."""
    shape = {"hidden_size": 256, "intermediate_size": 2048, "max_position_embeddings": 512}
    model = save_model(tmp_path / "model", make_model(**shape, num_hidden_layers=num_layers))
    write_texts(tmp_path / "texts.jsonl", count=8, length=520)
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_quantize, args=(model, tmp_path / "out", method, sending))
    process.start()
    sending.close()
    planned, measured = receiving.recv()
    process.join()
    assert abs(planned - measured) <= 0.15 * measured, f"foreseen {planned / 1e6:.0f} MB, took {measured / 1e6:.0f} MB"


def test_what_each_method_adds() -> None:
    """By hand, for a layer of hidden size 64 and inner size 128, and more tokens than matter."""
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    skeleton = Skeleton(config, "here")
    linears = [slot for slot in skeleton.layer(0) if isinstance(slot, LinearSlot)]
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64

    def device(method: str, batches: list[tuple[int, int]]) -> int:
        return plan_memory(skeleton, linears, batches, method=method, tied=False, on_gpu=True).device

    assert device("rtn", []) == 4 * (layer + 5 * 64 * 128)
    squares = 3 * 64**2 + 128**2
    assert device("awq", [(1, 1)]) == 4 * (layer + squares + 6 * 64 * 128)
    assert device("gptq", [(1, 1)]) == 4 * (layer + 2 * 128**2 + 7 * 64 * 128)
    many = 10_000 * (6 * 64 + 3 * 128)
    assert device("gptq", [(2, 5000)]) == 4 * (layer + 128**2 + many)
    assert device("auto", [(2, 5000), (1, 1)]) == 4 * (layer + squares + many)
