"""What only a GPU can show; test_cap_min.py tests the same code on the CPU.

Run:  python -m pytest -q -m cuda"""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cap_min  # noqa: E402
from bert_min import BertClassifier, from_pretrained  # noqa: E402
from cap_min import encode, main, topk_mask  # noqa: E402
from data_glue import WordPiece, encode_task, load  # noqa: E402
from test_cap_min import (  # noqa: E402, F401
    TINY, command, ends, glue, pretrained, record_of, start, steps_of, toy_data, vocab, watch)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("method", ["movement", "soft"])
def test_no_step_waits_for_the_gpu(method, command, tmp_path, monkeypatch):
    """CUDA says so itself, in all steps of an epoch but the first and the last, which is logged."""
    monkeypatch.setattr(cap_min, "LOG_EVERY", 1000)
    original = cap_min.randomness

    def watched(seed, epoch, batch):
        torch.cuda.set_sync_debug_mode("error" if 0 < batch < 6 else "default")
        return original(seed, epoch, batch)

    monkeypatch.setattr(cap_min, "randomness", watched)
    try:
        assert main(command(tmp_path, method, "--device", "cuda")) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_banks_outside_the_gpu(command, tmp_path, monkeypatch):
    """A bank that takes over a twentieth of what is free gives the same losses from outside."""
    logs, places, original = [], [], cap_min.Run.read

    def watched(run, name, device):
        bank = original(run, name, device)
        if name != "logits":
            places.append(bank.device.type)
        return bank

    monkeypatch.setattr(cap_min.Run, "read", watched)
    for free in (2 ** 40, 0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 ** 40))
        assert main(command(tmp_path / str(free), "movement", "--device", "cuda")) == 0
        logs.append([line["prc"] for line in steps_of(tmp_path / str(free))])
    assert places == ["cuda"] * 3 + ["cpu"] * 3
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)


def test_deterministic_mode(command, tmp_path, monkeypatch):
    """torch.use_deterministic_algorithms: the same command twice gives the same last bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        for out in ("one", "two"):
            assert main(command(tmp_path / out, "movement", "--device", "cuda")) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    files = [(tmp_path / out / "model" / "model.safetensors").read_bytes()
             for out in ("one", "two")]
    assert files[0] == files[1]


def test_a_gpu_computes_what_the_cpu_does(vocab):
    """Of equal scores the first by index, there too. In fp32 pooled vectors differ by rounding, in
    bf16 by its 8 bits; padding included."""
    scores = torch.randint(50, (64, 96)).float()
    assert torch.equal(topk_mask(scores.cuda(), 0.03).cpu(), topk_mask(scores, 0.03))
    model, data = BertClassifier(TINY).eval(), toy_data(vocab)
    wanted, model = encode(model, data), model.cuda()
    assert torch.allclose(encode(model, data).cpu(), wanted, atol=1e-5)
    assert torch.allclose(encode(model, data, "bf16").cpu(), wanted, atol=3e-2)


@pytest.mark.parametrize("method", ["movement", "soft", "magnitude", "structured"])
def test_run_on_a_gpu(method, command, vocab, glue, tmp_path, monkeypatch):
    """In bf16, stopped at the first snapshot and ended by the same command: the file is as sparse
    as was asked for, and scores the same on the CPU."""
    options = command(tmp_path, "movement", "--method", method, "--sparsity", "0.5", "--device",
                      "cuda", "--dtype", "bf16")
    with monkeypatch.context() as patch:
        watch(patch, "add_snapshot", stop_at=1)
        assert main(options) == 130
    assert main(options) == 0
    record, model = record_of(tmp_path), from_pretrained(tmp_path / "model")
    assert record["sparsity"]["total"] >= 0.499 and "cuda" in record["versions"]["machine"]
    dev = {"dev": encode_task(load("sst2", "dev", glue), WordPiece(vocab), 16)}
    assert cap_min.evaluate(model, "sst2", dev) == record["pruned"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_two_gpus(command, tmp_path):
    """By nccl, with what is exchanged on the CPU by gloo."""
    assert ends(start(command(tmp_path, "movement", "--device", "cuda"), 2)) == [0, 0]
    assert "2 processes" in record_of(tmp_path)["versions"]["machine"]
