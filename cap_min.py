"""CAP, ContrAstive Pruning, in one file: fine-tune BERT on a task while it is pruned to 3 % of its
encoder weights, and let contrastive terms against its own ancestors keep what they knew.

Paper:  Xu et al., "From Dense to Sparse: Contrastive Pruning for Better Pre-trained Language Model
        Compression" (arXiv 2112.07198, AAAI 2022). Under its losses: CAP-m and CAP-soft (movement,
        Sanh et al., arXiv 2005.07683), magnitude, CAP-f (heads and neurons by Taylor importance,
        Michel et al., arXiv 1905.10650).
Run:    python cap_min.py                                   the demo, in 4 minutes on 2 cores
        python cap_min.py --task mnli --sparsity 0.97       the published recipe

Glossary: symbol of the equations -> name in the code, shape
    x_i, y_i  index, labels (B,)      example i, as its row in the training set, and its label
    z_i       pooled (B, D)           tanh-pooled [CLS] of the model that is being pruned
    q_i       q (B, D)                anchor, z_i / |z_i|. NOTE deviation: no dropout on z_i
    b_j^m     bank[m][j] (D,)         unit pooled vector of example j by ancestor m:
                                      PrC pre-trained, SnC earlier snapshots, FiC fine-tuned
    I, E      index, extra            the batch, and examples drawn from the whole training set
    C_i, P_i  candidate_index, positive  what anchor i is compared with, positives among it
    tau       temperature             0.1
    W, S, M   weight, scores, mask    a matrix, how much each weight matters, 1 = kept, 0 = pruned
    d(t)      density                 fraction of weights kept at step t; sparsity = 1 - density
    t_0, t_1  warm, cool              dense steps at the start, steps of final sparsity at the end
    w_.       args.w_unsup, ...       weights of the terms of the loss
Sizes: B batch, N training examples, K ancestors in a bank, D hidden size, C candidates, L labels.
The equations (1) to (8) are written out in README.md; each is marked here as `# eq. (n)`.
To follow a run: `main`, `cap`, `train`, `batch_terms`, `cap_terms`, `contrastive_loss`."""

import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import platform
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

if sys.version_info < (3, 10):
    print("error: Python 3.10 or newer is needed", file=sys.stderr)
    sys.exit(2)

from bert_min import (BertClassifier, from_pretrained, model_folder, read_json, replacing,
                      save_pretrained, write_json)
from data_glue import (TASKS, batches, batches_by_length, encode_task, inputs, load, load_tokenizer,
                       save_tokenizer, score, sent)

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------- masks

SOFT_THRESHOLD = 0.1  # on sigmoid(S), at the end of CAP-soft

def topk_mask(scores, density):
    """Bool mask, shaped like `scores`, of its k = round(density * numel) largest entries, at
    least 1. Exactly k are kept: of equal scores the first by index. Eq. (1)."""
    return topk_masks([scores.detach()], density)[0]


def topk_masks(matrices, density):
    """`topk_mask` of each of these matrices, which have one shape."""
    shape = matrices[0].shape
    k = max(1, round(density * shape.numel()))  # eq. (1)
    if matrices[0].device.type == "cpu":
        masks = [torch.from_numpy(largest(matrix.flatten().numpy(), k)) for matrix in matrices]
    else:
        masks = largest_of_rows(torch.stack(matrices).flatten(1), k)
    return [mask.view(shape) for mask in masks]


def largest_of_rows(rows, k):
    """Bool mask of the k largest numbers of each row, of equal ones the first, without waiting for
    a GPU. There one search of many rows takes less time than many, on a CPU ten times as long."""
    threshold = rows.topk(k, sorted=False).values.amin(1, keepdim=True)  # (n, 1)
    above, ties = rows > threshold, rows == threshold
    # of what is equal to it, the first by index; one long sum is faster than one for each row
    number = ties.flatten().cumsum(0).view(rows.shape)
    before = number[:, :1] - ties[:, :1].long()  # in the rows above
    missing = k - above.sum(1, keepdim=True)
    return above | (ties & (number <= before + missing))


def largest(row, k):
    """Bool mask of the k largest numbers of a numpy vector, of equal ones the first."""
    # search only above a bound, over which lie 1.1 k / len(row) of a sample, and 20 numbers more
    sample = np.sort(row[::127])
    low = len(sample) - int(1.1 * len(sample) * k / len(row)) - 20
    candidates = row[row >= sample[max(0, low)]]
    if len(candidates) < k:  # it misled
        candidates = row
    threshold = np.partition(candidates, -k)[-k]
    # of what is equal to it, the first by index
    mask = row >= threshold
    surplus = np.count_nonzero(mask) - k
    if surplus > 0:
        mask[np.flatnonzero(row == threshold)[-surplus:]] = False
    return mask


class StraightThrough(torch.autograd.Function):
    """W' = W * M, where the gradient of W' reaches the scores as if M were S itself. Eq. (2)."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        mask = mask.view(torch.uint8)  # which torch multiplies faster than bools
        ctx.save_for_backward(weight, mask)
        return weight * mask  # eq. (1)

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        to_scores = None
        if ctx.needs_input_grad[1]:
            to_scores = grad * weight  # eq. (2)
        return grad * mask, to_scores, None  # eq. (2)


class Mask(nn.Module):
    """The mask of a weight matrix: as its parametrization it makes `layer.weight` W' = W * M. M has
    a 1 for the highest of trainable `scores`, which start at 0 (score_init "zero", as published) or
    at |W| / std(W) ("magnitude"): short runs end before scores from 0 have learnt what matters.
    "none": magnitude pruning, where |W| is the score."""

    def __init__(self, weight, score_init):
        super().__init__()
        weight, self.scores = weight.detach(), None
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        if score_init == "zero":
            self.scores = nn.Parameter(torch.zeros_like(weight))
        elif score_init == "magnitude":
            self.scores = nn.Parameter(weight.abs() / weight.std())

    def forward(self, weight):
        return StraightThrough.apply(weight, self.scores, self.mask)


def encoder_linears(model):
    """{name: linear layer} of all that is pruned: 72 in BERT-base."""
    return {name: layer for name, layer in model.named_modules()
            if name.startswith("bert.encoder.") and isinstance(layer, nn.Linear)}


def add_masks(model, score_init):
    """Give every linear layer of the encoder a `Mask`, and freeze the embeddings."""
    model.bert.embeddings.requires_grad_(False)
    for layer in encoder_linears(model).values():
        parametrize.register_parametrization(layer, "weight", Mask(layer.weight, score_init))


def masks_of(model):
    return [module for module in model.modules() if isinstance(module, Mask)]


def set_masks(model, density):
    """Eq. (1) for every matrix, before each step. NOTE deviation: so the mask that is exported is
    the one that the last step was trained with, not the top-k of the scores after it."""
    # matrices of one shape are searched together
    by_shape = {}
    for layer in encoder_linears(model).values():
        weight = layer.parametrizations.weight
        scores = weight[0].scores
        if scores is None:  # magnitude pruning
            scores = weight.original.abs()
        by_shape.setdefault(scores.shape, []).append((weight[0], scores.detach()))
    for group in by_shape.values():
        modules, matrices = zip(*group)
        for module, mask in zip(modules, topk_masks(matrices, density)):
            module.mask = mask


def set_soft_masks(model, density, sparsity):
    """CAP-soft: over all matrices together, keep what has sigmoid(score) over a threshold that
    rises from 0 to SOFT_THRESHOLD; but at most the fraction `density`, and once `sparsity` is
    reached just that. NOTE deviation: so the density never exceeds eq. (3)."""
    modules = masks_of(model)
    scores = parameters_to_vector([module.scores for module in modules]).detach()
    mask = topk_mask(scores, density)
    if density > 1 - sparsity:
        mask &= scores.sigmoid() > SOFT_THRESHOLD * (1 - density) / sparsity
    vector_to_parameters(mask, [module.mask for module in modules])


def apply_masks(model):
    """Make every masked layer a plain one whose pruned weights are exactly 0."""
    for layer in encoder_linears(model).values():
        parametrize.remove_parametrizations(layer, "weight")
        layer.weight.data += 0.0  # -0 becomes 0


# -------------------------------------------------------------------------- schedule

def cubic_density(step, total, start, end, warm, cool):
    """Density at `step` of `total`: `start` for the first `warm` steps, `end` for the last `cool`,
    and a cubic in between that prunes fast first, then ever slower. Eq. (3)."""
    if step < warm:
        return start
    if step >= total - cool:
        return end
    return end + (start - end) * (1 - (step - warm) / (total - warm - cool)) ** 3  # eq. (3)


def linear_lr(step, total, warmup):
    """Factor on the learning rate: linear from 0 over `warmup` steps, then linear down to 0."""
    return step / warmup if step < warmup else (total - step) / (total - warmup)


# ------------------------------------------------------------------- sparsity report

def sparsity_report(model):
    """{"total": fraction of encoder weights that are exactly 0 or removed, "weights": how many
    there were, "kept": how many are neither, "matrices": {name: fraction}}."""
    config, matrices = model.config, {}
    weights = kept = 0
    for name, layer in encoder_linears(model).items():
        # its size before anything was removed
        size = config.hidden_size * config.intermediate_size
        if ".attention." in name:
            size = config.hidden_size ** 2
        nonzero = int(layer.weight.count_nonzero())
        matrices[name + ".weight"] = 1 - nonzero / size
        weights += size
        kept += nonzero
    return {"total": 1 - kept / weights, "weights": weights, "kept": kept, "matrices": matrices}


# -------------------------------------------------------------------- snapshot banks

def autocast(device, dtype):
    """dtype: "fp32" or "bf16", in which matrix products are computed."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def encode(model, data, dtype="fp32", tokens=8192):
    """Pooled vectors (N, D) of all examples, fp32, on the model's device. Dropout is off and no
    gradient is kept; the model's mode is restored. tokens: most in a batch, padding included."""
    # of several processes each encodes every n-th batch, and all have all vectors
    device, was_training = model.classifier.weight.device, model.training
    pooled = torch.zeros(len(data), model.config.hidden_size, device=device)
    model.eval()
    with torch.no_grad(), autocast(device, dtype), parametrize.cached():  # each W' is made once
        for i, batch in enumerate(batches_by_length(data.to(device), tokens)):
            if i % processes() == rank():
                pooled[batch["index"]] = model(*inputs(batch))[1].float()
    model.train(was_training)
    return summed(pooled)


def to_bank(pooled):
    """Vectors (N, D) as a bank's file has them: of length 1, in half precision."""
    return F.normalize(pooled, dim=-1).half().cpu()


@dataclass
class Ancestors:
    """What the model that is being pruned is compared with."""

    banks: dict  # "prc", "snc", "fic", as far as used: each a list of K tensors (N, D)
    logits: torch.Tensor  # (N, L), the teacher's
    labels: torch.Tensor  # (N,), those of a regression rounded to whole numbers


def store_ancestors(run, model, teacher, data):
    """Encode the training set by the pre-trained `model` and the `teacher`, which never change."""
    pooled = encode(teacher, data, run.args.dtype)  # (N, D)
    run.write("logits", teacher.classifier(pooled).detach().cpu())
    if "fic" not in run.args.without:
        run.write("fic-0", to_bank(pooled))
    if "prc" not in run.args.without:
        run.write("prc-0", to_bank(encode(model, data, run.args.dtype)))


def load_ancestors(run, data, device):
    """The `Ancestors` that a run has stored, its snapshots among them."""
    banks = {}
    for name, count in (("prc", 1), ("snc", run.snapshots), ("fic", 1)):
        if name not in run.args.without:
            banks[name] = [run.read(f"{name}-{i}", device) for i in range(count)]
    return Ancestors(banks, run.read("logits", device).to(device), data.labels.round())


def add_snapshot(run, model, data, ancestors):
    """Enter the model as it is now in SnC."""
    name = f"snc-{run.snapshots}"
    run.write(name, to_bank(encode(model, data, run.args.dtype)))
    ancestors.banks["snc"].append(run.read(name, ancestors.labels.device))
    run.snapshots += 1


# ------------------------------------------------------------------ contrastive loss

def contrastive_loss(queries, index, labels, bank, bank_labels, extra,
                     temperature=0.1, norm="official"):
    """Unsupervised and supervised contrastive loss of a batch against one bank, eq. (4) to (7).
    queries: (B, D) pooled vectors, not normalised. index, labels: (B,). bank: unit vectors, a
    tensor (N, K, D) or a list of K tensors (N, D) on any device. bank_labels: (N,). extra: (E,)
    rows of the bank, drawn without replacement. norm: "official" divides by the number of positives
    of the whole batch, as the published code does; "supcon" by B, as Khosla et al. (arXiv
    2004.11362) do. Returns [unsup, sup]: two scalars, not weighted."""
    q = F.normalize(queries, dim=-1)  # (B, D)
    if isinstance(bank, torch.Tensor):
        bank = bank.unbind(1)  # K of (N, D)
    # candidates: the other anchors, and what each ancestor made of the batch and of `extra`
    drawn = torch.cat([index, extra])  # (B + E,)
    vectors = torch.cat([ancestor.index_select(0, drawn.to(ancestor.device)).to(q.device)
                         for ancestor in bank]).to(q.dtype)  # (K (B + E), D)
    candidate_index = torch.cat([index, drawn.repeat(len(bank))])  # (C,), C_i of eq. (4)
    # similarities (bank times anchors is the faster order); no anchor is its own candidate
    scaled = q / temperature
    among = (scaled @ q.detach().T).fill_diagonal_(-torch.inf)  # (B, B), j != i of eq. (4)
    similarity = torch.cat([among, (vectors @ scaled.T).T], dim=1)  # (B, C), s_ic of eq. (5)
    log_p = similarity.log_softmax(dim=1)  # (B, C), eq. (5)
    # positives: the same example, or the same label
    same_example = index[:, None] == candidate_index  # (B, C), P^u of eq. (6)
    same_label = labels[:, None] == bank_labels[candidate_index]  # (B, C), P^s of eq. (6)
    losses = []
    for positive in (same_example, same_label):
        positive.fill_diagonal_(False)
        count = positive.sum(1)  # (B,), |P_i|
        per_anchor = torch.where(positive, log_p, 0).sum(1) / count  # (B,)
        divisor = count.sum() if norm == "official" else len(q)
        losses.append(-per_anchor.sum() / divisor)  # eq. (7)
    return losses


# ------------------------------------------------------------------------ total loss

def task_loss(logits, labels):
    """Cross-entropy, or the squared error of a regression. logits: (B, L), labels: (B,)."""
    if logits.size(1) == 1:
        return F.mse_loss(logits.squeeze(1), labels)
    return F.cross_entropy(logits, labels)


def distillation_loss(logits, teacher_logits, kd_temperature=2.0):
    """T^2 KL(teacher_T || student_T), mean over the batch; the squared error of a regression."""
    if logits.size(1) == 1:
        return F.mse_loss(logits, teacher_logits)
    student = (logits / kd_temperature).log_softmax(dim=1)  # (B, L)
    teacher = (teacher_logits / kd_temperature).log_softmax(dim=1)  # (B, L)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return kd_temperature ** 2 * divergence  # last term of eq. (8)


def cap_terms(logits, pooled, batch, ancestors, extra, args):
    """The weighted terms of eq. (8) as {"ce", "kd", "prc", "snc", "fic"}: all but CAP-soft's own.
    extra: rows; K ancestors use the first args.extra // K, together no more than args.extra."""
    # what the labels and the teacher say
    index, bank_labels = batch["index"], ancestors.labels
    terms = {"ce": args.w_ce * task_loss(logits, batch["labels"])}
    if "kd" not in args.without:
        terms["kd"] = args.w_kd * distillation_loss(logits, ancestors.logits[index],
                                                    args.kd_temperature)
    # what each kind of ancestor says
    for name, bank in ancestors.banks.items():
        if not bank:  # SnC, before the first snapshot
            continue
        unsup, sup = contrastive_loss(pooled, index, bank_labels[index], bank, bank_labels,
                                      extra[:args.extra // len(bank)], args.temperature, args.norm)
        terms[name] = args.w_unsup * unsup + args.w_sup * sup  # eq. (8)
    return terms


def soft_penalty(model, density, args):
    """CAP-soft's term of eq. (8): lambda(t), which grows as the threshold, times mean sigmoid."""
    means = [module.scores.sigmoid().mean() for module in masks_of(model)]
    penalty = args.penalty * (1 - density) / max(args.sparsity, 1e-9)
    return penalty * torch.stack(means).mean()  # eq. (8), CAP-soft


def gradient_shares(terms, pooled):
    """{term: |d term / d pooled| as a fraction of the sum over terms}: who steers the encoder."""
    norms = {}
    for name, term in terms.items():
        # it is 0 for the penalty on the scores
        grad, = torch.autograd.grad(term, pooled, retain_graph=True, materialize_grads=True)
        norms[name] = summed(grad.float().norm() ** 2).sqrt().item()
    total = sum(norms.values()) or 1.0
    return {name: norm / total for name, norm in norms.items()}


# -------------------------------------------------------------------------- training

LOG_EVERY = 50  # steps between two lines of log.jsonl
END_OF_LINE = "\r" if sys.stdout.isatty() else "\n"  # on a terminal the step line is rewritten
TEACHER, TEACHER_EPOCHS = -1, 3  # the stage before those of pruning, and its epochs


def stages(args):
    """Target sparsities, each for args.epochs: in CAP-f 10 %, 20 %, ..., args.sparsity."""
    if args.method != "structured":
        return [args.sparsity]
    return [i / 10 for i in range(1, 10) if i / 10 < args.sparsity] + [args.sparsity]


def make_optimizer(model, args):
    """Adam, with learning rates of their own for weights and scores, which each step sets."""
    weights, scores = [], []
    for name, parameter in model.named_parameters():
        group = scores if name.endswith("scores") else weights
        group.append(parameter)
    groups = [{"params": weights, "peak": args.lr}, {"params": scores, "peak": args.mask_lr}]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def randomness(*position):
    """All that is random in a step, as a function of its position (seed, epoch, batch): a numpy
    generator, the same in all processes, and torch's own, for dropout, different in each."""
    chance = np.random.default_rng(position)
    torch.manual_seed(int(chance.integers(2 ** 62)) + rank())
    return chance


def batch_terms(model, batch, ancestors, chance, args):
    """A batch's weighted terms of eq. (8), or without ancestors the cross-entropy alone, and
    the pooled vectors (b, D) of the part of it that this process computes: all, if it is one."""
    labels = batch["labels"]
    own_part = [tensor[rank()::processes()] for tensor in inputs(batch)]  # every n-th of n
    with autocast(labels.device, args.dtype):
        logits, own_pooled = model(*own_part)
    logits = gather(logits.float(), len(labels))  # (B, L)
    if ancestors is None:
        return {"ce": task_loss(logits, labels)}, own_pooled
    pooled = gather(own_pooled.float(), len(labels))  # (B, D)
    # E: rows of the training set; all, if it has no more
    size = len(ancestors.labels)
    rows = chance.choice(size, min(args.extra, size), replace=False)
    extra = sent(torch.from_numpy(rows), labels.device)
    return cap_terms(logits, pooled, batch, ancestors, extra, args), own_pooled


def train(run, model, data, ancestors=None, dev=None):
    """Train `model` on `data` (on its device) to the end of the run's stage; a teacher has no
    ancestors. dev: scored after each epoch of pruning. ValueError: a term or weight not finite."""
    args, device = run.args, model.classifier.weight.device
    # epochs and steps of the stage
    first, end = 0, TEACHER_EPOCHS
    if ancestors is not None:
        first, end = run.stage * args.epochs, (run.stage + 1) * args.epochs
    steps = math.ceil(len(data) / args.batch_size)  # of an epoch
    total = (end - first) * steps
    warmup = round(args.warmup * total)
    # model and optimizer, as they were if the run was stopped in this stage
    optimizer = make_optimizer(model, args)
    if run.saved is None:
        run.save(model, optimizer)  # a stop from here on leads back to here
    else:
        model.load_state_dict(run.saved["model"])
        optimizer.load_state_dict(run.saved["optimizer"])
        run.saved = None
    replica = model
    if processes() > 1:
        replica = DistributedDataParallel(model)
        replica.broadcast_buffers = False  # all processes have the same masks
    masked = ancestors is not None and args.method != "structured"
    say("step | kept | loss = weighted terms | lr | ms, ex/s, GB | eta")
    model.train()
    while run.epoch < end:
        last_line, unreported = time.perf_counter(), 0  # when it was, and steps since then
        for batch in batches(data, args.batch_size, args.seed, run.epoch, run.batch):
            step = (run.epoch - first) * steps + run.batch
            chance = randomness(args.seed, run.epoch, run.batch)
            # density and masks of this step, eq. (1) and (3), and its learning rates
            density = cubic_density(step, total, 1.0, 1.0 - args.sparsity, 2 * warmup, 3 * warmup)
            if masked and density < 1:  # before, the masks keep all
                if args.method == "soft":
                    set_soft_masks(model, density, args.sparsity)
                else:
                    set_masks(model, density)
            factor = linear_lr(step, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            # terms of the loss, eq. (8)
            terms, pooled = batch_terms(replica, batch, ancestors, chance, args)
            if masked and args.method == "soft":
                terms["l1"] = soft_penalty(model, density, args)
            # what is logged must be known before the graph is gone
            ends_epoch = run.batch == steps - 1
            to_log = step % LOG_EVERY == 0 or ends_epoch
            if to_log:
                check_finite(terms, step)
                values = {name: term.item() for name, term in terms.items()}
                shares = gradient_shares(terms, pooled)
            # backward, eq. (2), and the step
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.batch += 1
            unreported += 1
            # the log, and the step line on the terminal
            if to_log:
                seconds = (time.perf_counter() - last_line) / unreported  # of a step
                last_line, unreported = time.perf_counter(), 0
                entry = {"step": first * steps + step, "epoch": run.epoch,
                         "kept": 1 - sparsity_report(model)["total"], "lr": args.lr * factor,
                         "loss": sum(values.values()), **values, "gradient_share": shares,
                         "ms": 1000 * seconds,
                         "examples_per_second": min(args.batch_size, len(data)) / seconds}
                run.log(**entry)
                eta = timedelta(seconds=int(seconds * (total - step - 1)))
                line = f"{step + 1}/{total} | {step_line(entry, values, device)} | {eta}"
                say(line.ljust(119), end="\n" if ends_epoch else END_OF_LINE)
            # a save, but not between the end of an epoch and its snapshot
            if run.due() and not ends_epoch:
                run.save(model, optimizer)
        run.epoch, run.batch = run.epoch + 1, 0
        if ancestors is not None:
            after_epoch(run, model, data, ancestors, dev, entry)
    run.save(model, optimizer)


def after_epoch(run, model, data, ancestors, dev, entry):
    """A snapshot after an epoch of pruning, but not after the last one, and in CAP-f only at the
    end of a stage; and a score on 2,000 rows of `dev`. entry: the epoch's last one in the log."""
    args, epochs = run.args, run.args.epochs * len(stages(run.args))
    ends_stage = args.method != "structured" or run.epoch % args.epochs == 0
    if "snc" in ancestors.banks and ends_stage and run.epoch < epochs:
        add_snapshot(run, model, data, ancestors)
    scores = evaluate(model, args.task, {"dev": dev.head(2000)}, args.dtype)
    say(f"epoch {run.epoch}/{epochs}, dev: {show_scores(scores)}")
    run.log(step=entry["step"], epoch=entry["epoch"], kept=entry["kept"], dev=scores)


def check_finite(named, step):
    """ValueError with the name of the first of {name: tensor} that is not finite."""
    for name, tensor in named.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite at step {step}: try a smaller --lr")


def step_line(entry, terms, device):
    """An entry of the log as the middle columns of the step line."""
    losses = " ".join(f"{name} {value:.2f}" for name, value in terms.items())
    return (f"{entry['kept']:.1%} | {entry['loss']:.2f} = {losses} | {entry['lr']:.0e} | "
            f"{entry['ms']:.0f}, {entry['examples_per_second']:.0f}, "
            f"{peak_memory(device) / 1e9:.1f}")


def peak_memory(device):
    """Most bytes held so far: of GPU memory on CUDA, of the process elsewhere (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not there on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def evaluate(model, task, dev_sets, dtype="fp32"):
    """GLUE's scores on every dev set: {"accuracy": ..., "accuracy_mm": ...}, as fractions."""
    scores = {}
    for split, data in dev_sets.items():
        logits = model.classifier(encode(model, data, dtype)).detach()  # (N, L)
        predictions = logits.argmax(dim=1)
        if logits.size(1) == 1:
            predictions = logits[:, 0]
        for name, value in score(task, predictions.cpu(), data.labels).items():
            scores[name + split.removeprefix("dev")] = value
    return scores


def show_scores(scores):
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())


# --------------------------------------------------------------- structured pruning

def importance(run, model, data, ancestors):
    """CAP-f's first-order Taylor criterion: |dL/dm| summed over the batches of `data`, where a mask
    m = 1 multiplies what a head or a neuron puts out; dropout is off. Of feature f, which column f
    of W reads, dL/dm = sum_d W_df dL/dW_df. Returns two lists, (H,) a layer and (F,) a layer."""
    args, config = run.args, model.config
    # the matrices that read what heads and neurons put out, in turn, and the columns of a unit
    readers = []
    for layer in model.bert.encoder["layer"]:
        readers += [layer.attention["output"].dense.weight, layer.output.dense.weight]
    widths = [config.hidden_size // config.num_attention_heads, 1] * config.num_hidden_layers
    sums = [0.0] * len(readers)
    # the loss of every batch, as in a step, and its gradient for every unit
    model.eval()
    for i, batch in enumerate(batches(data, args.batch_size, args.seed, 0)):
        terms, _ = batch_terms(model, batch, ancestors, randomness(args.seed, 0, i, 1), args)
        gradients = torch.autograd.grad(sum(terms.values()), readers)
        for j, gradient in enumerate(gradients):
            columns = (readers[j].detach() * summed(gradient)).sum(0)  # by n processes: n-fold
            sums[j] += columns.view(-1, widths[j]).sum(1).abs()
    return sums[::2], sums[1::2]


def most_important(importances, count):
    """Bool masks, one a layer, of the `count` largest of all, each layer's L2 norm taken as 1."""
    scaled = torch.cat([vector / vector.norm().clamp_min(1e-20) for vector in importances])
    mask = torch.zeros_like(scaled, dtype=torch.bool)
    mask[scaled.argsort(descending=True, stable=True)[:count]] = True
    return mask.split([len(vector) for vector in importances])


def of_sizes(model, layer_sizes):
    """A new model like `model`, with so many heads and neurons a layer, and embeddings frozen."""
    small = BertClassifier(replace(model.config, layer_sizes=layer_sizes))
    small.bert.embeddings.requires_grad_(False)
    return small.to(model.classifier.weight)  # its device and dtype


def remove_units(model, heads, neurons):
    """A model with only the heads and neurons of these bool masks, one a layer: its matrices are
    smaller, `config.layer_sizes` tells how small, and it computes what the masked one would."""
    sizes = [[int(in_heads.sum()), int(in_neurons.sum())]
             for in_heads, in_neurons in zip(heads, neurons)]
    # the state of the smaller model is cut out of that of the model
    small, state = of_sizes(model, sizes), model.state_dict()
    width = model.config.hidden_size // model.config.num_attention_heads
    for name, tensor in state.items():
        if name.startswith("bert.encoder."):
            layer = int(name.split(".")[3])
            kept = neurons[layer]
            if ".attention." in name:
                kept = heads[layer].repeat_interleave(width)  # a head has several rows
            if ".self." in name or ".intermediate." in name:  # weights and biases that make a unit
                state[name] = tensor[kept]
            elif name.endswith("output.dense.weight"):  # weights that read it
                state[name] = tensor[:, kept]
    small.load_state_dict(state)
    return small


def remove_least_important(run, model, data, ancestors, sparsity):
    """A stage of CAP-f: the model without at least the fraction `sparsity` of its original heads,
    and of its neurons; one of each stays. NOTE deviation: a layer may lose all of them."""
    say(f"ranking heads and neurons on all examples; {sparsity:.0%} to go")
    config, masks = model.config, []
    for importances, units in zip(importance(run, model, data, ancestors),
                                  (config.num_attention_heads, config.intermediate_size)):
        count = math.floor((1 - sparsity) * (config.num_hidden_layers * units) + 1e-6)
        masks.append(most_important(importances, max(1, count)))
    return remove_units(model, *masks)


# --------------------------------------------------------- run folder and checkpoint

@dataclass
class Run:
    """Where a run is. With the states of model and optimizer and the banks' files this is all that
    a stopped run needs, since all that is random in a step is a function of its position."""

    args: argparse.Namespace
    config: dict  # what decides its result
    stage: int = TEACHER  # or the index in `stages`
    epoch: int = 0  # of the teacher's, or of the pruning's in all its stages
    batch: int = 0  # the next one of the epoch
    snapshots: int = 0  # that SnC holds
    dense: dict | None = None  # the teacher's scores
    log_size: int = 0  # bytes
    phase: str = "other"  # what the time is counted for
    seconds: dict = field(default_factory=lambda: dict.fromkeys(
        ("teacher", "banks", "prune", "other"), 0.0))

    def __post_init__(self):
        self.folder = self.args.out / "checkpoint"
        self.log_path = self.args.out / "log.jsonl"
        self.last_tick = time.perf_counter()
        self.saved = None  # what a stopped run had saved, until `train` has taken it over

    def begin(self):
        """Make the run folder, or take over the position of a stopped run and cut its log to what
        it was then. ValueError if another process uses the folder, or not all machines share it."""
        # its folder, for one run at a time
        out = self.args.out
        if rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            write_json(self.config, out / "config.json")
            self.folder.mkdir(exist_ok=True)
            self.log_file = open(self.log_path, "a", encoding="utf-8")
            try:
                import fcntl  # not there on Windows
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{out} is in use by another process") from None
            except (ImportError, OSError):  # the second: a file system that has no locks
                pass
        wait_for_all()
        for _ in range(40):  # a network folder may show it late
            if self.log_path.exists():
                break
            time.sleep(1)
        else:
            raise ValueError(f"{out} is not that of process 0: all machines must share it")
        # where it was
        if (self.folder / "state.pt").exists():
            self.saved = self.load("state")
            vars(self).update(self.saved["position"])
        wait_for_all()  # else process 0 could save before another has looked
        if rank() == 0:
            self.log_file.truncate(min(self.log_size, self.log_path.stat().st_size))

    def save(self, model, optimizer):
        """Write state.pt. ValueError if a weight is not finite: what was saved before is better."""
        check_finite(dict(model.named_parameters()), f"{self.batch} of epoch {self.epoch + 1}")
        self.enter(self.phase)  # counts the time, and starts the clock of `due` anew
        self.log_size = self.log_path.stat().st_size
        position = asdict(self)
        del position["args"], position["config"]
        self.write("state", {"position": position, "layer_sizes": model.config.layer_sizes,
                             "model": model.state_dict(), "optimizer": optimizer.state_dict()})

    def due(self):
        """Whether it is time to save."""
        return time.perf_counter() - self.last_tick >= 60 * self.args.checkpoint_minutes

    def write(self, name, content):
        """Process 0 writes tensors, numbers and the like to checkpoint/NAME.pt."""
        if rank() == 0:
            with replacing(self.folder / f"{name}.pt") as file:
                torch.save(content, file)

    def load(self, name, mmap=False):
        """What checkpoint/NAME.pt holds. ValueError if it cannot be read."""
        path = self.folder / f"{name}.pt"
        try:
            return torch.load(path, map_location="cpu", mmap=mmap)
        except Exception:  # torch raises half a dozen types here
            raise ValueError(f"{path} cannot be read: if damaged, delete {self.args.out}") from None

    def read(self, name, device):
        """The tensor in checkpoint/NAME.pt: on a GPU if it takes at most a twentieth of what is
        free there (10 epochs have 11), else memory-mapped: what fits stays in memory."""
        wait_for_all()  # until it is written
        tensor = self.load(name, mmap=True)
        if device.type == "cuda" and tensor.nbytes <= torch.cuda.mem_get_info(device)[0] / 20:
            return tensor.to(device)
        return tensor

    def log(self, **entry):
        """Append a line to log.jsonl."""
        if rank() == 0:
            print(json.dumps({"phase": self.phase, **entry}), file=self.log_file, flush=True)
            os.fsync(self.log_file.fileno())  # else a power cut could leave less than state.pt says

    def enter(self, phase):
        """Count the time since the last call for the phase that ends, and begin another."""
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.last_tick
        self.phase, self.last_tick = phase, now


def run_config(args, data, dev_sets, model, teacher):
    """What decides the result of a run: flags, rows, weights of the models it is given."""
    digest = hashlib.sha256(str(model.config).encode())
    for module in (model, teacher):
        if module is not None:
            for tensor in module.state_dict().values():
                digest.update(tensor.cpu().numpy())
    config = {name: value for name, value in vars(args).items()
              if name not in ("out", "device", "checkpoint_minutes")}  # the machine's
    return config | {"train_sha256": data.sha256(), "weights_sha256": digest.hexdigest(),
                     "dev_sha256": [rows.sha256() for rows in dev_sets.values()]}


def finished_record(run):
    """The record of a finished run, else {}. ValueError if its folder holds something else."""
    # whose folder is it? models and data are known by their content, not by where they lie
    out = run.args.out
    before = read_json(out / "config.json", {})
    if before:
        differing = [f"{name} {before.get(name)!s:.20}" for name in before | run.config
                     if name not in ("model", "teacher", "data_dir")
                     and run.config.get(name) != before.get(name)]
        if differing:
            raise ValueError(f"{out} has a run with {', '.join(differing)}; it goes on with these, "
                             "another run needs another --out")
    elif any(out.glob("[!.]*")):
        raise ValueError(f"{out} is no run folder: choose another --out")
    return read_json(out / "record.json", {})


def export(model, tokenizer, task, folder):
    """Save `model` with its labels and tokenizer, ready for transformers."""
    model.config.id2label = dict(enumerate(TASKS[task].words))
    if rank() == 0:
        save_pretrained(model, folder)
        save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    wait_for_all()


def make_record(run, model, data, dev_sets):
    """What a figure in a table must be able to show for itself. model: the exported one."""
    args, device = run.args, model.classifier.weight.device
    # scores, and the speed of both trainings
    pruned, sparsity = evaluate(model, args.task, dev_sets), sparsity_report(model)
    run.enter("other")
    speeds, pruning_epochs = {}, args.epochs * len(stages(args))
    for phase, epochs in (("teacher", TEACHER_EPOCHS), ("prune", pruning_epochs)):
        if run.seconds[phase] > 0:  # a teacher may have been given
            speeds[phase] = len(data) * epochs / run.seconds[phase]
    source = b"".join((HERE / name).read_bytes()
                      for name in ("bert_min.py", "data_glue.py", "cap_min.py"))
    machine = (f"{platform.machine()}, {device.type}, {torch.get_num_threads()} threads, "
               f"{processes()} processes")
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "machine": machine}
    examples = {split: len(rows) for split, rows in {"train": data, **dev_sets}.items()}
    return {"config": run.config, "seed": args.seed, "versions": versions,
            "source_sha256": hashlib.sha256(source).hexdigest(),
            "train_sha256": run.config["train_sha256"], "examples": examples,
            "dense": run.dense, "pruned": pruned, "sparsity": sparsity,
            "seconds": run.seconds | {"total": sum(run.seconds.values())},
            "examples_per_second": speeds, "peak_memory_bytes": peak_memory(device)}


CURVE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 300" font-size="13">
<rect width="600" height="300" fill="white"/>
<text x="60" y="24">kept: gray, dev {metric}: blue, dense {dense:.3f}: red, {steps} steps</text>
<text x="40" y="44">1</text><text x="40" y="264">0</text>
<style>path, polyline {{fill: none; vector-effect: non-scaling-stroke}}</style>
<g transform="translate(60,260) scale({scale},-220)">
<path d="M0,1 V0 H{steps}" stroke="gray"/><polyline points="{kept}" stroke="gray"/>
<polyline points="{dev}" stroke="blue"/><path d="M0,{dense} H{steps}" stroke="red"/></g></svg>
"""


def draw_curve(run):
    """curve.svg of the pruning phase: what was kept, and the dev score after each epoch."""
    metric, kept, dev = next(iter(run.dense)), "", ""
    for line in run.log_path.read_text().splitlines():
        entry = json.loads(line)
        if entry["phase"] == "prune":
            kept += f"{entry['step']},{entry['kept']} "
            if "dev" in entry:
                dev += f"{entry['step']},{entry['dev'][metric]} "
    steps = entry["step"] + 1
    (run.args.out / "curve.svg").write_text(CURVE.format(
        metric=metric, dense=run.dense[metric], steps=steps, scale=500 / steps, kept=kept, dev=dev))


def print_summary(args, record):
    """The end of a run: scores of both models, and where the pruned one lies."""
    say(f"\ndense, dev: {show_scores(record['dense'])}")
    say(f"pruned, dev: {show_scores(record['pruned'])}")
    say(f"pruned model: {args.out / 'model'}, sparsity {record['sparsity']['total']:.2%}")


# ----------------------------------------------------------------- several processes

def processes():
    """How many processes torchrun started for this run: 1 without it."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """The number of this process, from 0. Process 0 alone writes files and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def say(words, end="\n"):
    if rank() == 0:
        print(words, end=end, flush=True)


def wait_for_all():
    if processes() > 1:
        distributed.barrier()


def summed(tensor):
    """Sum of `tensor` over all processes, in place."""
    if processes() > 1:
        distributed.all_reduce(tensor)
    return tensor


def gather(rows, size):
    """Rows (B, D) of the whole batch from those (b, D) of each process's part. All n compute its
    loss, but each the gradient of its own rows, n times: DistributedDataParallel takes the mean."""
    whole = rows.new_zeros(size, rows.size(1))
    whole[rank()::processes()] = rows.detach()
    summed(whole)  # the rows of all, without a gradient
    whole[rank()::processes()] = rows  # one's own, with it
    whole.register_hook(lambda gradient: gradient * processes())
    return whole


def join_processes():
    """Under torchrun: one process of a group (gloo, or nccl where there are GPUs)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=2))  # for downloads


# ---------------------------------------------------------------------- command line

DEMO = {"model": str(HERE / "demo" / "model"), "epochs": 6, "lr": 1e-3, "max_length": 32}
STRUCTURED = {"sparsity": 0.9, "epochs": 2, "batch_size": 16, "lr": 2e-5, "w_unsup": 0.3,
              "w_sup": 3.0, "kd_temperature": 1.0}


def number(kind, low, below=2 ** 31):
    """A type of argparse, "number" in its errors: one of `kind` with low <= number < below."""
    def number(text):
        if not low <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {below})")
        return kind(text)
    return number


whole_number, fraction = number(int, 1), number(float, 0, 1)
positive, not_negative = number(float, 1e-12), number(float, 0)

# {group: [(flag, default, type or choices, help), ...]}, the published recipe for BERT-base
FLAGS = {
    "what": [
        ("--task", "demo", TASKS, "GLUE task, snli, or demo/'s small world with its own model"),
        ("--sparsity", 0.97, fraction, "fraction of encoder weights to prune"),
        ("--method", "soft", ("soft", "movement", "magnitude", "structured"),
         "soft: one threshold for all scores (CAP-soft); movement: top-k in each matrix (CAP-m); "
         "magnitude: top-k of |W|; structured: heads and neurons go (CAP-f; own defaults)"),
        ("--model", "bert-base-uncased", str, "pre-trained model, or its folder"),
        ("--teacher", None, os.path.abspath, "folder of a fine-tuned model; None: is made first"),
        ("--data-dir", None, os.path.abspath, "folder with the task's folder; None: downloaded"),
        ("--out", None, Path, "None: runs/TASK-SPARSITY[-METHOD][-no-TERM...]-seedSEED"),
        ("--seed", 0, number(int, 0), "of everything random"),
    ],
    "training": [
        ("--epochs", 10, whole_number, "of pruning, or of each stage; a teacher has 3"),
        ("--batch-size", 32, whole_number, "examples a step"),
        ("--lr", 3e-5, positive, "peak learning rate of weights"),
        ("--mask-lr", 1e-2, positive, "peak learning rate of scores"),
        ("--max-length", 128, number(int, 3), "tokens an example, at most"),
        ("--max-train", None, whole_number, "training rows, drawn by a fixed seed; None: all"),
        ("--warmup", 0.09, fraction, "share of steps, below 0.2: rates rise; 2x dense, 3x cool"),
        ("--score-init", "auto", ("auto", "zero", "magnitude"), "auto: zero from 30,000 steps on"),
    ],
    "loss, eq. (4) to (8)": [
        ("--temperature", 0.1, positive, "tau of eq. (5)"),
        ("--w-unsup", 0.1, not_negative, "weight of the unsupervised terms"),
        ("--w-sup", 10.0, not_negative, "weight of the supervised terms"),
        ("--w-ce", 0.1, not_negative, "weight of the cross-entropy"),
        ("--w-kd", 0.9, not_negative, "weight of the distillation"),
        ("--kd-temperature", 2.0, positive, "T of the distillation, eq. (8)"),
        ("--extra", 4096, whole_number, "candidates beside the batch"),
        ("--norm", "official", ("official", "supcon"), "eq. (7)"),
        ("--penalty", 680.0, not_negative, "lambda_f of eq. (8), of CAP-soft"),
        ("--without", [], ("prc", "snc", "fic", "kd"), "terms to leave out"),
    ],
    "machine": [
        ("--device", "auto", str, "auto, cuda, cuda:1, mps or cpu"),
        ("--dtype", "auto", ("auto", "fp32", "bf16"), "of the matrix products"),
        ("--checkpoint-minutes", 10.0, not_negative, "between saves, from which a run can go on"),
    ],
}


def parse(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--task TASK] [--sparsity S] [...]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, default, kind, meaning in flags:
            options = {"default": default, "help": meaning}
            options["type" if callable(kind) else "choices"] = kind
            if default == []:
                options["nargs"] = "+"
            group.add_argument(flag, **options)
    # parsed twice, since --method and --task change the defaults of the others
    args = parser.parse_args(argv)
    if args.method == "structured":
        parser.set_defaults(**STRUCTURED)
    if args.task == "demo":
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    args.without = sorted(set(args.without))
    if Path(args.model).is_dir():  # else it is a name
        args.model = os.path.abspath(args.model)
    # the run folder is named by what tells runs apart
    if args.out is None:
        name = f"{args.task}-{args.sparsity:g}"
        if args.method != "soft":
            name += f"-{args.method}"
        for term in args.without:
            name += f"-no-{term}"
        args.out = Path("runs", f"{name}-seed{args.seed}")
    return args


def choose_device(args):
    """The device; settles --dtype. ValueError if the machine does not have it."""
    # of several processes each has a GPU of its own
    name = args.device
    if name == "auto":
        name = "cpu"
        if torch.accelerator.is_available():
            name = torch.accelerator.current_accelerator().type
    if name.startswith("cuda") and processes() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {error}") from None
    # matrix products in bf16, where it is fast
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if args.dtype == "auto":
        args.dtype = "bf16" if has_bf16 else "fp32"
    return device


def settle_schedule(args, size):
    """Settles --score-init. ValueError unless `size` examples give the schedule room."""
    if args.method in ("magnitude", "structured"):
        args.score_init = "none"  # there are no scores
    total = args.epochs * math.ceil(size / args.batch_size)
    warmup = round(args.warmup * total)
    if args.method != "structured" and (warmup < 1 or total < 5 * warmup + 2):  # CAP-f has none
        raise ValueError(f"{total} steps with --warmup {args.warmup} have no room for the schedule")
    if args.score_init == "auto":
        args.score_init = "zero" if total >= 30_000 else "magnitude"


def load_data(args, tokenizer, config):
    """(training set, {split: dev set}), encoded. ValueError if they do not fit the model."""
    # does the model know all pieces and positions?
    if len(tokenizer.listed) > config.vocab_size:
        raise ValueError(f"{args.model} lists more pieces than its model knows")
    if args.max_length > config.max_position_embeddings:
        raise ValueError(f"--max-length: the model has {config.max_position_embeddings} positions")
    encoded = {}
    for split in TASKS[args.task].files:
        rows = load(args.task, split, args.data_dir)
        if split == "train" and args.max_train is not None:
            # some rows, in their order and the same for every seed
            count = min(args.max_train, len(rows))
            chosen = sorted(random.Random(0).sample(range(len(rows)), count))
            rows = [rows[i] for i in chosen]
        encoded[split] = encode_task(rows, tokenizer, args.max_length)
    return encoded.pop("train"), encoded


def label_order(labels, words):
    """The output of a model for each of the task's words, None where it has none, by its labels: in
    {output: label} a word, its beginning (neg) or number. Without labels the order is trusted."""
    if not labels or not words or labels == dict(enumerate(words)):
        return list(range(max(1, len(words))))
    outputs = {}
    for output, label in labels.items():
        label = label.lower()
        for i, word in enumerate(words):
            if word.lower().startswith(label) or label in (str(i), f"label_{i}"):
                outputs[word] = output
    return [outputs.get(word) for word in words]


def load_fine_tuned(folder, args, config):
    """A model fine-tuned on the task, with its outputs in the order of the task's words. ValueError
    if its labels are others, or its inputs or, for FiC, its vectors not those of the `config`."""
    model, words = from_pretrained(folder, num_labels=None), TASKS[args.task].words
    labels = model.config.id2label
    order = label_order(labels, words)
    if set(order) != set(range(model.config.num_labels)):
        raise ValueError(f"{folder}: its labels are {labels}, those of {args.task} are {words}")
    for parameter in model.classifier.parameters():
        parameter.data = parameter.data[order]
    same = ["vocab_size", "max_position_embeddings", "type_vocab_size"]
    if "fic" not in args.without:
        same.append("hidden_size")
    for name in same:
        size, wanted = getattr(model.config, name), getattr(config, name)
        if size != wanted:
            raise ValueError(f"{folder}: its {name} is {size}, that of --model is {wanted}")
    return model


def tune_cpu():
    """What makes a step on a CPU faster and changes nothing else, before torch's threads start."""
    # numbers below 1e-38 are 0: Adam's momentum of pruned weights, on which processors take long
    torch.set_flush_denormal(True)
    # keep oneDNN's code for 4,096 shapes, each 0.4 MB and 1 ms to make: a run of MNLI has 2,000
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    # glibc keeps what is freed: to map each step's gradients anew takes up to a tenth of a step
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, at its largest
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def cap(args):
    """Begin the run that `args` ask for, go on with it, or show it finished. Returns its record."""
    # the input: all of it is looked at before anything is written
    device, words = choose_device(args), TASKS[args.task].words
    tokenizer = load_tokenizer(model_folder(args.model))
    torch.manual_seed(args.seed)  # of the new classifier
    model, teacher = from_pretrained(args.model, max(1, len(words))), None
    if args.teacher is not None:
        teacher = load_fine_tuned(args.teacher, args, model.config)
    data, dev_sets = load_data(args, tokenizer, model.config)
    settle_schedule(args, len(data))
    if model.config.layer_sizes is not None:
        raise ValueError(f"{args.model}: some of its heads or neurons are gone already")
    run = Run(args, run_config(args, data, dev_sets, model, teacher))
    record = finished_record(run)
    wait_for_all()  # else one could write before another has looked
    if record:
        shutil.rmtree(run.folder, ignore_errors=True)  # of a stop at the very end
        say(f"{args.out} is finished:")
        print_summary(args, record)
        return record
    run.begin()
    model.to(device)
    data = data.to(device)  # so that batches are cut there
    say(f"{len(data)} examples on {device}, scores from {args.score_init}, {args.dtype}, "
        f"run folder {args.out}")
    if run.saved is not None:
        say(f"goes on after {run.epoch} epochs and {run.batch} batches of its {run.phase} phase")

    # the teacher, a copy of the model, and what both make of the training set
    if run.stage == TEACHER:
        if teacher is None:
            run.enter("teacher")
            teacher = copy.deepcopy(model)
            train(run, teacher, data)
            export(teacher, tokenizer, args.task, args.out / "teacher")
        run.enter("other")
        run.dense = evaluate(teacher.to(device), args.task, dev_sets)
        say(f"dense, dev: {show_scores(run.dense)}")
        labels = teacher.config.id2label or {}
        if run.dense.get("accuracy", 1) < 0.4 and set(labels.values()) != set(words):
            raise ValueError(f"{args.teacher} is mostly wrong: write an id2label, {words} in the "
                             f"order of its outputs, into its config, and delete {args.out}")
        run.enter("banks")
        store_ancestors(run, model, teacher, data)
        run.stage = run.epoch = run.batch = 0
    del teacher  # all that is needed of it is stored
    ancestors = load_ancestors(run, data, device)

    # pruning, in one stage or, of heads and neurons, in several
    run.enter("prune")
    structured = args.method == "structured"
    if not structured:
        add_masks(model, args.score_init)
    elif run.saved is not None:
        model = of_sizes(model, run.saved["layer_sizes"])
    for run.stage in range(run.stage, len(stages(args))):  # it is part of what `save` writes
        if structured and run.saved is None:
            model = remove_least_important(run, model, data, ancestors, stages(args)[run.stage])
        train(run, model, data, ancestors, dev_sets["dev"])
    del ancestors  # else some systems cannot remove their files
    if not structured:
        apply_masks(model)
    export(model, tokenizer, args.task, args.out / "model")

    # the record, of the exported folder
    run.enter("other")
    model = from_pretrained(args.out / "model", num_labels=None).to(device)
    record = make_record(run, model, data, dev_sets)
    if rank() == 0:
        draw_curve(run)
        write_json(record, args.out / "record.json")
        shutil.rmtree(run.folder, ignore_errors=True)  # nothing of it is needed any more
    print_summary(args, record)
    return record


def main(argv=None):
    """Exit status: 0, 2 after a one-sentence error, 130 after Ctrl-C."""
    tune_cpu()
    status = 0
    try:
        args = parse(argv)
        join_processes()
        cap(args)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).partition("\n")[0] or "out of memory"
        sys.stderr.write(f"error: {reason}\n")  # in one go, if several processes have one to tell
        status = 2
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on from what was saved last")
        status = 130
    if processes() > 1:
        os._exit(status)  # Python's own end aborts if a thread of gloo still holds a tensor then
    return status


if __name__ == "__main__":
    sys.exit(main())
