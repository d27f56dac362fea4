"""The tests of CAP in three files, a lecture in four parts: numbers by hand, properties, parity
with other implementations, behaviour. A docstring derives the number that its test asserts.

Run:  python -m pytest -q test_cap_min.py
Parity with transformers, tokenizers and safetensors is tested where these are installed."""

import _thread
import contextlib
import copy
import functools
import hashlib
import http.server
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import xml.dom.minidom
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn

import bert_min
import cap_min
import data_glue
from bert_min import (BertClassifier, BertConfig, Layer, from_pretrained, load_safetensors,
                      save_pretrained, save_safetensors)
from cap_min import (Ancestors, Mask, Run, StraightThrough, add_masks, apply_masks, cap_terms,
                     contrastive_loss, cubic_density, distillation_loss, encode, encoder_linears,
                     gradient_shares, linear_lr, main, set_masks, sparsity_report, topk_mask, unit)
from data_glue import TASKS, Example, WordPiece, batches, encode_task, load, score

HERE = Path(__file__).parent
LONG, DOUBLE = torch.int64, torch.float64
pytestmark = [pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
              pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")]


def tensor(values, dtype=DOUBLE):
    return torch.tensor(values, dtype=dtype)


PIECES = ("[PAD] [UNK] [CLS] [SEP] [MASK] a good bad film is the was it not un ##aff ##able "
          "##s ##e ! . , - ' e ##n o u 中 文 ² ß σ ##σ ς ##ς 1 ##2 [ ] sep x").split()
TINY = BertConfig(vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=2,
                  num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)


@pytest.fixture(scope="session")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, vocab):
    """Folder of a tiny BERT with random weights; its 3 labels fit no task that is run here."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_pretrained(BertClassifier(BertConfig(**{**vars(TINY), "num_labels": 3})), folder)
    (folder / "vocab.txt").write_bytes(vocab.read_bytes())
    return folder


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
# ----------------------------------------------------------------------------- masks


def test_mask_keeps_the_largest_of_ten_integers():
    """round(0.3 * 10) = 3 of the scores 0 ... 9 are kept: 7, 8 and 9. Eq. (1)."""
    scores = tensor([[3, 9, 0, 7, 1], [5, 2, 8, 4, 6]])
    wanted = tensor([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]], torch.bool)
    assert torch.equal(topk_mask(scores, 0.3), wanted)


def test_mask_takes_tied_scores_by_index():
    """k = 3 of [1, 2, 1, 1, 0] is the 2 and the first two of three ones; of constant scores the
    first half: a comparison with the threshold would keep four, and all. round(0.01 * 4) = 0, but
    a matrix keeps at least one weight. Eq. (1)."""
    assert topk_mask(tensor([1, 2, 1, 1, 0]), 0.6).tolist() == [True, True, True, False, False]
    assert topk_mask(torch.zeros(2, 2), 0.5).tolist() == [[True, True], [False, False]]
    assert topk_mask(tensor([1, 4, 2, 3]), 0.01).tolist() == [False, True, False, False]


def test_straight_through_gradients():
    """y = (W * M) x with W = (2, -3), M = (1, 0), x = (5, 7): y = 10 and dy/dW' = x, so
    dy/dS = dy/dW' * W = (5 * 2, 7 * -3) and dy/dW = dy/dW' * M = (5, 0). dy/dW' is left as it
    was, since others may read it. Eq. (2)."""
    weight = tensor([2.0, -3.0]).requires_grad_()
    scores = tensor([0.0, 0.0]).requires_grad_()
    masked = StraightThrough.apply(weight, scores, tensor([1, 0], torch.bool))
    x = tensor([5.0, 7.0])
    assert (masked @ x).item() == 10
    masked.backward(x)
    assert scores.grad.tolist() == [10, -21]
    assert weight.grad.tolist() == [5, 0]
    assert x.tolist() == [5, 7]


def test_straight_through_under_autocast():
    """1 + 2^-10 is 1 in bf16: so is W' in forward, but the score's gradient has the whole W:
    dL/dS = 2 (1 + 2^-10), and dL/dW = 2; both in fp32."""
    weight = torch.tensor([1 + 2 ** -10, 3.0], requires_grad=True)
    scores = torch.zeros(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        masked = StraightThrough.apply(weight, scores, tensor([1, 0], torch.bool))
    assert masked.dtype == torch.bfloat16 and masked.tolist() == [1, 0]
    (2 * masked).sum().backward()
    assert weight.grad.tolist() == [2, 0] and weight.grad.dtype == torch.float32
    assert scores.grad.tolist() == [2 + 2 ** -9, 6]


def test_magnitude_start_of_scores():
    """W = (-3, 1, -1, 3) has mean 0 and std sqrt(20 / 3): scores |W| / std. Zero: 0."""
    weight = torch.tensor([[-3.0, 1.0, -1.0, 3.0]])
    wanted = torch.tensor([[3.0, 1.0, 1.0, 3.0]]) / math.sqrt(20 / 3)
    assert torch.allclose(Mask(weight, "magnitude").scores, wanted)
    assert Mask(weight, "zero").scores.tolist() == [[0, 0, 0, 0]]


def test_soft_masks_and_their_cut():
    """sigmoid of log(p / (1 - p)) is p. Of p = 0.05, 0.2 in one matrix and 0.5, 0.6, 0.09, 0.7 in
    another, 4 of 6 exceed 0.1, the threshold at density 1/3 on the way to sparsity 2/3; at density
    1, where it is 0, all do. A density of 1/3 keeps the 2 largest of both matrices together; on the
    way to sparsity 1/6 the threshold is 0.1 at 5/6, which adds the largest below it, if it is to be
    exact. The penalty is the mean of 0.25 / 2 and 1.89 / 4."""
    model = nn.ModuleDict({"bert": nn.ModuleDict({"encoder": nn.ModuleList([
        nn.Linear(2, 1), nn.Linear(2, 2)])})})
    model.bert, model.bert.embeddings = model["bert"], nn.Identity()
    add_masks(model, "zero")
    first, second = (layer.parametrizations.weight[0] for layer in model["bert"]["encoder"])
    first.scores.data = torch.logit(torch.tensor([[0.05, 0.2]]))
    second.scores.data = torch.logit(torch.tensor([[0.5, 0.6], [0.09, 0.7]]))
    for density, sparsity, exact, kept, wanted in (
            (1, 2 / 3, False, 1, [True] * 6),
            (5 / 6, 1 / 6, False, 4 / 6, [False, True, True, True, False, True]),
            (1 / 3, 2 / 3, False, 1 / 3, [False, False, False, True, False, True]),
            (5 / 6, 1 / 6, True, 5 / 6, [False, *[True] * 5])):
        assert cap_min.set_soft_masks(model, density, sparsity, exact) == kept
        assert first.mask.flatten().tolist() + second.mask.flatten().tolist() == wanted
    assert cap_min.mean_sigmoid(model).item() == pytest.approx((0.25 / 2 + 1.89 / 4) / 2)


# -------------------------------------------------------------------------- schedule


def test_cubic_schedule():
    """From 1 to 0.2 between step 2 and step 10 - 4 = 6: at step 4 half of it is over, so
    0.2 + 0.8 * (1 - 1/2)^3 = 0.3; before it is 1, after it 0.2. The learning rate, with a
    warm-up of 2 in 6 steps: 0, 1/2, 1, then down by 1/4 a step. Eq. (3)."""
    density = [cubic_density(step, 10, 1.0, 0.2, warm=2, cool=4) for step in range(11)]
    assert density[:3] == [1, 1, 1]
    assert density[4] == pytest.approx(0.3)
    assert density[6:] == [0.2] * 5
    assert [linear_lr(step, 6, 2) for step in range(7)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]


# ------------------------------------------------------------------- sparsity report


def test_sparsity_report_counts_zeros():
    """One of TINY's 12 matrices, of 16 * 16 weights, has 64 zeros: a share of 1/4 of it and of
    64 / (2 * (4 * 16 * 16 + 2 * 16 * 32)) = 1/64 of all. The classifier does not count."""
    model = BertClassifier(TINY)
    model.bert.encoder.layer[1].attention.self.key.weight.data[:4] = 0
    model.classifier.weight.data[:] = 0
    report = sparsity_report(model)
    assert report["total"] == 1 / 64
    assert report["matrices"]["bert.encoder.layer.1.attention.self.key.weight"] == 0.25
    assert sum(report["matrices"].values()) == 0.25 and len(report["matrices"]) == 12


# ------------------------------------------------------------------ contrastive loss

EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def loss_2d(queries, index, bank, labels, extra, **options):
    """`contrastive_loss` at tau = 1 on two-dimensional vectors; labels are the bank's."""
    labels, index = tensor(labels, LONG), tensor(index, LONG)
    return contrastive_loss(tensor(queries), index, labels[index], tensor(bank), labels,
                            tensor(extra, LONG), **{"temperature": 1.0, **options})


def test_one_positive_one_negative():
    """The anchor points east. Candidates: its own bank row, east too (s = 1), and a drawn one,
    north (s = 0). p(own) = e / (e + 1), so L^u = log(1 + 1/e) = 0.3133. At tau = 1/2, s = 2 and
    0, and L^u = log(1 + e^-2). Eq. (5)."""
    unsup, sup = loss_2d([EAST], [0], [[EAST], [NORTH]], [0, 1], extra=[1])
    assert unsup.item() == pytest.approx(0.31326, abs=1e-5)
    assert sup.item() == pytest.approx(0.31326, abs=1e-5)
    unsup, _ = loss_2d([EAST], [0], [[EAST], [NORTH]], [0, 1], extra=[1], temperature=0.5)
    assert unsup.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_candidates_are_other_anchors_and_bank_rows():
    """Anchors east and north, with bank rows alike; nothing is drawn. The candidates of the
    first are the second (s = 0) and both bank rows (s = 1, 0), not itself:
    -log p = log(e + 2) - 1 for each, sum |P| = 2, L^u = (2 / 2)(log(e + 2) - 1). Eq. (4)."""
    unsup, _ = loss_2d([EAST, NORTH], [0, 1], [[EAST], [NORTH]], [0, 1], extra=[])
    assert unsup.item() == pytest.approx(math.log(math.e + 2) - 1)


def test_positives_of_an_example_drawn_twice():
    """E draws the anchor's own row again: of the three candidates (own, own, north) two are
    positive, -log p = log(2e + 1) - 1 for both, and their mean is divided by |P| = 2. Eq. (6)."""
    unsup, _ = loss_2d([EAST], [0], [[EAST], [NORTH]], [0, 1], extra=[0, 1])
    assert unsup.item() == pytest.approx((math.log(2 * math.e + 1) - 1) / 2)


def test_positives_with_the_same_label():
    """The drawn example north has the anchor's label, west has not. Z = e + 1 + 1/e; P^s is own
    and north: mean of -log p = log Z - (1 + 0) / 2, over |P| = 2. P^u is own alone. Eq. (6)."""
    unsup, sup = loss_2d([EAST], [0], [[EAST], [NORTH], [WEST]], [1, 1, 0], extra=[1, 2])
    log_z = math.log(math.e + 1 + 1 / math.e)
    assert unsup.item() == pytest.approx(log_z - 1)
    assert sup.item() == pytest.approx((log_z - 0.5) / 2)


def test_supcon_divides_by_the_batch():
    """The two forms differ in the divisor alone: official * sum |P_i| = supcon * B. With two
    anchors of one label and one drawn row of another, P^s_i is the other anchor and both bank
    rows: sum |P^s_i| = 6, sum |P^u_i| = 2, B = 2. Eq. (7)."""
    case = ([EAST, NORTH], [0, 1], [[EAST], [NORTH], [WEST]], [1, 1, 0], [2])
    official, supcon = loss_2d(*case), loss_2d(*case, norm="supcon")
    assert official[0].item() * 2 == pytest.approx(supcon[0].item() * 2)
    assert official[1].item() * 6 == pytest.approx(supcon[1].item() * 2)


# ------------------------------------------------------------------------ total loss


def test_distillation():
    """T = 2, teacher logits (2 log 3, 0), student (0, 0): softmax at T gives (3/4, 1/4) and
    (1/2, 1/2); T^2 KL = 4 (3/4 log(3/2) + 1/4 log(1/2)) = 0.5232. Eq. (8)."""
    value = distillation_loss(tensor([[0.0, 0.0]]), tensor([[2 * math.log(3), 0.0]]), 2.0)
    assert value.item() == pytest.approx(0.52325, abs=1e-5)
    assert distillation_loss(tensor([[1.0]]), tensor([[3.0]])).item() == 4  # regression: 2^2


def cap_case(without=(), snapshots=1, rows=(EAST, EAST, EAST, EAST)):
    """Arguments of `cap_terms`: banks of 4 examples, of which the second is the one anchor."""
    args = cap_min.parse(["--w-unsup", "0.5", "--w-sup", "7", "--extra", "2"])
    args.without = list(without)
    counts = {"prc": 1, "snc": snapshots, "fic": 1}
    banks = {name: [unit(torch.tensor(rows))] * count for name, count in counts.items()
             if name not in without}
    labels = tensor([0, 1, 1, 0], LONG)
    batch = {"index": tensor([1], LONG), "labels": labels[1:2]}
    teacher_logits = torch.tensor([[0, 0], [2 * math.log(3), 0], [0, 0], [0, 0]])
    return (torch.zeros(1, 2), torch.tensor([[1.0, 0.5]], requires_grad=True), batch,
            Ancestors(banks, teacher_logits, labels), tensor([2, 0], LONG), args)


def test_total_loss():
    """CE of logits (0, 0) is log 2; KD is that of the test above. All bank rows are equal, so
    p = 1/C. PrC and FiC: C = 1 + 2, of which the anchor's own is in P^u and one more in P^s:
    L^u = log 3, L^s = log 3 / 2. SnC, K = 2, draws 2 / K = 1 example, of the anchor's label:
    C = 2 + 2, L^u = log 4 / 2, L^s = log 4 / 4. With w_u = 1/2, w_s = 7: 4 log 3 and 2 log 4.
    Before there is a snapshot, SnC is absent. Eq. (8)."""
    terms = cap_terms(*cap_case(snapshots=2))
    assert list(terms) == ["ce", "kd", "prc", "snc", "fic"]
    wanted = [0.1 * math.log(2), 0.9 * 0.52325, 4 * math.log(3), 2 * math.log(4), 4 * math.log(3)]
    assert [term.item() for term in terms.values()] == pytest.approx(wanted, abs=1e-4)
    assert set(cap_terms(*cap_case(snapshots=0))) == {"ce", "kd", "prc", "fic"}
    *case, args = cap_case(without=("prc", "snc", "fic"))
    args.kd_temperature = 1.0  # softmax of (2 log 3, 0): (9/10, 1/10)
    wanted = 0.9 * (0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert cap_terms(*case, args)["kd"].item() == pytest.approx(wanted)


# --------------------------------------------------------------- structured pruning


def test_units_are_ranked_over_all_layers():
    """(3, 4) has norm 5 and becomes (0.6, 0.8), (0, 10) becomes (0, 1): the order is the last one,
    0.8, 0.6, 0; a layer may lose all. (1, 1, 1, 1) becomes 0.5 each, (100, 200) becomes (0.45,
    0.89): divided by their sums, or by nothing, 100 would come before a 1. Nothing stays 0."""
    importances = [tensor([3.0, 4.0]), tensor([0.0, 10.0])]
    kept = [[mask.tolist() for mask in cap_min.most_important(importances, count)]
            for count in (0, 1, 2, 3)]
    assert kept == [[[False, False], [False, False]], [[False, False], [False, True]],
                    [[False, True], [False, True]], [[True, True], [False, True]]]
    fours, two = cap_min.most_important([torch.ones(4), tensor([100.0, 200.0])], 5)
    assert fours.tolist() == [True] * 4 and two.tolist() == [False, True]
    assert cap_min.most_important([torch.zeros(2), tensor([1.0, 2.0])], 2)[1].tolist() == [True] * 2


def test_stages():
    """CAP-f prunes 10 % more at a time, last what was asked for; the others prune in one go."""
    for sparsity, wanted in ((0.35, [0.1, 0.2, 0.3, 0.35]), (0.2, [0.1, 0.2]), (0.05, [0.05]),
                             (0.95, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])):
        args = cap_min.parse(["--method", "structured", "--sparsity", str(sparsity)])
        assert cap_min.stages(args) == wanted
        assert cap_min.teacher_epochs(args) == min(3, 2 * len(wanted))
    assert cap_min.stages(cap_min.parse(["--sparsity", "0.9"])) == [0.9]


# ------------------------------------------------------------------------- WordPiece


def pieces(vocab, text, **options):
    tokenizer = WordPiece(vocab, **options)
    return " ".join(PIECES[i] for i in tokenizer.encode(text)[0][1:-1])


def test_wordpiece_takes_the_longest_prefix(vocab):
    """"un" is the longest known prefix, then "##aff", "##able"; a rest that no piece begins
    makes the whole word unknown, as do over 100 characters."""
    assert pieces(vocab, "unaffable films filmx") == "un ##aff ##able film ##s [UNK]"
    assert pieces(vocab, "u" + "s" * 99) == " ".join(["u"] + ["##s"] * 99)
    assert pieces(vocab, "u" + "s" * 100) == "[UNK]"


def test_wordpiece_cleans_as_google_does(vocab):
    """Control characters vanish, also inside a word; every space splits; accents go with the
    case; ideographs and punctuation stand alone; a final sigma is lower-cased as one; a special
    token in a text is only text; private-use characters stay, so they are unknown."""
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


# --------------------------------------------------------------------------- metrics


def test_metrics():
    """Predictions 1 1 0 0 for labels 1 0 1 0: half right; 1 true of 2 predicted and 2 real
    positives, F1 = 2 / 4; as many agreements as chance, Matthews 0. Predicting 1 1 1 0 for
    1 1 0 0: TP 2, FP 1, TN 1, FN 0, F1 = 4 / 5, Matthews 2 / sqrt(3 * 2 * 2 * 1) = 0.577.
    (1, 2, 9) and (1, 2, 3) have the same order: Spearman 1. Pearson: x - 4 = (-3, -2, 5),
    y - 2 = (-1, 0, 1), 8 / sqrt(38 * 2) = 0.918. Tied values share their mean rank."""
    assert score("mrpc", [1, 1, 0, 0], [1, 0, 1, 0]) == {"accuracy": 0.5, "f1": 0.5}
    assert score("cola", [1, 1, 0, 0], [1, 0, 1, 0]) == {"matthews": 0}
    assert score("mrpc", [1, 1, 1, 0], [1, 1, 0, 0])["f1"] == pytest.approx(0.8)
    assert score("cola", [1, 1, 1, 0], [1, 1, 0, 0])["matthews"] == pytest.approx(2 / 12 ** 0.5)
    assert score("cola", [1, 1], [1, 0]) == {"matthews": 0}
    got = score("stsb", [1, 2, 9], [1, 2, 3])
    assert got == {"pearson": pytest.approx(8 / 76 ** 0.5), "spearman": pytest.approx(1)}
    assert data_glue.ranks(np.array([5, 5, 7])).tolist() == [1.5, 1.5, 3]


# =============================================================== part 2: properties
# ----------------------------------------------------------------------------- masks


@pytest.mark.parametrize("size", [1, 7, 1000, 40_000])
@pytest.mark.parametrize("density", [0.001, 0.03, 0.5, 0.999, 1.0])
def test_mask_is_the_head_of_a_stable_sort(size, density):
    """For any scores, few distinct ones and periodic ones (which mislead a strided sample) too,
    the mask marks the first k of a stable descending sort, alone and among others of its size.
    Eq. (1)."""
    torch.manual_seed(size)
    k = max(1, round(density * size))
    for scores in (torch.randn(size), torch.randint(0, 3, (size,)).float(),
                   (torch.arange(size) % 127).float(), torch.arange(size).double()):
        wanted = torch.zeros(size, dtype=torch.bool)
        wanted[scores.sort(descending=True, stable=True).indices[:k]] = True
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            assert torch.equal(topk_mask(scores.to(device), density).cpu(), wanted)
            both = torch.stack([scores, scores.flip(0)]).to(device)
            assert torch.equal(cap_min.mask_rows(both, density)[0].cpu(), wanted)


@pytest.mark.parametrize("score_init", ["zero", "none"])
def test_masked_weights_get_no_gradient_and_stay_zero_in_the_export(score_init):
    """Adam's momentum revives a pruned weight (its gradient is 0, its step is not); the export
    is W * M all the same. So it is without scores, where |W| decides."""
    torch.manual_seed(0)
    model = BertClassifier(TINY)
    add_masks(model, score_init)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for density in (1.0, 0.1, 0.1):
        set_masks(model, density)
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


def test_magnitude_pruning_keeps_the_largest_weights():
    """Without scores a quarter of |W| is kept, none of it smaller than what is pruned."""
    model = BertClassifier(TINY)
    add_masks(model, "none")
    set_masks(model, 0.25)
    for layer in encoder_linears(model).values():
        mask = layer.parametrizations.weight[0]
        size = layer.parametrizations.weight.original.detach().abs()
        assert mask.scores is None and int(mask.mask.sum()) == size.numel() // 4
        assert size[mask.mask].min() >= size[~mask.mask].max()


# -------------------------------------------------------------------- snapshot banks


def toy_data(vocab, count=10):
    examples = [Example("good " * (1 + i % 5), None, i % 2) for i in range(count)]
    return encode_task(examples, WordPiece(vocab), max_length=16)


def test_encode_is_deterministic_and_restores_the_mode(vocab):
    """Dropout is on in the training model, off in `encode`; its rows are the model's pooled
    vectors in the order of the data, whatever the batches, which are filled up to `tokens`."""
    torch.manual_seed(0)
    model, data = BertClassifier(TINY).train(), toy_data(vocab)
    first, sizes = encode(model, data), []
    model.register_forward_pre_hook(lambda _, batch: sizes.append(batch[0].numel()))
    second = encode(model, data, tokens=17)
    assert max(sizes) <= 17 and len(sizes) < len(data)
    assert model.training and not first.requires_grad
    assert torch.allclose(first, second, atol=1e-6)
    batch = data.batch(tensor([4], LONG))
    alone = model.eval()(*cap_min.inputs(batch))[1]
    assert torch.allclose(first[4], alone[0], atol=1e-6)
    encode(model, data)
    assert not model.training


def test_tiny_numbers_are_zero_in_all_threads():
    """2e-38 / 10 is a denormal number, which `main` has count as 0 in torch's threads too: of a
    million of them none is left. What Adam keeps of pruned weights decays to such numbers."""
    script = ("import torch, cap_min; cap_min.parse = lambda argv: 1 / 0\n"
              "try: cap_min.main([])\nexcept ZeroDivisionError: pass\n"
              "torch.set_num_threads(2)\n"
              "print(int((torch.full((1_000_000,), 2e-38) / 10).count_nonzero()))")
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, text=True, check=True,
                          stdout=subprocess.PIPE)
    assert done.stdout == "0\n"


def test_encode_masks_each_matrix_once(vocab, monkeypatch):
    """The W' of 12 matrices is made 12 times for all batches, and again by the next call, also
    after one that failed, which so has the masks of its time."""
    torch.manual_seed(0)
    model, data, made = BertClassifier(TINY), toy_data(vocab), []
    add_masks(model, "magnitude")
    original = Mask.forward
    monkeypatch.setattr(Mask, "forward", lambda self, weight: [made.append(1),
                                                               original(self, weight)][1])
    dense = encode(model, data, tokens=17)
    assert len(made) == 12
    hook = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(model, data)
    hook.remove()
    set_masks(model, 0.1)
    pruned = encode(model, data)
    assert len(made) == 24 and not torch.allclose(dense, pruned, atol=1e-4)
    apply_masks(model)
    assert torch.allclose(pruned, encode(model, data), atol=1e-6)


def toy_run(folder, *options):
    """A `Run` in its folder, at its start."""
    args = cap_min.parse(["--task", "sst2", "--dtype", "fp32", "--out", str(folder), *options])
    run = Run(args, "")
    run.begin()
    return run


def test_banks_hold_unit_vectors_of_the_right_ancestor(vocab, tmp_path):
    """PrC is of the pre-trained model, FiC of the teacher, whose logits are its classifier's on
    the same pooled vectors; SnC grows by a snapshot at a time, and a run that goes on has those
    that it had. MNLI's second dev set has scores of its own."""
    config = BertConfig(**{**vars(TINY), "num_labels": 3})
    model, teacher, data = BertClassifier(config), BertClassifier(config).eval(), toy_data(vocab)
    run, cpu = toy_run(tmp_path), torch.device("cpu")
    cap_min.store_ancestors(run, data, model, teacher)
    ancestors = cap_min.load_ancestors(run, data, cpu)
    assert {name: len(bank) for name, bank in ancestors.banks.items()} == {
        "prc": 1, "snc": 0, "fic": 1}
    snapshots = [BertClassifier(config), BertClassifier(config)]
    for snapshot in snapshots:
        cap_min.add_snapshot(run, data, snapshot, ancestors)
    wanted = {"prc": [model], "snc": snapshots, "fic": [teacher]}
    for banks in (ancestors.banks, cap_min.load_ancestors(run, data, cpu).banks):
        for name, models in wanted.items():
            assert len(banks[name]) == len(models)
            for vectors, ancestor in zip(banks[name], models):
                length_1 = nn.functional.normalize(encode(ancestor, data), dim=-1)
                assert vectors.dtype == torch.float16
                assert torch.allclose(vectors.float(), length_1, atol=1e-3)
    batch = data.batch(torch.arange(10))
    assert torch.allclose(ancestors.logits, teacher(*cap_min.inputs(batch))[0], atol=1e-6)
    dev_sets = {"dev": data, "dev_mm": data.head(1)}
    assert set(cap_min.evaluate(model, "mnli", dev_sets)) == {"accuracy", "accuracy_mm"}


# ------------------------------------------------------------------ contrastive loss


@pytest.mark.parametrize("without", [names for r in range(5) for names in
                                     itertools.combinations(("prc", "snc", "fic", "kd"), r)])
def test_any_combination_of_terms(without):
    """Each of the 16 sets of --without leaves exactly the other terms, and with banks that point
    to several sides every one of them has a share of the gradient."""
    _, pooled, *rest = cap_case(without, rows=(EAST, NORTH, WEST, NORTH))
    terms = cap_terms(pooled @ torch.tensor([[0.5, 0.0], [0.0, 0.5]]), pooled, *rest)
    assert set(terms) == {"ce", "kd", "prc", "snc", "fic"} - set(without)
    shares = gradient_shares(terms, pooled)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3) and min(shares.values()) > 0


# --------------------------------------------------------------- structured pruning


def test_importance_is_the_gradient_of_a_mask(vocab, tmp_path, monkeypatch):
    """A mask m, here a factor on what a head or a neuron puts out, has a gradient dL/dm; of 10
    examples in batches of 4 the absolute values of three such gradients are summed. Of two
    processes, each has twice the gradient of its part, so half the sum counts: if that is 6 times
    its own, 3 times."""
    model, data = BertClassifier(TINY).double(), toy_data(vocab)
    run = toy_run(tmp_path, "--method", "structured", "--batch-size", "4", "--w-ce", "1")
    run.args.without = ["prc", "snc", "fic", "kd"]
    ancestors = Ancestors({}, None, data.labels)
    heads, neurons = cap_min.importance(run, model, data, ancestors)
    masks = [torch.ones(2, dtype=DOUBLE, requires_grad=True),
             torch.ones(32, dtype=DOUBLE, requires_grad=True)]
    layer = model.bert.encoder.layer[1]
    layer.attention.output.dense.register_forward_pre_hook(
        lambda module, given: given[0] * masks[0].repeat_interleave(8))
    layer.output.dense.register_forward_pre_hook(lambda module, given: given[0] * masks[1])
    wanted = [torch.zeros(2, dtype=DOUBLE), torch.zeros(32, dtype=DOUBLE)]
    for batch in batches(data, 4, seed=0, epoch=0):
        loss = cap_min.task_loss(model.eval()(*cap_min.inputs(batch))[0], batch["labels"])
        for total, gradient in zip(wanted, torch.autograd.grad(loss, masks)):
            total += gradient.abs()
    assert torch.allclose(heads[1].double(), wanted[0], rtol=1e-4) and len(heads) == 2
    assert torch.allclose(neurons[1].double(), wanted[1], rtol=1e-4) and wanted[1].min() > 0
    for name, fake in (("processes", lambda: 2), ("own_part", lambda batch: batch),
                       ("gather", lambda rows, size: rows), ("summed", lambda grad: 6 * grad)):
        monkeypatch.setattr(cap_min, name, fake)
    again, _ = cap_min.importance(run, model, data, ancestors)
    assert torch.allclose(again[1], 3 * heads[1], rtol=1e-4)


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


def test_removed_units_compute_as_masked_ones(tmp_path):
    """The smaller model's logits are those of the masked one, also after a round trip through a
    file. Layer 0 keeps half of 4 * 16 * 16 weights in attention and none of 2 * 16 * 32; layer 1
    none and half: 1024 of 4096. What is gone counts as pruned."""
    masked, small = removed_units()
    batch = toy_batch()
    assert (small(*batch)[0] - masked(*batch)[0]).abs().max() < 1e-12
    report = sparsity_report(small)
    assert (report["weights"], report["kept"], report["total"]) == (4096, 1024, 0.75)
    assert report["matrices"]["bert.encoder.layer.0.attention.self.key.weight"] == 0.5
    save_pretrained(small, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config.layer_sizes == [[1, 0], [0, 16]]
    assert sum(p.numel() for p in loaded.bert.encoder.parameters() if p.ndim == 2) == 1024
    assert (loaded.eval()(*batch)[0] - masked(*batch)[0]).abs().max() < 1e-6


# ---------------------------------------------------------------- sparse inference


@pytest.mark.parametrize("batch", [toy_batch(), tuple(x[:1] for x in toy_batch())])
def test_sparse_forward_is_the_dense_one(batch, monkeypatch):
    """CSR matrices, feature-major activations and LayerNorm by columns give the same logits and
    pooled vectors, with padding, in both layers of which a tenth is left; a dense one is kept as
    it is, and so is the model that was given."""
    model = BertClassifier(TINY).double()
    for linear in encoder_linears(model).values():
        linear.weight.data *= topk_mask(linear.weight, 0.1)
        nn.init.normal_(linear.bias)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    sparse = bert_min.to_sparse(model)
    assert [type(layer) for layer in sparse.bert.encoder.layer] == [bert_min.SparseLayer] * 2
    for inputs in (batch, batch[:1]):
        for got, wanted in zip(sparse(*inputs), model.eval()(*inputs)):
            assert (got - wanted).abs().max() < 1e-12 and not got.requires_grad
    model.bert.encoder.layer[0].intermediate.dense.weight.data[:] = 1
    mixed = bert_min.to_sparse(model)
    assert [type(layer) for layer in mixed.bert.encoder.layer] == [Layer, bert_min.SparseLayer]
    assert (mixed(*batch)[0] - model(*batch)[0]).abs().max() < 1e-12
    kept = sum(int(linear.weight.count_nonzero())
               for name, linear in encoder_linears(model).items() if ".layer.1." in name)
    for share, kind in ((kept / 2048, bert_min.SparseLayer), (kept / 2048 - 1e-4, Layer)):
        monkeypatch.setattr(bert_min, "SPARSE_DENSITY", share)
        assert type(bert_min.to_sparse(model).bert.encoder.layer[1]) is kind
    monkeypatch.undo()
    masked, small = removed_units()
    assert (bert_min.to_sparse(small)(*batch)[0] - masked(*batch)[0]).abs().max() < 1e-12


# --------------------------------------------------------------------------- batches


def test_every_example_once_an_epoch_among_its_likes(vocab):
    """Batches are padded to their longest example. Lengths 1 ... 5 + 2 special ids, shuffled,
    fill 5 of 7 places on average; bucketed by length more than 95 %."""
    data = toy_data(vocab, 1000)
    seen, padded = [], 0
    for batch in batches(data, 20, seed=0):
        lengths = batch["attention_mask"].sum(1)
        padded += batch["attention_mask"].numel()
        assert batch["input_ids"].shape == (len(lengths), lengths.max())
        seen += batch["index"].tolist()
        for row, i in enumerate(batch["index"].tolist()):
            tokens = data.tokens[data.starts[i]:data.starts[i + 1]].tolist()
            assert batch["input_ids"][row, :lengths[row]].tolist() == tokens
            assert batch["labels"][row] == i % 2
    assert sorted(seen) == list(range(1000)) and len(data.tokens) / padded > 0.95


def test_position_in_the_data_is_epoch_and_batch(vocab):
    """(seed, epoch) decides the order, so the rest of an epoch can be had again."""
    data = toy_data(vocab, 50)
    order = [batch["index"].tolist() for batch in batches(data, 8, seed=3, epoch=2)]
    rest = [batch["index"].tolist() for batch in batches(data, 8, seed=3, epoch=2, start=4)]
    other = [batch["index"].tolist() for batch in batches(data, 8, seed=3, epoch=3)]
    assert rest == order[4:] and other != order and len(order) == math.ceil(50 / 8)


def test_segments_of_a_pair(vocab):
    """Segment 0 up to the first [SEP], 1 up to the second, 0 where there is padding."""
    examples = [Example("good film", "bad", 1), Example("a", "b", 0)]
    batch = encode_task(examples, WordPiece(vocab)).batch(tensor([0, 1], LONG))
    assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"] == 1)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]


# ------------------------------------------------------------------------ embeddings


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
# ------------------------------------------------------------------ contrastive loss

CASES = json.loads((HERE / "fixtures" / "contrastive_cases.json").read_text())["cases"]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_published_loss(case, listed):
    """Values and gradients that the published code gives for seeded inputs: K = 1 to 3 ancestors,
    in one tensor or a list of K, rows drawn again, several tau and weights. Eq. (4) to (7)."""
    bank = tensor(case["bank"])
    queries = tensor(case["queries"]).requires_grad_()
    index, labels = tensor(case["batch_index"], LONG), tensor(case["bank_labels"], LONG)
    unsup, sup = contrastive_loss(queries, index, labels[index],
                                  list(bank.unbind(1)) if listed else bank, labels,
                                  tensor(case["extra_index"], LONG), case["temperature"])
    total = case["w_unsup"] * unsup + case["w_sup"] * sup
    for name, value in (("unsup", unsup), ("sup", sup), ("total", total)):
        wanted = case["official"]
        gradient, = torch.autograd.grad(value, queries, retain_graph=True)
        assert value.item() == pytest.approx(wanted[name], abs=1e-9)
        assert (gradient - tensor(wanted[name + "_grad"])).abs().max() < 1e-9


# ----------------------------------------------------------------- layer, classifier


def test_layer_is_torch_transformer_encoder_layer():
    """torch's post-norm layer with gelu computes the same from the same weights; query, key and
    value lie there in one matrix, and its padding mask is True where ours is 0."""
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
    got = ours(x, real[:, None, None], x)
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
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert len(gradients) == len(list(ours.parameters()))
    for name, p in ours.named_parameters():
        assert (p.grad - gradients[name]).abs().max() < 1e-8, name


def test_configuration_round_trip(tmp_path):
    """config.json goes through ours and transformers' reader and back without loss."""
    config = BertConfig(hidden_size=24, num_attention_heads=3, id2label={0: "no", 1: "yes", 2: "x"},
                        num_labels=3, layer_norm_eps=1e-6)
    config.to_json(tmp_path / "config.json")
    assert BertConfig.from_json(tmp_path / "config.json") == config
    assert "layer_sizes" not in (tmp_path / "config.json").read_text()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.num_labels == 3 and theirs.hidden_size == 24 and theirs.layer_norm_eps == 1e-6
    theirs.save_pretrained(tmp_path)
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
        assert loaded.keys() == tensors.keys()
        for name, wanted in tensors.items():
            assert loaded[name].dtype == wanted.dtype and torch.equal(loaded[name], wanted)


# ------------------------------------------------------------------------- WordPiece

ODD_TEXTS = [
    "Good film, isn't it?", "naïve café ÀÉÎÕÜ Ǖ ẞß", "e\u0301e\u0300\u0323 \u1ec7 Å \u212b K",
    "中文good中文 \u3400\U00020000\uf900日本語カナ한국어", "İstanbul IJ DŽ ŁØ", "२३ ½ ² ① Ⅷ", "",
    "a\x00b\x07c\u200bd\ufeffe\u00ade\ufffdf", "a`b^c~d|e{e}e\\e", "##s ##",
    "tab\there\r\nand\u00a0there\u2003too\u3000.\u2028x\u2029y", "x" * 5000,
    "😀👩‍👩‍👧🏽 good🎬film ☃️", "good-bad_film@x.com #1 $2 £3 €4 «e» “e” … — ¿e? ،؛",
    "u" * 100 + " " + "u" * 101, "مرحبا بالعالم שָׁלוֹם Привет Ёж Ελληνικά",
]


def test_wordpiece_is_the_tokenizers_library(vocab, tmp_path):
    """The same ids and segments for texts with accents, ideographs, control characters, emoji and
    long words, alone and in pairs, whole and truncated. The vocabulary has every character."""
    tokenizers = pytest.importorskip("tokenizers")
    parts = sorted({char for text in ODD_TEXTS for char in "".join(WordPiece(vocab).words(text))})
    path = tmp_path / "vocab.txt"
    pieces = dict.fromkeys(PIECES + parts + ["##" + part for part in parts])
    path.write_text("\n".join(pieces), encoding="utf-8")
    ours, theirs = WordPiece(path), tokenizers.BertWordPieceTokenizer(str(path))
    for text_a, text_b in itertools.product(ODD_TEXTS, [None] + ODD_TEXTS[:8]):
        wanted = theirs.encode(text_a, text_b)
        assert ours.encode(text_a, text_b, max_length=20_000) == (wanted.ids, wanted.type_ids)
        theirs.enable_truncation(13)  # room for 10 pieces: ties over an odd one are cut otherwise
        wanted = theirs.encode(text_a, text_b) if text_b is not None else None
        theirs.no_truncation()
        assert wanted is None or ours.encode(text_a, text_b, 13) == (wanted.ids, wanted.type_ids)


