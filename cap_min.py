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
    b_j^m     bank[j, m] (N, K, D)    unit pooled vector of example j by ancestor m:
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
import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from bert_min import (BertClassifier, from_pretrained, model_folder, replacing,
                      save_pretrained)
from data_glue import TASKS, batches, encode_task, load, load_tokenizer, save_tokenizer, score

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------- masks


def topk_mask(scores, density):
    """Bool mask, shaped like `scores`, of its k = round(density * numel) largest entries, at
    least 1. Exactly k are kept: of equal scores the first by index. Eq. (1)."""
    flat = scores.detach().flatten()
    k = max(1, round(density * flat.numel()))  # eq. (1)
    if k >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if flat.device.type == "cpu":
        return torch.from_numpy(topk_by_sample(flat.numpy(), k)).view_as(scores)
    kept = flat.sort(descending=True, stable=True).indices[:k]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, kept, True).view_as(scores)


def topk_by_sample(flat, k):
    """`topk_mask` of a numpy vector without sorting it all: a sorted sample tells about where the
    k-th largest lies, a count how far off that is, and only a narrow band has to be searched."""
    stride = 61  # a prime, not to fall into step with the rows of the matrix
    sample = np.sort(flat[::stride])
    place = len(sample) * (1 - k / len(flat))
    mask = flat > sample[int(place)]
    miss = (np.count_nonzero(mask) - k) / stride  # in places of the sample; above 0: too many
    place += miss + math.copysign(2 + 4 * math.sqrt(abs(miss)), miss)
    edge = sample[min(max(0, int(place)), len(sample) - 1)]
    mask, wider = (mask, flat >= edge) if miss < 0 else (flat > edge, mask)
    band = np.flatnonzero(mask ^ wider)
    lacking = k - np.count_nonzero(mask)  # so many of the band are kept as well
    if not 0 < lacking <= len(band):  # the sample misled: search everything
        mask, band, lacking = np.zeros(len(flat), bool), np.arange(len(flat)), k
    values = flat[band]
    threshold = np.partition(values, -lacking)[-lacking]
    mask[band] = values >= threshold
    surplus = np.count_nonzero(values >= threshold) - lacking
    mask[band[values == threshold][::-1][:surplus]] = False
    return mask


class StraightThrough(torch.autograd.Function):
    """W' = W * M, where the gradient of W' reaches the scores as if M were S itself. Eq. (2)."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight, mask)
        return weight * mask  # eq. (1)

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        return grad * mask, grad * weight if ctx.needs_input_grad[1] else None, None  # eq. (2)


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

    def forward(self, x):
        return F.linear(x, StraightThrough.apply(self.weight, self.scores, self.mask), self.bias)


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
        layer.mask = topk_mask(scores, density)


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


# -------------------------------------------------------------------- snapshot banks


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def encode(model, data, dtype=torch.float32, tokens=None):
    """Pooled vectors (N, D) of all examples, fp32, on the model's device. Dropout is off and no
    gradient is kept; the model's mode is restored. tokens: most in a batch, padding included."""
    device, was_training = model.classifier.weight.device, model.training
    tokens = tokens or (2 ** 11 if device.type == "cpu" else 2 ** 16)
    pooled = torch.empty(len(data), model.config.hidden_size, device=device)
    lengths, order = data.lengths.sort(descending=True)  # alike in length: little padding
    model.eval()
    with torch.no_grad(), autocast(device, dtype):
        while len(order):
            count = max(1, tokens // int(lengths[0]))
            batch = move(data.batch(order[:count]), device)
            pooled[batch["index"]] = model(*inputs(batch))[1].float()
            lengths, order = lengths[count:], order[count:]
    model.train(was_training)
    return pooled


def move(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def inputs(batch):
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


class Banks:
    """Unit pooled vectors of the training set by the model's ancestors, in half precision."""

    def __init__(self, names, size, hidden_size, snapshots, device):
        """names: those of "prc", "snc", "fic" that are used. size: N. snapshots: room in SnC."""
        self.filled = {name: 0 for name in names}
        self.bank = {name: torch.empty(size, snapshots if name == "snc" else 1, hidden_size,
                                       dtype=torch.float16, device=device) for name in names}

    def add(self, name, pooled):
        """Append one ancestor's pooled vectors (N, D)."""
        self.bank[name][:, self.filled[name]] = F.normalize(pooled, dim=-1).half()
        self.filled[name] += 1

    def items(self):
        """(name, (N, K, D)) of the banks that hold an ancestor yet: SnC comes with epoch 2."""
        return [(name, self.bank[name][:, :k]) for name, k in self.filled.items() if k]


# ------------------------------------------------------------------ contrastive loss


def contrastive_loss(queries, index, labels, bank, bank_labels, extra,
                     temperature=0.1, norm="official"):
    """Unsupervised and supervised contrastive loss of a batch against one bank, eq. (4) to (7).

    queries: (B, D) pooled vectors, not normalised. index, labels: (B,). bank: (N, K, D) unit
    vectors. bank_labels: (N,). extra: (E,) rows of the bank, drawn without replacement.
    norm: "official" divides by the number of positives of the whole batch, as the published
    code does; "supcon" by B, as Khosla et al. (arXiv 2004.11362) do.
    Returns (unsup, sup): two scalars, not weighted."""
    q = F.normalize(queries, dim=-1)  # (B, D)
    drawn = torch.cat([index, extra])  # (B + E,)
    ancestors = bank.index_select(0, drawn).to(q.dtype).flatten(0, 1)  # ((B + E) K, D)
    candidate_index = torch.cat([index, drawn.repeat_interleave(bank.size(1))])  # (C,)
    candidate_labels = torch.cat([labels, bank_labels[drawn].repeat_interleave(bank.size(1))])
    similarity = torch.cat([q @ q.detach().T, q @ ancestors.T], dim=1) / temperature  # eq. (4)
    itself = torch.eye(*similarity.shape, dtype=torch.bool, device=q.device)  # (B, C)
    log_p = torch.where(itself, -torch.inf, similarity).log_softmax(dim=1)  # (B, C), eq. (5)
    same_example = (index[:, None] == candidate_index) & ~itself  # (B, C), P^u of eq. (6)
    same_label = (labels[:, None] == candidate_labels) & ~itself  # (B, C), P^s of eq. (6)

    def mean_over_positives(positive):
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
                                      bank_labels, extra[:args.extra // bank.size(1)],
                                      args.temperature, args.norm)
        terms[name] = args.w_unsup * unsup + args.w_sup * sup  # eq. (8)
    return terms


def gradient_shares(terms, pooled):
    """{term: |d term / d pooled| as a share of the sum over terms}: who steers the encoder."""
    norms = {}
    for name, term in terms.items():  # but the penalty on the scores, which is not of pooled
        grad, = torch.autograd.grad(term, pooled, retain_graph=True, allow_unused=True)
        norms[name] = 0.0 if grad is None else grad.float().norm().item()
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


def train(model, data, loss_terms, args, log, epochs, set_density=None, after_epoch=None,
          first_epoch=0):
    """Train `model` on `data`: the one loop of the dense teacher and of the pruned model.

    loss_terms(logits, pooled, batch) -> {name: scalar}, whose sum is minimised.
    set_density(step, total) -> share of weights kept: sets the masks before each step.
    after_epoch(epoch) -> {...}, entered in the log. first_epoch: number of the first one, for the
    order of the data and the log; the schedule begins anew. ValueError if the loss is not finite,
    which is looked at every LOG_EVERY steps."""
    device = model.classifier.weight.device
    dtype, steps = args.compute_dtype, math.ceil(len(data) / args.batch_size)
    total = epochs * steps
    optimizer, schedule = make_optimizer(model, args, total)
    progress = Progress(total, args.batch_size, device)
    model.train()
    for epoch in range(first_epoch, first_epoch + epochs):
        for i, batch in enumerate(batches(data, args.batch_size, args.seed, epoch)):
            step = (epoch - first_epoch) * steps + i
            kept = 1.0 if set_density is None else set_density(step, total)
            batch = move(batch, device)
            with autocast(device, dtype):
                logits, pooled = model(*inputs(batch))
            terms = loss_terms(logits.float(), pooled.float(), batch)
            to_log = step % LOG_EVERY == 0 or step == total - 1
            if to_log:
                values = {name: term.item() for name, term in terms.items()}
                bad = [name for name, value in values.items() if not math.isfinite(value)]
                if bad:
                    raise ValueError(f"the term {bad[0]} is {values[bad[0]]} at step {step}")
                shares = gradient_shares(terms, pooled)
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
        if sys.stdout.isatty():
            print()  # the step line stays
        if after_epoch is not None:
            log({"step": first_epoch * steps + step, "epoch": epoch, "kept": kept,
                 **after_epoch(epoch)})


class Progress:
    """The step line, under a heading that names its columns: rewritten in place on a terminal,
    elsewhere one line a minute."""

    def __init__(self, total, batch_size, device):
        self.total, self.batch_size, self.device = total, batch_size, device
        self.start = self.last_time = time.perf_counter()
        self.last_step, self.last_printed = -1, -math.inf
        print("step | kept | loss = weighted terms | lr | ms, ex/s, GB | eta", flush=True)

    def show(self, step, kept, values, lr):
        """Print the line and return its speed: {"ms", "examples_per_second"} since the last."""
        now = time.perf_counter()
        seconds = (now - self.last_time) / (step - self.last_step)
        left = (now - self.start) / (step + 1) * (self.total - step - 1)
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


def train_teacher(args, data, model, log):
    """Fine-tune the dense `model` on `data`."""
    torch.manual_seed(args.seed)

    def loss_terms(logits, pooled, batch):
        return {"ce": task_loss(logits, batch["labels"])}

    train(model, data, loss_terms, args, lambda entry: log({"phase": "teacher", **entry}),
          teacher_epochs(args))


def stages(args):
    """Sparsities at which the model is trained for args.epochs each: the one asked for, after
    those of 10 %, 20 %, ... where heads and neurons are removed."""
    tenths = [i / 10 for i in range(1, 10)] if args.method == "structured" else []
    return [*(sparsity for sparsity in tenths if sparsity < args.sparsity), args.sparsity]


def teacher_epochs(args):
    return min(TEACHER_EPOCHS, args.epochs * len(stages(args)))


def first_banks(args, data, model, teacher):
    """(banks with PrC and FiC filled, teacher logits (N, L)). Both are made once: neither the
    pre-trained model nor the teacher ever changes."""
    names = [name for name in ("prc", "snc", "fic") if name not in args.without]
    pooled = encode(teacher, data, args.compute_dtype)  # (N, D)
    snapshots = (len(stages(args)) if args.method == "structured" else args.epochs) - 1
    banks = Banks(names, len(data), pooled.size(1), snapshots, pooled.device)
    if "fic" in names:
        banks.add("fic", pooled)
    if "prc" in names:
        banks.add("prc", encode(model, data, args.compute_dtype))
    return banks, teacher.classifier(pooled).detach()


def set_masks_at(model, args, step, total):
    """The masks of `step`, eq. (3). Returns the share of weights kept and, for CAP-soft, its
    threshold and the share over it, None once exactly k are kept all the same, as at the end.
    NOTE deviation: CAP-soft's density is not left to its penalty but stays below eq. (3)."""
    warm, cool = 2 * warmup_steps(args, total), 3 * warmup_steps(args, total)
    kept = cubic_density(step, total, 1.0, 1.0 - args.sparsity, warm, cool)
    if args.method != "soft":
        set_masks(model, kept)
        return kept, 0.0, None
    threshold = cubic_density(step, total, 0.0, SOFT_THRESHOLD, warm, cool)
    exact = step >= total - cool
    over = set_soft_masks(model, threshold, kept, exact)
    return (kept, threshold, None) if exact else (min(kept, over), threshold, over)


def prune(args, data, dev_sets, model, banks, teacher_logits, log):
    """CAP: the pre-trained `model`, pruned. Returns it, with the pruned weights at 0 or removed,
    and the share of weights over CAP-soft's threshold just before its cut to exactly k, or None."""
    torch.manual_seed(args.seed)
    device, structured = teacher_logits.device, args.method == "structured"
    epoch_dev = {"dev": dev_sets["dev"].head(EPOCH_DEV_EXAMPLES)}
    chance = np.random.default_rng(args.seed)
    bank_labels = data.labels.round().to(device)  # a regression's labels: nearest whole number
    last_epoch = args.epochs * len(stages(args)) - 1
    threshold, over = 0.0, None

    def loss_terms(logits, pooled, batch):
        count = min(args.extra, len(data))
        extra = torch.from_numpy(chance.choice(len(data), count, replace=False)).to(device)
        terms = cap_terms(logits, pooled, batch, teacher_logits, banks, bank_labels, extra, args)
        if args.method == "soft":
            penalty = args.penalty * threshold / SOFT_THRESHOLD
            terms["l1"] = penalty * mean_sigmoid(model)  # eq. (8), CAP-soft
        return terms

    def set_density(step, total):
        nonlocal threshold, over
        if structured:
            return left
        kept, threshold, share = set_masks_at(model, args, step, total)
        over = over if share is None else share
        return kept

    def after_epoch(epoch):
        if "snc" in banks.bank and epoch < last_epoch and (
                not structured or (epoch + 1) % args.epochs == 0):
            banks.add("snc", encode(model, data, args.compute_dtype))
        scores = evaluate(model, args, epoch_dev, args.compute_dtype)
        print(f"epoch {epoch + 1}/{last_epoch + 1}, dev: {show_scores(scores)}", flush=True)
        return {"dev": scores}

    if not structured:
        add_masks(model, args.score_init)
    for stage, sparsity in enumerate(stages(args)):
        if structured:
            print(f"ranking heads and neurons on all {len(data)} examples; {sparsity:.0%} to go",
                  flush=True)
            model = remove_least_important(model, data, loss_terms, args, sparsity)
            left = 1 - sparsity_report(model)["total"]
        train(model, data, loss_terms, args, lambda entry: log({"phase": "prune", **entry}),
              args.epochs, set_density, after_epoch, first_epoch=stage * args.epochs)
    return model if structured else apply_masks(model), over


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
    for batch in batches(data, args.batch_size, args.seed, 0):
        batch = move(batch, heads[0].device)
        with autocast(heads[0].device, args.compute_dtype):
            logits, pooled = model(*inputs(batch))
        loss = sum(loss_terms(logits.float(), pooled.float(), batch).values())
        for total, grad in zip(sums, torch.autograd.grad(loss, heads + neurons)):
            total += grad.abs()
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


def remove_units(model, heads, neurons):
    """A model with only the heads and neurons of these bool masks, one a layer: its matrices are
    smaller, `config.layer_sizes` tells how small, and it computes what the masked one would."""
    sizes = [[int(kept.sum()) for kept in masks] for masks in zip(heads, neurons)]
    small = BertClassifier(dataclasses.replace(model.config, layer_sizes=sizes))
    small.to(model.classifier.weight)  # its device and dtype
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
    masks, left = [], (1 - sparsity) * model.config.num_hidden_layers
    for importances, units in zip(importance(model, data, loss_terms, args),
                                  (model.config.num_attention_heads,
                                   model.config.intermediate_size)):
        masks.append(most_important(importances, math.floor(left * units + 1e-6)))
    model = remove_units(model, *masks)
    model.bert.embeddings.requires_grad_(False)
    return model


def show_scores(scores):
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())


# ------------------------------------------------------------------------ run folder


def is_finished(folder, config):
    """Whether the run folder holds this very run, finished. ValueError if it is something else, or
    belongs to a run of another configuration."""
    path = folder / "log.jsonl"
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is no run folder: choose another --out")
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8").split("\n")[0])["config"]
        differing = [key for key in config if key in before and config[key] != before[key]]
        if not before.keys() & config.keys():
            raise KeyError("task")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: delete the folder") from None
    if differing:
        raise ValueError(f"{folder} belongs to another run ({', '.join(differing)} differ): "
                         "choose another --out or delete it")
    return (folder / "record.json").exists()


def start_log(folder, config):
    """Make the run folder with a new log.jsonl; returns log(entry), which appends a line."""
    path = folder / "log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": config}) + "\n", encoding="utf-8")

    def log(entry):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    return log


def run_config(args):
    """All flags as JSON, but where the run lies and the modes; paths are relative to this file."""
    config = {key: str(value) if isinstance(value, (Path, torch.dtype)) else value
              for key, value in vars(args).items() if key not in ("out", "compare", "probe")}
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
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    save_pretrained(model, folder)


def provenance(args, data, dev_sets, device):
    """What a record says of the program, the machine and the data that it comes from."""
    modules = ("bert_min.py", "data_glue.py", "cap_min.py")
    source = b"".join((HERE / name).read_bytes() for name in modules)
    rows = data.tokens.numpy().tobytes() + data.labels.numpy().tobytes()
    return {"config": run_config(args), "seed": args.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__,
                         "machine": f"{platform.machine()}, {device.type}, "
                                    f"{torch.get_num_threads()} threads"},
            "source_sha256": hashlib.sha256(source).hexdigest(),
            "train_sha256": hashlib.sha256(rows).hexdigest(),
            "examples": {"train": len(data), **{name: len(dev) for name, dev in dev_sets.items()}}}


def write_record(args, data, dev_sets, results, seconds, device):
    """record.json: all that a figure in a table must be able to show for itself."""
    passes = {"teacher": teacher_epochs(args), "prune": args.epochs * len(stages(args))}
    write_json({**provenance(args, data, dev_sets, device), **results,
                "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
                "examples_per_second": {phase: round(len(data) * epochs / seconds[phase], 1)
                                        for phase, epochs in passes.items() if seconds[phase]},
                "peak_memory_bytes": peak_memory(device)}, args.out / "record.json")


def write_json(record, path):
    """A record that is there is whole."""
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
        points = " ".join(f"{60 + 500 * x / last:.1f},{260 - 220 * y:.1f}" for x, y in values)
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
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("it is none of cuda, mps and cpu")
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
    """ValueError unless `size` examples give the schedule room; settles --score-init auto."""
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


def keep_freed_memory():
    """Have glibc keep what is freed: to give each step's gradients back to the system and to map
    them anew, page by page, takes up to a tenth of a step. Without glibc nothing is done."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, at its largest
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def run(args):
    """Make the run that `args` ask for, unless its folder holds it finished; returns its record."""
    device, config = choose_device(args), run_config(args)
    if is_finished(args.out, config):
        print(f"{args.out} is finished:")
    else:
        make_run(args, device, config)
    path = args.out / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        print_summary(args, record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: delete the folder") from None
    return record


def make_run(args, device, config):
    """Teacher, banks, pruning, export, evaluation of the exported folder, record."""
    start, seconds = time.perf_counter(), {"teacher": 0.0}
    source = model_folder(args.model)
    tokenizer = load_tokenizer(source)
    torch.manual_seed(args.seed)  # of the new classifier
    model = from_pretrained(source, max(1, len(TASKS[args.task].words))).to(device)
    teacher = load_fine_tuned(args.teacher, args.task, model.config) if args.teacher else None
    data, dev_sets = load_data(args, tokenizer, model.config)
    check_schedule(args, len(data))
    log = start_log(args.out, config)  # the input is sound: now something may be written
    start_of_scores = f", scores from {args.score_init}" if args.score_init else ""
    print(f"{args.task}: {len(data)} examples, {args.epochs * len(stages(args))} epochs on "
          f"{device}, {args.compute_dtype}, {args.method}{start_of_scores}, run folder {args.out}",
          flush=True)

    if teacher is None:
        folder = args.out / "teacher"
        if not (folder / "model.safetensors").exists():
            teacher = copy.deepcopy(model)
            _, seconds["teacher"] = timed(train_teacher, args, data, teacher, log)
            export(teacher, tokenizer, args.task, folder)
        teacher = load_fine_tuned(folder, args.task, model.config)
    dense = evaluate(teacher.to(device), args, dev_sets)
    print(f"dense, dev: {show_scores(dense)}", flush=True)
    (banks, teacher_logits), seconds["banks"] = timed(first_banks, args, data, model, teacher)
    del teacher  # all that is needed of it is cached
    (model, over), seconds["prune"] = timed(prune, args, data, dev_sets, model, banks,
                                            teacher_logits, log)

    export(model, tokenizer, args.task, args.out / "model")
    model = load_fine_tuned(args.out / "model", args.task, model.config).to(device)
    pruned, sparsity = evaluate(model, args, dev_sets), sparsity_report(model)
    left = 1 - sparsity["total"]
    density = {"before_cut": left if over is None else over, "after_cut": left}
    seconds["total"] = time.perf_counter() - start
    draw_curve(args.out, dense)
    write_record(args, data, dev_sets, {"dense": dense, "pruned": pruned, "sparsity": sparsity,
                                        "density": density}, seconds, device)


def timed(function, *arguments):
    """(what it returns, seconds it took)."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


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
    for name, folder in folders.items():
        model = from_pretrained(folder, max(1, len(TASKS[args.task].words))).to(device)
        if not scores:
            data, dev_sets = load_data(args, tokenizer, model.config)
        fit_classifier(model, data)
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
    """Exit status: 0, 2 after a one-sentence error, 130 after Ctrl-C."""
    keep_freed_memory()
    try:
        args = parse(argv)
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
        print("\nstopped; the same command starts again, with the teacher if it was finished")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
