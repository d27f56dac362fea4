"""The tests of CAP in three files, a lecture in four parts: numbers by hand, properties, parity
with other implementations, behaviour. A docstring derives the number that its test asserts.

Run:  python -m pytest -q test_cap_min.py
Parity with transformers, tokenizers and safetensors is tested where these are installed."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import xml.dom.minidom
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import bert_min
import cap_min
import data_glue
from bert_min import (BertClassifier, BertConfig, Layer, from_pretrained, load_safetensors,
                      save_pretrained, save_safetensors)
from cap_min import (Ancestors, Mask, Run, add_masks, apply_masks, cap_terms, contrastive_loss,
                     cubic_density, encode, encoder_linears, linear_lr, main, set_masks, topk_mask)
from data_glue import TASKS, Example, WordPiece, batches, encode_task, load, score

HERE = Path(__file__).parent
LONG, DOUBLE = torch.int64, torch.float64


def tensor(values, dtype=DOUBLE):
    return torch.tensor(values, dtype=dtype)


PIECES = ("[PAD] [UNK] [CLS] [SEP] [MASK] a good bad film is the was it not un ##aff ##able "
          "##s ##e ! . , - ' e ##n o u 中 文 ² ß σ ##σ ς ##ς 1 ##2 [ ] sep x").split()
TINY = BertConfig(vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=2,
                  num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Folder of a tiny BERT with random weights; its 3 labels fit no task that is run here."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = BertClassifier(BertConfig(**{**vars(TINY), "num_labels": 3}))
    model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = 0  # which is not pruned
    save_pretrained(model, folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def vocab(pretrained):
    return pretrained / "vocab.txt"


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """A data folder with 320 + 40 sentences for sst2, of many lengths; "good" means positive."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "SST-2").mkdir()
    for name, count in (("train.tsv", 320), ("dev.tsv", 40)):
        rows = [f"the film {'is ' * (i % 7)}{('bad', 'good')[i % 2]} !\t{i % 2}"
                for i in range(count)]
        (folder / "SST-2" / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


def toy_batch():
    """Ids (3, 7), mask and segments, with padding in two of three examples."""
    input_ids = torch.randint(4, TINY.vocab_size, (3, 7))
    attention_mask = tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5], LONG)
    return input_ids, attention_mask, tensor([[0] * 3 + [1] * 4] * 3, LONG)


# ========================================================== part 1: numbers by hand
# ------------------------------------------------------------------- masks, schedule

def test_mask_takes_tied_scores_by_index():
    """k = round(0.55 * 6) = 3 of ((1, 0, 1), (2, 1, 0)) is the 2 and the first two of three ones;
    of constant scores the first half: a comparison with the threshold would keep four, and all.
    round(0.01 * 4) = 0, but a matrix keeps at least one weight. Eq. (1)."""
    assert topk_mask(tensor([[1, 0, 1], [2, 1, 0]]), 0.55).tolist() == [[1, 0, 1], [1, 0, 0]]
    assert topk_mask(torch.zeros(2, 2), 0.5).tolist() == [[True, True], [False, False]]
    assert topk_mask(tensor([1, 4, 2, 3]), 0.01).tolist() == [False, True, False, False]


def test_straight_through_gradients():
    """y = (W * M) x with W = (1 + 2^-10, -3), M = (1, 0), x = (5, 7): dy/dW' = x, so dy/dS =
    dy/dW' * W = (5 + 5 * 2^-10, 7 * -3) and dy/dW = dy/dW' * M = (5, 0), in fp32. Autocast has the
    product in bf16, where 1 + 2^-10 is 1 and y = 5. dy/dW' is left as it was. Eq. (2)."""
    weight = torch.tensor([1 + 2 ** -10, -3.0], requires_grad=True)
    scores = torch.zeros(2, requires_grad=True)
    x = torch.tensor([5.0, 7.0])
    with cap_min.autocast(torch.device("cpu"), "bf16"):
        masked = cap_min.StraightThrough.apply(weight, scores, tensor([1, 0], torch.bool))
        y = masked @ x
    assert masked.tolist() == [1 + 2 ** -10, 0]
    assert y.dtype == torch.bfloat16 and y.item() == 5
    masked.backward(x)
    assert scores.grad.tolist() == [5 + 5 * 2 ** -10, -21]
    assert weight.grad.tolist() == [5, 0]
    assert x.tolist() == [5, 7]


def test_soft_masks_and_their_cut():
    """sigmoid of log(p / (1 - p)) is p. Of p = 0.05, 0.2 in one matrix and 0.5, 0.6, 0.09, 0.7 in
    another, 4 of 6 exceed 0.1, the threshold at density 1/3 on the way to sparsity 2/3; at density
    1, where it is 0, all do. A density of 1/3 keeps the 2 largest of both matrices together; on the
    way to sparsity 1/6 the threshold is almost 0.1 just before 5/6, where the largest below it is
    added. The penalty: lambda_f / 2, halfway, times the mean of 0.25 / 2 and 1.89 / 4. Eq. (8)."""
    first, second = Mask(torch.zeros(1, 2), "zero"), Mask(torch.zeros(2, 2), "zero")
    model = nn.ModuleList([first, second])
    first.scores.data = torch.logit(torch.tensor([[0.05, 0.2]]))
    second.scores.data = torch.logit(torch.tensor([[0.5, 0.6], [0.09, 0.7]]))
    for density, sparsity, wanted in (
            (1, 2 / 3, [True] * 6), (5 / 6, 1 / 6, [False, *[True] * 5]),
            (5 / 6 + 1e-9, 1 / 6, [False, True, True, True, False, True]),
            (1 / 3, 2 / 3, [False, False, False, True, False, True])):
        cap_min.set_soft_masks(model, density, sparsity)
        assert first.mask.flatten().tolist() + second.mask.flatten().tolist() == wanted
    args = cap_min.parse(["--penalty", "8", "--sparsity", "0.6"])
    penalty = cap_min.soft_penalty(model, density=0.7, args=args)
    assert penalty.item() == pytest.approx(4 * (0.25 / 2 + 1.89 / 4) / 2)


def test_cubic_schedule():
    """From 1 to 0.2 between step 2 and step 10 - 4 = 6: at step 4 half of it is over, so
    0.2 + 0.8 * (1 - 1/2)^3 = 0.3; before it is 1, after it 0.2. The learning rate, with a
    warm-up of 2 in 6 steps: 0, 1/2, 1, then down by 1/4 a step. Eq. (3)."""
    density = [cubic_density(step, 10, 1.0, 0.2, warm=2, cool=4) for step in range(11)]
    assert density[:3] == [1, 1, 1] and density[6:] == [0.2] * 5
    assert density[4] == pytest.approx(0.3)
    assert [linear_lr(step, 6, 2) for step in range(7)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    assert [linear_lr(step, 4, 0) for step in (0, 3)] == [1, 0.25] and linear_lr(3, 4, 4) == 0.75


# ------------------------------------------------------ contrastive loss, total loss

@pytest.mark.parametrize("norm, divisor", [("official", 6), ("supcon", 2)])
def test_candidates_positives_and_supcon(norm, divisor):
    """Anchors east and north, of one label, have bank rows alike; of another label west is drawn.
    Candidates are the other anchor and the three bank rows, not oneself: s = 0, 1, 0, -1 for east,
    so Z = e + 2 + 1/e, and s = 0, 0, 1, 0 for north, so Z = e + 3. Eq. (4). P^u is one's own row:
    -log p = log Z - 1. P^s is the other anchor and both their rows: mean -log p = log Z - 1/3. The
    means are summed; official divides by sum |P|, 2 and 6, supcon by B = 2. Eq. (5), (6), (7)."""
    index, labels = tensor([0, 1], LONG), tensor([1, 1, 0], LONG)
    bank, extra = tensor([[[1, 0]], [[0, 1]], [[-1, 0]]]), tensor([2], LONG)
    unsup, sup = contrastive_loss(tensor([[1, 0], [0, 1]]), index, labels[index], bank, labels,
                                  extra, temperature=1.0, norm=norm)
    log_z = math.log(math.e + 2 + 1 / math.e) + math.log(math.e + 3)
    assert unsup.item() == pytest.approx((log_z - 2) / 2)
    assert sup.item() == pytest.approx((log_z - 2 / 3) / divisor)


def test_total_loss():
    """Softmax of the logits (0, 2 log 2) is (1/5, 4/5): CE = log(5/4). KD, teacher logits (2 log 3,
    0), T = 2: softmax gives (3/4, 1/4) and (1/3, 2/3), T^2 KL = 4 (3/4 log(9/4) + 1/4 log(3/8));
    T = 1: (9/10, 1/10) and (1/5, 4/5). Of 4 examples the second is the anchor; all bank rows are
    equal, so p = 1/C. PrC and FiC: C = 1 + 2, of which the anchor's own is in P^u and one more in
    P^s: L^u = log 3, L^s = log 3 / 2. SnC, K = 2, draws 2 / K = 1 example, of the anchor's label:
    C = 2 + 2, L^u = log 4 / 2, L^s = log 4 / 4. With w_u = 1/2, w_s = 7: 4 log 3 and 2 log 4.
    Before there is a snapshot, SnC is absent. With tau = 1 and the last row drawn turned round, Z =
    2 e + 1/e; supcon divides by B = 1: both log Z - 1. Errors: 2^2 and (2^2 + 0) / 2. Eq. (8)."""
    args = cap_min.parse(["--w-unsup", "0.5", "--w-sup", "7", "--extra", "2"])
    bank, labels = cap_min.to_bank(torch.tensor([[1.0, 0.0]] * 4)), tensor([0, 1, 1, 0], LONG)
    teacher_logits = tensor([[0, 0], [2 * math.log(3), 0], [0, 0], [0, 0]])
    ancestors = Ancestors({"prc": [bank], "snc": [bank] * 2, "fic": [bank]}, teacher_logits, labels)
    logits, pooled = tensor([[0, 2 * math.log(2)]]), torch.tensor([[2.0, 0.0]])
    batch = {"index": tensor([1], LONG), "labels": labels[1:2]}
    case = (logits, pooled, batch, ancestors, tensor([2, 0], LONG), args)
    terms = cap_terms(*case)
    assert list(terms) == ["ce", "kd", "prc", "snc", "fic"]
    kd = 4 * (0.75 * math.log(9 / 4) + 0.25 * math.log(3 / 8))
    wanted = [0.1 * math.log(5 / 4), 0.9 * kd, 4 * math.log(3), 2 * math.log(4), 4 * math.log(3)]
    assert [term.item() for term in terms.values()] == pytest.approx(wanted)
    ancestors.banks |= {"snc": [], "prc": [bank * tensor([[-1], [1], [1], [1]], torch.half)]}
    args.kd_temperature, args.temperature, args.norm = 1.0, 1.0, "supcon"
    batch["labels"] = tensor([0], LONG)
    terms = cap_terms(*case)
    assert set(terms) == {"ce", "kd", "prc", "fic"}
    assert terms["ce"].item() == pytest.approx(0.1 * math.log(5))
    assert terms["prc"].item() == pytest.approx(7.5 * (math.log(2 * math.e + 1 / math.e) - 1))
    kd = 0.9 * math.log(9 / 2) + 0.1 * math.log(1 / 8)
    assert terms["kd"].item() == pytest.approx(0.9 * kd)
    assert cap_min.distillation_loss(tensor([[1.0]]), tensor([[3.0]])).item() == 4
    assert cap_min.task_loss(tensor([[1.0], [2.0]]), tensor([3.0, 2.0])).item() == 2


# --------------------------------------------------------------- structured pruning

def test_units_are_ranked_over_all_layers(monkeypatch):
    """(3, 4) has norm 5 and becomes (0.6, 0.8), (0, 10) becomes (0, 1): the order is the last one,
    0.8, 0.6, 0; a layer may lose all. (1, 1, 1, 1) becomes 0.5 each, (100, 200) becomes (0.45,
    0.89): divided by sums, or not at all, 100 would come before a 1. A head and a neuron stay."""
    importances = [tensor([3.0, 4.0]), tensor([0.0, 10.0])]
    kept = [[mask.tolist() for mask in cap_min.most_important(importances, count)]
            for count in (0, 1, 2, 3)]
    assert kept == [[[0, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [0, 1]], [[1, 1], [0, 1]]]
    fours, two = cap_min.most_important([torch.ones(4), tensor([100.0, 200.0])], 5)
    assert fours.tolist() == [True] * 4 and two.tolist() == [False, True]
    assert cap_min.most_important([torch.zeros(2), tensor([1.0, 2.0])], 2)[1].tolist() == [True] * 2
    equal = [torch.ones(2)] * 2, [torch.ones(32)] * 2
    monkeypatch.setattr(cap_min, "importance", lambda *given: equal)
    small = cap_min.remove_least_important(None, BertClassifier(TINY), None, None, 0.999)
    assert small.config.layer_sizes == [[1, 1], [0, 0]]


# ---------------------------------------------------------------- WordPiece, metrics

def pieces(vocab, text, **options):
    tokenizer = WordPiece(vocab, **options)
    return " ".join(PIECES[i] for i in tokenizer.encode(text)[0][1:-1])


def test_wordpiece_is_googles(vocab):
    """"un" is the longest known prefix, then "##aff", "##able"; a rest that no piece begins makes
    the whole word unknown, as do over 100 characters. Control characters vanish; every space
    splits; accents go with the case; ideographs and punctuation stand alone; a final sigma is
    lower-cased as one; a special token in a text is only text; private-use characters stay."""
    assert pieces(vocab, "unaffable films filmx") == "un ##aff ##able film ##s [UNK]"
    assert pieces(vocab, "u" + "s" * 99) == " ".join(["u"] + ["##s"] * 99)
    assert pieces(vocab, "u" + "s" * 100) == "[UNK]"
    assert pieces(vocab, "UN\u200baff\x00able\u00a0go\xadod\u2028bad") == "un ##aff ##able good bad"
    assert pieces(vocab, "\u00c9-\u0065\u0301!中文e") == "e - e ! 中 文 e"
    assert pieces(vocab, "ΣΣ") == "σ ##ς"
    assert pieces(vocab, "[SEP]") == "[ sep ]"
    assert pieces(vocab, "good\ue000 \ue000") == "[UNK] [UNK]"
    assert pieces(vocab, "Good good", lowercase=False) == "[UNK] good"
    assert pieces(vocab, " \t ") == ""


def test_pair_truncation_takes_from_the_longer(vocab):
    """8 ids hold 3 special ones and 5 pieces. Of (5, 3) the first text loses 2, then, at 3 and
    3, the second one: (3, 2). Segments are 0 up to the first [SEP], 1 after it."""
    ids, segments = WordPiece(vocab).encode("a film is the good", "bad bad bad", max_length=8)
    assert " ".join(PIECES[i] for i in ids) == "[CLS] a film is [SEP] bad bad [SEP]"
    assert segments == [0] * 5 + [1] * 3
    ids, _ = WordPiece(vocab).encode("a film is the good", max_length=5)
    assert " ".join(PIECES[i] for i in ids) == "[CLS] a film is [SEP]"


def test_metrics():
    """Predictions 1 1 1 0 for labels 1 0 0 1: one of four right; TP 1, FP 2, FN 1, TN 0, so F1 =
    2 / (2 + 2 + 1), Matthews -2 / sqrt(3 * 2 * 2 * 1) = -0.577, and 0 where all labels are alike.
    (1, 2, 9) and (1, 2, 3) have the same order: Spearman 1. Pearson: x - 4 = (-3, -2, 5),
    y - 2 = (-1, 0, 1), 8 / sqrt(38 * 2) = 0.918. Tied values share their mean rank."""
    assert score("mrpc", [1, 1, 1, 0], [1, 0, 0, 1]) == {"accuracy": 0.25, "f1": 0.4}
    assert score("cola", [1, 1, 1, 0], [1, 0, 0, 1])["matthews"] == pytest.approx(-2 / 12 ** 0.5)
    assert score("cola", [1, 1], [1, 0]) == {"matthews": 0}
    got = score("stsb", [1, 2, 9], [1, 2, 3])
    assert got == {"pearson": pytest.approx(8 / 76 ** 0.5), "spearman": pytest.approx(1)}
    assert data_glue.ranks(np.array([5, 5, 7])).tolist() == [1.5, 1.5, 3]


# =============================================================== part 2: properties

@pytest.mark.parametrize("size", [1, 7, 1000, 40_000])
@pytest.mark.parametrize("density", [0.001, 0.03, 0.5, 0.999, 1.0])
def test_mask_is_the_head_of_a_stable_sort(size, density):
    """For any scores, also few distinct and periodic ones (which mislead a strided sample), both
    masks have the first k of a stable sort, by what runs on a CPU and on a GPU. Eq. (1)."""
    torch.manual_seed(size)
    k = max(1, round(density * size))
    for scores in (torch.randn(size), torch.randint(0, 3, (size,)).float(),
                   (torch.arange(size) % 127).float(), torch.arange(size).double()):
        rows = torch.stack([scores, scores.flip(0)])
        wanted = torch.zeros(2, size, dtype=torch.bool)
        wanted.scatter_(1, rows.sort(descending=True, stable=True).indices[:, :k], True)
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            rows = rows.to(device)
            masks = torch.stack(cap_min.topk_masks(list(rows), density))
            assert torch.equal(masks.cpu(), wanted)
            assert torch.equal(cap_min.largest_of_rows(rows, k).cpu(), wanted)


@pytest.mark.parametrize("score_init", ["zero", "none"])
def test_masked_weights_get_no_gradient_and_stay_zero_in_the_export(score_init):
    """Adam's momentum revives a pruned weight (its gradient is 0, its step is not); the export is
    W * M all the same. Without scores what is pruned first is no larger than what is not."""
    torch.manual_seed(0)
    model = BertClassifier(TINY)
    add_masks(model, score_init)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for density in (1.0, 0.1, 0.1):
        set_masks(model, density)
        if score_init == "none":
            mask = model.bert.encoder.layer[0].output.dense.parametrizations.weight
            size = mask.original.abs()
            assert (size * ~mask[0].mask).max() <= size[mask[0].mask].min()
        optimizer.zero_grad()
        model(*toy_batch())[0].square().sum().backward()
        optimizer.step()
    for layer in encoder_linears(model).values():
        mask, weight = layer.parametrizations.weight[0].mask, layer.parametrizations.weight.original
        assert (weight.grad[~mask] == 0).all() and (weight[~mask] != 0).any()
    batch = toy_batch()
    masked = model.eval()(*batch)[0]
    apply_masks(model)
    for layer in encoder_linears(model).values():
        assert type(layer) is nn.Linear
        assert int((layer.weight != 0).sum()) == round(0.1 * layer.weight.numel())
        assert not layer.weight[layer.weight == 0].signbit().any()  # no -0
    assert torch.equal(model(*batch)[0], masked)


def toy_data(vocab):
    examples = [Example("good " * (1 + i % 5), None, i % 2) for i in range(10)]
    return encode_task(examples, WordPiece(vocab), max_length=16)


def test_encode_is_deterministic_and_restores_the_mode(vocab):
    """Dropout is on in the training model, off in `encode`; its rows are in the order of the data,
    whatever the batches, which are filled up to `tokens`."""
    torch.manual_seed(0)
    model, data = BertClassifier(TINY).train(), toy_data(vocab)
    first, sizes = encode(model, data), []
    model.register_forward_pre_hook(lambda _, batch: sizes.append(batch[0].numel()))
    second = encode(model, data, tokens=17)
    assert max(sizes) <= 17 and len(sizes) < len(data)
    assert model.training and not first.requires_grad
    assert torch.allclose(first, second, atol=1e-6)
    encode(model.eval(), data)
    assert not model.training


def toy_run(folder, *options):
    """A `Run` in its folder, at its start."""
    args = cap_min.parse(["--task", "sst2", "--dtype", "fp32", "--out", str(folder), *options])
    run = Run(args, {})
    run.begin()
    return run


def test_banks_hold_unit_vectors_of_the_right_ancestor(vocab, tmp_path):
    """PrC is of the pre-trained model, FiC of the teacher, whose logits are its classifier's on
    the same pooled vectors; SnC grows by a snapshot at a time, and a run that goes on has those
    that it had. MNLI's second dev set has scores of its own, and its content counts."""
    config = BertConfig(**{**vars(TINY), "num_labels": 3})
    model, teacher, data = BertClassifier(config), BertClassifier(config).eval(), toy_data(vocab)
    run, cpu = toy_run(tmp_path), torch.device("cpu")
    cap_min.store_ancestors(run, model, teacher, data)
    ancestors = cap_min.load_ancestors(run, replace(data, labels=data.labels + 0.6), cpu)
    assert ancestors.labels.tolist() == [1, 2] * 5
    wanted = {"prc": [model], "fic": [teacher], "snc": [BertClassifier(config) for _ in range(2)]}
    for snapshot in wanted["snc"]:
        cap_min.add_snapshot(run, snapshot, data, ancestors)
    for banks in (ancestors.banks, cap_min.load_ancestors(run, data, cpu).banks):
        for name, models in wanted.items():
            for vectors, ancestor in zip(banks[name], models, strict=True):
                length_1 = nn.functional.normalize(encode(ancestor, data), dim=-1).half()
                torch.testing.assert_close(vectors, length_1, rtol=0, atol=1e-3)
    batch = data.batch(torch.arange(10))
    assert torch.allclose(ancestors.logits, teacher(*cap_min.inputs(batch))[0], atol=1e-6)
    dev_sets = {"dev": data, "dev_mm": data.head(1)}
    assert set(cap_min.evaluate(model, "mnli", dev_sets)) == {"accuracy", "accuracy_mm"}
    config = cap_min.run_config(run.args, data, dev_sets, model, None)
    other = cap_min.run_config(run.args, data, dev_sets, model, teacher)
    model.classifier.bias.data += 1
    third = cap_min.run_config(run.args, data, dev_sets, model, teacher)
    assert config["dev_sha256"] == [data.sha256(), data.head(1).sha256()]
    assert len({found["weights_sha256"] for found in (config, other, third)}) == 3


# ---------------------------------------------- structured pruning, sparse inference

def test_importance_is_the_gradient_of_a_mask(vocab, tmp_path, monkeypatch):
    """A mask m, here a factor on what a head or a neuron puts out, has a gradient dL/dm, where L
    has all terms, here CE and KD; of 10 examples in batches of 4 the absolute values of three such
    gradients are summed. Of several processes their sum counts: here -6 times one's own."""
    model, data = BertClassifier(TINY).double(), toy_data(vocab)
    run = toy_run(tmp_path, "--method", "structured", "--batch-size", "4", "--w-ce", "1")
    ancestors = Ancestors({}, torch.randn(10, 2), data.labels)
    monkeypatch.setattr(cap_min, "summed", lambda gradient: -6 * gradient)
    heads, neurons = cap_min.importance(run, model, data, ancestors)
    masks = [torch.ones(count, dtype=DOUBLE, requires_grad=True) for count in (2, 32)]
    layer = model.bert.encoder.layer[1]
    layer.attention.output.dense.register_forward_pre_hook(
        lambda module, given: given[0] * masks[0].repeat_interleave(8))
    layer.output.dense.register_forward_pre_hook(lambda module, given: given[0] * masks[1])
    wanted = [torch.zeros(2, dtype=DOUBLE), torch.zeros(32, dtype=DOUBLE)]
    for batch in batches(data, 4, seed=0, epoch=0):
        logits = model.eval()(*cap_min.inputs(batch))[0]
        loss = cap_min.task_loss(logits, batch["labels"]) + 0.9 * cap_min.distillation_loss(
            logits, ancestors.logits[batch["index"]].double(), kd_temperature=1.0)
        for total, gradient in zip(wanted, torch.autograd.grad(loss, masks)):
            total += 6 * gradient.abs()
    assert torch.allclose(heads[1].double(), wanted[0], rtol=1e-4) and len(heads) == 2
    assert torch.allclose(neurons[1].double(), wanted[1], rtol=1e-4) and wanted[1].min() > 0


def removed_units():
    """(masked, smaller) of one model: layer 0 loses head 1 and all neurons, layer 1 all heads."""
    torch.manual_seed(0)
    model = BertClassifier(TINY).double().eval()
    heads = [tensor([1, 0], torch.bool), tensor([0, 0], torch.bool)]
    neurons = [tensor([0] * 32, torch.bool), tensor([1, 0, 0, 1] * 8, torch.bool)]
    small = cap_min.remove_units(model, heads, neurons).eval()
    for layer, kept_heads, kept_neurons in zip(model.bert.encoder.layer, heads, neurons):
        layer.attention.output.dense.weight.data *= kept_heads.repeat_interleave(8)
        layer.output.dense.weight.data *= kept_neurons
    return model, small


def test_removed_units_compute_as_masked_ones():
    """The smaller model's logits are those of the masked one. Layer 0 keeps half of 4 * 16 * 16
    weights in attention and none of 2 * 16 * 32; layer 1 none and half: 1024 of 4096."""
    masked, small = removed_units()
    batch = toy_batch()
    assert (small(*batch)[0] - masked(*batch)[0]).abs().max() < 1e-12
    report = cap_min.sparsity_report(small)
    assert (report["weights"], report["kept"], report["total"]) == (4096, 1024, 0.75)
    assert report["matrices"]["bert.encoder.layer.0.attention.self.key.weight"] == 0.5


def test_sparse_forward_is_the_dense_one(monkeypatch):
    """CSR matrices, feature-major activations and LayerNorm by columns give the same logits and
    pooled vectors, with padding, without, and where units are gone. A layer is sparse up to a share
    of its weights, here all that is left of it; the model that was given is kept as it is."""
    batch, model = toy_batch(), BertClassifier(TINY).double()
    for linear in encoder_linears(model).values():
        linear.weight.data *= topk_mask(linear.weight, 0.1)
        nn.init.normal_(linear.bias)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            nn.init.normal_(parameter)
    sparse = bert_min.to_sparse(model)
    for inputs in (batch, batch[:1], [x[:1] for x in batch]):
        for got, wanted in zip(sparse(*inputs), model.eval()(*inputs)):
            assert (got - wanted).abs().max() < 1e-12 and not got.requires_grad
    masked, small = removed_units()
    assert (bert_min.to_sparse(small)(*batch)[0] - masked(*batch)[0]).abs().max() < 1e-12
    model.bert.encoder.layer[0].intermediate.dense.weight.data[:] = 1
    kept = (4 * 26 + 2 * 51) / 2048
    for share, kind in ((kept, bert_min.SparseLayer), (kept - 1e-4, Layer)):
        monkeypatch.setattr(bert_min, "SPARSE_DENSITY", share)
        layers = bert_min.to_sparse(model).bert.encoder.layer
        assert [type(layer) for layer in layers] == [Layer, kind]


# ------------------------------------------------------------------ batches, dropout

def test_every_example_once_an_epoch_among_its_likes(vocab):
    """Batches are padded to their longest example: ids, mask and segments with 0. Pairs of 5 ... 9
    ids, 200 of each, shuffled, fill 7 of 9 places on average; bucketed by length more than 95 %,
    but not all, since some batches of 30 hold two lengths."""
    examples = [Example("good " * (1 + i % 5), "bad", i % 2) for i in range(1000)]
    tokenizer, seen, padded = WordPiece(vocab), [], 0
    data = encode_task(examples, tokenizer)
    for batch in batches(data, 30, seed=0):
        longest = int(data.lengths[batch["index"]].max())
        padded += batch["input_ids"].numel()
        seen += batch["index"].tolist()
        for row, i in enumerate(batch["index"].tolist()):
            ids, segments = tokenizer.encode("good " * (1 + i % 5), "bad")
            padding = [0] * (longest - len(ids))
            wanted = [ids + padding, [1] * len(ids) + padding, segments + padding]
            assert [part[row].tolist() for part in cap_min.inputs(batch)] == wanted
            assert batch["labels"][row] == i % 2
    assert sorted(seen) == list(range(1000)) and 0.95 < len(data.tokens) / padded < 1
    first = [next(batches(data, 30, *place))["index"] for place in ((0, 0), (1, 0), (0, 1))]
    assert len({str(index) for index in first}) == 3  # by seed and epoch


def test_dropout_keeps_its_share_and_the_mean():
    """At rate 1/4, of n = 200,001 ones a quarter becomes 0 and the others 4/3; of neighbours, cut
    from one random number, a sixteenth of the pairs is (0, 0): within 5 standard deviations
    sqrt(n p q). The gradient takes the same mask; in eval mode nothing is dropped."""
    torch.manual_seed(0)
    dropout, x = bert_min.Dropout(0.25), torch.ones(200_001, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    zero = (y == 0)
    assert torch.equal(y[~zero], torch.full_like(y[~zero], 4 / 3)) and torch.equal(x.grad, y)
    for dropped, p in ((zero, 1 / 4), (zero[1:] & zero[:-1], 1 / 16)):
        n = len(dropped)
        assert abs(int(dropped.sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert torch.equal(dropout.eval()(x), x)
    assert not bert_min.Dropout(1.0)(x).any()


# =================================================================== part 3: parity

@pytest.mark.parametrize("case", json.loads(
    (HERE / "fixtures" / "contrastive_cases.json").read_text())["cases"])
def test_published_loss(case):
    """Values and gradients that the published code gives for seeded inputs: K = 1 to 3 ancestors,
    rows drawn again, several tau and weights. Eq. (4), (5), (6), (7)."""
    queries = tensor(case["queries"]).requires_grad_()
    index, labels = tensor(case["batch_index"], LONG), tensor(case["bank_labels"], LONG)
    unsup, sup = contrastive_loss(queries, index, labels[index], tensor(case["bank"]), labels,
                                  tensor(case["extra_index"], LONG), case["temperature"])
    total = case["w_unsup"] * unsup + case["w_sup"] * sup
    for name, value in (("unsup", unsup), ("sup", sup), ("total", total)):
        wanted = case["official"]
        gradient, = torch.autograd.grad(value, queries, retain_graph=True)
        assert value.item() == pytest.approx(wanted[name], abs=1e-9)
        assert (gradient - tensor(wanted[name + "_grad"])).abs().max() < 1e-9


def test_layer_is_torch_transformer_encoder_layer():
    """torch's post-norm layer with gelu computes the same from the same weights; query, key and
    value lie there in one matrix, and its padding mask is True where ours is -inf."""
    torch.manual_seed(0)
    ours = Layer(TINY, 2, 32).double().eval()
    theirs = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", layer_norm_eps=1e-12,
                                        batch_first=True, dtype=DOUBLE).eval()
    for part, original in ((theirs.self_attn.out_proj, ours.attention.output.dense),
                           (theirs.norm1, ours.attention.output.LayerNorm),
                           (theirs.linear1, ours.intermediate.dense),
                           (theirs.linear2, ours.output.dense),
                           (theirs.norm2, ours.output.LayerNorm)):
        part.load_state_dict(original.state_dict())
    qkv = [ours.attention.self.query, ours.attention.self.key, ours.attention.self.value]
    theirs.self_attn.in_proj_weight.data = torch.cat([layer.weight for layer in qkv]).data
    theirs.self_attn.in_proj_bias.data = torch.cat([layer.bias for layer in qkv]).data
    x, real = torch.randn(2, 5, 16, dtype=DOUBLE), tensor([[1] * 5, [1] * 3 + [0] * 2], torch.bool)
    got = ours(x, torch.where(real, 0.0, -torch.inf)[:, None, None], x)
    wanted = theirs(x, src_key_padding_mask=~real)
    assert (got - wanted)[real].abs().max() < 1e-12


def in_transformers(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager").eval()


def test_bert_is_transformers_bert(pretrained):
    """Logits and the gradients of all parameters, double precision, padded pairs: 1e-8."""
    ours, theirs = from_pretrained(pretrained, 3).double().eval(), in_transformers(pretrained)
    ids, mask, segments = toy_batch()
    logits, pooled = ours(ids, mask, segments)
    wanted = theirs.double()(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits
    assert (logits - wanted).abs().max() < 1e-8
    hidden, same_pooled = ours.bert(ids, mask, segments)
    assert hidden.shape == (3, 7, 16) and torch.allclose(pooled, same_pooled, atol=1e-12)
    assert torch.equal(ours(ids)[0], ours(ids, torch.ones_like(ids), torch.zeros_like(ids))[0])
    weights = torch.randn(3, 3, dtype=DOUBLE)
    (logits * weights).sum().backward()
    (wanted * weights).sum().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-8)


def test_configuration_round_trip(tmp_path):
    """config.json goes through ours and transformers' reader and back without loss."""
    config = BertConfig(hidden_size=24, num_attention_heads=3, id2label={0: "no", 1: "yes", 2: "x"},
                        num_labels=3, layer_norm_eps=1e-6)
    config.to_json(tmp_path / "config.json")
    assert BertConfig.from_json(tmp_path / "config.json") == config
    transformers = pytest.importorskip("transformers")
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert BertConfig.from_json(tmp_path / "config.json") == config


def test_safetensors_files_of_both_sides(tmp_path):
    """Files go both ways between ours and the safetensors library, empty and scalar ones too."""
    library = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).half(), "c": torch.tensor(3),
               "d": torch.empty(0, 4), "e": torch.ones(3, dtype=torch.bool),
               "f": torch.randn(2).bfloat16(), "g": torch.randn(2, 2, dtype=DOUBLE).T}
    save_safetensors(tensors, tmp_path / "ours")
    assert b'{"__metadata__": {"format": "pt"}' in (tmp_path / "ours").read_bytes()[:60]
    library.save_file({name: tensors[name].contiguous() for name in tensors}, tmp_path / "theirs")
    for loaded in (library.load_file(tmp_path / "ours"), load_safetensors(tmp_path / "theirs"),
                   load_safetensors(tmp_path / "ours")):
        torch.testing.assert_close(loaded, tensors, rtol=0, atol=0)


# ------------------------------------------------------------------------- WordPiece

ODD_TEXTS = [
    "Good film, isn't it?", "naïve café ÀÉÎÕÜ Ǖ ẞß", "e\u0301e\u0300\u0323 \u1ec7 Å \u212b K",
    "中文good中文 \u3400\U00020000\uf900日本語カナ한국어", "İstanbul IJ DŽ ŁØ", "२३ ½ ² ① Ⅷ", "",
    "a\x00b\x07c\u200bd\ufeffe\u00ade\ufffdf", "a`b^c~d|e{e}e\\e", "##s ##",
    "tab\there\r\nand\u00a0there\u2003too\u3000.\u2028x\u2029y", "x" * 5000,
    "😀👩‍👩‍👧🏽 good🎬film ☃️", "good-bad_film@x.com #1 $2 £3 €4 «e» “e” … — ¿e? ،؛",
    "u" * 100 + " " + "u" * 101, "مرحبا بالعالم שָׁלוֹם Привет Ёж Ελληνικά"]


@pytest.mark.parametrize("lowercase, others", [
    (True, {}), (False, {}), (True, {"strip_accents": False}), (False, {"strip_accents": True}),
    (True, {"tokenize_chinese_chars": False})])
def test_wordpiece_is_that_of_transformers(lowercase, others, vocab, tmp_path):
    """The same ids for texts with accents, ideographs, control characters, emoji and long words,
    from a folder, from what transformers saves (tokenizer.json, no vocab.txt) and from our export
    of that, which it reads alike; and segments for pairs, whole and truncated."""
    transformers = pytest.importorskip("transformers")
    # a vocabulary with each character that any setting makes of the texts
    words = [word for text in ODD_TEXTS for settings in ((True,), (False,), (False, True))
             for word in WordPiece(vocab, *settings).words(text)]
    parts = sorted(set("".join(words)))
    listed = dict.fromkeys(PIECES + parts + ["##" + part for part in parts])
    (tmp_path / "vocab.txt").write_text("\n".join(listed), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": lowercase, **others}))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    saved = data_glue.load_tokenizer(tmp_path / "saved")
    (tmp_path / "export").mkdir()
    data_glue.save_tokenizer(saved, tmp_path / "export", 512)
    exported = transformers.BertTokenizer.from_pretrained(tmp_path / "export")
    for folder in (tmp_path, tmp_path / "saved", tmp_path / "export"):
        ours = data_glue.load_tokenizer(folder)
        for text in ODD_TEXTS:
            ids = ours.encode(text, max_length=20_000)[0]
            assert ids == theirs(text)["input_ids"] == exported(text)["input_ids"]
        assert len(ours.listed) == len(theirs)
    backend = theirs.backend_tokenizer  # of the tokenizers library
    for length in (20_000, 13):  # 10 pieces and 3 special ones: ties over 9 or 11 it cuts otherwise
        backend.enable_truncation(length)
        for pair in itertools.product(ODD_TEXTS, ODD_TEXTS[:8]):
            wanted = backend.encode(*pair)
            assert ours.encode(*pair, length) == (wanted.ids, wanted.type_ids)


# ================================================================ part 4: behaviour

cap_min.LOG_EVERY = 1
METHODS = {"movement": ["--method", "movement"],
           "soft": ["--method", "soft", "--penalty", "5000", "--mask-lr", "0.1"],
           "structured": ["--method", "structured", "--sparsity", "0.25", "--epochs", "1",
                          "--score-init", "zero"]}


@pytest.fixture(scope="session")
def command(pretrained, glue):
    """command(out, method, *more): a run of 50 rows, of which an epoch has 7 steps: 3 epochs of the
    teacher and 2 of pruning, of CAP-f 3 stages of one epoch."""
    return lambda out, method="movement", *more: [
        "--task", "sst2", "--model", str(pretrained), "--data-dir", str(glue), "--out", str(out),
        "--sparsity", "0.9", "--epochs", "2", "--max-train", "50", "--batch-size", "8",
        "--max-length", "16", "--device", "cpu", "--dtype", "fp32", "--lr", "3e-3",
        *METHODS[method], *more]


@pytest.fixture(scope="session")
def whole(tmp_path_factory, command):
    """whole(method): the folder of a run that nobody stopped."""
    @functools.cache
    def whole(method):
        out = tmp_path_factory.mktemp("whole")
        assert main(command(out, method)) == 0
        return out

    return whole


def record_of(run):
    return json.loads((run / "record.json").read_text())


def log_of(run):
    """The lines of a run's log but for times."""
    return [{name: value for name, value in json.loads(line).items()
             if name not in ("ms", "examples_per_second")}
            for line in (run / "log.jsonl").read_text().splitlines()]


def steps_of(run):
    """The lines of the steps of pruning."""
    return [line for line in log_of(run) if line["phase"] == "prune" and "loss" in line]


def watch(monkeypatch, name, *, stop_at=None):
    """What this function of cap_min is given, call by call; at call `stop_at` Ctrl-C comes."""
    original, calls = functools.reduce(getattr, name.split("."), cap_min), []

    def watched(*given, **named):
        calls.append(given)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(f"cap_min.{name}", watched)
    return calls


def test_run_folder(whole, command, pretrained):
    """Its files, and what its record holds. Its 50 rows, cut to --max-length, are not the first."""
    args = cap_min.parse(command("run", "movement", "--max-length", "10"))
    train, _ = cap_min.load_data(args, data_glue.load_tokenizer(pretrained), TINY)
    assert train.lengths.max() == 10 and train.labels.tolist() != [0, 1] * 25
    run = whole("movement")
    assert {path.name for path in run.iterdir()} == {
        "teacher", "model", "config.json", "record.json", "log.jsonl", "curve.svg"}
    xml.dom.minidom.parse(str(run / "curve.svg"))
    record = record_of(run)
    assert set(record) == {
        "config", "seed", "versions", "source_sha256", "train_sha256", "examples", "dense",
        "pruned", "sparsity", "seconds", "examples_per_second", "peak_memory_bytes"}
    assert record["config"] == json.loads((run / "config.json").read_text())
    assert not {"out", "device", "checkpoint_minutes"} & set(record["config"])
    assert record["examples"] == {"train": 50, "dev": 40}
    assert set(record["seconds"]) == {"teacher", "banks", "prune", "other", "total"}


def test_log_tells_each_term_and_its_share(whole):
    """Every step has the terms, which sum to the loss, and their gradient shares; SnC comes with
    the second epoch; every epoch has its dev score, the last that of the record. Of 2 * 7 steps
    round(0.09 * 14) = 1 is warm-up, the first 2 keep all, the last 3 a tenth."""
    run = whole("movement")
    lines = steps_of(run)
    assert [line["step"] for line in lines] == list(range(14))
    for line in lines:
        names = {"ce", "kd", "prc", "fic"} | ({"snc"} if line["epoch"] else set())
        assert set(line["gradient_share"]) == names
        assert sum(line["gradient_share"].values()) == pytest.approx(1, abs=1e-3)
        assert sum(line[name] for name in names) == pytest.approx(line["loss"])
    assert [line["epoch"] for line in log_of(run) if "dev" in line] == [0, 1]
    assert log_of(run)[-1]["dev"] == record_of(run)["pruned"]
    density = 0.1 + 0.9 * (8 / 9) ** 3
    at_step_3 = (4 * round(density * 256) + 2 * round(density * 512)) / 2048
    kept = [line["kept"] for line in lines]
    assert kept[:4] == pytest.approx([1, 1, 1, at_step_3], abs=1 / 4096)  # one weight is 0
    at_end = (4 * 26 + 2 * 51) / 2048
    assert kept[10] > at_end and kept[11:] == [pytest.approx(at_end)] * 3
    assert max(line["lr"] for line in lines) == lines[1]["lr"] == 3e-3


@pytest.mark.parametrize("method", ["movement", "soft"])
def test_export_has_exactly_k_weights_and_is_transformers(method, whole, vocab, glue):
    """In the file, each matrix has exactly round(0.1 * numel) weights that are not 0, by CAP-soft
    all 4,096 together; transformers loads it, gives our logits and the record's accuracy."""
    run, kept = whole(method), []
    stored = load_safetensors(run / "model" / "model.safetensors")
    record = record_of(run)
    for name, sparsity in record["sparsity"]["matrices"].items():
        kept.append(int((stored[name] != 0).sum()))
        assert kept[-1] == round((1 - sparsity) * stored[name].numel())
    assert sum(kept) == 410 if method == "soft" else kept == [26, 26, 26, 26, 51, 51] * 2
    data = encode_task(load("sst2", "dev", glue), WordPiece(vocab), 16)
    batch = cap_min.inputs(data.batch(torch.arange(len(data))))
    for folder, key in (("teacher", "dense"), ("model", "pruned")):
        ours, theirs = from_pretrained(run / folder).eval(), in_transformers(run / folder)
        wanted = theirs(*batch).logits
        assert (ours(*batch)[0] - wanted).abs().max() < 1e-5
        accuracy = (wanted.argmax(1) == data.labels).float().mean().item()
        assert accuracy == pytest.approx(record[key]["accuracy"])
        assert theirs.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.parametrize("method, sparsity, kept", [
    ("movement", "89.94%", "10.1%"), ("soft", "89.99%", "10.0%")])
def test_run_is_reproducible_and_finished_only_once(method, sparsity, kept, whole, command,
                                                    tmp_path, capsys):
    """Another folder, the same command, the teacher of the first run: the same weights to the
    last bit. Of 2 * (4 * 256 + 2 * 512) weights 2 * (4 * 26 + 2 * 51) are left, by CAP-soft 410.
    The command again does nothing; with another option it is refused."""
    run = whole(method)
    assert main(command(tmp_path, method, "--teacher", str(run / "teacher"))) == 0
    out = capsys.readouterr().out
    assert f"sparsity {sparsity}" in out and f"\n14/14 | {kept} | " in out
    first, second = (folder / "model" / "model.safetensors" for folder in (run, tmp_path))
    assert first.read_bytes() == second.read_bytes()
    before = (run / "record.json").stat().st_mtime_ns
    assert main(command(run, method)) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and sparsity in out and "14/14" not in out
    assert main(command(run, method, "--lr", "2e-3")) == 2
    assert "has a run with lr 0.003; it goes on with these, another" in capsys.readouterr().err
    assert (run / "record.json").stat().st_mtime_ns == before


def test_recipe(capsys):
    """The defaults are those of the paper's MNLI: 10 epochs of 392,702 rows in batches of 32 are
    122,720 steps, scores from 0; below 30,000 from the magnitude. The encoder's 12 matrices have
    scores. CAP-f, which prunes 10 % more at a time, and the demo have defaults of their own."""
    args = cap_min.parse(["--task", "mnli"])
    assert len(vars(args)) <= 30 and (args.model, args.data_dir) == ("bert-base-uncased", None)
    assert (args.method, args.sparsity, args.w_unsup, args.w_sup) == ("soft", 0.97, 0.1, 10)
    assert (args.extra, args.temperature, args.penalty, args.max_length) == (4096, 0.1, 680, 128)
    for args.method, rows, start in (("soft", 392_702, "zero"), ("soft", 96_000, "zero"),
                                     ("soft", 95_968, "magnitude"), ("magnitude", 392_702, "none")):
        args.score_init = "auto"
        cap_min.settle_schedule(args, rows)
        assert args.score_init == start
    model = BertClassifier(TINY)
    add_masks(model, "zero")
    weights, scores = cap_min.make_optimizer(model, args).param_groups
    assert (weights["peak"], scores["peak"], len(scores["params"])) == (3e-5, 1e-2, 12)
    assert not any(p.any() for p in scores["params"])
    weight = torch.tensor([[-3.0, 1.0, -1.0, 3.0]])  # its standard deviation is sqrt(20 / 3)
    assert torch.allclose(Mask(weight, "magnitude").scores, weight.abs() / math.sqrt(20 / 3))
    assert weights["weight_decay"] == scores["weight_decay"] == 0
    for name, p in model.named_parameters():
        assert p.requires_grad != ("embeddings" in name)
    stages = cap_min.parse(["--task", "mnli", "--method", "structured", "--w-sup", "4"])
    assert (stages.sparsity, stages.epochs, stages.batch_size, stages.lr) == (0.9, 2, 16, 2e-5)
    assert (stages.w_unsup, stages.w_sup, stages.kd_temperature) == (0.3, 4, 1)
    assert cap_min.stages(stages) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    demo = cap_min.parse(["--max-length", "16"])
    assert (demo.task, demo.epochs, demo.max_length, demo.lr) == ("demo", 6, 16, 1e-3)
    both = cap_min.parse(["--method", "structured", "--sparsity", "0.05"])
    assert (both.epochs, both.batch_size, both.lr) == (6, 16, 1e-3)
    assert cap_min.stages(both) == [0.05] and cap_min.stages(args) == [0.97]
    for wrong in ("--sparsity 1.0", "--sparsity nan", "--epochs 0", "--lr 0", "--seed -1",
                  "--w-sup nan", "--method hard", "--max-length 2", "--temperature cold",
                  "--without all"):
        with pytest.raises(SystemExit):
            cap_min.parse(wrong.split())
        assert f"error: argument {wrong.split()[0]}: " in capsys.readouterr().err


def test_lines_on_the_terminal(capsys):
    """A step line fits in 120 columns with all six terms, of which CAP-soft's starts below 680 *
    0.68 = 462, after 122,720 steps of 3 s, and half a day to go. The end tells both scores."""
    terms = dict.fromkeys(("ce", "kd", "prc", "snc", "fic"), 9.87654) | {"l1": 462.4}
    entry = {"kept": 0.123456, "loss": sum(terms.values()), "lr": 2.9e-5, "ms": 3000.0,
             "examples_per_second": 10.7}
    line = cap_min.step_line(entry, terms, torch.device("cpu"))
    assert re.fullmatch(r"12.3% \| 511.78 = ce 9.88 kd 9.88 prc 9.88 snc 9.88 fic 9.88 l1 462.40 "
                        r"\| 3e-05 \| 3000, 11, \d+\.\d", line)
    assert len(f"122720/122720 | {line} | 12:00:00") <= 120
    cap_min.print_summary(cap_min.parse([]), {"dense": {"f1": 0.9}, "pruned": {"f1": 0.5},
                                              "sparsity": {"total": 0.97}})
    assert "dense, dev: f1 90.00\npruned, dev: f1 50.00\n" in capsys.readouterr().out


def test_soft_run(command, tmp_path, monkeypatch):
    """The penalty is lambda(t) mean sigmoid(S), where lambda(t) grows with the threshold: 0 in the
    2 dense steps of 14, then 5000 (1 - (1 - 1/9)^3), and 5000 from step 11 on; the mean is 0.68 at
    the start, where S = |W| / std(W), and falls. From step 11 on exactly k of all 4096 weights are
    left; before, at most d(t), and with a threshold of 0.9, thus |W| > 2.2 std, less. Eq. (8). All
    other terms have their share, in bf16 too. Order, chance and 8 extra rows go by the seed."""
    monkeypatch.setattr(cap_min, "SOFT_THRESHOLD", 0.9)
    terms, order = watch(monkeypatch, "cap_terms"), watch(monkeypatch, "batches")
    chance = watch(monkeypatch, "randomness")
    assert main(command(tmp_path, "soft", "--dtype", "bf16", "--extra", "8", "--seed", "7")) == 0
    extra = [set(given[4].tolist()) for given in terms]
    assert {len(rows) for rows in extra} == {8} and len(set().union(*extra)) > 30
    assert {given[2] for given in order} == {given[0] for given in chance} == {7}
    lines = steps_of(tmp_path)
    assert [line["l1"] for line in lines[:3]] == [0] * 3
    assert lines[3]["l1"] / (1 - (1 - 1 / 9) ** 3) / 5000 == pytest.approx(0.68, abs=0.03)
    assert 0.68 > lines[11]["l1"] / 5000 > lines[13]["l1"] / 5000 > 0
    for line in lines:
        assert [name for name, share in line["gradient_share"].items() if not share] == ["l1"]
        density = cubic_density(line["step"], 14, 1, 1 - 0.9, warm=2, cool=3)
        assert 4096 * line["kept"] <= round(4096 * density)
    kept = [line["kept"] for line in lines]
    assert kept[10] < 0.1 and kept[11:] == [pytest.approx(round(0.1 * 4096) / 4096)] * 3


def test_structured_run(whole, pretrained):
    """At 25 %, floor(0.75 * 4) = 3 of 4 heads and 48 of 64 neurons are left after the stages of 10
    and 20 %, each of which is a snapshot for the next; the embeddings are as they were."""
    out, before = whole("structured"), from_pretrained(pretrained).bert.embeddings.state_dict()
    record = record_of(out)
    assert record["sparsity"]["total"] == 0.25 and record["config"]["score_init"] == "none"
    model = from_pretrained(out / "model", None)
    assert [sum(sizes) for sizes in zip(*model.config.layer_sizes)] == [3, 48]
    lines = [line for line in log_of(out) if "dev" in line]
    assert [(line["step"], line["epoch"]) for line in lines] == [(6, 0), (13, 1), (20, 2)]
    kept = [line["kept"] for line in lines]
    assert kept[0] > kept[1] > kept[2] == pytest.approx(0.75, abs=1 / 4096)
    assert ["snc" in line for line in steps_of(out)] == [False] * 7 + [True] * 14
    torch.testing.assert_close(model.bert.embeddings.state_dict(), before, rtol=0, atol=0)


def test_regression_and_pairs(command, tmp_path):
    """One output, squared errors, Pearson and Spearman: movement pruning with distillation. The
    configuration has transformers' pipeline answer with the value itself, not its sigmoid."""
    (tmp_path / "STS-B").mkdir()
    rows = [f"good film\t{'good ' * (i % 5)}\t{i % 5}" for i in range(48)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "STS-B" / name).write_text("\n".join(["sentence1\tsentence2\tscore", *rows]))
    run = tmp_path / "run"
    assert main(command(run, "movement", "--task", "stsb", "--data-dir", str(tmp_path), "--epochs",
                        "3", "--without", "snc", "prc", "fic")) == 0
    assert set(record_of(run)["pruned"]) == {"pearson", "spearman"}
    assert record_of(run)["dense"]["pearson"] > 0.9  # the number of words decides: can be learnt
    assert set(steps_of(run)[-1]["gradient_share"]) == {"ce", "kd"}
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "LABEL_0"}


def test_what_is_random_is_a_function_of_its_place(monkeypatch):
    """Seed, epoch and batch each change it; the number of the process only torch's part."""
    def drawn(*place):
        return cap_min.randomness(*place).random(), torch.rand(1).item()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({number for place in places for number in drawn(*place)}) == 8
    first = drawn(0, 0, 0)
    monkeypatch.setattr(cap_min, "rank", lambda: 1)
    assert drawn(0, 0, 0)[0] == first[0] and drawn(0, 0, 0)[1] != first[1]


# ---------------------------------------------------------------------------- resume

def assert_same(first, second):
    """The same weights to the last bit, the same log but for times, and no checkpoint is left."""
    for name in ("teacher/model.safetensors", "model/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert log_of(first) == log_of(second) and not (second / "checkpoint").exists()


@pytest.mark.parametrize("place", [
    "movement write_json 1", "movement Run.save 1", "movement randomness 10",
    "movement torch.save 4", "movement export 1", "movement encode 1", "movement Run.write 10",
    "movement Run.write 15", "movement Run.save 8", "movement randomness 21",
    "movement add_snapshot 1", "movement randomness 28", "movement export 2",
    "movement make_record 1", "movement draw_curve 1", "soft randomness 21", "soft randomness 28",
    "structured importance 1", "structured randomness 25", "structured remove_units 2",
    "structured randomness 38", "structured add_snapshot 2", "structured torch.save 20"])
def test_stopped_anywhere_the_run_ends_the_same(place, whole, command, tmp_path, monkeypatch):
    """Exit status 130, and the same command goes on. A save is due after steps 3, 6 and 7, but 7
    ends the epoch and has none: up to three are done again, and their lines of the log cut off."""
    method, name, number = place.split()
    monkeypatch.setattr(Run, "due", lambda run: run.batch in (3, 6, 7))
    with monkeypatch.context() as patch:
        watch(patch, name, stop_at=int(number))
        assert main(command(tmp_path, method)) == 130
    assert not list(tmp_path.rglob("*.tmp"))
    assert main(command(tmp_path, method)) == 0
    assert_same(whole(method), tmp_path)


FORKS = multiprocessing.get_context("forkserver")  # whose processes need not import torch anew
FORKS.set_forkserver_preload([__name__])


def work(options, rank, count, port):
    """What a process of its own does, one of `count` as torchrun would start them."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    status = main(options)
    sys.exit(status if count == 1 else 3)  # of several, `main` ends each: Python could abort


def free_port():
    with socket.create_server(("localhost", 0)) as free:
        return str(free.getsockname()[1])


def start(options, count=1):
    """`count` processes at work on one run."""
    port = free_port()
    started = [FORKS.Process(target=work, args=(options, i, count, port)) for i in range(count)]
    for process in started:
        process.start()
    return started


def ends(started):
    """Exit statuses; that of a killed process is minus the signal's number."""
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def kill_after(log, lines, seconds, started):
    """Kill all processes so many seconds after the log has so many lines."""
    while started[0].is_alive() and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.001)
    time.sleep(seconds)
    for process in started:
        process.kill()
    assert ends(started) == [-signal.SIGKILL] * len(started)


def test_killed_at_any_moment_the_run_ends_the_same(whole, command, tmp_path):
    """SIGKILL comes thrice, up to 20 ms after a line of the log, while every step saves: within a
    step, or within a save, of which a torn file stays, which does no harm."""
    options = command(tmp_path, "soft", "--checkpoint-minutes", "0")
    (tmp_path / ".config.json.tmp").write_bytes(b"torn")
    for lines, seconds in ((4, 0.003), (16, 0.017), (24, 0.015)):
        kill_after(tmp_path / "log.jsonl", lines, seconds, start(options))
        (tmp_path / "checkpoint" / ".state.pt.tmp").write_bytes(b"torn")
    assert ends(start(options)) == [0] and not list(tmp_path.rglob("*.tmp"))
    assert_same(whole("soft"), tmp_path)


def test_the_same_run_twice_at_once_is_refused(tmp_path):
    """Until the first has ended, in whatever way; it saves every 10 minutes."""
    first = toy_run(tmp_path)
    for seconds, due in ((500, False), (601, True)):
        first.last_tick = time.perf_counter() - seconds
        assert first.due() == due
    with pytest.raises(ValueError, match=f"^{tmp_path} is in use by another process$"):
        toy_run(tmp_path)
    first.log_file.close()
    toy_run(tmp_path)


def test_a_run_is_known_by_its_content(command, pretrained, glue, tmp_path, monkeypatch, capsys):
    """After a stop a label, text, weight or dropout rate is changed: refused until changed back; so
    is a state cut short. In other folders the same files are the same run, which misses no log."""
    folder, out = shutil.copytree(glue, tmp_path / "glue"), tmp_path / "run"
    bert = shutil.copytree(pretrained, tmp_path / "bert")
    options = command(out, "movement", "--data-dir", str(folder), "--max-train", "320",
                      "--model", str(bert))
    with monkeypatch.context() as patch:
        watch(patch, "export", stop_at=1)
        assert main(options) == 130
    assert "the same command goes on" in capsys.readouterr().out
    state = out / "checkpoint" / "state.pt"
    train, dev = folder / "SST-2" / "train.tsv", folder / "SST-2" / "dev.tsv"
    weights, config = bert / "model.safetensors", bert / "config.json"
    other = bytearray(weights.read_bytes())
    other[-300] += 1  # of the pooler's bias; the last 204 bytes are the classifier's
    for path, damaged, sentence in (
            (state, state.read_bytes()[:-100],
             f"error: {state} cannot be read: if damaged, delete {out}\n"),
            (train, train.read_bytes()[:-2] + b"0\n", "has a run with train_sha256 "),
            (dev, dev.read_bytes().replace(b"bad", b"film"), "has a run with dev_sha256 "),
            (weights, other, "has a run with weights_sha256 "),
            (config, config.read_bytes().replace(b"0.1", b"0.2"), "with weights_sha256 ")):
        content = path.read_bytes()
        path.write_bytes(damaged)
        assert main(options) == 2 and sentence in capsys.readouterr().err
        path.write_bytes(content)
    moved = ["--data-dir", str(glue), "--model", str(pretrained), "--device", "auto"]
    (out / "log.jsonl").unlink()
    assert main([*options, *moved]) == 0 and "goes on after 3 epochs" in capsys.readouterr().out
    assert len(steps_of(out)) == 80


def test_a_number_that_is_not_finite_is_never_saved(vocab, tmp_path, monkeypatch):
    """The third loss is not a number: two steps are behind the newest state. A gradient that is
    none, of sqrt(x) at 0, is seen in the weights."""
    factors = iter([1, 1, math.nan])
    for loss, name, good in ((lambda logits, _: logits.sum() * next(factors), "ce", 2),
                             (lambda logits, _: (0 * logits.sum()).sqrt(), "bert.embeddings", 0)):
        monkeypatch.setattr(cap_min, "task_loss", loss)
        run = toy_run(tmp_path / name, "--batch-size", "2", "--checkpoint-minutes", "0")
        with pytest.raises(ValueError, match=f"^{name}.* is not finite at step .* a smaller --lr"):
            cap_min.train(run, BertClassifier(TINY), toy_data(vocab))
        state = torch.load(run.folder / "state.pt")
        assert state["position"]["batch"] == good
        assert sum(state["position"]["seconds"].values()) > 0
        assert all(weight.isfinite().all() for weight in state["model"].values())


# -------------------------------------------------- several processes, other devices

@pytest.mark.parametrize("method", ["movement", "soft", "structured"])
def test_two_processes_train_as_one(method, whole, command, pretrained, tmp_path):
    """Without dropout the weights are the same but for rounding; of the 40 batches of each epoch
    the last has one example, and so none for the second process; what banks hold is encoded in two
    batches, one by each. A run that two began, killed in its second epoch, one process can end."""
    model = shutil.copytree(pretrained, tmp_path / "pretrained")
    BertConfig(**vars(TINY) | {"num_labels": 3, "hidden_dropout_prob": 0,
                               "attention_probs_dropout_prob": 0}).to_json(model / "config.json")
    options = ["--model", str(model), "--teacher", str(whole("movement") / "teacher"),
               "--max-train", "313", "--lr", "1e-5"]
    one, two, both = (command(tmp_path / name, method, *options) for name in ("one", "two", "both"))
    assert main(one) == 0 and ends(start(two, 2)) == [0, 0]
    if method == "movement":
        both += ["--checkpoint-minutes", "0"]
        kill_after(tmp_path / "both" / "log.jsonl", 45, 0, start(both, 2))
        assert main(both) == 0
    wanted = load_safetensors(tmp_path / "one" / "model" / "model.safetensors")
    for path in tmp_path.glob("*o*/model/model.safetensors"):
        torch.testing.assert_close(load_safetensors(path), wanted, atol=1e-6, rtol=0)
    for first, second in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        assert first["gradient_share"] == pytest.approx(second["gradient_share"], abs=2e-3)


def test_two_machines(pretrained, glue, tmp_path):
    """Two agents of torchrun with two processes each, and caches of their own that hold model and
    data, share a run folder. CAP-soft leaves 3 % of all 4,096 weights."""
    agents, port = [], free_port()
    for node in ("0", "1"):
        shutil.make_archive(str(tmp_path / node / "glue" / "SST-2"), "zip", glue)
        shutil.copytree(pretrained, tmp_path / node / "bert-base-uncased")
        agents.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", node,
             "--master_addr", "127.0.0.1", "--master_port", port, "--nproc_per_node", "2",
             HERE / "cap_min.py", "--task", "sst2", "--epochs", "2", "--max-train", "50",
             "--batch-size", "8", "--max-length", "16", "--device", "cpu", "--out",
             tmp_path / "run"], stdout=subprocess.DEVNULL,
            env=os.environ | {"CAP_CACHE": str(tmp_path / node), "OMP_NUM_THREADS": "1"}))
    assert [agent.wait() for agent in agents] == [0, 0]
    record = record_of(tmp_path / "run")
    assert record["sparsity"]["kept"] == round(0.03 * 4096)
    assert "4 processes" in record["versions"]["machine"]


def test_a_machine_that_does_not_share_the_run_folder(command, tmp_path, monkeypatch, capsys):
    """The second process of two, which sees nothing of what the first one writes."""
    monkeypatch.setattr(cap_min, "rank", lambda: 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert main(command(tmp_path)) == 2
    assert f"{tmp_path} is not that of process 0: all machines must" in capsys.readouterr().err


def test_banks_that_could_crowd_a_gpu_are_memory_mapped(monkeypatch):
    """One of 5 bytes lies on a GPU of which 100 are free, not with 99."""
    bank = types.SimpleNamespace(nbytes=5, to=lambda device: "on the GPU")
    monkeypatch.setattr(Run, "load", lambda run, name, mmap: bank)
    run = Run(cap_min.parse([]), {})
    for free, found in ((100, "on the GPU"), (99, bank)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
        assert run.read("prc-0", torch.device("cuda")) == found


def test_a_step_reads_nothing_back(vocab, monkeypatch):
    """Nor does it mix devices: on torch's meta device, whose tensors have no content, either
    raises. So the CPU never waits for a GPU between two log lines."""
    monkeypatch.setattr(cap_min, "autocast", lambda device, dtype: contextlib.nullcontext())
    args, meta = cap_min.parse([]), torch.device("meta")
    model, data = BertClassifier(TINY), toy_data(vocab).to(meta)
    add_masks(model, "zero")
    model.to(meta)
    bank = [torch.zeros(10, 16, device=meta, dtype=torch.half)] * 2
    ancestors = Ancestors(dict.fromkeys(("prc", "snc", "fic"), bank),
                          torch.zeros(10, 2, device=meta), data.labels)
    batch = next(batches(data, 4, seed=0))
    set_masks(model, 0.3)
    cap_min.set_soft_masks(model, 0.3, 0.9)
    terms, _ = cap_min.batch_terms(model, batch, ancestors, np.random.default_rng(0), args)
    terms["l1"] = cap_min.soft_penalty(model, 0.3, args)
    sum(terms.values()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


# ---------------------------------------------------------------------- command line

@pytest.mark.parametrize("options, sentence", [
    (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
    (["--model", "nowhere"], "nowhere: no such folder"),
    (["--data-dir", "nowhere"], "SST-2/train.tsv is not in "),
    (["--max-length", "33"], "--max-length: the model has 32 positions"),
    (["--epochs", "1", "--batch-size", "10"], "5 steps with --warmup 0.09 have no room"),
    (["--warmup", "0.2"], "14 steps with --warmup 0.2 have no room"),
    (["--teacher", "swapped"], "swapped: its labels are {0: 'good', 1: 'bad'}"),
    (["--teacher", "small"], "small: its "),
    (["--model", "swapped"], "swapped lists more pieces than its model"),
    (["--model", "removed"], "removed: some of its heads or neurons are gone already")])
def test_bad_arguments_end_in_one_sentence(options, sentence, command, pretrained, tmp_path,
                                           monkeypatch, capsys):
    """Exit status 2, one line on stderr, and no run folder has been made. What a teacher calls
    "good" is anyone's guess; one of another size has no bank."""
    monkeypatch.chdir(tmp_path)
    model = from_pretrained(pretrained)
    model.config.id2label = {0: "good", 1: "bad"}
    save_pretrained(model, "swapped")
    Path("swapped/vocab.txt").write_text("\n".join([*PIECES, "more"]), "utf-8")
    save_pretrained(BertClassifier(BertConfig(**{**vars(TINY), "hidden_size": 8})), "small")
    save_pretrained(removed_units()[1], "removed")
    shutil.copy(pretrained / "vocab.txt", "removed")
    small = cap_min.parse(command("run", "movement", "--without", "prc", "snc", "fic"))
    cap_min.load_fine_tuned("small", small, model.config)  # it serves for distillation alone
    capsys.readouterr()
    assert main(command("run", "movement", *options)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not Path("run").exists()


def test_labels_are_matched_to_words():
    """In order, or by themselves, beginnings or numbers; in data a number is not both."""
    for labels, words, order in (
            (["no", "yes"], ["no", "yes"], [0, 1]), (["pos", "NEG"], ["neg", "Positive"], [1, 0]),
            (["sport", "sports"], ["sport", "sports"], [0, 1]), (["1", "0"], ["1", "0"], [0, 1]),
            (["sports", "sport"], ["sport", "sports"], [1, 1]),
            (["1", "0"], ["bad", "good"], [1, 0]), (["a", "c"], ["bad", "good"], [None] * 2),
            (["goo", "good"], ["bad", "good"], [None, 1]),
            (["LABEL_0", "LABEL_1"], ["bad", "good"], [0, 1]), ([], ["bad", "good"], [0, 1]),
            (["LABEL_0"], [], [0]), ([], [], [0]), (["bad", "bad"], ["bad", "good"], [1, None])):
        assert cap_min.label_order(dict(enumerate(labels)), words) == order
    assert [TASKS[name].words[1] for name in ("cola", "mrpc", "qqp", "wnli")] == [
        "acceptable", "equivalent", "duplicate", "entailment"]
    stars = data_glue.Task("stars", "text", None, "label", ["1", "2"])
    assert [data_glue.read_label(stars, written, "") for written in "12"] == [0, 1]
    with pytest.raises(ValueError, match=": label '0', not one of 1, 2$"):
        data_glue.read_label(stars, "0", "stars")
    assert cap_min.label_order({1: "bad", 0: "good"}, ["bad", "good"]) == [1, 0]


def test_labels_of_a_teacher(pretrained, command, tmp_path, monkeypatch, capsys):
    """Its outputs are put in the order of the task's words: the same logits. If mostly wrong, it is
    taken with these words, but not with LABEL_0 ..., which are perhaps in another order."""
    words, folder, batch = ["negative", "mixed", "positive"], tmp_path / "teacher", toy_batch()
    monkeypatch.setitem(TASKS, "sst2", TASKS["sst2"]._replace(words=words))
    teacher = from_pretrained(pretrained, 3)
    wanted = teacher(*batch)[0]
    teacher.config.id2label = {0: "pos", 1: "mixed", 2: "NEG"}
    for parameter in teacher.classifier.parameters():
        parameter.data = parameter.data.flip(0)
    save_pretrained(teacher, folder)
    loaded = cap_min.load_fine_tuned(folder, cap_min.parse(command("run")), teacher.config)
    assert torch.equal(loaded(*batch)[0], wanted)
    monkeypatch.setattr(cap_min, "evaluate", lambda *given: {"accuracy": 0.39})
    watch(monkeypatch, "store_ancestors", stop_at=1)
    for labels, status in ((dict(enumerate(words[::-1])), 130), (None, 2)):
        teacher.config.id2label = labels
        save_pretrained(teacher, folder)
        assert main(command(tmp_path / str(status), "movement", "--teacher", str(folder))) == status
    assert "an id2label, ['negative', 'mixed', 'positive'] in" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, sentence", [
    ("run", b"mine", "File exists: "), ("run/thesis.tex", b"mine", "run is no run folder"),
    ("run/config.json", b"[", "config.json: damaged, not a JSON file"),
    ("run/config.json", b'{"hidden_size": 16}', "run with hidden_size 16, task None")])
def test_a_run_folder_of_something_else_is_left_alone(name, content, sentence, command, tmp_path,
                                                      capsys):
    """Nothing in it has changed, and nothing is new."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    before = list(tmp_path.rglob("*"))
    assert main(command(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert (tmp_path / name).read_bytes() == content and list(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_what_was_there(command, tmp_path, capsys):
    """No file can grow over 20,000 bytes: one sentence names it, and an earlier one stays whole."""
    out, path = tmp_path / "run", tmp_path / "whole"
    save_safetensors({"a": torch.ones(2)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert main(command(out)) == 2
        with pytest.raises(OSError, match=f"{path} could not be written, .*File too large"):
            save_safetensors({"a": torch.ones(9000)}, path)
        with pytest.raises(OSError, match="could not"), bert_min.replacing(path) as file:
            torch.save([torch.ones(9000), torch.ones(9000)], file)  # which raises a RuntimeError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}/checkpoint/state.pt could not be written, the disk ")
    assert error.count("\n") == 1
    files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"config.json", "log.jsonl", "whole"}
    assert load_safetensors(path)["a"].tolist() == [1, 1]


# ----------------------------------------------------------------------------- tasks

@pytest.mark.parametrize("task, text, sentence", [
    ("sst2", b"sentence\tlabel\ngood 1\n", "line 2: 1 columns, not 2"),
    ("sst2", b"sentence\tlabel\nso\tgood\t1\n", "line 2: 3 columns, not 2"),
    ("sst2", b"sentence\tlabel\n", "no examples"),
    ("sst2", b"\n\nlabel\n", "line 3: no column 'sentence', only ['label']"),
    ("sst2", b"sentence\tlabel\ngood\t1\n\xff\t1\n", "line 3: not valid UTF-8"),
    ("sst2", b"sentence\tlabel\ngood\t" + b"1" * 9000,
     f"label '{'1' * 50}', not one of negative, positive, 0, 1"),
    ("sst2", b"x" * 9000, "line 1: no column 'sentence', only ['xxx"),
    ("sst2", b'sentence\tlabel\n"""a""\nb"\t1\nc\t2\n', "line 4: label '2'"),
    *(("stsb", b"sentence1\tsentence2\tscore\na\tb\t0\na\tb\t5\na\tb\t" + written,
       "line 4: '%s' is not a number from 0 to 5" % written.decode())
      for written in (b"nan", b"inf", b"5.1", b"-1", b"", b"good"))])
def test_bad_data_is_named_by_file_and_line(task, text, sentence, tmp_path):
    (tmp_path / TASKS[task].folder).mkdir()
    (tmp_path / TASKS[task].folder / "train.tsv").write_bytes(text)
    with pytest.raises(ValueError, match="train.tsv.*" + re.escape(sentence)) as error:
        load(task, "train", tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("task, text, wanted", [
    ("mrpc", '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t1\t2\t"He said\t"\r\n',
     ('"He said', '"', 1)),
    ("cola", "gj04\t0\t*\tIt was\u2028good.\n", ("It was\u2028good.", None, 0)),
    ("snli", "gold_label\tsentence2\tsentence1\n-\ta\tb\nneutral\tc\td", ("d", "c", 1)),
    ("rte", 'sentence1\tsentence2\tlabel\n"a ""b"""\t"c" d\tentailment',
     ('"a ""b"""', '"c" d', 0)),
    # as the datasets library writes them
    ("cola", "sentence\tlabel\tidx\nIt was good.\t0\t0\n", ("It was good.", None, 0)),
    ("snli", "premise\thypothesis\tlabel\na\tb\t-1\nd\tc\t2\n", ("d", "c", 2)),
    ("mrpc", "sentence1\tsentence2\tlabel\tidx\na\tb\t0\t7\n", ("a", "b", 0)),
    ("stsb", "sentence1\tsentence2\tlabel\na\tb\t3.7999999523\n", ("a", "b", 3.7999999523)),
    ("sst2", 'sentence\tlabel\r\n"he said ""no""\r\n\t!"\t1\r\n',
     ('he said "no"\r\n\t!', None, 1))])
def test_files_as_they_are(task, text, wanted, tmp_path):
    """GLUE's quotes are text, and "-" is where SNLI's annotators did not agree; the datasets
    library puts quotes about a field that has quotes, which are then doubled."""
    (tmp_path / TASKS[task].folder).mkdir()
    (tmp_path / TASKS[task].folder / "train.tsv").write_bytes(text.encode())
    assert load(task, "train", tmp_path) == [wanted]


# ----------------------------------------------------------- load and save, download

def test_other_names_and_files_load_alike(pretrained, tmp_path, capsys):
    """Without the prefix `bert.`, with those of DistributedDataParallel and torch.compile, with
    gamma/beta, half precision, pre-training heads, nulls in the configuration, as "state_dict" in a
    pytorch_model.bin: the same weights, in eval mode. One line tells what was ignored and what is
    new, such as a pooler that is not there, which a fine-tuned model must have."""
    wanted = load_safetensors(pretrained / "model.safetensors")
    config = json.loads((pretrained / "config.json").read_text())
    config |= {"pad_token_id": None, "hidden_act": "gelu_python", "position_embedding_type": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = {name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
           .replace("LayerNorm.bias", "LayerNorm.beta"): tensor.bfloat16()
           for name, tensor in wanted.items() if not name.startswith("classifier")}
    old["cls.predictions.bias"] = torch.zeros(3)
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in old.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "pytorch_model.bin")
    model = from_pretrained(tmp_path, num_labels=3)
    assert not model.training
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, wanted["bert." + name].bfloat16().float())
    assert ("pytorch_model.bin: ignored 1 tensors ['cls.predictions.bias'], newly initialised "
            "['classifier.weight', 'classifier.bias']\n") in capsys.readouterr().out
    from_pretrained(pretrained, num_labels=3)
    assert not capsys.readouterr().out
    del old["pooler.dense.weight"], old["pooler.dense.bias"]
    save_safetensors(old, tmp_path / "model.safetensors")
    from_pretrained(tmp_path)
    assert "newly initialised ['bert.pooler.dense.weight', 'bert.poo" in capsys.readouterr().out
    with pytest.raises(ValueError, match="4 tensors are missing .*: .'bert.pooler.dense.weight"):
        from_pretrained(tmp_path, num_labels=None)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).rename(tmp_path / f"{name}.index.json")
    with pytest.raises(ValueError, match="several files; load it in transformers and save it with"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("weight, sentence", [
    (torch.zeros(16, 15), "of another shape"), (torch.zeros(16, 16, dtype=LONG), "or type than"),
    (torch.full((16, 16), math.nan), "damaged"),
    (torch.full((16, 16), 1e300, dtype=DOUBLE), "damaged")])
def test_weights_that_do_not_fit_are_refused(weight, sentence, pretrained, tmp_path):
    """A sentence names a tensor of another shape or type, with a NaN, or above all of fp32."""
    model = from_pretrained(pretrained)
    model.bert.encoder.layer[1].attention.self.key.weight = nn.Parameter(weight, False)
    save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=f"{sentence}.*bert.encoder.layer.1.attention.self.key"):
        from_pretrained(tmp_path)


def tokenizer_json(prefix="##", lowercase=True, first=0, **others):
    ids = {piece: i for i, piece in enumerate(PIECES, first)}
    return json.dumps({
        "model": {"type": "WordPiece", "vocab": ids, "continuing_subword_prefix": prefix},
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": lowercase,
                       "strip_accents": None, "handle_chinese_chars": True}, **others}).encode()


@pytest.mark.parametrize("name, content, sentence", [
    ("vocab.txt", b"", r"vocab.txt: not a BERT vocabulary, \[PAD\] is missing"),
    ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nGo\nIs", "6 pieces have upper-case letters"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"45": {"content": "<e>"}}}', "<e>"),
    ("added_tokens.json", b'{"<e>": 45}', "tokens were added to its vocabulary: .'<e>'"),
    ("tokenizer.json", tokenizer_json(added_tokens=[{"content": "<e>"}]), "tokens were added"),
    ("tokenizer.json", tokenizer_json(lowercase=False), "'lowercase': False.*config: .*: True"),
    ("tokenizer.json", tokenizer_json(prefix="@@"), "tokenizer.json: .*'@@'}, .*'##'"),
    ("tokenizer.json", tokenizer_json(first=1), r"its tokenizer is not known here \(0\)"),
    ("tokenizer.json", b'{"model": 3}', "its tokenizer is not known here"),
    *(("tokenizer_config.json", content, "tokenizer_config.json: damaged, not a JSON file")
      for content in (b"[]", b"[" * 9999)),
    ("config.json", b"", "config.json: damaged, not a JSON file"),
    ("config.json", b'{"model_type": "roberta"}', "model_type is 'roberta', not 'bert'"),
    ("config.json", b'{"hidden_act": "relu"}', "hidden_act is 'relu', not 'gelu'"),
    ("config.json", b'{"tokenizer_class": "BertJapaneseTokenizer"}', "not 'BertTokenizer'"),
    *(("config.json", content, "config.json: impossible sizes")
      for content in (b'{"hidden_size": "16"}', b'{"num_attention_heads": 0}')),
    ("config.json", b'{"id2label": ["good", "bad"]}', "config.json: id2label"),
    ("config.json", b'{"vocab_size": 1000000000000}', "tensors are missing or of another shape")])
def test_damaged_model_folders_are_refused(name, content, sentence, pretrained, tmp_path):
    """One sentence names the file, and the line or the key, before any memory is taken."""
    shutil.copytree(pretrained, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        data_glue.load_tokenizer(tmp_path)
        from_pretrained(tmp_path)


@pytest.mark.parametrize("old, new, size", [
    (b"", b"", 31), (b"", b"", 33), (b"[0, 24]", b"[4, 28]", 32), (b"[2, 3]", b"[2, 4]", 32),
    (b"[24, 32]", b"[24, 31]", 32), (b"[2, 3]", b"[-2, -3]", 32), (b"F32", b"F31", 32),
    (b"[2, 3]", b"[%s6]" % (b"6, " * 999), 32), (b"}}", b"}}" + b" " * 10 ** 7, 32),
    (b"{", b"{" * 5000, 32)])
def test_damaged_safetensors_are_refused(old, new, size, tmp_path):
    """Cut short, longer than it says, shifted, misshapen, of an unknown type or 1000 dimensions,
    with an odd header: one sentence names the file. The sound one has 32 bytes of data."""
    path = tmp_path / "weights"
    save_safetensors({"a": torch.ones(2, 3), "b": torch.ones(2)}, path)
    raw = path.read_bytes()
    header, data = raw[8:-32].replace(old, new), raw[-32:] + b"x"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[:size])
    with pytest.raises(ValueError, match="weights: not a whole safetensors file") as error:
        load_safetensors(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))  # what unpickling calls


@pytest.mark.parametrize("content", [[], {"a": 1.0}, Bomb()])
def test_pickles_of_other_things_are_refused(content, tmp_path, monkeypatch):
    """A list, a number in place of a tensor, and what would run code."""
    monkeypatch.chdir(tmp_path)
    torch.save(content, "model.bin")
    with pytest.raises(ValueError, match="model.bin: not a weight file of tensors alone"):
        bert_min.load_bin("model.bin")
    assert not Path("ran").exists()


def test_a_download_that_fails_leaves_nothing(tmp_path):
    """An answer that is not HTTP: a sentence names address, cause and where to put the file."""
    path, server = tmp_path / "cache" / "big", socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}/big"

    def serve():
        with server, server.accept()[0] as connection:
            connection.recv(9999)
            connection.sendall(b"nonsense\r\n")

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(OSError, match=rf"^{address} could not be downloaded \(nonsense\); put the "
                                      f"file at {path} by hand, or pass --model or --data-dir"):
        bert_min.download(address, path, "0" * 64)
    assert not list(path.parent.iterdir())


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder whose files are had as file://...; the cache lies beside it."""
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    for module, name in ((bert_min, "BERT_BASE_URL"), (data_glue, "GLUE_URL")):
        monkeypatch.setattr(module, name, f"file://{tmp_path}/served")
    return tmp_path / "served"


def test_bert_base_is_downloaded_by_name(served, pretrained, monkeypatch):
    """Three files, each with its SHA-256; what is there is not asked for again."""
    shutil.copytree(pretrained, served, dirs_exist_ok=True)
    names = ("config.json", "vocab.txt", "model.safetensors")
    right = {name: hashlib.sha256((served / name).read_bytes()).hexdigest() for name in names}
    monkeypatch.setattr(bert_min, "BERT_BASE_FILES", right | {"vocab.txt": "0" * 64})
    with pytest.raises(OSError, match=r"vocab.txt could not be downloaded \(invalid hash"):
        from_pretrained("bert-base-uncased")
    cache = served.parent / "cache" / "bert-base-uncased"
    assert [path.name for path in cache.iterdir()] == ["config.json"]
    (served / "config.json").unlink()
    monkeypatch.setattr(bert_min, "BERT_BASE_FILES", right)
    got, wanted = from_pretrained("google-bert/bert-base-uncased"), from_pretrained(pretrained)
    torch.testing.assert_close(got.bert.state_dict(), wanted.bert.state_dict(), rtol=0, atol=0)


SETTINGS = ("import os, torch, bert_min, cap_min; cap_min.main(['--device', 'none'])\n"
            "torch.set_num_threads(2)\n"
            "print(int((torch.full((1_000_000,), 2e-38) / 10).count_nonzero()),"
            " os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], bert_min.BERT_BASE_URL)")


@pytest.mark.parametrize("code, variables, status, printed", [
    ("import sys; sys.version_info = (3, 9); import cap_min", {}, 2, "error: Python 3.10 or newer"),
    (SETTINGS, {"HF_ENDPOINT": "https://mirror"}, 0,
     "\n0 4096 https://mirror/google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734"),
    (SETTINGS, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, 0, "\n0 7 http")])
def test_what_is_decided_as_a_process_starts(code, variables, status, printed):
    """An old Python is refused before any work; a mirror of the hub is asked in its place; after
    `main`, of a million denormal numbers, here 2e-38 / 10, none is left in torch's threads."""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=os.environ | variables,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status and printed in done.stdout


def test_glue_archives_are_downloaded_and_read(served, glue, monkeypatch):
    """SST-2's zip gives two files; snli is not downloaded; what is no zip, or another, is named."""
    shutil.make_archive(str(served / "SST-2"), "zip", glue)
    whole = (served / "SST-2.zip").read_bytes()
    monkeypatch.setitem(data_glue.SHA256, "SST-2.zip", hashlib.sha256(whole).hexdigest())
    assert all(load("sst2", split) == load("sst2", split, glue) for split in ("train", "dev"))
    path = served.parent / "cache" / "glue" / "RTE.zip"
    with pytest.raises(FileNotFoundError, match=f"snli/dev.tsv is not in {path.parent}, or dam"):
        load("snli", "dev")
    shutil.copytree(glue / "SST-2", path.parent / "snli")  # there it is found
    with pytest.raises(ValueError, match="snli/dev.tsv, line 1: no column 'sentence1'"):
        load("snli", "dev")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("RTE/dev.tsv", "good")
    for content in (b"<html>", path.read_bytes().replace(b"good", b"bad!"), whole):
        path.write_bytes(content)
        with pytest.raises(FileNotFoundError, match=f"RTE/dev.tsv is not in {path.parent}, or dam"):
            load("rte", "dev")
