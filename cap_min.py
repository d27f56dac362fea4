"""CAP, ContrAstive Pruning, in one file: fine-tune BERT on a task while it is pruned to 3 % of its
encoder weights, and let contrastive terms against its own ancestors keep what they knew.

Paper:  Xu et al., "From Dense to Sparse: Contrastive Pruning for Better Pre-trained Language Model
        Compression" (arXiv 2112.07198, AAAI 2022). Under its losses: CAP-m and CAP-soft (movement,
        Sanh et al., arXiv 2005.07683), magnitude, CAP-f (heads and neurons by Taylor importance,
        Michel et al., arXiv 1905.10650).
Run:    python cap_min.py                                   the demo, in 3 minutes on a laptop
        python cap_min.py --task mnli --sparsity 0.97       the published recipe

Glossary: symbol of the equations -> name in the code, shape
    x_i, y_i  index, labels (B,)      example i, as its row in the training set, and its label
    z_i       pooled (B, D)           tanh-pooled [CLS] of the model that is being pruned
    q_i       q (B, D)                anchor, z_i / |z_i|. NOTE deviation: no dropout on z_i
    b_j^m     bank[m][j] (D,)         unit pooled vector of example j by ancestor m:
                                      PrC pre-trained, SnC earlier snapshots, FiC fine-tuned
    I, E      index, extra            the batch, and further examples drawn from the training set
    C_i, P_i  candidates (C, D)       what anchor i is compared with, and the positives among it
    tau       temperature             0.1
    W, S, M   weight, scores, mask    a matrix, how much each weight matters, 1 = kept, 0 = pruned
    d(t)      density                 share of weights kept at step t; sparsity = 1 - density
    t_0, t_1  warm, cool              dense steps at the start, steps of final sparsity at the end
    w_.       args.w_unsup, ...       weights of the terms of the loss
Sizes: B batch, N training examples, K ancestors in a bank, D hidden size, C candidates, L labels.
The equations (1) to (8) are written out in README.md; each is marked here as `# eq. (n)`.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bert_min import (BertClassifier, from_pretrained, model_folder, replacing,
                      save_pretrained)
from data_glue import TASKS, batches, encode_task, load, load_tokenizer, save_tokenizer, score

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------- masks


def topk_mask(scores, density):
    """Bool mask, shaped like `scores`, of its k = round(density * numel) largest entries, at
    least 1. Exactly k are kept: of equal scores the first by index. Eq. (1)."""
    return topk(scores, density)[0]


def topk(scores, density, guess=None):
    """(mask, threshold): `topk_mask` and the smallest score that it keeps; None in place of this
    on a GPU, and where all are kept. guess: a number near the threshold, such as that of the step
    before. The mask is the same without it, but takes longer."""
    flat = scores.detach().flatten()
    k = max(1, round(density * flat.numel()))  # eq. (1)
    if k >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool), None
    if flat.device.type != "cpu":
        return topk_by_edge(flat, k).view_as(scores), None
    mask, threshold = topk_near(flat.numpy(), k, guess)
    return torch.from_numpy(mask).view_as(scores), threshold


def topk_by_edge(flat, k):
    """`topk_mask` of a vector on a GPU, which selects without sorting."""
    edge = flat.topk(k, sorted=False).values.min()
    above, ties = flat > edge, flat == edge
    return above | ties & (ties.cumsum(0) <= k - above.sum())


def topk_near(flat, k, guess):
    """`topk` of a numpy vector without sorting it all: a count tells how far off `guess` is, a
    sorted sample which band of numbers lies between, and only that has to be searched."""
    stride = 127  # a prime, not to fall into step with the rows of the matrix
    if guess is None:
        sample = np.sort(flat[::stride])
        guess = sample[int(len(sample) * (1 - k / len(flat)))]
        mask = flat > guess
    else:
        mask = flat > guess
        sample = np.sort(flat[::stride])  # which the comparison has brought into the cache
    excess = np.count_nonzero(mask) - k
    miss = excess / stride  # in places of the sample
    place = np.searchsorted(sample, guess)
    place += miss + math.copysign(2 + 4 * math.sqrt(abs(miss)), miss)
    edge = sample[int(place)] if 0 <= place < len(sample) else math.copysign(math.inf, miss)
    mask, wider = (mask, flat >= edge) if miss < 0 else (flat > edge, mask)
    band = np.flatnonzero(mask ^ wider)
    lacking = (0 if miss < 0 else len(band)) - excess  # so many of the band are kept as well
    if not 0 < lacking <= len(band):  # the sample misled: search everything
        mask, band, lacking = np.zeros(len(flat), bool), np.arange(len(flat)), k
    values = flat[band]
    threshold = np.partition(values, -lacking)[-lacking]
    mask[band] = values >= threshold
    surplus = np.count_nonzero(values >= threshold) - lacking
    mask[band[values == threshold][::-1][:surplus]] = False
    return mask, threshold


class StraightThrough(torch.autograd.Function):
    """W' = W * M, where the gradient of W' reaches the scores as if M were S itself. Eq. (2). Under
    autocast W' has its number type: what follows need not cast it."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        mask = mask.view(torch.uint8)  # which torch multiplies faster than bools
        ctx.save_for_backward(weight, mask)
        return weight.to(dtype) * mask  # eq. (1)

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        grad = grad.to(weight.dtype, copy=True)  # which may then be changed in place
        to_scores = grad * weight if ctx.needs_input_grad[1] else None  # eq. (2)
        return grad.mul_(mask), to_scores, None  # eq. (2)


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a mask, the top-k of trainable `scores`. They
    start at 0 (`score_init="zero"`, as published), or at |W| / std(W) ("magnitude"), which short
    runs need: they end before scores from 0 have learnt what matters. None: magnitude pruning,
    there are no scores and |W| stands for them."""

    def __init__(self, linear, score_init="zero"):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        weight = linear.weight.detach()
        scale = 0.0 if score_init == "zero" else 1 / weight.std().clamp_min(1e-12)
        self.scores = nn.Parameter(weight.abs() * scale) if score_init else None
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.threshold = None  # of the last mask: about where the next one's will be
        self.product = None  # W', where `masked_once` made it

    def masked_weight(self):
        return StraightThrough.apply(self.weight, self.scores, self.mask)

    def forward(self, x):
        weight = self.masked_weight() if self.product is None else self.product
        return F.linear(x, weight, self.bias)


@contextlib.contextmanager
def masked_once(model):
    """Within it the W' of each layer is made once, not for every batch: nothing may change it."""
    layers = [layer for layer in model.modules() if isinstance(layer, MaskedLinear)]
    for layer in layers:
        layer.product = layer.masked_weight()
    try:
        yield
    finally:
        for layer in layers:
            layer.product = None


def encoder_linears(model):
    """{name: linear layer} of everything that is pruned: 12 x 6 matrices in BERT-base."""
    return {name: layer for name, layer in model.named_modules()
            if name.startswith("bert.encoder.") and isinstance(layer, nn.Linear)}


def replace_linears(model, make):
    """Put make(layer) in the place of every linear layer of the encoder."""
    for name, layer in encoder_linears(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(layer))
    return model


def add_masks(model, score_init):
    """Make every linear layer of the encoder a `MaskedLinear` and freeze the embeddings."""
    model.bert.embeddings.requires_grad_(False)
    return replace_linears(model, lambda layer: MaskedLinear(layer, score_init))


def set_masks(model, density):
    """Eq. (1) for every matrix, before each step. NOTE deviation: so the mask that is exported is
    the one that the last step was trained with, not the top-k of the scores after it."""
    for layer in encoder_linears(model).values():
        scores = layer.weight.abs() if layer.scores is None else layer.scores
        layer.mask, layer.threshold = topk(scores, density, layer.threshold)


def set_soft_masks(model, threshold, density, exact):
    """CAP-soft: keep the weights of all matrices with sigmoid(score) > threshold, but at most the
    share `density` of all of them, and exactly this share if `exact`: those with the largest
    scores. Returns the share over the threshold."""
    layers = encoder_linears(model).values()
    scores = torch.cat([layer.scores.detach().flatten() for layer in layers])
    mask = scores > math.log(threshold / (1 - threshold)) if threshold else scores > -math.inf
    over = int(mask.count_nonzero()) / len(mask)
    if exact or over > density:
        mask = topk_mask(scores, density)
    for layer, part in zip(layers, mask.split([layer.scores.numel() for layer in layers])):
        layer.mask = part.view_as(layer.scores)
    return over


def mean_sigmoid(model):
    """What CAP-soft penalises: mean over matrices of the mean of sigmoid(S). Eq. (8)."""
    means = [layer.scores.sigmoid().mean() for layer in encoder_linears(model).values()]
    return torch.stack(means).mean()


def apply_masks(model):
    """Replace every `MaskedLinear` by a plain layer whose pruned weights are exactly 0."""

    def plain(layer):
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach().masked_fill(~layer.mask, 0.0))
        linear.bias = layer.bias
        return linear

    return replace_linears(model, plain)


# -------------------------------------------------------------------------- schedule


def cubic_density(step, total, start, end, warm, cool):
    """Share of weights kept at `step` of `total`: `start` for the first `warm` steps, `end` for
    the last `cool`, and a cubic in between that prunes fast first, then ever slower. Eq. (3)."""
    if step < warm:
        return start
    if step >= total - cool:
        return end
    return end + (start - end) * (1 - (step - warm) / (total - warm - cool)) ** 3  # eq. (3)


def linear_lr(step, total, warmup):
    """Factor on the learning rate: linear from 0 over `warmup` steps, then linear down to 0."""
    return step / warmup if step < warmup else (total - step) / max(1, total - warmup)


# ------------------------------------------------------------------- sparsity report


def sparsity_report(model):
    """{"total": share of encoder weights that are exactly 0 or removed, "weights": how many there
    were, "kept": how many are left, "matrices": {name: share}}."""
    with torch.device("meta"):
        whole = BertClassifier(dataclasses.replace(model.config, layer_sizes=None))
    sizes = {name: layer.weight.numel() for name, layer in encoder_linears(whole).items()}
    kept = {name: int((layer.weight * getattr(layer, "mask", 1)).count_nonzero())
            for name, layer in encoder_linears(model).items()}
    total, left = sum(sizes.values()), sum(kept.values())
    return {"total": 1 - left / total, "weights": total, "kept": left,
            "matrices": {name + ".weight": 1 - kept[name] / sizes[name] for name in sizes}}


# ----------------------------------------------------------------- several processes


def processes():
    """How many processes torchrun started for this run: 1 without it."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """The number of this process, from 0. Process 0 alone writes files and prints progress."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait_for_all():
    if processes() > 1:
        distributed.barrier()


@contextlib.contextmanager
def process_0_first():
    """Has process 0 run its body before the others: what it puts into the caches they find."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def summed(tensor):
    """Sum of `tensor` over all processes, in place."""
    if processes() > 1:
        distributed.all_reduce(tensor)
    return tensor


def share(batch):
    """The examples of a batch that are this process's: every n-th of n processes."""
    return {name: tensor[rank()::processes()] for name, tensor in batch.items()}


class Gather(torch.autograd.Function):
    """From the rows (b, D) of each process's share to those of the whole batch (B, D)."""

    @staticmethod
    def forward(ctx, rows, size):
        whole = rows.new_zeros(size, rows.size(1))
        whole[rank()::processes()] = rows
        return summed(whole)

    @staticmethod
    def backward(ctx, grad):
        return grad[rank()::processes()] * processes(), None  # DDP divides by as many


def gather(rows, size):
    """Every process computes the loss of the whole batch, but its gradient reaches only the rows
    of its own share: summed over processes it is the gradient that one process would have."""
    return rows if processes() == 1 else Gather.apply(rows, size)


# -------------------------------------------------------------------- snapshot banks


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def encode(model, data, dtype=torch.float32, tokens=None):
    """Pooled vectors (N, D) of all examples, fp32, on the model's device. Dropout is off and no
    gradient is kept; the model's mode is restored. tokens: most in a batch, padding included.
    Of several processes each encodes every n-th batch; all have all vectors."""
    device, was_training = model.classifier.weight.device, model.training
    tokens = tokens or (2 ** 11 if device.type == "cpu" else 2 ** 16)
    pooled, turn = torch.zeros(len(data), model.config.hidden_size, device=device), 0
    lengths, order = data.lengths.sort(descending=True)  # alike in length: little padding
    model.eval()
    with torch.no_grad(), autocast(device, dtype), masked_once(model):
        while len(order):
            count = max(1, tokens // int(lengths[0]))
            if turn % processes() == rank():
                batch = move(data.batch(order[:count]), device)
                pooled[batch["index"]] = model(*inputs(batch))[1].float()
            lengths, order, turn = lengths[count:], order[count:], turn + 1
    model.train(was_training)
    return summed(pooled)


def move(batch, device):
    on_gpu = device.type == "cuda"  # which then need not wait for what it was given before
    return {name: tensor.to(device, non_blocking=on_gpu) for name, tensor in batch.items()}


def inputs(batch):
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


class Banks:
    """The banks of the names "prc", "snc", "fic" that are used. Each is a list of K tensors, the
    unit pooled vectors (N, D) of all examples by one ancestor, in half precision."""

    def __init__(self, names, device, keep=None):
        """device: where the vectors lie. keep(stem, tensor) writes a tensor for a later sitting
        and returns it as it lies in the file."""
        self.bank, self.device, self.keep = {name: [] for name in names}, device, keep

    def add(self, name, pooled, place=0):
        """The pooled vectors (N, D) of ancestor number `place` of a bank."""
        vectors = F.normalize(pooled, dim=-1).half()
        self.put(name, self.keep(f"{name}-{place}", vectors) if self.keep else vectors, place)

    def put(self, name, vectors, place):
        self.bank[name][place:] = [vectors.to(self.device)]

    def restore(self, kept):
        """Take over what an earlier sitting kept: {stem: tensor}."""
        for stem, vectors in kept.items():
            name, _, place = stem.partition("-")
            if name in self.bank:
                self.put(name, vectors, int(place))

    def items(self):
        """(name, bank) of those that hold an ancestor yet: SnC comes with epoch 2."""
        return [(name, bank) for name, bank in self.bank.items() if bank]


def new_banks(args, data, model, checkpoints):
    """Empty banks, on a GPU if they take at most half of what is free there. Elsewhere they are
    memory-mapped files in the run folder: the system keeps in memory what fits."""
    names = [name for name in ("prc", "snc", "fic") if name not in args.without]
    snapshots = pruning_epochs(args) // snapshot_every(args) - 1
    count = sum(snapshots if name == "snc" else 1 for name in names)
    size, device = count * len(data) * model.config.hidden_size * 2, model.classifier.weight.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds back counts as taken
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 2:
        device = torch.device("cpu")
    place = device if device.type == "cuda" else "memory-mapped files" if checkpoints else "memory"
    print(f"banks: {count} x {len(data)} x {model.config.hidden_size} in half precision, "
          f"{size / 1e9:.2f} GB, in {place}", flush=True)
    return Banks(names, device, checkpoints.keep if checkpoints else None)


# ------------------------------------------------------------------ contrastive loss


def contrastive_loss(queries, index, labels, bank, bank_labels, extra,
                     temperature=0.1, norm="official"):
    """Unsupervised and supervised contrastive loss of a batch against one bank, eq. (4) to (7).

    queries: (B, D) pooled vectors, not normalised. index, labels: (B,). bank: unit vectors, a
    tensor (N, K, D) or a list of K tensors (N, D) on any device. bank_labels: (N,). extra: (E,)
    rows of the bank, drawn without replacement.
    norm: "official" divides by the number of positives of the whole batch, as the published
    code does; "supcon" by B, as Khosla et al. (arXiv 2004.11362) do.
    Returns (unsup, sup): two scalars, not weighted."""
    q = F.normalize(queries, dim=-1)  # (B, D)
    drawn = torch.cat([index, extra])  # (B + E,)
    if isinstance(bank, torch.Tensor):
        bank = bank.unbind(1)  # K of (N, D)
    rows = drawn.to(bank[0].device)  # (B + E,)
    ancestors = torch.cat([vectors.index_select(0, rows) for vectors in bank])  # (K (B + E), D)
    ancestors = ancestors.to(q.device).to(q.dtype)
    candidate_index = torch.cat([index, drawn.repeat(len(bank))])  # (C,)
    candidate_labels = torch.cat([labels, bank_labels[drawn].repeat(len(bank))])  # (C,)
    scaled = q / temperature
    among = (scaled @ q.detach().T).fill_diagonal_(-torch.inf)  # (B, B), without the anchor itself
    similarity = torch.cat([among, (ancestors @ scaled.T).T], dim=1)  # (B, C), eq. (4)
    log_p = similarity.log_softmax(dim=1)  # (B, C), eq. (5)
    same_example = index[:, None] == candidate_index  # (B, C), P^u of eq. (6)
    same_label = labels[:, None] == candidate_labels  # (B, C), P^s of eq. (6)

    def mean_over_positives(positive):
        positive.fill_diagonal_(False)  # it is none of its positives
        count = positive.sum(1)  # (B,), |P_i|
        per_anchor = torch.where(positive, log_p, 0).sum(1) / count  # (B,)
        return -per_anchor.sum() / (count.sum() if norm == "official" else len(q))  # eq. (7)

    return mean_over_positives(same_example), mean_over_positives(same_label)


# ------------------------------------------------------------------------ total loss


def task_loss(logits, labels):
    """Cross-entropy, or the squared error of a regression. logits: (B, L), labels: (B,)."""
    if logits.size(1) == 1:
        return F.mse_loss(logits.squeeze(1), labels)
    return F.cross_entropy(logits, labels)


def distillation_loss(logits, teacher_logits, temperature=2.0):
    """T^2 KL(teacher_T || student_T), mean over the batch; the squared error of a regression."""
    if logits.size(1) == 1:
        return F.mse_loss(logits, teacher_logits)
    student = (logits / temperature).log_softmax(dim=1)  # (B, L)
    teacher = (teacher_logits / temperature).log_softmax(dim=1)  # (B, L)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature ** 2 * divergence  # last term of eq. (8)


def cap_terms(logits, pooled, batch, teacher_logits, banks, bank_labels, extra, args):
    """The weighted terms of eq. (8) as {"ce", "kd", "prc", "snc", "fic"}; their sum is the loss.

    teacher_logits: (N, L). bank_labels: (N,). extra: rows drawn from all N, of which a bank of K
    ancestors uses the first args.extra // K, so that all give about as many candidates."""
    terms = {"ce": args.w_ce * task_loss(logits, batch["labels"])}
    if "kd" not in args.without:
        terms["kd"] = args.w_kd * distillation_loss(logits, teacher_logits[batch["index"]],
                                                    args.kd_temperature)
    for name, bank in banks.items():
        unsup, sup = contrastive_loss(pooled, batch["index"], bank_labels[batch["index"]], bank,
                                      bank_labels, extra[:args.extra // len(bank)],
                                      args.temperature, args.norm)
        terms[name] = args.w_unsup * unsup + args.w_sup * sup  # eq. (8)
    return terms


def gradient_shares(terms, pooled):
    """{term: |d term / d pooled| as a share of the sum over terms}: who steers the encoder.
    pooled: (B, D), or of several processes each one's share."""
    norms = {}
    for name, term in terms.items():  # but the penalty on the scores, which is not of pooled
        grad, = torch.autograd.grad(term, pooled, retain_graph=True, allow_unused=True)
        norms[name] = 0.0 if grad is None else summed(grad.float().norm() ** 2).sqrt().item()
    total = sum(norms.values()) or 1.0
    return {name: round(norm / total, 4) for name, norm in norms.items()}


# -------------------------------------------------------------------------- training

LOG_EVERY = 50  # steps between two lines of log.jsonl
TEACHER_EPOCHS = 3  # at most
SOFT_THRESHOLD = 0.1  # CAP-soft keeps what exceeds it at the end
EPOCH_DEV_EXAMPLES = 2000  # the dev score after an epoch is on the first so many


def warmup_steps(args, total):
    """Of the learning rate. t_0 of eq. (3) is twice, t_1 three times as many."""
    return round(args.warmup * total)


def make_optimizer(model, args, total):
    """Adam on weights and scores, each with its learning rate under one linear schedule."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in named if not name.endswith("scores")], "lr": args.lr},
              {"params": [p for name, p in named if name.endswith("scores")], "lr": args.mask_lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]],
                                  eps=1e-8, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: linear_lr(step, total, warmup_steps(args, total)))


def randomness(*place):
    """All that is random in a step is a function of its place (seed, epoch, batch), so there is no
    random state to save: a numpy generator, the same in all processes, and torch's own, which
    dropout uses, set from it and different in each."""
    chance = np.random.default_rng(place)
    torch.manual_seed(int(chance.integers(2 ** 62)) + rank())
    return chance


class Stop:
    """Ctrl-C or SIGTERM. Where `patient`, among the steps of an epoch, the first one is only noted
    in `asked`, so that the step is ended and saved; else it raises KeyboardInterrupt at once."""

    def __init__(self):
        self.patient = self.asked = False

    def __call__(self, signal_number, frame):
        if not self.patient or self.asked:
            raise KeyboardInterrupt
        self.asked = True


STOP = Stop()


def train(model, data, loss_terms, args, log, epochs, set_density=None, after_epoch=None,
          first_epoch=0, checkpoints=None, state=None):
    """Train `model` on `data`: the one loop of the dense teacher and of the pruned model.

    loss_terms(logits, pooled, batch, chance) -> {name: scalar}, whose sum is minimised; chance is
    what may be random in it. set_density(step, total) -> share of weights kept: sets the masks
    before each step. after_epoch(epoch) -> {...}, entered in the log. first_epoch: number of the
    first one, for the order of the data and the log; the schedule begins anew. state: what
    `checkpoints` had saved of this training, to go on from. ValueError if the loss is not finite,
    which is looked at every LOG_EVERY steps, or a weight where it would be saved."""
    device = model.classifier.weight.device
    dtype, steps = args.compute_dtype, math.ceil(len(data) / args.batch_size)
    total = epochs * steps
    optimizer, schedule = make_optimizer(model, args, total)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    epoch, done, kept = first_epoch, 0, 1.0  # epochs, and batches of the next, that were made
    if state:
        epoch, done, kept = state["epoch"], state["batches"], state["kept"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        state.clear()  # of its memory, which the callers would hold as long as this goes on

    def save(epoch, batches_done):
        if checkpoints is not None:
            check_finite(model.named_parameters(), step)
            checkpoints.save({"epoch": epoch, "batches": batches_done, "kept": kept,
                              **{name: part.state_dict() for name, part in parts.items()}})

    step = (epoch - first_epoch) * steps + done - 1  # the last one that was made
    replica = model if processes() == 1 else DistributedDataParallel(
        model, forward_sync_buffers=False)  # the masks: each process computes the same
    progress = Progress(total, args.batch_size, device, step)
    model.train()
    while epoch < first_epoch + epochs:
        STOP.patient = True
        for i, batch in enumerate(batches(data, args.batch_size, args.seed, epoch, done), done):
            step = (epoch - first_epoch) * steps + i
            chance = randomness(args.seed, epoch, i)
            kept = 1.0 if set_density is None else set_density(step, total)
            batch = move(batch, device)
            with autocast(device, dtype):
                logits, own_pooled = replica(*inputs(share(batch)))
            terms = loss_terms(gather(logits.float(), len(batch["index"])),
                               gather(own_pooled.float(), len(batch["index"])), batch, chance)
            to_log = step % LOG_EVERY == 0 or step == total - 1
            if to_log:
                values = {name: term.item() for name, term in terms.items()}
                check_finite(values.items(), step)
                shares = gradient_shares(terms, own_pooled)
            sum(terms.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            lr = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if to_log:
                log({"step": first_epoch * steps + step, "epoch": epoch, "kept": kept, "lr": lr,
                     "loss": sum(values.values()), **values, "gradient_share": shares,
                     **progress.show(step, kept, values, lr)})
            asked = bool(summed(torch.tensor(int(STOP.asked))))  # of any process: all stop here
            if asked or checkpoints is not None and checkpoints.due():
                save(epoch, i + 1)
            if asked:
                raise KeyboardInterrupt
        STOP.patient = False
        if sys.stdout.isatty():
            print()  # the step line stays
        if after_epoch is not None:
            try:
                found = after_epoch(epoch)
            except KeyboardInterrupt:
                save(epoch, steps)
                raise
            log({"step": first_epoch * steps + step, "epoch": epoch, "kept": kept, **found})
        epoch, done = epoch + 1, 0
    save(epoch, 0)


def check_finite(named, step):
    """ValueError with the name of the first number or tensor that is not finite."""
    for name, value in named:
        if not torch.as_tensor(value).isfinite().all():
            raise ValueError(f"{name} is not finite at step {step}: try a smaller --lr; what was "
                             "saved before is kept")


class Progress:
    """The step line, under a heading that names its columns: rewritten in place on a terminal,
    elsewhere one line a minute."""

    def __init__(self, total, batch_size, device, last_step=-1):
        self.total, self.batch_size, self.device = total, batch_size, device
        self.start = self.last_time = time.perf_counter()
        self.first, self.last_step, self.last_printed = last_step, last_step, -math.inf
        print("step | kept | loss = weighted terms | lr | ms, ex/s, GB | eta", flush=True)

    def show(self, step, kept, values, lr):
        """Print the line and return its speed: {"ms", "examples_per_second"} since the last."""
        now = time.perf_counter()
        seconds = (now - self.last_time) / (step - self.last_step)
        left = (now - self.start) / (step - self.first) * (self.total - step - 1)
        self.last_time, self.last_step = now, step
        terms = " ".join(f"{name} {value:.2f}"[:len(name) + 5].rstrip(".")
                         for name, value in values.items())
        line = (f"{step + 1}/{self.total} | {kept:.1%} | {sum(values.values()):.2f} = {terms} | "
                f"{lr:.1e} | {1000 * seconds:.0f}, {self.batch_size / seconds:.0f}, "
                f"{peak_memory(self.device) / 1e9:.1f} | {timedelta(seconds=int(left))}")
        if sys.stdout.isatty():
            print("\r" + line.ljust(119), end="", flush=True)
        elif now - self.last_printed > 60 or step == self.total - 1:
            print(line, flush=True)
            self.last_printed = now
        return {"ms": round(1000 * seconds, 1),
                "examples_per_second": round(self.batch_size / seconds, 1)}


def peak_memory(device):
    """Most bytes held so far: of GPU memory on CUDA, of the process elsewhere (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not there on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def evaluate(model, args, dev_sets, dtype=torch.float32):
    """GLUE's scores on every dev set: {"accuracy": ..., "accuracy_mm": ...}, as fractions."""
    scores = {}
    for split, data in dev_sets.items():
        logits = model.classifier(encode(model, data, dtype)).detach()  # (N, L)
        predictions = logits[:, 0] if logits.size(1) == 1 else logits.argmax(dim=1)
        found = score(args.task, predictions.cpu().numpy(), data.labels.numpy())
        scores |= {name + split.removeprefix("dev"): value for name, value in found.items()}
    return scores


def train_teacher(args, data, model, log, checkpoints=None, state=None):
    """Fine-tune the dense `model` on `data`."""

    def loss_terms(logits, pooled, batch, chance):
        return {"ce": task_loss(logits, batch["labels"])}

    train(model, data, loss_terms, args, lambda entry: log({"phase": "teacher", **entry}),
          teacher_epochs(args), checkpoints=checkpoints, state=state)


def stages(args):
    """Sparsities at which the model is trained for args.epochs each: the one asked for, after
    those of 10 %, 20 %, ... where heads and neurons are removed."""
    tenths = [i / 10 for i in range(1, 10)] if args.method == "structured" else []
    return [*(sparsity for sparsity in tenths if sparsity < args.sparsity), args.sparsity]


def pruning_epochs(args):
    return args.epochs * len(stages(args))


def teacher_epochs(args):
    return min(TEACHER_EPOCHS, pruning_epochs(args))


def snapshot_every(args):
    """Epochs from one snapshot to the next: CAP-f has one after each stage."""
    return args.epochs if args.method == "structured" else 1


def add_snapshot(args, data, model, banks, epoch):
    """Enter the model after `epoch` in SnC, if it is a snapshot: the last one would serve nobody,
    and one that was made before a stop is there."""
    number, rest = divmod(epoch + 1, snapshot_every(args))
    if ("snc" in banks.bank and not rest and epoch + 1 < pruning_epochs(args)
            and len(banks.bank["snc"]) < number):
        banks.add("snc", encode(model, data, args.compute_dtype), number - 1)


def first_banks(args, data, model, teacher, checkpoints=None):
    """(banks with PrC and FiC filled, teacher logits (N, L)). Both are made once: neither the
    pre-trained model nor the teacher ever changes."""
    banks = new_banks(args, data, model, checkpoints)
    pooled = encode(teacher, data, args.compute_dtype)  # (N, D)
    if "fic" in banks.bank:
        banks.add("fic", pooled)
    if "prc" in banks.bank:
        banks.add("prc", encode(model, data, args.compute_dtype))
    return banks, teacher.classifier(pooled).detach()


def set_masks_at(model, args, step, total, facts):
    """The masks of `step`, eq. (3). Returns the share of weights kept. CAP-soft enters in `facts`
    its "threshold" and, until in the end exactly k are kept, the share "over" it.
    NOTE deviation: CAP-soft's density is not left to its penalty but stays below eq. (3)."""
    warm, cool = 2 * warmup_steps(args, total), 3 * warmup_steps(args, total)
    kept = cubic_density(step, total, 1.0, 1.0 - args.sparsity, warm, cool)
    if args.method != "soft":
        set_masks(model, kept)
        return kept
    facts["threshold"] = cubic_density(step, total, 0.0, SOFT_THRESHOLD, warm, cool)
    exact = step >= total - cool
    over = set_soft_masks(model, facts["threshold"], kept, exact)
    if exact:
        return kept
    facts["over"] = over
    return min(kept, over)


def prune(args, data, dev_sets, model, banks, teacher_logits, log, checkpoints=None, state=None):
    """CAP: the pre-trained `model`, pruned. Returns it, with the pruned weights at 0 or removed,
    and the share of weights over CAP-soft's threshold just before its cut to exactly k, or None.
    state: what `checkpoints` had saved of the pruning, to go on from."""
    facts = {"stage": 0, "over": None} if checkpoints is None else checkpoints.facts
    device, structured = teacher_logits.device, args.method == "structured"
    epoch_dev = {"dev": dev_sets["dev"].head(EPOCH_DEV_EXAMPLES)}
    bank_labels = data.labels.round().to(device)  # a regression's labels: nearest whole number

    def loss_terms(logits, pooled, batch, chance):
        count = min(args.extra, len(data))
        extra = torch.from_numpy(chance.choice(len(data), count, replace=False)).to(device)
        terms = cap_terms(logits, pooled, batch, teacher_logits, banks, bank_labels, extra, args)
        if args.method == "soft":
            penalty = args.penalty * facts["threshold"] / SOFT_THRESHOLD
            terms["l1"] = penalty * mean_sigmoid(model)  # eq. (8), CAP-soft
        return terms

    def set_density(step, total):
        return left if structured else set_masks_at(model, args, step, total, facts)

    def after_epoch(epoch):
        add_snapshot(args, data, model, banks, epoch)
        scores = evaluate(model, args, epoch_dev, args.compute_dtype)
        print(f"epoch {epoch + 1}/{pruning_epochs(args)}, dev: {show_scores(scores)}", flush=True)
        return {"dev": scores}

    if not structured:
        add_masks(model, args.score_init)
    for stage, sparsity in list(enumerate(stages(args)))[facts["stage"]:]:
        if structured and state:
            model = of_sizes(model, facts["layer_sizes"])  # as it was saved
        elif structured:
            model = remove_least_important(model, data, loss_terms, args, sparsity)
        left = 1 - sparsity_report(model)["total"]
        facts.update(phase="prune", stage=stage, layer_sizes=model.config.layer_sizes)
        train(model, data, loss_terms, args, lambda entry: log({"phase": "prune", **entry}),
              args.epochs, set_density, after_epoch, stage * args.epochs, checkpoints, state)
    return model if structured else apply_masks(model), facts["over"]


# --------------------------------------------------------------- structured pruning


def importance(model, data, loss_terms, args):
    """CAP-f's first-order Taylor criterion: |dL/dmask| summed over the batches of `data`, where a
    mask, here 1, multiplies what each head and each neuron puts out; dropout is off. Returns two
    lists with a vector for each layer: (H,) of the heads and (F,) of the neurons."""
    heads, neurons, hooks = [], [], []

    def add_mask(linear, units):  # of the layer that reads what the units put out
        mask = torch.ones(units, device=linear.weight.device, requires_grad=True)
        width = linear.in_features // max(1, units)
        hooks.append(linear.register_forward_pre_hook(
            lambda module, inputs: inputs[0] * mask.repeat_interleave(width)))
        return mask

    for layer in model.bert.encoder["layer"]:
        heads.append(add_mask(layer.attention["output"].dense, layer.attention["self"].shape[0]))
        neurons.append(add_mask(layer.output.dense, layer.output.dense.in_features))
    sums = [torch.zeros_like(mask) for mask in heads + neurons]
    model.eval()
    for i, batch in enumerate(batches(data, args.batch_size, args.seed, 0)):
        batch = move(batch, heads[0].device)
        with autocast(heads[0].device, args.compute_dtype):
            outputs = model(*inputs(share(batch)))
        logits, pooled = (gather(output.float(), len(batch["index"])) for output in outputs)
        loss = sum(loss_terms(logits, pooled, batch, randomness(args.seed, 0, i, 1)).values())
        for total, grad in zip(sums, torch.autograd.grad(loss, heads + neurons)):
            total += (summed(grad) / processes()).abs()
    for hook in hooks:
        hook.remove()
    return sums[:len(heads)], sums[len(heads):]


def most_important(importances, count):
    """Bool masks, one for each layer's vector, of the `count` most important units of all layers,
    after each vector has been divided by its L2 norm."""
    scaled = torch.cat([vector / vector.norm().clamp_min(1e-20) for vector in importances])
    mask = torch.zeros_like(scaled, dtype=torch.bool)
    mask[scaled.argsort(descending=True, stable=True)[:count]] = True
    return mask.split([len(vector) for vector in importances])


def of_sizes(model, layer_sizes):
    """A new model with so many heads and neurons in each layer, else like `model`, embeddings
    frozen."""
    small = BertClassifier(dataclasses.replace(model.config, layer_sizes=layer_sizes))
    small.bert.embeddings.requires_grad_(False)
    return small.to(model.classifier.weight)  # its device and dtype


def remove_units(model, heads, neurons):
    """A model with only the heads and neurons of these bool masks, one a layer: its matrices are
    smaller, `config.layer_sizes` tells how small, and it computes what the masked one would."""
    small = of_sizes(model, [[int(kept.sum()) for kept in masks] for masks in zip(heads, neurons)])
    state = model.state_dict()
    for i, (kept_heads, kept_neurons) in enumerate(zip(heads, neurons)):
        rows = kept_heads.repeat_interleave(model.config.hidden_size
                                            // model.config.num_attention_heads)
        for name, kept in (("attention.self.query", rows), ("attention.self.key", rows),
                           ("attention.self.value", rows), ("intermediate.dense", kept_neurons)):
            for kind in ("weight", "bias"):
                state[f"bert.encoder.layer.{i}.{name}.{kind}"] = (
                    state[f"bert.encoder.layer.{i}.{name}.{kind}"][kept])
        for name, kept in (("attention.output", rows), ("output", kept_neurons)):
            name = f"bert.encoder.layer.{i}.{name}.dense.weight"
            state[name] = state[name][:, kept]
    small.load_state_dict(state)
    return small


def remove_least_important(model, data, loss_terms, args, sparsity):
    """A stage of CAP-f: the model without the least important heads and neurons, of both so many
    that at least the share `sparsity` of those the model once had is gone. NOTE deviation: a layer
    may lose all of them."""
    print(f"ranking heads and neurons on all {len(data)} examples; {sparsity:.0%} to go",
          flush=True)
    masks, left = [], (1 - sparsity) * model.config.num_hidden_layers
    for importances, units in zip(importance(model, data, loss_terms, args),
                                  (model.config.num_attention_heads,
                                   model.config.intermediate_size)):
        masks.append(most_important(importances, math.floor(left * units + 1e-6)))
    return remove_units(model, *masks)


def show_scores(scores):
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())


# --------------------------------------------------------- run folder and checkpoint


def is_finished(folder, config):
    """Whether the run folder holds this very run, finished. ValueError if it is something else, or
    belongs to a run of another configuration."""
    path = folder / "log.jsonl"
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is no run folder: choose another --out")
        return False
    try:
        text = path.read_text(encoding="utf-8")
        if log_header(config).startswith(text):
            return False  # killed while it was begun
        before = json.loads(text.split("\n")[0])["config"]
        differing = [key for key in config if key in before and config[key] != before[key]]
        if not before.keys() & config.keys():
            raise KeyError("task")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: delete the folder") from None
    if differing:
        raise ValueError(f"{folder} belongs to another run ({', '.join(differing)} differ): "
                         "choose another --out or delete it")
    return (folder / "record.json").exists()


def log_header(config):
    return json.dumps({"config": config}) + "\n"


def start_log(folder, config, size):
    """log(entry), which appends a line to log.jsonl: to its first `size` bytes, those of what was
    saved before a stop, or if that is None to a new file that begins with the configuration."""
    path = folder / "log.jsonl"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if size is None:
            path.write_text(log_header(config), encoding="utf-8")
        else:
            os.truncate(path, size)
    wait_for_all()

    def log(entry):
        if rank() == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    return log


class Checkpoints:
    """What a stopped run needs to go on, in RUN/checkpoint until the run is finished. Each file is
    written under a temporary name and renamed to STEM.SHA256.pt, where the sum is over the run's
    configuration and the file's content: a torn or foreign file is seen, and the state before it
    used, for the last two are kept. What stays as it is (banks, teacher logits) is written once."""

    def __init__(self, run, config, minutes):
        self.folder, self.log_path = run / "checkpoint", run / "log.jsonl"
        self.identity = json.dumps(config, sort_keys=True).encode()
        self.interval, self.last_time = 60 * minutes, time.monotonic()
        self.facts = {  # what is saved beside the state of the training
            "phase": "teacher", "stage": 0, "over": None, "kept": {},
            "seconds": {"teacher": 0.0, "banks": 0.0, "prune": 0.0, "total": 0.0}}
        self.last_tick, self.last_state = time.perf_counter(), None

    def tick(self, phase=None):
        """Count the time since the last call to the total and, if given, to a phase."""
        now = time.perf_counter()
        for name in {"total", phase or "total"}:
            self.facts["seconds"][name] += now - self.last_tick
        self.last_tick = now

    def digest(self, path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.sha256(self.identity)).hexdigest()

    def write(self, stem, content):
        """Write tensors, numbers and the like; returns the file's name. OSError if it fails."""
        temporary = self.folder / "writing.tmp"
        try:
            self.folder.mkdir(exist_ok=True)
            torch.save(content, temporary)
            name = f"{stem}.{self.digest(temporary)}.pt"
            os.replace(temporary, self.folder / name)
        except (OSError, RuntimeError) as error:  # the second is torch's
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", "the disk may be full")
            raise OSError(f"{self.folder}: {stem} could not be written ({reason}); what was saved "
                          "before is kept") from None
        return name

    def load(self, name, mmap):
        return torch.load(self.folder / name, map_location="cpu", mmap=mmap, weights_only=True)

    def read(self, name, mmap=False):
        """What was written under this name; None if it is not whole, or of another run."""
        try:
            if self.digest(self.folder / name) == name.split(".")[1]:
                return self.load(name, mmap)
        except OSError:
            pass
        print(f"{self.folder / name} is damaged, missing or of another run: not used")
        return None

    def keep(self, stem, tensor):
        """Write a tensor that will not change; returns it, memory-mapped."""
        name = [self.write(stem, tensor) if rank() == 0 else None]
        if processes() > 1:
            distributed.broadcast_object_list(name)
        self.facts["kept"][stem] = name[0]
        return self.load(name[0], mmap=True)  # just written: it need not be summed again

    def due(self):
        return time.monotonic() - self.last_time >= self.interval

    def states(self):
        """Names of the saved states, the newest first."""
        return sorted((path.name for path in self.folder.glob("state-*.pt")), reverse=True)

    def save(self, training=None):
        """The facts, and the state of the training that they are about."""
        self.tick(self.facts["phase"])
        if rank() == 0:
            before = self.states()
            number = int(before[0].split(".")[0].removeprefix("state-")) + 1 if before else 0
            saved = self.write(f"state-{number:06}", {"facts": self.facts, "training": training,
                                                      "log_size": self.log_path.stat().st_size})
            for name in before:
                if name != self.last_state:
                    (self.folder / name).unlink()
            self.last_state = saved
        self.last_time = time.monotonic()

    def newest(self):
        """(training, {stem: tensor} of what is kept, bytes of the log) of the newest state that is
        whole, whose facts are taken over; (None, {}, None) if there is none."""
        for name in self.states():
            state = self.read(name)
            if state is None:
                continue
            kept = {stem: self.read(file, mmap=True)
                    for stem, file in state["facts"]["kept"].items()}
            if (all(tensor is not None for tensor in kept.values())
                    and state["log_size"] <= self.log_path.stat().st_size):
                self.last_state = name
                self.facts = state["facts"]
                return state["training"], kept, state["log_size"]
        return None, {}, None


def run_config(args):
    """The flags that decide what comes out, as JSON; paths are relative to this file."""
    others = ("out", "compare", "probe", "checkpoint_minutes")
    config = {key: str(value) if isinstance(value, (Path, torch.dtype)) else value
              for key, value in vars(args).items() if key not in others}
    for key in ("model", "teacher", "data_dir"):
        if config[key] and Path(config[key]).exists():  # else: a name
            config[key] = os.path.relpath(config[key], HERE)
    return config


def located(name):
    """The folder that a record calls `name`, or the name of a model to download."""
    return HERE / name if (HERE / name).exists() else name


def teacher_folder(run, config):
    """Where the teacher of the run folder `run` lies, whose record has this `config`."""
    return located(config["teacher"]) if config["teacher"] else run / "teacher"


def export(model, tokenizer, task, folder):
    """Save `model` with its labels and tokenizer, ready for transformers; the weights last, so
    that a folder that has them is whole."""
    words = TASKS[task].words
    model.config.id2label = dict(enumerate(words)) if words else None
    if rank() == 0:
        save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
        save_pretrained(model, folder)
    wait_for_all()


def train_sha256(data):
    """Of the token ids and labels."""
    return hashlib.sha256(data.tokens.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()


def provenance(args, data, dev_sets, device):
    """What a record says of the program, the machine and the data that it comes from."""
    modules = ("bert_min.py", "data_glue.py", "cap_min.py")
    source = b"".join((HERE / name).read_bytes() for name in modules)
    return {"config": run_config(args), "seed": args.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__,
                         "machine": f"{platform.machine()}, {device.type}, "
                                    f"{torch.get_num_threads()} threads, "
                                    f"{processes()} processes"},
            "source_sha256": hashlib.sha256(source).hexdigest(),
            "train_sha256": train_sha256(data),
            "examples": {"train": len(data), **{name: len(dev) for name, dev in dev_sets.items()}}}


def write_record(args, data, dev_sets, results, seconds, device):
    """record.json: all that a figure in a table must be able to show for itself."""
    passes = {"teacher": teacher_epochs(args), "prune": pruning_epochs(args)}
    write_json({**provenance(args, data, dev_sets, device), **results,
                "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
                "examples_per_second": {phase: round(len(data) * epochs / seconds[phase], 1)
                                        for phase, epochs in passes.items() if seconds[phase]},
                "peak_memory_bytes": peak_memory(device)}, args.out / "record.json")


def write_json(record, path):
    """A record that is there is whole. Process 0 alone writes it."""
    if rank() == 0:
        with replacing(path) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")


def draw_curve(folder, dense):
    """curve.svg of the pruning phase: share of weights kept, and dev score after each epoch."""
    entries = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    pruning = [entry for entry in entries if entry.get("phase") == "prune"]
    last, (metric, level) = pruning[-1]["step"], next(iter(dense.items()))
    curves = (("kept", "#777777", [(entry["step"], entry["kept"]) for entry in pruning]),
              (f"dev {metric}", "#1f77b4", [(entry["step"], entry["dev"][metric])
                                            for entry in pruning if "dev" in entry]),
              (f"dense {level:.3f}", "#d62728", [(0, level), (last, level)]))
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 300" font-size="13">',
             '<rect width="600" height="300" fill="white"/>',
             '<path d="M60,40 V260 H560" fill="none" stroke="#777777"/>',
             '<text x="40" y="264">0</text><text x="40" y="44">1</text>',
             f'<text x="480" y="280">step {last}</text>']
    for place, (name, color, values) in enumerate(curves):
        points = " ".join(f"{60 + 500 * x / last:.1f},{260 - 220 * max(0, y):.1f}"
                          for x, y in values)  # Matthews' and Pearson's can be below 0
        lines += [f'<polyline fill="none" stroke-width="2" stroke="{color}" points="{points}"/>',
                  f'<text x="{60 + 170 * place}" y="24" fill="{color}">{name}</text>']
    (folder / "curve.svg").write_text("\n".join([*lines, "</svg>\n"]), encoding="utf-8")


def print_summary(args, record):
    """The end of a run: the scores of both models, how many weights they have, where it lies."""
    notes = {"accuracy": "(animals seen in fine-tuning)",
             "accuracy_unseen": "(animals known only from pre-training)"}
    path = args.out / "model" / "model.safetensors"
    print("\n     dense    pruned")
    for name, pruned in record["pruned"].items():
        print(f"{100 * record['dense'][name]:10.2f}{100 * pruned:10.2f}  dev {name}",
              notes.get(name, "") if args.task == "demo" else "")
    print(f"{record['sparsity']['weights']:10,}{record['sparsity']['kept']:10,}  weights in the "
          f"encoder\n"
          f"pruned model, {'' if args.method == 'structured' else 'for transformers too: '}"
          f"{path.parent}, {path.stat().st_size / 1e6:.1f} MB, took "
          f"{timedelta(seconds=int(record['seconds']['total']))}")


# ---------------------------------------------------------------------- command line

DEMO = {"model": HERE / "demo" / "model", "epochs": 6, "batch_size": 32, "lr": 1e-3,
        "max_length": 32}
STRUCTURED = {"sparsity": 0.9, "epochs": 2, "batch_size": 16, "lr": 2e-5, "w_unsup": 0.3,
              "w_sup": 3.0}


def number(kind, low, below=math.inf):
    """An argparse type: a number of `kind` with low <= number < below."""

    def convert(text):
        if not low <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {below})")
        return kind(text)

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


def add_flags(parser):
    """All flags, in groups; their defaults are the published recipe for BERT-base."""
    count, share = number(int, 1, 2 ** 31), number(float, 0, 1)
    weight, rate = number(float, 0), number(float, 1e-12)
    add = parser.add_argument_group("what").add_argument
    add("--task", default="demo", choices=TASKS, help="GLUE task, snli, or the small world of "
        "demo/, which has a model and defaults of its own: " +
        ", ".join(f"{name} {value}" for name, value in DEMO.items()))
    add("--sparsity", type=share, default=0.97, help="share of encoder weights to prune")
    add("--method", choices=("movement", "soft", "magnitude", "structured"), default="movement",
        help="what decides which weights are kept: top-k of trained scores (CAP-m), scores over a "
        "threshold (CAP-soft), or the weights' size; structured: the importance of heads and "
        "neurons, removed in stages of 10 %% (CAP-f), with defaults of its own: " +
        ", ".join(f"{name} {value}" for name, value in STRUCTURED.items()))
    add("--model", default="bert-base-uncased", help="pre-trained model, or its folder")
    add("--teacher", help="folder of a fine-tuned model; None: is fine-tuned first")
    add("--data-dir", help="folder with the task's folder; None: downloaded (the demo has its own)")
    add("--out", type=Path, help="run folder; None: "
        "runs/TASK-SPARSITY[-METHOD][-no-TERM...]-seedSEED or runs/TASK-SPARSITY-compare")
    add("--seed", type=number(int, 0, 2 ** 32), default=0, help="of everything random")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=10,
        help="of pruning, structured: of each stage; the teacher has at most 3")
    add("--batch-size", type=count, default=32, help="examples a step")
    add("--lr", type=rate, default=3e-5, help="peak learning rate of weights")
    add("--mask-lr", type=rate, default=1e-2, help="peak learning rate of scores")
    add("--max-length", type=count, default=128, help="tokens an example, at most")
    add("--max-train", type=count, help="training rows, drawn by a fixed seed; None: all")
    add("--warmup", type=share, default=0.09,
        help="of the learning rate, as a share of the run; dense for 2x, final sparsity for 3x")
    add("--score-init", choices=("auto", "zero", "magnitude"), default="auto",
        help="auto: zero, as published, from 30,000 steps on, magnitude below")
    add = parser.add_argument_group("loss, eq. (4) to (8)").add_argument
    add("--temperature", type=rate, default=0.1, help="tau of eq. (5)")
    add("--w-unsup", type=weight, default=0.1, help="weight of the unsupervised terms")
    add("--w-sup", type=weight, default=10.0, help="weight of the supervised terms")
    add("--w-ce", type=weight, default=0.1, help="weight of the cross-entropy")
    add("--w-kd", type=weight, default=0.9, help="weight of the distillation")
    add("--extra", type=count, default=4096, help="candidates beside the batch")
    add("--norm", choices=("official", "supcon"), default="official", help="eq. (7)")
    add("--penalty", type=weight, default=680.0, help="lambda_f of eq. (8), of CAP-soft")
    add("--without", nargs="+", choices=("prc", "snc", "fic", "kd"), default=[],
        help="terms to leave out")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the matrix products")
    add("--checkpoint-minutes", type=weight, default=10.0,
        help="between two saves of the state from which the same command goes on after a stop")
    add = parser.add_argument_group("modes").add_argument
    add("--compare", type=count, nargs="?", const=1, metavar="SEEDS",
        help="instead of one run: CAP, CAP without a term, and plain pruning, for so many seeds")
    add("--probe", type=Path, metavar="RUN", help="train a linear classifier for --task on the "
        "frozen encoders of this finished run: pruned, fine-tuned and pre-trained")


def parse(argv):
    """The command line as a namespace; ValueError, not argparse's many lines, if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="cap_min.py", description="Prune BERT with contrastive terms (arXiv 2112.07198).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def fail(message):
        raise ValueError(f"{message} (see --help)")

    parser.error = fail
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.method == "structured":
        parser.set_defaults(**STRUCTURED)
    if args.task == "demo":
        parser.set_defaults(**DEMO)
    if args.method == "structured" and args.task == "demo":
        parser.set_defaults(epochs=STRUCTURED["epochs"])
    args = parser.parse_args(argv)
    args.kd_temperature = 1.0 if args.method == "structured" else 2.0
    args.without = sorted(set(args.without))
    if args.out is None:
        parts = [args.task, f"{args.sparsity:g}", args.method.replace("movement", ""),
                 *(f"no-{name}" for name in args.without),
                 "compare" if args.compare else f"seed{args.seed}"]
        args.out = Path("runs", "-".join(filter(None, parts)))
    return args


def choose_device(args):
    """The device; args.compute_dtype is set too. ValueError if the machine does not have it."""
    name = args.device
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if processes() > 1 and name not in ("cuda", "cpu"):
        raise ValueError(f"--device {name} cannot be used by several processes: cuda or cpu can")
    if processes() > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("it is none of cuda, mps and cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason})") from None
    has_bf16 = (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() or
                device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    use_bf16 = args.dtype == "bf16" or (args.dtype == "auto" and has_bf16)
    args.compute_dtype = torch.bfloat16 if use_bf16 else torch.float32
    return device


def load_data(args, tokenizer, config):
    """(training set, {split: dev set}), encoded. ValueError if they do not fit the model."""
    if tokenizer.size > config.vocab_size:
        raise ValueError(f"{args.model}: vocab.txt has {tokenizer.size} pieces, the model knows "
                         f"{config.vocab_size}")
    if not 4 <= args.max_length <= config.max_position_embeddings:
        raise ValueError(f"--max-length {args.max_length} is not between 4 and the model's "
                         f"{config.max_position_embeddings} positions")
    if TASKS[args.task].text_b is not None and config.type_vocab_size < 2:
        raise ValueError(f"{args.model} knows one segment only, {args.task} is a task of pairs")
    with process_0_first():
        splits = {split: load(args.task, split, args.data_dir) for split in TASKS[args.task].files}
        rows = splits["train"]
        if args.max_train and args.max_train < len(rows):
            chosen = sorted(random.Random(0).sample(range(len(rows)), args.max_train))
            splits["train"] = [rows[i] for i in chosen]
        data = {split: encode_task(examples, tokenizer, args.max_length)
                for split, examples in splits.items()}
    return data.pop("train"), data


def load_fine_tuned(folder, task, config):
    """A model fine-tuned on the task. ValueError unless its labels are the task's, in order (those
    that have no names, LABEL_0 and so on, are trusted), and its sizes those of `config`."""
    model = from_pretrained(folder, num_labels=None)
    words, labels = TASKS[task].words, model.config.id2label or {}
    named = [str(labels[i]).lower() for i in sorted(labels)]
    if model.config.num_labels != max(1, len(words)) or (
            words and named and not named[0].startswith("label_") and named != words):
        raise ValueError(f"{folder}: its labels are {named or model.config.num_labels}, those of "
                         f"{task} are {words or 'one number'}")
    for name in ("hidden_size", "vocab_size", "max_position_embeddings", "type_vocab_size"):
        found, wanted = getattr(model.config, name), getattr(config, name)
        if found != wanted:
            raise ValueError(f"{folder}: its {name} is {found}, that of --model is {wanted}")
    return model


def check_schedule(args, size):
    """ValueError unless `size` examples give the schedule room, and a full batch every process an
    example; settles --score-init auto."""
    if args.batch_size < processes():
        raise ValueError(f"--batch-size {args.batch_size} is less than {processes()} processes")
    if args.method == "structured":
        args.score_init = None  # there are neither scores nor a schedule of densities
        return
    total = args.epochs * math.ceil(size / args.batch_size)
    warmup = warmup_steps(args, total)
    if warmup < 1 or total < 5 * warmup + 2:
        raise ValueError(f"{total} steps with --warmup {args.warmup} have no room for the schedule:"
                         " it takes a warm-up of at least 1 step, and 5 warm-ups + 2 steps in all")
    if args.method == "magnitude":
        args.score_init = None
    elif args.score_init == "auto":
        args.score_init = "zero" if total >= 30_000 else "magnitude"


def tune_cpu():
    """What makes a step on a CPU faster and changes nothing else. To be called before torch works,
    whose threads take over the first setting as they start.

    Numbers below 1e-38 count as 0: in some 800 steps Adam's momentum of a weight that stays pruned
    decays to such, over which some processors take ten times as long. oneDNN makes code for each
    shape of a matrix product and keeps 1,024 of them: batches of many lengths have more, and to
    make one anew takes 1 ms. And glibc keeps what is freed: to give each step's gradients back to
    the system and to map them anew, page by page, takes up to a tenth of a step."""
    torch.set_flush_denormal(True)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, at its largest
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def run(args):
    """Make the run that `args` ask for, unless its folder holds it finished; returns its record."""
    device, config = choose_device(args), run_config(args)
    finished = is_finished(args.out, config)
    wait_for_all()  # all have looked before one writes
    if finished:
        print(f"{args.out} is finished:")
    else:
        make_run(args, device, config)
        wait_for_all()
    shutil.rmtree(args.out / "checkpoint", ignore_errors=True)  # nothing of it is needed any more
    path = args.out / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        print_summary(args, record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: delete the folder") from None
    return record


def make_run(args, device, config):
    """Teacher, banks, pruning, export, evaluation of the exported folder, record: from the start,
    or from where an earlier sitting was stopped."""
    checkpoints = Checkpoints(args.out, config, args.checkpoint_minutes)
    with process_0_first():
        source = model_folder(args.model)
    tokenizer = load_tokenizer(source)
    torch.manual_seed(args.seed)  # of the new classifier
    model = from_pretrained(source, max(1, len(TASKS[args.task].words))).to(device)
    teacher = load_fine_tuned(args.teacher, args.task, model.config) if args.teacher else None
    data, dev_sets = load_data(args, tokenizer, model.config)
    check_schedule(args, len(data))
    state, kept, log_size = checkpoints.newest()
    rows = train_sha256(data)
    if checkpoints.facts.setdefault("train_sha256", rows) != rows:
        raise ValueError(f"{args.out} was begun with other training rows: choose another --out")
    log = start_log(args.out, config, log_size)  # the input is sound: now something may be written
    start_of_scores = f", scores from {args.score_init}" if args.score_init else ""
    print(f"{args.task}: {len(data)} examples, {pruning_epochs(args)} epochs on "
          f"{device}, {args.compute_dtype}, {args.method}{start_of_scores}, run folder {args.out}",
          flush=True)

    if log_size is not None:
        print(f"goes on where it was: {checkpoints.facts['phase']}" + (
            f", epoch {state['epoch'] + 1} after {state['batches']} batches" if state else ""),
            flush=True)
    if kept:
        banks = new_banks(args, data, model, checkpoints)
        banks.restore(kept)
        teacher_logits = kept["logits"].to(device)
    else:
        checkpoints.tick()
        teacher = teacher or fine_tune(args, data, model, tokenizer, log, checkpoints, state)
        dense = evaluate(teacher.to(device), args, dev_sets)
        print(f"dense, dev: {show_scores(dense)}", flush=True)
        checkpoints.tick()
        banks, teacher_logits = first_banks(args, data, model, teacher, checkpoints)
        checkpoints.keep("logits", teacher_logits)
        checkpoints.facts.update(phase="banks", dense=dense)
        checkpoints.save()
        state = None
    del teacher  # all that is needed of it is kept
    checkpoints.tick()
    model, over = prune(args, data, dev_sets, model, banks, teacher_logits, log, checkpoints, state)
    finish(args, data, dev_sets, model, over, tokenizer, checkpoints, device)


def fine_tune(args, data, model, tokenizer, log, checkpoints, state):
    """The teacher: a copy of `model`, fine-tuned, by way of its folder in the run folder."""
    folder = args.out / "teacher"
    if state or not (folder / "model.safetensors").exists():
        teacher = copy.deepcopy(model)
        train_teacher(args, data, teacher, log, checkpoints, state)
        checkpoints.tick("teacher")
        export(teacher, tokenizer, args.task, folder)
    return load_fine_tuned(folder, args.task, model.config)


def finish(args, data, dev_sets, model, over, tokenizer, checkpoints, device):
    """Export, evaluation of the exported folder, curve and record of the run."""
    checkpoints.tick("prune")
    export(model, tokenizer, args.task, args.out / "model")
    model = load_fine_tuned(args.out / "model", args.task, model.config).to(device)
    facts, pruned = checkpoints.facts, evaluate(model, args, dev_sets)
    sparsity = sparsity_report(model)
    left = 1 - sparsity["total"]
    density = {"before_cut": left if over is None else over, "after_cut": left}
    checkpoints.tick()
    if rank() == 0:
        draw_curve(args.out, facts["dense"])
        write_record(args, data, dev_sets, {"dense": facts["dense"], "pruned": pruned,
                                            "sparsity": sparsity, "density": density},
                     facts["seconds"], device)


COMPARED = {  # run: (method, terms left out)
    "magnitude": ("magnitude", ["fic", "kd", "prc", "snc"]),
    "movement": ("movement", ["fic", "kd", "prc", "snc"]),
    "movement-kd": ("movement", ["fic", "prc", "snc"]),
    "cap": ("movement", []),
    "cap-no-prc": ("movement", ["prc"]),
    "cap-no-snc": ("movement", ["snc"]),
    "cap-no-fic": ("movement", ["fic"]),
}


def compare(args):
    """Every run of COMPARED with args.compare seeds, on equal data and budget, and of each seed
    with one teacher, which is the row "dense"; ValueError if --method or --without is given. The
    mean scores are printed and written to compare.md in the run folder."""
    if args.without or args.method != "movement":
        raise ValueError("--compare sets --method and --without itself")
    scores = {"dense": []}
    for seed in range(args.seed, args.seed + args.compare):
        teacher = args.teacher
        for name, (method, without) in COMPARED.items():
            print(f"\n{name}, seed {seed}")
            options = {"compare": None, "seed": seed, "teacher": teacher, "method": method,
                       "without": without, "out": args.out / f"{name}-seed{seed}"}
            record = run(argparse.Namespace(**vars(args) | options))
            scores.setdefault(name, []).append(record["pruned"])
            teacher = teacher or str(options["out"] / "teacher")
        scores["dense"].append(record["dense"])
    metrics = list(record["dense"])
    lines = [f"| {args.task}, {100 * args.sparsity:g} % pruned, seeds: {args.compare} | "
             f"{' | '.join(metrics)} |", "|---" * (1 + len(metrics)) + "|"]
    for name, runs in scores.items():
        cells = (spread([100 * found[metric] for found in runs]) for metric in metrics)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if rank() == 0:
        (args.out / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("", *lines, f"see {args.out}", sep="\n")


def spread(values):
    """Mean, with the standard deviation where there are several values."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def probe(args):
    """How much the encoders of the finished run args.probe still know: the scores on args.task of
    a linear classifier on their frozen pooled vectors, in RUN/probe_TASK.json and printed."""
    if args.compare:
        raise ValueError("--probe and --compare are two modes: choose one")
    try:
        record = json.loads((args.probe / "record.json").read_text(encoding="utf-8"))
        config = record["config"]
        folders = {"pruned": args.probe / "model", "dense": teacher_folder(args.probe, config),
                   "pretrained": located(config["model"])}
        args.max_length = config["max_length"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{args.probe} is no finished run with a record.json") from None
    args.model, scores = args.probe / "model", {}
    device, tokenizer = choose_device(args), load_tokenizer(args.model)
    models = {name: from_pretrained(folder, max(1, len(TASKS[args.task].words)))
              for name, folder in folders.items()}  # a missing one is told before the work
    data, dev_sets = load_data(args, tokenizer, models["pruned"].config)
    for name, model in models.items():
        fit_classifier(model.to(device), data)
        scores[name] = evaluate(model, args, dev_sets)
        print(f"{name}, dev: {show_scores(scores[name])}", flush=True)
    write_json({**provenance(args, data, dev_sets, device), "run": config, **scores},
               args.probe / f"probe_{args.task}.json")


def fit_classifier(model, data):
    """Set the model's classifier to the one that minimises the task's loss, with a little L2, on
    the frozen pooled vectors; it is found by L-BFGS from 0, so there is no chance in it."""
    pooled, labels = encode(model, data), data.labels.to(model.classifier.weight.device)
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(model.classifier.parameters(), max_iter=500,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = task_loss(model.classifier(pooled), labels)
        value = value + 1e-4 * model.classifier.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def main(argv=None):
    """Exit status: 0, 2 after a one-sentence error, 130 after Ctrl-C or SIGTERM."""
    tune_cpu()
    STOP.__init__()
    if threading.current_thread() is threading.main_thread():  # others may not
        signal.signal(signal.SIGINT, STOP)
        signal.signal(signal.SIGTERM, STOP)
    try:
        args = parse(argv)
        with contextlib.redirect_stdout(join_processes()):
            if args.probe:
                probe(args)
            elif args.compare:
                compare(args)
            else:
                run(args)
                if args.task == "demo":
                    print("next: python cap_min.py --compare    (7 such runs, one table)")
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        line = (str(error) or "out of memory").split("\n")[0]
        line = "".join(char if char.isprintable() else "?" for char in line)
        print("error:", line if len(line) < 500 else f"{line[:500]} ...", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank() == 0:
            print("\nstopped; the same command goes on from what a run saved (a probe begins anew)")
        return 130
    return 0


def join_processes():
    """Under torchrun: one process of a group on this machine (gloo, or nccl where there are GPUs).
    Returns where this process may print: process 0 to the standard output, others nowhere."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=2))  # for downloads
    return sys.stdout if rank() == 0 else open(os.devnull, "w")


if __name__ == "__main__":
    sys.exit(main())
