"""Perplexity and divergence against an independent computation by transformers, on tiny models in float32."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qengine import cli, evaluate
from qengine.config import EngineConfig
from qengine.errors import ConfigError, LoadError, QEngineError
from qengine.evaluation import Evaluation, measure, scoring
from qengine.evaluation.forward import Forward
from qengine.evaluation.windows import Window, cut
from qengine.tokenizer import load_tokenizer
from tests.engine.fixtures import path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TEXT = "".join(f"Line {index}: the quick brown fox jumps over {index * 7} lazy dogs.\n" for index in range(40))
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu"}


def _save(folder: Path, seed: int, *, vocab_size: int | None = None) -> Path:
    """A random model with the tokenizer of a fixture."""
    source = Path(path("llama-awq-g64"))
    vocab = vocab_size or json.loads((source / "config.json").read_text())["vocab_size"]
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original, and the same with its weights disturbed."""
    root = tmp_path_factory.mktemp("models")
    original = _save(root / "original", 0)
    model = transformers.LlamaForCausalLM.from_pretrained(original)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.03)
    model.save_pretrained(root / "disturbed")
    for name in TOKENIZER_FILES:
        shutil.copy(original / name, root / "disturbed" / name)
    return original, root / "disturbed"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def _reference_log_probs(folder: Path, ids: list[int], window: int, stride: int) -> torch.Tensor:
    """[tokens scored, vocab], by the sliding window of transformers' own documentation."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    rows, scored = [], 1
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        with torch.inference_mode():
            found = torch.log_softmax(model(torch.tensor([ids[start:end]])).logits[0].double(), dim=-1)
        rows.append(found[max(scored, start + 1) - start - 1 : -1])
        scored = end
        if end == len(ids):
            break
    return torch.cat(rows)


def _reference_targets(ids: list[int], window: int, stride: int) -> torch.Tensor:
    return torch.tensor([ids[i] for i in range(1, len(ids)) if stride < window or i % window])


# Against transformers


@pytest.mark.parametrize(("window", "stride"), [(64, None), (64, 24), (64, 1), (256, None), (200, 199)])
def test_perplexity_matches_transformers(
    models: tuple[Path, Path], text_file: Path, window: int, stride: int | None
) -> None:
    limit = 300
    found = evaluate(str(models[0]), text=str(text_file), window=window, stride=stride, max_tokens=limit, **OPTIONS)
    ids = load_tokenizer(str(models[0])).encode(TEXT)[:limit]
    step = stride or window
    log_probs = _reference_log_probs(models[0], ids, window, step)
    nll = -log_probs.gather(1, _reference_targets(ids, window, step)[:, None])[:, 0]
    assert found.protocol.num_tokens == limit
    assert found.protocol.num_scored == len(nll)
    assert found.model.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    error = nll.std() / math.sqrt(len(nll)) * math.exp(nll.mean())
    assert found.model.perplexity_error == pytest.approx(float(error), rel=1e-4)
    assert found.original is None
    assert found.comparison is None


def test_divergence_matches_brute_force(models: tuple[Path, Path], text_file: Path) -> None:
    original, disturbed = models
    found = evaluate(str(disturbed), against=str(original), text=str(text_file), window=64, max_tokens=1000, **OPTIONS)
    ids = load_tokenizer(str(original)).encode(TEXT)[:1000]
    p, q = (_reference_log_probs(folder, ids, 64, 64) for folder in (original, disturbed))
    kl = (p.exp() * (p - q)).sum(-1)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    change = found.comparison
    assert change is not None
    assert kl.mean() > 0.01
    assert change.mean_kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert change.median_kl == pytest.approx(float(kl.median()), rel=2e-2)
    assert change.p999_kl == pytest.approx(float(torch.quantile(kl, 0.999)), rel=1e-3)
    assert change.max_kl == pytest.approx(float(kl.max()), rel=1e-3)
    assert change.top1_agreement == pytest.approx(float(agreement), abs=1.5 / len(kl))
    assert change.top1_low < change.top1_agreement < change.top1_high
    assert found.original is not None
    ratio = found.model.perplexity / found.original.perplexity
    assert change.perplexity_change == pytest.approx(ratio - 1, rel=1e-6)


def test_a_model_does_not_diverge_from_itself(models: tuple[Path, Path], text_file: Path) -> None:
    original = str(models[0])
    found = evaluate(original, against=original, text=str(text_file), window=64, max_tokens=300, **OPTIONS)
    change = found.comparison
    assert change is not None
    assert change.max_kl == 0
    assert change.top1_agreement == 1
    assert change.perplexity_change == 0
    assert found.model == found.original


def test_a_quantized_model_does_not_diverge_from_itself() -> None:
    """In the CPU's own dtype, with a quantized head, whose logits must not be rounded on one side only."""
    change = evaluate("demo", against="demo", max_tokens=48, device="cpu").comparison
    assert change is not None
    assert change.max_kl == 0
    assert change.top1_agreement == 1
    assert change.perplexity_change == 0


def test_both_models_run_in_the_dtype_of_the_original(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each would else run in its file's own."""
    monkeypatch.setattr(measure, "choose_device", lambda name: torch.device("cuda", 0))
    folders = {}
    for dtype in ("bfloat16", "float16"):
        folders[dtype] = shutil.copytree(models[0], tmp_path / dtype)
        config = json.loads((folders[dtype] / "config.json").read_text())
        config.pop("torch_dtype", None)
        (folders[dtype] / "config.json").write_text(json.dumps({**config, "dtype": dtype}))

    def opened(dtype: str, asked: str) -> measure._Candidate:
        config = EngineConfig.from_options({"model": str(folders[dtype]), "dtype": asked})
        return measure._Candidate.open(config, show_progress=False)

    for own, original, asked, expected in (
        ("float16", "bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float16", "auto", "float16"),
        ("bfloat16", "bfloat16", "float16", "float16"),
    ):
        pair = measure._in_one_dtype(opened(own, asked), opened(original, asked))
        assert [found.config.load.dtype for found in pair] == [expected, expected]


def test_short_texts_share_a_step(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a step has room for, however long a window may be; and their figures stay their own."""
    file = tmp_path / "rows.jsonl"
    texts = [f"Row {index}: " + "the quick brown fox jumps " * (1 + index % 3) for index in range(20)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    run, groups = Forward._run, []

    def counted(self: Forward, group: Sequence[Window]) -> Iterator[torch.Tensor]:
        groups.append(len(group))
        return run(self, group)

    monkeypatch.setattr(Forward, "_run", counted)
    together = evaluate(str(models[0]), text=str(file), **OPTIONS)
    assert together.protocol.window == 256
    assert together.protocol.num_tokens > 256
    assert sum(groups) == 20
    assert len(groups) <= -(-together.protocol.num_tokens // 256)
    groups.clear()
    monkeypatch.setattr("qengine.evaluation.forward._CPU_ROWS", 16)
    alone = evaluate(str(models[0]), text=str(file), **OPTIONS)
    assert len(groups) > 10
    assert alone.model.perplexity == pytest.approx(together.model.perplexity, rel=1e-5)


def test_a_quantized_checkpoint_runs_in_its_own_kernels(text_file: Path) -> None:
    name = path("llama-awq-g64")
    found = evaluate(name, text=str(text_file), max_tokens=100, **OPTIONS)
    assert 1 < found.model.perplexity < math.inf
    assert "AWQ" in found.model.description


# Sizes


def test_slices_and_steps_do_not_change_the_figures(
    models: tuple[Path, Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Evaluation:
        original, disturbed = map(str, models)
        return evaluate(
            disturbed, against=original, text=str(text_file), window=100, stride=60, max_tokens=500, **OPTIONS
        )

    whole = run()
    monkeypatch.setattr(scoring, "SLICE_BYTES", 7 * 4 * 1000)
    monkeypatch.setattr("qengine.evaluation.forward._CPU_ROWS", 33)
    monkeypatch.setattr(measure, "_MEMORY_BYTES", 1000)
    parts = run()
    assert parts.model.perplexity == pytest.approx(whole.model.perplexity, rel=1e-5)
    assert parts.comparison is not None
    assert whole.comparison is not None
    assert parts.comparison.mean_kl == pytest.approx(whole.comparison.mean_kl, rel=1e-4)
    assert parts.protocol == whole.protocol


def test_windows_score_every_token_once() -> None:
    for length in range(2, 40):
        for window in range(2, 12):
            for stride in range(1, window + 1):
                scored = []
                for found in cut([list(range(length))], window, stride):
                    assert 2 <= len(found.token_ids) <= window
                    scored += found.targets
                expected = [i for i in range(1, length) if stride < window or i % window]
                assert scored == expected, (length, window, stride)


def test_windows_do_not_join_sequences() -> None:
    assert list(cut([[1, 2, 3], [4, 5]], 2, 2)) == [Window([1, 2], 0), Window([4, 5], 0)]


def test_rows_of_jsonl_are_sequences_of_their_own(models: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "The quick brown fox"}\n{"text": "jumps over the lazy dog"}\n')
    found = evaluate(str(models[0]), text=str(file), **OPTIONS).protocol
    assert found.num_sequences == found.num_windows == 2
    assert found.num_scored == found.num_tokens - 2


# Refusals


def test_other_tokenizers_are_refused(models: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(models[1], other)
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="different tokenizers, so they cannot be compared: token"):
        evaluate(str(other), against=str(models[0]), text=str(text_file), **OPTIONS)


def test_other_vocabularies_are_refused(models: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    larger = _save(tmp_path / "larger", 0, vocab_size=5000)
    with pytest.raises(ConfigError, match="vocabularies of"):
        evaluate(str(larger), against=str(models[0]), text=str(text_file), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window is 1"),
        ({"window": 8, "stride": 9}, "stride is 9"),
        ({"stride": 0}, "stride is 0"),
        ({"max_tokens": 1}, "fewer than two tokens"),
        ({"window": 10**6}, "made for at most 256 positions"),
        ({"text": "no.txt"}, "--text: cannot open no.txt"),
        ({"tensor_parallel_size": 2}, "on one device"),
        ({"windw": 3}, "unknown option 'windw'"),
    ],
)
def test_wrong_options_are_refused(
    models: tuple[Path, Path], text_file: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(str(models[0]), **{"text": str(text_file), **OPTIONS, **options})


def test_a_missing_original_is_found_before_anything_runs(models: tuple[Path, Path], text_file: Path) -> None:
    with pytest.raises(LoadError, match="no model at"):
        evaluate(str(models[0]), against="./nowhere", text=str(text_file), **OPTIONS)


def test_logits_that_are_no_numbers_are_an_error(models: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = transformers.LlamaForCausalLM.from_pretrained(models[0])
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(broken)
    for name in TOKENIZER_FILES:
        shutil.copy(models[0] / name, broken / name)
    with pytest.raises(QEngineError, match="not finite"):
        evaluate(str(broken), text=str(text_file), max_tokens=50, skip_check=True, **OPTIONS)


# The command


def test_the_command_prints_a_table_or_json(
    models: tuple[Path, Path], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, disturbed = map(str, models)
    words = ["evaluate", disturbed, "--against", original, "--text", str(text_file), "--max-tokens", "200"]
    words += ["--window", "50", "--dtype", "float32", "--device", "cpu"]
    assert cli.main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "perplexity, change",
        "KL divergence, 99.9th percentile",
        "top-1 agreement",
        "200 tokens in 4 windows",
    ):
        assert part in text
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"]["window"] == 50
    assert found["comparison"]["mean_kl"] > 0
    assert found["original"]["perplexity"] > 1


def test_the_command_refuses_before_it_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--window", "0"]) == 2
    assert "--window is 0" in capsys.readouterr().err


def test_lines_for_a_model_card(models: tuple[Path, Path], text_file: Path) -> None:
    found = evaluate(str(models[0]), text=str(text_file), window=50, max_tokens=100, **OPTIONS).as_markdown()
    assert found.startswith("| | |\n|---|---:|\n| perplexity | ")
    assert "100 tokens in 2 windows of at most 50, no overlap; 98 tokens scored." in found
