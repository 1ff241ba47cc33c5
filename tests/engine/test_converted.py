"""The fixtures in other formats give the tokens and log-probabilities that they gave before: formats are one engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.convert import convert
from converters.export_formats import ExportFormat
from qengine import LLM, SamplingParams
from quant_kernels.linear.cpu_check import checked_library
from tests.engine.fixtures import expected, path
from tests.engine.test_checkpoints import GREEDY, check


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("llama-awq-g64", "compressed-tensors"),
        ("llama-awq-g64", "gptq"),
        ("llama-gptq-actorder-g32", "compressed-tensors"),
        ("llama-gptq-sym-g128", "awq"),
        ("llama-autogptq-perchannel", "compressed-tensors"),
        ("qwen2-gptq-v2-g64", "compressed-tensors"),
    ],
)
def test_the_same_tokens(tmp_path: Path, name: str, format: ExportFormat) -> None:
    convert(path(name), tmp_path / "out", format)
    wanted = expected(name)
    with LLM(str(tmp_path / "out"), dtype="float32", max_model_len=256, quantization=format) as llm:
        check(llm.generate([want.prompt for want in wanted], GREEDY, use_tqdm=False), wanted)


def test_compressed_tensors_run_on_the_cpus_kernels(tmp_path: Path) -> None:
    convert(path("llama-awq-g64"), tmp_path / "out", "compressed-tensors")
    with LLM(str(tmp_path / "out"), dtype="bfloat16", max_model_len=64) as llm:
        model = llm.engine._executor.runner.model  # type: ignore[attr-defined]
        kernels = [part.kernel for linear in model.linears() for part in linear.parts]
        expected_kernel = "cpu_int4" if checked_library() is None else "cpu_int8"
        assert kernels.count(expected_kernel) == 4 * model.config.num_layers
        assert llm.generate("Once", SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids
