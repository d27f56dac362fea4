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
from cap_min import (Banks, MaskedLinear, StraightThrough, add_masks, apply_masks, cap_terms,
                     contrastive_loss, cubic_density, distillation_loss, encode, encoder_linears,
                     gradient_shares, linear_lr, main, set_masks, sparsity_report, topk_mask)
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
    linear = nn.Linear(4, 1)
    linear.weight.data = torch.tensor([[-3.0, 1.0, -1.0, 3.0]])
    wanted = torch.tensor([[3.0, 1.0, 1.0, 3.0]]) / math.sqrt(20 / 3)
    assert torch.allclose(MaskedLinear(linear, "magnitude").scores, wanted)
    assert MaskedLinear(linear, "zero").scores.tolist() == [[0, 0, 0, 0]]


def test_soft_masks_and_their_cut():
    """sigmoid of log(p / (1 - p)) is p. Of p = 0.05, 0.2 in one matrix and 0.5, 0.6, 0.09, 0.7 in
    another, 4 of 6 exceed 0.1; at threshold 0, where it begins, all do. A density of 1/3 keeps the
    2 largest of both matrices together; one of 5/6 adds the largest below the threshold, if it is
    to be exact. The penalty is the mean of 0.25 / 2 and 1.89 / 4."""
    model = nn.ModuleDict({"bert": nn.ModuleDict({"encoder": nn.ModuleList([
        MaskedLinear(nn.Linear(2, 1)), MaskedLinear(nn.Linear(2, 2))])})})
    first, second = model["bert"]["encoder"]
    first.scores.data = torch.logit(torch.tensor([[0.05, 0.2]]))
    second.scores.data = torch.logit(torch.tensor([[0.5, 0.6], [0.09, 0.7]]))
    for threshold, density, exact, over, wanted in (
            (0.0, 1, False, 1, [True] * 6),
            (0.1, 1, False, 4 / 6, [False, True, True, True, False, True]),
            (0.1, 1 / 3, False, 4 / 6, [False, False, False, True, False, True]),
            (0.1, 5 / 6, True, 4 / 6, [False, *[True] * 5])):
        assert cap_min.set_soft_masks(model, threshold, density, exact) == over
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
    names = [name for name in ("prc", "snc", "fic") if name not in without]
    banks = Banks(names, torch.device("cpu"))
    for name in names:
        for place in range(snapshots if name == "snc" else 1):
            banks.add(name, torch.tensor(rows), place)
    args = types.SimpleNamespace(w_ce=0.1, w_kd=0.9, w_unsup=0.5, w_sup=7.0, extra=2,
                                 temperature=0.1,
                                 kd_temperature=2.0, norm="official", without=list(without))
    labels = tensor([0, 1, 1, 0], LONG)
    batch = {"index": tensor([1], LONG), "labels": labels[1:2]}
    teacher_logits = torch.tensor([[0, 0], [2 * math.log(3), 0], [0, 0], [0, 0]])
    return (torch.zeros(1, 2), torch.tensor([[1.0, 0.5]], requires_grad=True), batch,
            teacher_logits, banks, labels, tensor([2, 0], LONG), args)


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
    and from any guess, the mask marks the first k of a stable descending sort, and the threshold
    parts them from the others. Eq. (1)."""
    torch.manual_seed(size)
    k = max(1, round(density * size))
    for scores in (torch.randn(size), torch.randint(0, 3, (size,)).float(),
                   (torch.arange(size) % 127).float(), torch.arange(size).double()):
        wanted = torch.zeros(size, dtype=torch.bool)
        wanted[scores.sort(descending=True, stable=True).indices[:k]] = True
        _, threshold = cap_min.topk(scores, density)
        assert k == size or threshold == scores[wanted].min()
        for guess in (None, threshold, scores[0].item(), -math.inf, math.inf, math.nan):
            mask, again = cap_min.topk(scores, density, guess)
            assert torch.equal(mask, wanted) and again == threshold
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            assert torch.equal(topk_mask(scores.to(device), density).cpu(), wanted)
        assert k == size or torch.equal(cap_min.topk_by_edge(scores, k), wanted)  # as on a GPU


@pytest.mark.parametrize("score_init", ["zero", None])
def test_masked_weights_get_no_gradient_and_stay_zero_in_the_export(score_init):
    """Adam's momentum revives a pruned weight (its gradient is 0, its step is not); the export
    is W * M all the same. So it is without scores, where |W| decides."""
    torch.manual_seed(0)
    model = add_masks(BertClassifier(TINY), score_init)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for density in (1.0, 0.1, 0.1):
        set_masks(model, density)
        optimizer.zero_grad()
        model(*toy_batch())[0].square().sum().backward()
        optimizer.step()
    for layer in encoder_linears(model).values():
        assert (layer.weight.grad[~layer.mask] == 0).all()
        assert (layer.weight[~layer.mask] != 0).any()
    batch = toy_batch()
    masked = model.eval()(*batch)[0]
    for layer in encoder_linears(apply_masks(model)).values():
        assert type(layer) is nn.Linear
        assert int((layer.weight != 0).sum()) == round(0.1 * layer.weight.numel())
    assert torch.equal(model(*batch)[0], masked)


def test_magnitude_pruning_keeps_the_largest_weights():
    """Without scores a quarter of |W| is kept, none of it smaller than what is pruned."""
    model = add_masks(BertClassifier(TINY), None)
    set_masks(model, 0.25)
    for layer in encoder_linears(model).values():
        size = layer.weight.detach().abs()
        assert layer.scores is None and int(layer.mask.sum()) == size.numel() // 4
        assert size[layer.mask].min() >= size[~layer.mask].max()


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
    """The W' of 12 matrices is made 12 times for all batches, is gone afterwards, also where one
    fails, and is made again by the next call, which so has the new masks."""
    torch.manual_seed(0)
    model, data, made = add_masks(BertClassifier(TINY), "magnitude"), toy_data(vocab), []
    original = MaskedLinear.masked_weight
    monkeypatch.setattr(MaskedLinear, "masked_weight", lambda self: [made.append(1),
                                                                     original(self)][1])
    dense = encode(model, data, tokens=17)
    assert len(made) == 12
    hook = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(model, data)
    hook.remove()
    assert {layer.product for layer in encoder_linears(model).values()} == {None}
    set_masks(model, 0.1)
    pruned = encode(model, data)
    assert len(made) == 36 and not torch.allclose(dense, pruned, atol=1e-4)
    assert torch.allclose(pruned, encode(apply_masks(model), data), atol=1e-6)


def test_banks_hold_unit_vectors_of_the_right_ancestor(vocab):
    """PrC is of the pre-trained model, FiC of the teacher, whose logits are its classifier's on
    the same pooled vectors; SnC grows by a snapshot at a time. MNLI's second dev set has scores
    of its own."""
    config = BertConfig(**{**vars(TINY), "num_labels": 3})
    model, teacher, data = BertClassifier(config), BertClassifier(config).eval(), toy_data(vocab)
    args = types.SimpleNamespace(without=[], epochs=3, compute_dtype=torch.float32, task="mnli",
                                 method="movement", sparsity=0.97)
    banks, logits = cap_min.first_banks(args, data, model, teacher)
    assert [name for name, _ in banks.items()] == ["prc", "fic"]
    snapshots = [torch.randn(10, 16), torch.randn(10, 16)]
    for place, pooled in [(0, snapshots[1]), (1, snapshots[0]), *enumerate(snapshots)]:
        banks.add("snc", pooled, place)  # in a later sitting the same place is filled again
    got = {name: torch.stack(bank, dim=1) for name, bank in banks.items()}
    assert [bank.size(1) for bank in got.values()] == [1, 2, 1]
    assert {vectors.dtype for vectors in got.values()} == {torch.float16}
    wanted = {"prc": [encode(model, data)], "fic": [encode(teacher, data)], "snc": snapshots}
    for name, pooled in wanted.items():
        unit = nn.functional.normalize(torch.stack(pooled, dim=1), dim=-1)
        assert torch.allclose(got[name].float(), unit, atol=1e-3)
    batch = data.batch(torch.arange(10))
    assert torch.allclose(logits, teacher(*cap_min.inputs(batch))[0], atol=1e-6)
    dev_sets = {"dev": data, "dev_mm": data.head(1)}
    assert set(cap_min.evaluate(model, args, dev_sets)) == {"accuracy", "accuracy_mm"}


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


def test_importance_is_the_gradient_of_a_mask(vocab, monkeypatch):
    """A mask m on neuron f acts as a factor on column f of the matrix that reads it, so dL/dm =
    sum_d W_df dL/dW_df; on a head, the same summed over its columns. Of 10 examples in batches of
    4 the absolute values of three such gradients are summed. Of two processes, each has twice the
    gradient of its share, so half the sum counts: if that is 6 times its own, 3 times."""
    model, data = BertClassifier(TINY).double(), toy_data(vocab)
    args = types.SimpleNamespace(batch_size=4, seed=0, compute_dtype=torch.float32)

    def loss_terms(logits, pooled, batch, chance):
        return {"ce": cap_min.task_loss(logits, batch["labels"])}

    heads, neurons = cap_min.importance(model, data, loss_terms, args)
    wanted = [torch.zeros(2, dtype=DOUBLE), torch.zeros(32, dtype=DOUBLE)]
    readers = [model.bert.encoder.layer[1].attention.output.dense,
               model.bert.encoder.layer[1].output.dense]
    for batch in batches(data, 4, seed=0, epoch=0):
        model.zero_grad()
        cap_min.task_loss(model.eval()(*cap_min.inputs(batch))[0], batch["labels"]).backward()
        for total, reader in zip(wanted, readers):
            per_column = (reader.weight.grad * reader.weight).sum(0)
            total += per_column.view(len(total), -1).sum(1).abs()
    assert torch.allclose(heads[1].double(), wanted[0], rtol=1e-4) and len(heads) == 2
    assert torch.allclose(neurons[1].double(), wanted[1], rtol=1e-4) and wanted[1].min() > 0
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, fake in (("processes", lambda: 2), ("share", lambda batch: batch),
                       ("gather", lambda rows, size: rows), ("summed", lambda grad: 6 * grad)):
        monkeypatch.setattr(cap_min, name, fake)
    again, _ = cap_min.importance(model, data, loss_terms, args)
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


# =============================================================== part 4: behaviour
# ------------------------------------------------------------------------ run folder


def command(pretrained, glue, out, *more):
    return ["--task", "sst2", "--sparsity", "0.9", "--model", str(pretrained), "--data-dir",
            str(glue), "--out", str(out), "--epochs", "3", "--batch-size", "8", "--max-length",
            "16", "--device", "cpu", "--dtype", "fp32", "--lr", "3e-3", *more]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pretrained, glue):
    """The folder of a finished run of all terms on the tiny model."""
    out = tmp_path_factory.mktemp("runs") / "cap"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cap_min, "LOG_EVERY", 1)
        assert main(command(pretrained, glue, out)) == 0
    return out


def test_run_folder(finished):
    """It holds the model, its teacher, the record with its keys, the log and a curve in XML."""
    assert {path.name for path in finished.iterdir()} == {
        "teacher", "model", "record.json", "log.jsonl", "curve.svg"}
    record = json.loads((finished / "record.json").read_text())
    assert set(record) == {
        "config", "seed", "versions", "source_sha256", "train_sha256", "examples", "dense",
        "pruned", "sparsity", "density", "seconds", "examples_per_second", "peak_memory_bytes"}
    assert record["examples"] == {"train": 320, "dev": 40} and record["dense"]["accuracy"] == 1
    assert set(record["seconds"]) == {"teacher", "banks", "prune", "total"}
    assert record["config"]["score_init"] == "magnitude"  # auto: a short run
    xml.dom.minidom.parse(str(finished / "curve.svg"))


def test_curve_of_a_score_below_0(tmp_path):
    """0 is drawn at the height 260, 1 at 40; Matthews' -0.1 stays on the axis."""
    lines = [{"phase": "prune", "step": step, "kept": 1, "dev": {"matthews": value}}
             for step, value in ((1, -0.1), (2, 0.5))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cap_min.draw_curve(tmp_path, {"matthews": 1.0})
    assert 'points="310.0,260.0 560.0,150.0"' in (tmp_path / "curve.svg").read_text()


def test_log_tells_each_term_and_its_share(finished):
    """Every step of the pruning phase has the terms, which sum to the loss, and their gradient
    shares; SnC comes with the second epoch; every epoch has its dev score. Of 3 * 320 / 8 = 120
    steps round(0.09 * 120) = 11 are warm-up, the first 22 keep all, the last 33 a tenth."""
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("phase") == "prune" and "loss" in line]
    assert [line["step"] for line in steps] == list(range(120))
    for line in steps:
        names = {"ce", "kd", "prc", "fic"} | ({"snc"} if line["epoch"] else set())
        assert set(line["gradient_share"]) == names
        assert sum(line[name] for name in names) == pytest.approx(line["loss"])
    assert [line["epoch"] for line in lines if "dev" in line] == [0, 1, 2]
    assert [line["kept"] for line in steps[:23]] == [1] * 23 and steps[23]["kept"] < 1
    assert [line["kept"] for line in steps[-33:]] == pytest.approx([0.1] * 33)
    assert steps[-34]["kept"] > 0.1 and max(line["lr"] for line in steps) == steps[11]["lr"] == 3e-3


def test_gradient_shares_in_bf16(vocab):
    """The loss reads an fp32 copy of the pooled vectors, the classifier the vectors themselves: the
    share is of the gradient that reaches both."""
    args, lines = cap_min.parse(["--task", "sst2"]), []
    args.compute_dtype = torch.bfloat16
    cap_min.train(BertClassifier(TINY), toy_data(vocab), lambda logits, pooled, batch, chance: {
        "ce": cap_min.task_loss(logits, batch["labels"]), "prc": 1e-3 * pooled.sum()},
        args, lines.append, epochs=1)
    assert min(lines[0]["gradient_share"].values()) > 0


def test_recipe():
    """The defaults are those of the paper's MNLI: 10 epochs of 392,702 rows in batches of 32 are
    122,720 steps, scores from 0; below 30,000 steps from the magnitude. Weights and scores have
    a learning rate each; the encoder's matrices have scores, the embeddings are frozen. There are
    at most 30 flags."""
    args = cap_min.parse(["--task", "mnli"])
    assert len(vars(args)) - 1 <= 30  # all but kd_temperature are flags
    assert (args.kd_temperature, args.penalty) == (2, 680)
    stages = cap_min.parse(["--task", "mnli", "--method", "structured", "--w-sup", "4"])
    assert (stages.sparsity, stages.epochs, stages.batch_size, stages.lr, stages.w_unsup,
            stages.w_sup, stages.kd_temperature) == (0.9, 2, 16, 2e-5, 0.3, 4, 1)
    stages = cap_min.parse(["--method", "structured"])
    assert (stages.epochs, stages.batch_size, stages.lr) == (2, 32, 1e-3)
    demo = cap_min.parse(["--epochs", "3"])  # the demo has a model and defaults of its own
    assert (demo.task, demo.epochs, demo.max_length, demo.lr) == ("demo", 3, 32, 1e-3)
    assert cap_min.run_config(demo)["model"] == "demo/model"
    for rows, start in ((392_702, "zero"), (96_000, "zero"), (95_968, "magnitude")):
        args.score_init = "auto"
        cap_min.check_schedule(args, rows)
        assert args.score_init == start
    model = add_masks(BertClassifier(TINY), "zero")
    optimizer, _ = cap_min.make_optimizer(model, args, total=100)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [3e-5, 1e-2]
    assert len(optimizer.param_groups[1]["params"]) == 12
    for name, p in model.named_parameters():
        assert p.requires_grad != ("embeddings" in name)
        assert "encoder.layer" in name or not name.endswith("scores")


def test_export_has_exactly_k_weights_and_is_transformers(finished, vocab, glue):
    """In the file, each matrix has exactly round(0.1 * numel) weights that are not 0; transformers
    loads it, gives our logits, and its accuracy is the record's."""
    stored = load_safetensors(finished / "model" / "model.safetensors")
    record = json.loads((finished / "record.json").read_text())
    assert len(record["sparsity"]["matrices"]) == 12
    for name, sparsity in record["sparsity"]["matrices"].items():
        zeros = stored[name].numel() - round(0.1 * stored[name].numel())
        assert int((stored[name] == 0).sum()) == zeros == round(sparsity * stored[name].numel())
    data = encode_task(load("sst2", "dev", glue), WordPiece(vocab), 16)
    batch = data.batch(torch.arange(len(data)))
    names = ("input_ids", "attention_mask", "token_type_ids")
    for folder, key in (("teacher", "dense"), ("model", "pruned")):
        ours = from_pretrained(finished / folder).eval()(*cap_min.inputs(batch))[0]
        theirs = in_transformers(finished / folder)
        wanted = theirs(**{name: batch[name] for name in names}).logits
        assert (ours - wanted).abs().max() < 1e-5
        accuracy = (wanted.argmax(1) == data.labels).float().mean().item()
        assert accuracy == pytest.approx(record[key]["accuracy"])
    assert theirs.config.id2label == {0: "negative", 1: "positive"}


def test_run_is_reproducible_and_finished_only_once(finished, pretrained, glue, tmp_path, capsys):
    """Another folder, the same command, the teacher of the first run: the same weights to the
    last bit. Of 2 * (4 * 256 + 2 * 512) weights 2 * (4 * 26 + 2 * 51) are left, says the summary.
    The command again does nothing; with another option it is refused."""
    again = tmp_path / "again"
    assert main(command(pretrained, glue, again, "--teacher", str(finished / "teacher"))) == 0
    assert "     4,096       412  weights in the encoder" in capsys.readouterr().out
    first, second = (run / "model" / "model.safetensors" for run in (finished, again))
    assert first.read_bytes() == second.read_bytes()
    before = (finished / "record.json").stat().st_mtime_ns
    assert main(command(pretrained, glue, finished)) == 0
    assert "finished" in capsys.readouterr().out
    assert main(command(pretrained, glue, finished, "--lr", "2e-3")) == 2
    assert "lr differ" in capsys.readouterr().err
    assert (finished / "record.json").stat().st_mtime_ns == before


SITTINGS = """if True:
    import glob, json, os, socket, sys, threading, time, cap_min

    cap_min.LOG_EVERY, calls = 1, {"save": 0, "randomness": 0}

    def counted(owner, name):
        def count(*given, original=getattr(owner, name)):
            calls[name] += 1
            return original(*given)
        setattr(owner, name, count)

    counted(cap_min.Checkpoints, "save")
    counted(cap_min, "randomness")

    def stop(place, seconds, signal_number):
        while not glob.glob(place[1]) if place[0] == "file" else calls[place[0]] < place[1]:
            time.sleep(0.0001)
        time.sleep(seconds)
        os.kill(os.getpid(), signal_number)

    print("ready", flush=True)
    for line in sys.stdin:
        options, place, seconds, signal_number, processes = json.loads(line)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(processes):
            children.append(os.fork())
            if children[-1] == 0:  # as torchrun would have it
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK":
                               str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if signal_number:
                    threading.Thread(target=stop, args=(place, seconds, signal_number)).start()
                os._exit(cap_min.main(options))
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children],
              flush=True)
"""


@pytest.fixture(scope="session")
def sitting():
    """sitting(options, place, seconds, signal, processes): exit statuses of cap_min.py in processes
    of their own. If there is a signal, it comes so many seconds after a place in the run: ("file",
    path), ("save", so many states were saved) or ("randomness", so many steps were begun)."""
    process = subprocess.Popen([sys.executable, "-c", SITTINGS], cwd=HERE, text=True, bufsize=1,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})

    def sitting(options, place=None, seconds=0, number=0, processes=1):
        process.stdin.write(json.dumps([options, place, seconds, number, processes]) + "\n")
        return json.loads(process.stdout.readline())

    assert process.stdout.readline() == "ready\n"
    yield sitting
    process.kill()


def log_of(run):
    """The lines of a run's log but for its configuration and times."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines()[1:])
    return [{key: value for key, value in line.items()
             if key not in ("ms", "examples_per_second")} for line in lines]


@pytest.mark.parametrize("method", ["movement", "soft", "structured"])
def test_killed_at_any_moment_the_run_ends_the_same(method, pretrained, glue, tmp_path, sitting):
    """Stopped six times, then finished: the weights are those of a run without a stop, to the last
    bit, and the log is the same but for times. What is needed to go on is gone in the end. The
    stops are in the teacher's 39 steps, in the encoding of the banks, three times in the 39 steps
    of the pruning, and in the export; each at a random moment up to 20 ms after a save began (every
    step has one), or 5 ms after a file is there. One is SIGTERM, the others SIGKILL."""
    options = ["--method", method, "--checkpoint-minutes", "0", "--max-train", "100"]
    if method == "structured":
        options += ["--sparsity", "0.25", "--epochs", "1"]
    assert sitting(command(pretrained, glue, tmp_path / "whole", *options)) == [0]
    cut, chance = command(pretrained, glue, tmp_path / "cut", *options), random.Random(1)
    exports = [("file", str(tmp_path / "cut" / name)) for name in
               ("teacher/model.safetensors", "model/vocab.txt")]
    steps = "save", 12
    for number, place in ((signal.SIGKILL, steps), (signal.SIGKILL, exports[0]),
                          (signal.SIGKILL, steps), (signal.SIGTERM, steps),
                          (signal.SIGKILL, steps), (signal.SIGKILL, exports[1])):
        longest = 0.02 if place == steps else 0.005
        stopped = sitting(cut, place, chance.uniform(0, longest), number)
        assert stopped == [130 if number == signal.SIGTERM else -signal.SIGKILL]
    assert sitting(cut) == [0] and not (tmp_path / "cut" / "checkpoint").exists()
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    first, second = (json.loads((tmp_path / run / "record.json").read_text())
                     for run in ("whole", "cut"))
    for key in ("dense", "pruned", "density", "sparsity"):
        assert first[key] == second[key]
    for folder in ("teacher", "model"):
        first, second = (tmp_path / run / folder / "model.safetensors" for run in ("whole", "cut"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("options", [
    ["--epochs", "4"], ["--method", "soft", "--epochs", "1"],
    ["--method", "structured", "--epochs", "1", "--sparsity", "0.15"]])
def test_two_processes_train_as_one(options, finished, pretrained, glue, tmp_path, sitting):
    """Without dropout the weights are the same but for rounding, with CAP-m after 52 steps; of the
    13 of each epoch the last has one example, and so none for the second process. A run that two
    began, and were told to stop in its twentieth step, one can end."""
    settings = json.loads((pretrained / "config.json").read_text())
    model = shutil.copytree(pretrained, tmp_path / "model")
    (model / "config.json").write_text(json.dumps(
        settings | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}))
    options += ["--teacher", str(finished / "teacher"), "--max-train", "97", "--lr", "3e-4"]
    one, two, both = (command(model, glue, tmp_path / name, *options)
                      for name in ("one", "two", "both"))
    assert sitting(one) == [0] and sitting(two, processes=2) == [0, 0]
    if "4" in options:
        stopped = sitting(both, ("randomness", 20), 0, signal.SIGTERM, processes=2)
        assert stopped == [130, 130] and sitting(both) == [0]
    wanted = load_safetensors(tmp_path / "one" / "model" / "model.safetensors")
    for path in tmp_path.glob("[tb]*/model/model.safetensors"):
        torch.testing.assert_close(load_safetensors(path), wanted, atol=1e-6, rtol=0)
    logs = [[line["gradient_share"] for line in log_of(tmp_path / name) if "loss" in line]
            for name in ("one", "two")]
    for first, second in zip(*logs, strict=True):
        assert first == pytest.approx(second, abs=2e-3)  # they are rounded to 1e-4


def test_one_process_fills_the_caches(monkeypatch):
    """Process 0 waits for the others after its turn, they for it before theirs."""
    order = []
    monkeypatch.setattr(cap_min, "wait_for_all", lambda: order.append("meet"))
    for rank in (0, 1):
        monkeypatch.setattr(cap_min, "rank", lambda: rank)
        with cap_min.process_0_first():
            order.append(rank)
    assert order == [0, "meet", "meet", 1]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_two_gpus(pretrained, glue, tmp_path, sitting):
    """By nccl, with what is exchanged on the CPU by gloo."""
    options = command(pretrained, glue, tmp_path, "--device", "cuda")
    assert sitting(options, processes=2) == [0, 0]
    assert json.loads((tmp_path / "record.json").read_text())["dense"]["accuracy"] == 1


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_several_processes_do_not_share_a_gpu(device, monkeypatch):
    monkeypatch.setattr(cap_min, "processes", lambda: 2)
    with pytest.raises(ValueError, match=f"--device {device} cannot be used by several processes"):
        cap_min.choose_device(cap_min.parse(["--device", device]))


@pytest.mark.parametrize("number, place, first, last", [
    (signal.SIGINT, ("randomness", 39 + 5), 5, 12),
    (signal.SIGTERM, ("file", "checkpoint/snc-0.*"), 13, 38)])
def test_a_polite_stop_loses_nothing(number, place, first, last, pretrained, glue, tmp_path,
                                     sitting):
    """Teacher and model have 3 epochs of 13 steps. Told to stop in the fifth step of the pruning,
    or in the snapshot after the first epoch, the run saves where it is, although ten minutes are
    not over."""
    options, place = command(pretrained, glue, tmp_path, "--max-train", "97"), list(place)
    if place[0] == "file":
        place[1] = str(tmp_path / place[1])
    assert sitting(options, place, 0, number) == [130]
    args = cap_min.parse(options)
    cap_min.choose_device(args)
    state = cap_min.Checkpoints(tmp_path, cap_min.run_config(args), 10).newest()[0]
    assert first <= state["epoch"] * 13 + state["batches"] <= last


def test_what_is_random_is_a_function_of_its_place(monkeypatch):
    """Seed, epoch and batch each change it; the number of the process only torch's part."""
    def drawn(*place):
        return cap_min.randomness(*place).random(), torch.rand(1).item()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({number for place in places for number in drawn(*place)}) == 8
    first = drawn(0, 0, 0)
    assert drawn(0, 0, 0) == first
    monkeypatch.setattr(cap_min, "rank", lambda: 1)
    assert drawn(0, 0, 0)[0] == first[0] and drawn(0, 0, 0)[1] != first[1]


def test_damaged_checkpoints_are_not_used(pretrained, glue, tmp_path, sitting, capsys):
    """Of the two states that a kill left, the newest is used; cut short, the one before; after one
    bit of a bank is turned, none, and none of another run. The run goes on from the one before."""
    out = tmp_path / "run"
    options = command(pretrained, glue, out, "--checkpoint-minutes", "0")
    snapshot = "file", str(out / "checkpoint" / "snc-1.*")
    assert sitting(options, snapshot, 0, signal.SIGKILL) == [-9]
    args = cap_min.parse(options)
    cap_min.choose_device(args)

    def newest(**others):
        return cap_min.Checkpoints(out, cap_min.run_config(args) | others, 1).newest()

    def position():
        return newest()[0]["epoch"] * 40 + newest()[0]["batches"]

    whole = position()
    assert 80 <= whole and len(list(out.glob("checkpoint/state-*"))) == 2
    state = max(out.glob("checkpoint/state-*"))
    state.write_bytes(state.read_bytes()[:-1])
    assert position() == whole - 1 and f"{state} is damaged" in capsys.readouterr().out
    bank = next(out.glob("checkpoint/prc-0.*"))
    content = bank.read_bytes()
    bank.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
    assert newest() == (None, {}, None)
    bank.write_bytes(content)
    assert newest(lr=1.0) == (None, {}, None) and position() == whole - 1
    steps = len(log_of(out))
    assert sitting(options) == [0] and len(log_of(out)) > steps


def test_a_stopped_run_goes_on_with_its_own_rows_only(pretrained, glue, tmp_path, sitting, capsys):
    """One label of 320 is changed after a kill: refused, until it is changed back."""
    folder = shutil.copytree(glue, tmp_path / "glue")
    options = command(pretrained, folder, tmp_path / "run", "--checkpoint-minutes", "0")
    assert sitting(options, ("save", 12), 0, signal.SIGKILL) == [-9]
    train = folder / "SST-2" / "train.tsv"
    text = train.read_text()
    train.write_text(text[:-2] + "0\n")
    assert text[-2] == "1" and main(options) == 2
    assert f"error: {tmp_path}/run was begun with other training rows" in capsys.readouterr().err
    train.write_text(text)
    assert main(options) == 0 and "goes on where it was: teacher" in capsys.readouterr().out


def test_a_number_that_is_not_finite_is_never_saved(vocab, tmp_path, monkeypatch):
    """The third loss is not a number: two steps are behind the newest state. A gradient that is
    none, of sqrt(x) at 0, is seen in the weights."""
    monkeypatch.setattr(cap_min, "LOG_EVERY", 1)
    args, model = cap_min.parse(["--task", "sst2", "--batch-size", "2"]), BertClassifier(TINY)
    args.compute_dtype = torch.float32
    (tmp_path / "log.jsonl").touch()
    checkpoints, values = cap_min.Checkpoints(tmp_path, {}, 0), iter([1, 1, math.nan])
    with pytest.raises(ValueError, match="^kd is not finite at step 2: try a smaller --lr; what"):
        cap_min.train(model, toy_data(vocab), lambda logits, pooled, batch, chance: {
            "ce": pooled.sum(), "kd": pooled.sum() * next(values)}, args, print, epochs=1,
            checkpoints=checkpoints)
    saved = checkpoints.newest()[0]
    assert saved["batches"] == 2 and torch.equal(saved["model"]["classifier.bias"],
                                                 model.classifier.bias)
    with pytest.raises(ValueError, match="embeddings.weight is not finite at step 0"):
        cap_min.train(model, toy_data(vocab), lambda logits, pooled, batch, chance: {
            "ce": (0 * pooled.sum()).sqrt()}, args, print, epochs=1, checkpoints=checkpoints)
    assert checkpoints.newest()[0]["batches"] == 2


def test_compare_runs_everything_once(pretrained, glue, tmp_path, capsys):
    """7 runs with 7 different models and one teacher. Run again, nothing is done but the table."""
    options = command(pretrained, glue, tmp_path, "--compare", "--max-train", "88")
    assert main(options) == 0
    for name, (method, without) in cap_min.COMPARED.items():
        config = json.loads((tmp_path / f"{name}-seed0" / "record.json").read_text())["config"]
        assert (config["method"], config["without"]) == (method, without)
    models = {path.read_bytes() for path in tmp_path.glob("*/model/model.safetensors")}
    assert len(models) == 7 and len(list(tmp_path.glob("*/teacher"))) == 1
    capsys.readouterr()
    assert main(options) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "compare.md").read_text() in out and "step" not in out


def test_regression_and_pairs(pretrained, tmp_path):
    """STS-B: one output, squared errors, Pearson and Spearman; the label is one column of ten.
    Without the three contrastive terms it is movement pruning with distillation."""
    (tmp_path / "STS-B").mkdir()
    header = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    rows = [f"{i}\t.\t.\t.\t.\t.\t.\tgood film\t{'good ' * (i % 5)}\t{i % 5}" for i in range(48)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "STS-B" / name).write_text("\n".join([header.replace(" ", "\t"), *rows]))
    options = command(pretrained, tmp_path, tmp_path / "run")
    options[1] = "stsb"
    assert main([*options, "--lr", "1e-3", "--without", "snc", "prc", "fic"]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert set(record["pruned"]) == {"pearson", "spearman"}
    assert record["dense"]["pearson"] > 0.5  # the number of words decides, and can be learnt
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert set(json.loads(log[-2])["gradient_share"]) == {"ce", "kd"}


@pytest.fixture
def banked(monkeypatch):
    """Names of the banks to which a run adds an ancestor, in its order."""
    names, add = [], Banks.add
    monkeypatch.setattr(Banks, "add", lambda banks, name, *rest: names.append(name)
                        or add(banks, name, *rest))
    return names


def test_soft_run(pretrained, glue, tmp_path, monkeypatch, banked):
    """The penalty is lambda(t) mean sigmoid(S), where lambda(t) grows with the threshold: 0 in the
    22 dense steps of 120, then 5000 (1 - (1 - 1/65)^3), and 5000 from step 87 on; the mean is
    0.68 at the start, where S = |W| / std(W), and falls. From step 87 on exactly k of all 4096
    weights are left; before, at most d(t). Eq. (8)."""
    monkeypatch.setattr(cap_min, "LOG_EVERY", 1)
    out, set_soft_masks, given = tmp_path / "soft", cap_min.set_soft_masks, []
    monkeypatch.setattr(cap_min, "set_soft_masks", lambda model, *arguments: given.append(arguments)
                        or set_soft_masks(model, *arguments))
    assert main(command(pretrained, glue, out, "--method", "soft", "--penalty", "5000",
                        "--mask-lr", "0.1")) == 0
    record = json.loads((out / "record.json").read_text())
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in steps if line.get("phase") == "prune" and "l1" in line}
    assert [steps[i]["l1"] for i in range(23)] == [0] * 23
    assert steps[23]["l1"] / (1 - (1 - 1 / 65) ** 3) / 5000 == pytest.approx(0.68, abs=0.03)
    assert 0.68 > steps[86]["l1"] / 5000 > steps[119]["l1"] / 5000 > 0
    assert min(steps[i]["kept"] for i in range(87)) < 0.1 and steps[87]["kept"] == 1 - 0.9
    assert record["density"]["before_cut"] < 0.1
    assert banked == ["fic", "prc", "snc", "snc"]  # none after the last of 3 epochs
    assert given[22] == (0, 1, False) and given[87] == (0.1, 1 - 0.9, True) == given[119]
    assert given[30][:2] == pytest.approx((0.1 * (1 - (1 - 8 / 65) ** 3),
                                           0.1 + 0.9 * (1 - 8 / 65) ** 3))
    assert record["sparsity"]["kept"] == round(0.1 * 4096)
    assert record["density"]["after_cut"] == pytest.approx(0.1, abs=1e-3)


def test_structured_run(pretrained, glue, tmp_path, monkeypatch, banked):
    """At 25 %, floor(0.75 * 4) = 3 of 4 heads and 48 of 64 neurons are left after the stages of 10
    and 20 %: 3 stages of 2 epochs of 27 batches, each with batches of its own. The files are that
    much smaller, the record counts what is gone, the embeddings are as they were, and the stages
    before the last are snapshots."""
    out, seen = tmp_path / "structured", []
    monkeypatch.setattr(cap_min, "batches", lambda *arguments: seen.append(arguments[3])
                        or batches(*arguments))
    options = ("--method", "structured", "--sparsity", "0.25", "--epochs", "2")
    assert main(command(pretrained, glue, out, *options, "--batch-size", "12")) == 0
    assert banked == ["fic", "prc", "snc", "snc"]
    assert seen == [0, 1, 2, 0, 0, 1, 0, 2, 3, 0, 4, 5]  # teacher; importance and 2 epochs, thrice
    record = json.loads((out / "record.json").read_text())
    assert record["sparsity"]["total"] == 0.25 == 1 - record["density"]["after_cut"]
    model = from_pretrained(out / "model", None)
    assert [sum(sizes) for sizes in zip(*model.config.layer_sizes)] == [3, 48]
    assert sum(layer.weight.numel() for layer in encoder_linears(model).values()) == 0.75 * 4096
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    stages = [line for line in lines if line.get("phase") == "prune" and "dev" in line]
    assert [line["step"] for line in stages] == [26, 53, 80, 107, 134, 161]
    assert [line["epoch"] for line in stages] == [0, 1, 2, 3, 4, 5]
    assert stages[0]["kept"] > stages[2]["kept"] > stages[4]["kept"] == 0.75
    assert record["examples_per_second"]["prune"] == pytest.approx(
        6 * 320 / record["seconds"]["prune"], rel=0.05)
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[name], from_pretrained(pretrained, 2).state_dict()[name])


def test_probe(finished, pretrained, glue, tmp_path, capsys, monkeypatch):
    """A linear classifier on frozen pooled vectors of each encoder, found from the current
    directory or another one; its loss, cross-entropy and 1e-4 |W|^2, is at its minimum: the
    gradient is 0. Only a finished run can be probed."""
    folders = []
    monkeypatch.setattr(cap_min, "from_pretrained", lambda folder, *labels: folders.append(
        Path(folder).resolve()) or from_pretrained(folder, *labels))
    monkeypatch.chdir(tmp_path)
    assert main(command(pretrained, glue, tmp_path, "--probe", str(finished))) == 0
    assert folders == [finished / "model", finished / "teacher", pretrained]
    record = json.loads((finished / "probe_sst2.json").read_text())
    assert record["dense"]["accuracy"] == 1 and record["examples"]["train"] == 320
    assert 0.4 <= record["pretrained"]["accuracy"] < 1 and "accuracy" in record["pruned"]
    (finished / "probe_sst2.json").unlink()
    model, data = from_pretrained(pretrained, 2), encode_task(
        load("sst2", "train", glue), WordPiece(pretrained / "vocab.txt"), 16)
    before = copy.deepcopy(model.bert.state_dict())
    cap_min.fit_classifier(model, data)
    found = model.classifier.weight.detach().clone()
    nn.init.normal_(model.classifier.weight)
    cap_min.fit_classifier(model, data)
    assert torch.equal(model.classifier.weight, found)
    dev_sets = {"dev": encode_task(load("sst2", "dev", glue), WordPiece(pretrained / "vocab.txt"),
                                   16)}
    assert cap_min.evaluate(model, cap_min.parse(["--task", "sst2"]), dev_sets) == record[
        "pretrained"]
    loss = cap_min.task_loss(model.classifier(encode(model, data)), data.labels)
    loss = loss + 1e-4 * model.classifier.weight.square().sum()
    assert all(grad.abs().max() < 1e-5
               for grad in torch.autograd.grad(loss, list(model.classifier.parameters())))
    assert all(torch.equal(before[name], p) for name, p in model.bert.state_dict().items())
    assert main(command(pretrained, glue, tmp_path, "--probe", str(pretrained))) == 2
    assert "is no finished run with a record.json" in capsys.readouterr().err
    record = json.loads((finished / "record.json").read_text())
    record["config"]["model"] = "gone"
    (tmp_path / "record.json").write_text(json.dumps(record))
    shutil.copytree(finished / "model", tmp_path / "model")
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    assert main(command(pretrained, glue, tmp_path, "--probe", str(tmp_path))) == 2
    out, error = capsys.readouterr()
    assert "gone: no such folder" in error and "dev:" not in out  # before any work


def test_step_line_fits_in_120_columns(capsys):
    """On MNLI at full length. 366,000 s since the last line are 3 s a step and 32 / 3 = 11 ex/s;
    at 1,800 s for 122,000 steps the 720 left take 10 s."""
    progress = cap_min.Progress(122_720, 32, torch.device("cpu"))
    values = dict.fromkeys(("ce", "kd", "prc", "snc", "fic"), 9.87654) | {"l1": 680.4}
    progress.start -= 1800
    progress.last_time -= 3 * 122_000
    progress.show(121_999, 0.123456, values, 2.9e-5)
    _, line = capsys.readouterr().out.splitlines()
    assert len(line) <= 120
    assert re.fullmatch(r"122000/122720 \| 12.3% \| 729.78 = ce 9.88 kd 9.88 prc 9.88 snc 9.88 "
                        r"fic 9.88 l1 680 \| 2.9e-05 \| 3000, 11, \d+\.\d \| 0:00:10", line)


# ------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("density", [0.03, 0.5])
def test_mask_on_a_gpu_is_that_of_the_cpu(density):
    """Of equal scores the first by index, there too."""
    scores = torch.randint(50, (64, 96)).float()
    assert torch.equal(topk_mask(scores.cuda(), density).cpu(), topk_mask(scores, density))


@pytest.mark.cuda
def test_model_on_a_gpu_is_that_of_the_cpu(vocab):
    """In fp32 pooled vectors differ by rounding, in bf16 by its 8 bits; padding included."""
    model, data = BertClassifier(TINY).eval(), toy_data(vocab)
    wanted, model = encode(model, data), model.cuda()
    assert torch.allclose(encode(model, data).cpu(), wanted, atol=1e-5)
    assert torch.allclose(encode(model, data, torch.bfloat16).cpu(), wanted, atol=3e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["movement", "soft", "magnitude", "structured"])
def test_run_on_a_gpu(method, pretrained, glue, tmp_path, sitting):
    """In bf16, stopped after the first snapshot and ended by the same command: the teacher learns
    the task, the file is as sparse as was asked for, and scores the same on the CPU."""
    options = command(pretrained, glue, tmp_path, "--device", "cuda", "--dtype", "bf16",
                      "--method", method, "--sparsity", "0.5")
    snapshot = "file", str(tmp_path / "checkpoint" / "snc-0.*")
    assert sitting(options, snapshot, 0, signal.SIGTERM) == [130]
    assert sitting(options) == [0]
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["dense"]["accuracy"] == 1 and "cuda" in record["versions"]["machine"]
    assert record["sparsity"]["total"] >= 0.499
    dev = {"dev": encode_task(load("sst2", "dev", glue), WordPiece(pretrained / "vocab.txt"), 16)}
    found = cap_min.evaluate(from_pretrained(tmp_path / "model"), cap_min.parse(options), dev)
    assert found == record["pruned"]


# ---------------------------------------------------------------------- command line


def test_the_cpu_is_tuned(monkeypatch):
    """1e-39 lies below the smallest normal number, 1.2e-38: half of it, 5e-40, counts as 0. oneDNN
    is told to keep 16,384 products, unless it has been told how many."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    torch.set_flush_denormal(False)
    cap_min.tune_cpu()
    assert (torch.tensor([1e-39]) / 2).item() == 0 and os.environ[name] == "16384"
    monkeypatch.setenv(name, "7")
    cap_min.tune_cpu()
    assert os.environ[name] == "7"


@pytest.mark.parametrize("options, sentence", [
    (["--task", "mnlii"], "invalid choice: 'mnlii'"),
    (["--compare", "--without", "prc"], "--compare sets --method and --without itself"),
    (["--sparsity", "97"], "--sparsity: 97 is not in [0, 1)"),
    (["--sparsity", "nan"], "not in [0, 1)"),
    (["--sparsity", "1.0"], "1.0 is not in [0, 1)"),
    (["--epochs", "9" * 30], "is not in [1, 2147483648)"),
    (["--epochs", "9" * 5000], "invalid int value: '999"),
    (["--task", "a\x1bb\nc"], "invalid choice: 'a"),
    (["a\x1bb\nc"], "unrecognized arguments: a?b"),
    (["--epochs", "0"], "0 is not in [1, 2147483648)"),
    (["--seed", "-1"], "-1 is not in [0, 4294967296)"),
    (["--w-sup", "nan"], "--w-sup: nan is not in"),
    (["--temperature", "cold"], "invalid float value: 'cold'"),
    (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
    (["--model", "nowhere"], "nowhere: no such folder"),
    (["--data-dir", "nowhere"], "nowhere/SST-2/train.tsv"),
    (["--max-length", "33"], "the model's 32 positions"),
    (["--epochs", "1", "--batch-size", "80"], "4 steps with --warmup 0.09 have no room"),
    (["--warmup", "0.197"], "120 steps with --warmup 0.197 have no room"),
    (["--teacher", "nowhere"], "nowhere: no such folder"),
])
def test_bad_arguments_end_in_one_sentence(options, sentence, pretrained, glue, tmp_path, capsys):
    """Exit status 2, one line on stderr, and no run folder has been made."""
    assert main(command(pretrained, glue, tmp_path / "run", *options)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("error: ")
    assert len(error) < 600 and error[:-1].isprintable()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, sentence", [
    (b"sentence\tlabel\ngood\t1\nbad\t2\n", "train.tsv, line 3: label '2', not one of 0, 1"),
    (b"sentence\tlabels\ngood\t1\n", "line 1: no column 'label', only ['sentence', 'labels']"),
    (b"sentence\tlabel\ngood 1\n", "line 2: only 1 columns"),
    (b"sentence\tlabel\n", "no examples"),
    (b"", "line 1: no column 'sentence', only []"),
    (b"\n\nlabel\n", "line 3: no column 'sentence', only ['label']"),
    (b"sentence\tlabel\ngood\t1\n\xff\xfe\t1\n", "line 3: not valid UTF-8"),
    (b"sentence\tlabel\rgood\t1\r", r"no column 'label', only ['sentence', 'label\rgood', '1']"),
    (b"sentence\tlabel\ngood\t" + b"1" * 9000, f"line 2: label '{'1' * 50}', not one of 0, 1"),
    (b"x" * 9000, "line 1: no column 'sentence', only ['xxx"),
])
def test_bad_data_is_named_by_file_and_line(text, sentence, tmp_path):
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        load("sst2", "train", tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("written", ["nan", "inf", "1e999", "1e39", "5.1", "-1", "", "good"])
def test_similarity_is_a_number_from_0_to_5(written):
    with pytest.raises(ValueError, match="place: '.*' is not a number from 0 to 5"):
        data_glue.read_label(TASKS["stsb"], written, "place")
    assert [data_glue.read_label(TASKS["stsb"], number, "") for number in ("0", "5")] == [0, 5]


@pytest.mark.parametrize("name, content, sentence", [
    ("vocab.txt", b"", r"vocab.txt: not a BERT vocabulary, \[PAD\] is missing"),
    ("vocab.txt", b"[PAD]\n\xff\n", "vocab.txt, line 2: not valid UTF-8"),
    *(("tokenizer_config.json", content, "tokenizer_config.json: not a tokenizer's configuration")
      for content in (b"", b"[]", b'{"do_lower_case": "no"}', b"\xff", b"[" * 9999, b"9" * 5000)),
])
def test_damaged_tokenizers_are_refused(name, content, sentence, pretrained, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((pretrained / "vocab.txt").read_bytes())
    assert data_glue.load_tokenizer(tmp_path).lowercase is True
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        data_glue.load_tokenizer(tmp_path)


def limited(size, function, *arguments):
    """What it returns on a disk where no file can grow over `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        return function(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(pretrained, glue, tmp_path, capsys):
    """One sentence that names the file; what was written of it is gone, an earlier file of that
    name is whole, and so is a record."""
    out = tmp_path / "run"
    assert limited(20_000, main, command(pretrained, glue, out)) == 2
    assert (f"error: {out}/checkpoint: state-000000 could not be written (the disk may be full); "
            "what was saved before is kept\n") == capsys.readouterr().err
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"log.jsonl"}
    save_safetensors({"a": torch.ones(2)}, tmp_path / "whole")
    cap_min.write_json({"a": 1}, tmp_path / "record.json")
    TINY.to_json(tmp_path / "config.json")
    for write in (lambda: save_safetensors({"a": torch.ones(9000)}, tmp_path / "whole"),
                  lambda: cap_min.write_json({"a": "b" * 9000}, tmp_path / "record.json"),
                  lambda: BertConfig(id2label={0: "b" * 9000}).to_json(tmp_path / "config.json")):
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}"):
            limited(4096, write)
    assert load_safetensors(tmp_path / "whole")["a"].tolist() == [1, 1]
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": 1}
    assert BertConfig.from_json(tmp_path / "config.json").hidden_size == 16
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name, content, sentence", [
    ("run", b"mine", "run is no run folder"),
    ("run/thesis.tex", b"mine", "run is no run folder"),
    *(("run/log.jsonl", content, "log.jsonl is damaged: delete the folder")
      for content in (b"\n", b"\xff", b"[]", b'{"config": {}}', b'{"config": []}', b"[" * 9999)),
    ("run/log.jsonl", b'{"config": {"lr": 3}}', "run belongs to another run (lr differ)"),
    *(("run/record.json", content, "record.json is damaged: delete the folder")
      for content in (b"", b"{}", b"[]", b"\xff", b'{"pruned": 3}', b"[" * 9999)),
    ("run/model/model.safetensors", None, "No such file or directory"),
])
def test_a_run_folder_of_something_else_is_left_alone(name, content, sentence, finished, pretrained,
                                                      glue, tmp_path, capsys):
    """Nothing in it has changed, and nothing is new."""
    if name.startswith(("run/record", "run/model")):
        shutil.copytree(finished, tmp_path / "run")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert main(command(pretrained, glue, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}


def test_glue_files_as_they_are(tmp_path):
    """A byte-order mark, quotes that are text, columns by name in any order, CoLA without a header,
    "-" where SNLI's annotators did not agree."""
    for folder in ("MRPC", "CoLA", "snli"):
        (tmp_path / folder).mkdir()
    (tmp_path / "MRPC/train.tsv").write_text(
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t1\t2\t"He said\t"\r\n', "utf-8")
    (tmp_path / "CoLA/train.tsv").write_text("gj04\t0\t*\tIt was\u2028good.\n")
    (tmp_path / "snli/dev.tsv").write_text(
        "gold_label\tsentence2\tsentence1\n-\ta\tb\nneutral\tc\td")
    assert load("mrpc", "train", tmp_path) == [('"He said', '"', 1)]
    assert load("cola", "train", tmp_path) == [("It was\u2028good.", None, 0)]
    assert load("snli", "dev", tmp_path) == [("d", "c", 1)]


def test_models_that_do_not_fit_the_task_or_each_other(pretrained, glue, tmp_path, capsys):
    """A teacher that calls class 0 "positive" would teach the opposite in silence; one of another
    size has no bank for this model; a vocabulary may not be larger than the model's; a folder
    that is not a run's is left alone. No run folder is made."""
    def refuse(sentence, *options):
        assert main(command(pretrained, glue, tmp_path / "run", *options)) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()

    model = from_pretrained(pretrained)
    model.config.id2label = {0: "positive", 1: "negative"}
    save_pretrained(model, tmp_path / "swapped")
    save_pretrained(BertClassifier(BertConfig(**{**vars(TINY), "hidden_size": 8})),
                    tmp_path / "small")
    (tmp_path / "swapped" / "vocab.txt").write_text("\n".join([*PIECES, "more"]), "utf-8")
    refuse("its labels are ['positive', 'negative']", "--teacher", str(tmp_path / "swapped"))
    refuse("its hidden_size is 8", "--teacher", str(tmp_path / "small"))
    refuse("has 43 pieces, the model knows 42", "--model", str(tmp_path / "swapped"))
    (tmp_path / "swapped" / "tokenizer_config.json").write_text("[]")
    refuse("not a tokenizer's configuration", "--model", str(tmp_path / "swapped"))
    refuse("small is no run folder", "--out", str(tmp_path / "small"))
    (tmp_path / "small" / "log.jsonl").write_text('{"config": 3}')
    refuse("log.jsonl is damaged", "--out", str(tmp_path / "small"))
    assert TASKS["mnli"].words == ["entailment", "neutral", "contradiction"]


# --------------------------------------------------------------------- load and save


def test_other_names_and_files_load_alike(pretrained, tmp_path, capsys):
    """Without the prefix `bert.`, with gamma/beta, half precision, pre-training heads, or as
    pytorch_model.bin: the same weights, and one line tells what became of the tensors."""
    wanted = load_safetensors(pretrained / "model.safetensors")
    (tmp_path / "config.json").write_bytes((pretrained / "config.json").read_bytes())
    old = {name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
           .replace("LayerNorm.bias", "LayerNorm.beta"): tensor.bfloat16()
           for name, tensor in wanted.items() if not name.startswith("classifier")}
    old["cls.predictions.bias"] = torch.zeros(3)
    for save, name in ((torch.save, "pytorch_model.bin"), (save_safetensors, "model.safetensors")):
        save(old, tmp_path / name)
        state = from_pretrained(tmp_path, num_labels=3).state_dict()
        for name, tensor in wanted.items():
            assert name.startswith("classifier") or torch.equal(state[name],
                                                                tensor.bfloat16().float())
        line, = capsys.readouterr().out.splitlines()
        assert "loaded 39 tensors (39 renamed), ignored 1 ['cls.predictions.bias']" in line
        assert "newly initialised ['classifier.weight', 'classifier.bias']" in line


def test_weights_that_do_not_fit_are_refused(pretrained, tmp_path):
    """A missing, misshapen or whole-number encoder tensor is named, and so is one with a NaN or
    infinity, also one that double precision alone holds; a fine-tuned model must have its
    classifier; a folder without weights says so."""
    (tmp_path / "config.json").write_bytes((pretrained / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        from_pretrained(tmp_path)
    good = load_safetensors(pretrained / "model.safetensors")
    name = "bert.pooler.dense.weight"
    for bad in ({}, {name: torch.zeros(16, 15)}, {name: torch.zeros(16, 16, dtype=LONG)}):
        save_safetensors({key: tensor for key, tensor in good.items() if key != name} | bad,
                         tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"1 tensors are missing .*{name}"):
            from_pretrained(tmp_path)
    for value in (math.nan, -math.inf, 1e300):
        bad = good[name].to(DOUBLE)
        bad[3, 5] = value
        save_safetensors(good | {name: bad}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"damaged, 1 tensors are not finite: {name}"):
            from_pretrained(tmp_path)
    del good["classifier.bias"]
    save_safetensors(good, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="classifier.bias"):
        from_pretrained(tmp_path, num_labels=None)


@pytest.mark.parametrize("change", [
    lambda header, data: (header, data[:-1]),
    lambda header, data: (header, data + b"x"),
    lambda header, data: (header.replace(b"[0, 24]", b"[4, 28]"), data),
    lambda header, data: (header.replace(b"[2, 3]", b"[2, 4]"), data),
    lambda header, data: (header.replace(b"[2, 3]", b"[-2, -3]"), data),
    lambda header, data: (header.replace(b"F32", b"F31"), data),
    lambda header, data: (header.replace(b"[24, 32]", b"[16, 24]"), data),
    lambda header, data: (header.replace(b"[24, 32]", b"[24, 32.0]"), data),
    lambda header, data: (header.replace(b"[2, 3]", b"[2, 3%s]" % (b", 1" * 64)), data),
    lambda header, data: (
        header.replace(b"[2, 3]", b"[0, %d, 9]" % 2 ** 47).replace(b"[0, 24]", b"[0, 0]")
        .replace(b"[24, 32]", b"[0, 8]"), data[:8]),
    lambda header, data: (header.replace(b'"a"', b'"a\\n"').replace(b"[2, 3]", b"[2]"), data),
    lambda header, data: (header.replace(b'"a"', b'"a\\n"').replace(b"[2, 3]", b"[-2]"), data),
    lambda header, data: (header.replace(b"[2, 3]", b"[%s6]" % (b"6, " * 999)), data),
    lambda header, data: (header + b" " * 10 ** 7, data),
    lambda header, data: (b"[1, 2]", data),
    lambda header, data: (b"{" * 5000, data),
])
def test_damaged_safetensors_are_refused(change, tmp_path):
    """Cut short, longer than it says, shifted, misshapen, of an unknown type, overlapping, of 66
    dimensions or a nothing of 9 * 2^47 rows, with an odd name, with a header of 10 MB or none: one
    sentence that names the file. The sound file loads."""
    path = tmp_path / "weights"
    save_safetensors({"a": torch.ones(2, 3), "b": torch.ones(2)}, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert load_safetensors(path)["b"].tolist() == [1, 1]
    header, data = change(raw[8:8 + length], raw[8 + length:])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(ValueError, match="weights: damaged, not a whole safetensors file") as error:
        load_safetensors(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    path.write_bytes((2 ** 62).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="damaged"):
        load_safetensors(path)


def test_compact_files(finished, tmp_path):
    """The bits and half-precision values of a matrix become the matrix again, to 11 bits, and take
    at most 1/12 of it in fp32 at 97 %; transformers finds no file that it could misread."""
    model = from_pretrained(finished / "model")
    for linear in encoder_linears(model).values():
        linear.weight.data *= topk_mask(linear.weight.abs(), 0.03)
    save_pretrained(model, tmp_path, compact=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model_compact.safetensors"}
    wanted, loaded = model.state_dict(), from_pretrained(tmp_path, None).state_dict()
    assert all(torch.allclose(loaded[name], wanted[name], rtol=2 ** -11) for name in wanted)
    packed = load_safetensors(tmp_path / bert_min.COMPACT_FILE)
    parts = [tensor for name, tensor in packed.items() if name.endswith((".kept", ".values"))]
    whole = sum(linear.weight.nbytes for linear in encoder_linears(model).values())
    assert len(parts) == 24 and sum(part.nbytes for part in parts) < whole / 12
    odd = BertClassifier(BertConfig(**{**vars(TINY), "hidden_size": 6, "intermediate_size": 3}))
    for compact in (True, False, True):  # one file of weights at a time; 18 bits are 3 bytes
        save_pretrained(odd, tmp_path, compact)
        assert len(list(tmp_path.iterdir())) == 2
        got = from_pretrained(tmp_path).state_dict()
        assert all(torch.allclose(got[name], p, rtol=2 ** -11, atol=1e-7)
                   for name, p in odd.state_dict().items())
    path, name = tmp_path / bert_min.COMPACT_FILE, "bert.encoder.layer.0.output.dense.weight"
    packed = load_safetensors(path)
    packed[name + ".kept"][-1] |= 1  # a bit, and a value for it, beyond the last weight
    packed[name + ".values"] = torch.cat([packed[name + ".values"], torch.ones(1).half()])
    save_safetensors(packed, path)
    with pytest.raises(ValueError, match=f"damaged, {name} has 19 values"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [
    lambda kept, values: (kept[:-1], values), lambda kept, values: (kept, values[:-1]),
    lambda kept, values: (kept | 1, values), lambda kept, values: (kept.half(), values),
    lambda kept, values: (kept, torch.cat([values, values[:1]])),
    lambda kept, values: (kept[:-1], values[:-8]),
    lambda kept, values: (kept[:, None] >> tensor([0, 1], torch.uint8), values)])
def test_damaged_compact_files_are_refused(change, tmp_path):
    """Too few or too many bits or values, bits that are no bytes."""
    model, path = BertClassifier(TINY), tmp_path / bert_min.COMPACT_FILE
    model.bert.encoder.layer[1].output.dense.weight.data[0, 7] = 0  # the last bit of a byte
    save_pretrained(model, tmp_path, compact=True)
    tensors, name = load_safetensors(path), "bert.encoder.layer.1.output.dense.weight"
    parts = f"{name}.kept", f"{name}.values"
    tensors |= zip(parts, change(*(tensors[part] for part in parts)))
    save_safetensors(tensors, path)
    with pytest.raises(ValueError, match=f"damaged, {name} has"):
        from_pretrained(tmp_path)


def test_memory_is_that_of_the_tensors(tmp_path):
    """A file of 64 MB is read once. Of one that says it has a terabyte, nothing is."""
    path = tmp_path / "weights"
    save_safetensors({"a": torch.ones(2 ** 24)}, path)
    for tail, most in ((0, 2 ** 26 + 2 ** 23), (2 ** 40, 2 ** 20)):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size + tail)  # without blocks on the disk
        tracemalloc.start()
        with pytest.raises(ValueError) if tail else contextlib.nullcontext():
            load_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < most  # numpy's memory counts
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:.*quantize")
@pytest.mark.parametrize("make", [
    lambda good: [], lambda good: {"model": good}, lambda good: good | {"a": 1.0},
    lambda good: good | {"a": torch.eye(2).to_sparse()},
    lambda good: good | {"a": torch.eye(2, device="meta")},
    lambda good: good | {"a": torch.ones(1).expand(10 ** 12)},
    lambda good: good | {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    lambda good: good | {"a": torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)}])
def test_pickles_of_other_things_are_refused(make, pretrained, tmp_path, recwarn):
    """Lists, nested containers, numbers, tensors that are not dense, not here or not all stored.
    A file that is cut short is refused as well, a whole one of weights loads."""
    path = tmp_path / "pytorch_model.bin"
    good = load_safetensors(pretrained / "model.safetensors")
    torch.save({name: nn.Parameter(weight.T).T for name, weight in good.items()}, path)
    assert all(torch.equal(weight, good[name])
               for name, weight in bert_min.load_bin(path).items())
    torch.save(make(good), path)
    recwarn.clear()
    for _ in range(2):
        with pytest.raises(ValueError, match="model.bin: not a weight file of tensors alone"):
            bert_min.load_bin(path)
        path.write_bytes(path.read_bytes()[:-200])
    assert not recwarn


def test_a_pickle_that_would_run_code_never_runs(pretrained, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "config.json").write_bytes((pretrained / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
    with pytest.raises(ValueError, match="not a weight file of tensors alone"):
        from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"hidden_size": "16"}', '{"hidden_act": "relu"}',
                                  '{"model_type": "roberta"}', '{"num_attention_heads": 5}',
                                  '{"id2label": 3}', '{"vocab_size": 0}',
                                  '{"hidden_dropout_prob": "x"}', '{"pad_token_id": 40000}',
                                  '{"num_hidden_layers": 1000000000}', '{"layer_norm_eps": NaN}',
                                  '{"num_hidden_layers": 201}', "[" * 9999,
                                  '{"hidden_size": %d}' % 12 ** 18, '{"vocab_size": "%s"}' % 9999,
                                  '{"id2label": {"0": "a", "2": "b"}}', "9" * 5000,
                                  *('{"num_hidden_layers": 2, "layer_sizes": [[12, 0], %s]}' % sizes
                                    for sizes in ("[13, 1], [1, 1]", "[13, 1]", "[1, -1]",
                                                  "[1.0, 1]", "[1]"))])
def test_configurations_of_other_models_are_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: not a BERT configuration"):
        BertConfig.from_json(tmp_path / "config.json")


# ---------------------------------------------------------------------------- fuzzer

ODD_VALUES = [0, -1, 1, 4, 2 ** 24, 2 ** 40, 2 ** 63, 10 ** 400, 1.5, math.nan, True, None, "",
              "F16", "a\nb\ud800", [], [0], [0, 0], [2 ** 40] * 3, [1] * 10_000, {}, {"0": "a"}]
FUZZED = ("model.safetensors", bert_min.COMPACT_FILE, "config.json", "tokenizer_config.json",
          "vocab.txt", "train.tsv")
LABELS = ("label", "gold_label", "is_duplicate", "score", "Quality")


def mutate_bytes(data, rng):
    """1 to 3 of: a byte flipped, a stretch cut out, doubled or overwritten, the end cut off."""
    for _ in range(rng.randint(1, 3)):
        first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        last = min(last, first + rng.choice((1, 8, 2 ** 20)))
        odd = rng.choice([b"", bytes([rng.randrange(256)]), b"\n", b"\t", b"\r", b"\xff", b"\0",
                          b"\xef\xbb\xbf", b'"', b"\xe2\x80\xa8", b"nan", b"9" * 5000, b"[" * 5000])
        data = rng.choice((data[:first] + odd + data[last:], data[:last] + data[first:],
                           data[:first] + odd + data[first + 1:], data[:first]))
    return data


def mutate_values(value, rng):
    """A value somewhere inside `value`, or a name, is replaced by an odd one, moved or dropped."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(value[key], (dict, list)) and rng.random() < 0.8:
        mutate_values(value[key], rng)
    elif isinstance(value, dict) and rng.random() < 0.3:
        value[rng.choice([*keys, "odd\n", key + ".kept"])] = value.pop(key)
    else:
        odd = value[key] + rng.choice((-1, 1, 8)) if type(value[key]) is int else 0
        value[key] = copy.deepcopy(rng.choice([odd, value[rng.choice(keys)], *ODD_VALUES]))


def mutate(data, name, rng):
    """The bytes of a file, half of the JSON ones mutated as JSON, weights with a new length."""
    length = int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else 0
    if name.endswith((".txt", ".tsv")) or rng.random() < 0.3:
        return mutate_bytes(data, rng)
    header, rest = (data[8:8 + length], data[8 + length:]) if length else (data, b"")
    if rng.random() < 0.3:
        header = mutate_bytes(header, rng)
    else:
        tree = json.loads(header)
        for _ in range(rng.randint(1, 3)):
            mutate_values(tree, rng)
        header = json.dumps(tree).encode()
    return (len(header).to_bytes(8, "little") if length else b"") + header + rest


@pytest.fixture(scope="session")
def fuzzed(tmp_path_factory, pretrained):
    """A folder with every file of FUZZED, and a config.json with all its fields."""
    folder = tmp_path_factory.mktemp("fuzzed")
    model = from_pretrained(pretrained, 3)
    model.config.layer_sizes = model.config.full_sizes
    save_pretrained(model, folder, compact=True)
    data_glue.save_tokenizer(WordPiece(pretrained / "vocab.txt"), folder, 32)
    (folder / "model.safetensors").write_bytes((pretrained / "model.safetensors").read_bytes())
    columns = ("index label sentence sentence1 sentence2 question question1 question2 gold_label "
               "is_duplicate score Quality premise hypothesis #1_String #2_String").split()
    columns = [column.replace("_S", " S") for column in columns]
    rows = [["LABEL" if column in LABELS else f"{column} {i} 中" for column in columns]
            for i in range(4)]
    lines = ("\t".join(row) for row in [columns, *rows])
    (folder / "train.tsv").write_text("\n".join(lines), "utf-8")
    return folder


def fuzz(name, seed, source, folder):
    """Mutate one file, read it, and hold the reader to its promise."""
    rng = random.Random(f"{name} {seed}")
    for path in source.iterdir():
        if path.suffix != ".safetensors" or path.name == (
                name if name.endswith(".safetensors") else FUZZED[seed % 2]):
            (folder / path.name).write_bytes(path.read_bytes())
    data = (source / name).read_bytes()
    task = rng.choice(list(TASKS))
    if name == "train.tsv":
        label = rng.choice([*(TASKS[task].labels or ("2.5", "4", "nan", "1e999", "5.1")), "-"])
        data = data.replace(b"LABEL", label.encode())
        folder.joinpath(TASKS[task].folder).mkdir(exist_ok=True)
    data = mutate(data, name, rng)
    (folder / (TASKS[task].folder if name == "train.tsv" else "") / name).write_bytes(data)
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of earlier tests
    before, start, error = peak(), time.perf_counter(), ""
    try:
        if name == "train.tsv":
            load(task, "train", folder)
        elif name.startswith(("vocab", "tokenizer")):
            data_glue.load_tokenizer(folder)
        else:
            state = from_pretrained(folder, rng.choice((None, 2, 3))).state_dict()
            assert all(tensor.isfinite().all() for tensor in state.values())
    except (ValueError, OSError) as refusal:
        error = str(refusal)
    assert len(error.splitlines()) <= 1 and len(error) < 600
    assert time.perf_counter() - start < 5
    assert peak() - before <= 2 * len(data) + 2 ** 25
    return bool(error)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", FUZZED)
def test_fuzzed_files_load_or_are_refused(name, fuzzed, tmp_path):
    """Whatever the bytes: a result, or a ValueError or OSError of one line, within 5 seconds and
    twice the file's memory and 32 MB. CAP_FUZZ=20 in the environment: 20 times as many cases."""
    cases, refused = 25 * int(os.environ.get("CAP_FUZZ", 1)), 0
    for seed in range(cases):
        try:
            refused += fuzz(name, seed, fuzzed, tmp_path)
        except BaseException as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
        finally:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert refused >= cases / 10


# -------------------------------------------------------------------------- download


class Faulty(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, but answers the first requests as the server's list `faults` says."""

    def do_GET(self):
        if "?moved" in self.path:
            return super().do_GET()
        self.server.asked.append(self.path)
        if not self.server.faults:
            return super().do_GET()
        fault = self.server.faults.pop(0)
        body = Path(self.translate_path(self.path)).read_bytes()
        half, port = body[:len(body) // 2], self.server.server_port
        if fault == "nonsense":
            return self.wfile.write(b"nonsense\r\n" + body)
        self.send_response(302 if "moved" in fault else 200)
        if "moved" in fault:
            host = "localhost" if fault == "moved away" else "127.0.0.1"
            self.send_header("Location", f"http://{host}:{port}{self.path}?moved")
        elif fault != "endless":
            announced = half if fault == "announced half" else body
            self.send_header("Content-Length", len(announced))
        self.end_headers()
        if fault in ("cut", "closed", "stalled", "stopped"):
            self.wfile.write(half)
        if fault == "cut":  # a reset, not an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault == "stalled":
            time.sleep(1)
        elif fault == "stopped":
            _thread.interrupt_main()  # Ctrl-C
        elif fault == "other bytes":
            self.wfile.write(body[::-1])
        elif fault == "announced half":
            self.wfile.write(body)
        elif fault == "held":
            self.server.free.wait(30)
            self.wfile.write(body)
        while fault == "endless" and self.server.sent < 64 << 20:
            self.server.sent += self.wfile.write(bytes(1 << 20))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the folder tmp_path/served on this machine; the cache lies beside the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    for module in (bert_min, data_glue):
        monkeypatch.setattr(module, "SCHEME", "http://")
        monkeypatch.setattr(module, "PAUSES", (0, 0))
    handler = functools.partial(Faulty, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.folder, running.address = folder, f"http://127.0.0.1:{running.server_port}"
        running.faults, running.asked, running.sent = [], [], 0
        running.free = threading.Event()
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def big(server):
    """The arguments of `download` for a file of 600,000 bytes on the server."""
    content = np.random.default_rng(0).bytes(600_000)
    (server.folder / "big").write_bytes(content)
    return [f"{server.address}/big", server.folder.parent / "cache" / "big", len(content),
            hashlib.sha256(content).hexdigest()]


def test_both_modules_download_alike():
    """bert_min and data_glue import nothing of each other: each has the same two functions."""
    for name in ("download", "receive"):
        ours, theirs = getattr(bert_min, name), getattr(data_glue, name)
        assert inspect.getsource(ours) == inspect.getsource(theirs)
    for module in (bert_min, data_glue):
        assert (module.SCHEME, module.PAUSES, module.TIMEOUT) == ("https://", (1, 4), 30)


@pytest.mark.parametrize("fault, reason", [
    ("cut", "reset by peer|300000 bytes"), ("closed", "300000 bytes of 600000"),
    ("stalled", "timed out"),
    ("announced half", "300000 bytes of 600000"), ("other bytes", "600000 bytes of 600000"),
    ("endless", "of 600000"), ("nonsense", "nonsense"),
    ("moved away", "redirects to http://localhost")])
def test_download_survives_two_faults_but_not_three(server, big, fault, reason, monkeypatch):
    """The third try is the last: then one sentence names address, cause and place, and not a byte
    stays. An endless answer is left after little more than the size."""
    address, target, size, _ = big
    if fault == "stalled":
        monkeypatch.setattr(data_glue, "TIMEOUT", 0.5)
    elif fault == "moved away":
        monkeypatch.setattr(data_glue, "SCHEME", "http://127.0.0.1")
    server.faults[:] = [fault] * 3
    sentence = f"^{address} could not .*({reason}).* put the file at {target} by hand [^\n]*$"
    with pytest.raises(OSError, match=sentence):
        data_glue.download(*big)
    assert len(server.asked) == 3 and not list(target.parent.iterdir()) and server.sent < 64 << 20
    server.faults[:] = [fault] * 2
    assert sha256(data_glue.download(*big)) == big[3]
    assert [path.name for path in target.parent.iterdir()] == ["big"]
    assert len(server.asked) == 6


def test_download_follows_a_redirect_and_asks_only_once(server, big, capsys):
    """A file that is there is not asked for again, whatever it is; Ctrl-C leaves nothing behind."""
    address, target, size, right = big
    server.faults[:] = ["stopped"]
    with pytest.raises(KeyboardInterrupt):
        data_glue.download(*big)
    assert not list(target.parent.iterdir())
    server.faults[:] = ["moved"]
    assert data_glue.download(*big) == data_glue.download(*big) == target
    assert server.asked == ["/big"] * 2 and sha256(target) == right
    assert capsys.readouterr().out == 2 * f"downloading {address} (0.6 MB)\n"
    target.write_bytes(b"mine")
    with pytest.raises(ValueError, match="big is not the file of .*: delete it"):
        data_glue.download(*big)
    assert target.read_bytes() == b"mine" and len(server.asked) == 2


def test_only_https_is_asked(server, big, monkeypatch):
    """And whatever the cause, the sentence is one line: of more, the command line shows one."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"\(no network\); .* hand"):
        patch.setattr(data_glue, "receive", Mock(side_effect=OSError("no\nnetwork")))
        data_glue.download(*big)
    monkeypatch.setattr(data_glue, "SCHEME", "https://")
    with pytest.raises(OSError, match="does not start with https://"):
        data_glue.download(*big)
    assert not server.asked


def test_progress_on_a_terminal(server, big, monkeypatch, capsys):
    """600,000 bytes come in pieces of 262,144, one every 2 s, thus at 0.13 MB/s: 43.7 % after the
    first, 87.4 % after the second; 337,856 and 75,712 bytes are left for 2.6 s and 0.6 s."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    clock = Mock(perf_counter=itertools.count(0, 2).__next__)
    monkeypatch.setattr(data_glue, "time", clock)
    data_glue.download(*big)
    _, *shown = capsys.readouterr().out.split("\r")
    assert [line.strip() for line in shown] == [
        "44%, 0.1 MB/s, eta 3 s", "87%, 0.1 MB/s, eta 1 s", "100%, 0.1 MB/s, eta 0 s"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
def test_two_processes_download_at_once(server, big):
    """Each has its own temporary file; both end well, and only the file itself stays."""
    target, server.faults[:] = big[1], ["held", "held"]
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                status = int(sha256(data_glue.download(*big)) != big[3])
            except BaseException:
                status = 2
            os._exit(status)
    end = time.monotonic() + 10
    while len(list(target.parent.glob("big.*.tmp"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    server.free.set()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(server.asked) == 2 and sha256(target) == big[3]
    assert [path.name for path in target.parent.iterdir()] == ["big"]


def test_bert_base_is_downloaded_once_and_verified(server, pretrained, monkeypatch):
    """Files come by name, with their SHA-256; afterwards no server is needed. Wrong bytes are
    refused and leave nothing behind, and so does a server that is not there."""
    folder, address = server.folder, server.address
    names = ("config.json", "vocab.txt", "model.safetensors")
    for name in names:
        (folder / name).write_bytes((pretrained / name).read_bytes())
    monkeypatch.setattr(bert_min, "BERT_BASE_URL", address)
    right = {name: ((folder / name).stat().st_size, sha256(folder / name)) for name in names}
    monkeypatch.setattr(bert_min, "BERT_BASE_FILES", {**right, "vocab.txt": (9, "0" * 64)})
    with pytest.raises(OSError, match="vocab.txt could not be downloaded .*put the file at"):
        from_pretrained("bert-base-uncased")
    cache = bert_min.Path(bert_min.os.environ["CAP_CACHE"]) / "bert-base-uncased"
    assert [path.name for path in cache.iterdir()] == ["config.json"]
    monkeypatch.setattr(bert_min, "BERT_BASE_FILES", right)
    wanted = from_pretrained(pretrained).bert.state_dict()
    got = from_pretrained("bert-base-uncased").bert.state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    monkeypatch.setattr(bert_min, "BERT_BASE_URL", "http://127.0.0.1:9")
    from_pretrained("bert-base-uncased")
    (cache / "vocab.txt").write_text("put there by hand")
    with pytest.raises(ValueError, match="vocab.txt is not the file of"):
        from_pretrained("bert-base-uncased")


def test_glue_archives_are_downloaded_and_unpacked(server, glue, monkeypatch):
    """SST-2's zip gives its two files; MRPC's dev set is the listed pairs of the corpus; snli and
    an unreachable server are refused with the place where the file can be put by hand."""
    folder, address = server.folder, server.address
    with zipfile.ZipFile(folder / "SST-2.zip", "w") as archive:
        for name in ("train.tsv", "dev.tsv"):
            archive.write(glue / "SST-2" / name, f"SST-2/{name}")
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    (folder / "corpus").write_text(header + "1\t10\t11\ta\tb\r\n0\t20\t21\tc\td\r\n", "utf-8")
    (folder / "ids").write_text("20\t21\n")
    monkeypatch.setattr(data_glue, "GLUE_URL", address)
    monkeypatch.setattr(data_glue, "SENTEVAL_URL", address)
    pin = {name: (name, (folder / name).stat().st_size, sha256(folder / name))
           for name in ("SST-2.zip", "corpus", "ids")}
    monkeypatch.setitem(data_glue.ARCHIVES, "sst2", pin["SST-2.zip"])
    monkeypatch.setattr(data_glue, "MRPC_TRAIN", pin["corpus"])
    monkeypatch.setattr(data_glue, "MRPC_DEV_IDS", pin["ids"])
    assert all(load("sst2", split) == load("sst2", split, glue) for split in ("train", "dev"))
    assert load("mrpc", "train") == [("a", "b", 1)] and load("mrpc", "dev") == [("c", "d", 0)]
    (folder.parent / "cache/glue/MRPC/dev.tsv").unlink()
    (folder.parent / "cache/glue/ids").write_text("put there by hand")
    with pytest.raises(ValueError, match="ids is not the file of"):
        load("mrpc", "dev")
    with pytest.raises(FileNotFoundError, match="snli is not downloaded; put the file there"):
        load("snli", "dev")
    monkeypatch.setattr(data_glue, "GLUE_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="CoLA.zip could not be .* or pass --model or --data-dir"):
        load("cola", "dev")


# ---------------------------------------------------------------- all cores, the cache


@pytest.fixture
def many(vocab, monkeypatch, tmp_path):
    """23 pairs of many lengths, which count as many and make 4 chunks; two cores; a tokenizer."""
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_glue, "MANY", 23)
    monkeypatch.setattr(data_glue, "CHUNK", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    rows = [Example("The film " * (i % 5), "was good ! " * (i % 4), i % 3) for i in range(23)]
    return rows, WordPiece(vocab)


def same_ids(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype
               for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("breaks", ["nothing", "a worker dies", "no process can be had"])
def test_all_cores_encode_like_one(many, breaks, monkeypatch):
    """One example fewer than many is encoded here and leaves no file; many are encoded by other
    processes, which break the count of calls here, unless these do not work."""
    rows, tokenizer = many
    few = encode_task(rows[:22], tokenizer, 16)
    assert not data_glue.cache_folder().exists()
    calls, encode_rows = [], data_glue.encode_rows
    monkeypatch.setattr(data_glue, "encode_rows", lambda *a: calls.append(a) or encode_rows(*a))
    if breaks == "a worker dies":
        monkeypatch.setattr(data_glue, "start_worker", lambda *_: os._exit(1))
    elif breaks == "no process can be had":
        monkeypatch.setattr(data_glue, "ProcessPoolExecutor", Mock(side_effect=OSError))
    data = encode_task(rows, tokenizer, 16)
    assert len(calls) == (breaks != "nothing") and data.lengths.max() == 16
    assert same_ids(data.head(22), data_glue.Encoded(data.tokens, *list(vars(few).values())[1:]))
    assert torch.equal(data.tokens[:len(few.tokens)], few.tokens)
    monkeypatch.setattr(data_glue, "MANY", 24)
    assert same_ids(data, encode_task(rows, tokenizer, 16))


def test_encoded_ids_are_kept_and_known_by_their_content(many, vocab, tmp_path, monkeypatch):
    """The second time nothing is encoded. Another text, label, length, case or vocabulary makes
    another file; one that is damaged is made anew; one that cannot be written does no harm."""
    rows, tokenizer = many
    encode_rows = Mock(side_effect=data_glue.encode_rows)
    monkeypatch.setattr(data_glue, "encode_on_all_cores", encode_rows)
    (tmp_path / "vocab.txt").write_bytes(vocab.read_bytes() + b"film !\n")
    first = encode_task(rows, tokenizer, 16)
    path, = (tmp_path / "cache" / "encoded").iterdir()
    assert same_ids(encode_task(list(rows), WordPiece(vocab), 16), first)
    assert encode_rows.call_count == 1
    others = [[rows[0]._replace(**change)] + rows[1:]
              for change in ({"text_a": "film"}, {"text_b": "film"}, {"label": 2})]
    for change in (*((other, tokenizer, 16) for other in others), (rows, tokenizer, 15),
                   (rows, WordPiece(vocab, lowercase=False), 16),
                   (rows, WordPiece(tmp_path / "vocab.txt"), 16)):
        encode_rows.reset_mock()
        assert encode_task(*change).labels.tolist() == [row.label for row in change[0]]
        assert encode_rows.call_count == 1
    good = path.read_bytes()
    for bad in (b"", good[:-4], good[:40] + b"?" + good[41:], b"?" + good[1:]):
        path.write_bytes(bad)
        assert same_ids(encode_task(rows, tokenizer, 16), first) and path.read_bytes() == good
    monkeypatch.setenv("CAP_CACHE", str(vocab))  # a file, so no folder can be made in it
    assert same_ids(encode_task(rows, tokenizer, 16), first)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux' ps")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_is_left_behind(vocab, stop):
    """Ctrl-C, which reaches every process of a terminal, or the end of the parent alone, while two
    workers are at work: all end (state Z: ended, but nobody has asked for the exit status)."""
    script = ("import os, sys, data_glue as d; d.MANY, d.CHUNK = 2, 20_000; "
              "os.sched_getaffinity = lambda process: {0, 1}; "
              "row = d.Example('the film was not good ' * 20, None, 0); "
              "d.encode_task([row] * 1_000_000, d.WordPiece(sys.argv[1]))")
    process = subprocess.Popen([sys.executable, "-c", script, str(vocab)], cwd=HERE,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 100

    def running():
        states = subprocess.run(["ps", "-s", str(process.pid), "-o", "stat="], capture_output=True)
        return sum(not state.startswith(b"Z") for state in states.stdout.split())

    while running() < 3 and time.monotonic() < end:
        time.sleep(0.1)
    assert running() == 3
    (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
    assert process.wait(timeout=60) == -stop
    while running() and time.monotonic() < end:
        time.sleep(0.1)
    assert running() == 0


# ---------------------------------------------------------------------------- README


def test_readme_is_current():
    """Its tables are what results/report.py makes of the records, the code and these tests; each
    of the eight equations has a line and a test; it names no unknown flag."""
    sys.path.insert(0, str(HERE / "results"))
    import report
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert report.render(text) == text, "run python results/report.py"
    assert all(lines and tests for _, _, lines, tests in report.equations())
    flags = set(re.findall(r"--[a-z][a-z-]+", text)) - {
        "--help", "--no-deps", "--extra-index-url", "--nproc-per-node"}
    assert flags <= {"--" + name.replace("_", "-") for name in vars(cap_min.parse(["--task=rte"]))}
