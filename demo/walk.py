"""Print demo/README.md: one training step of CAP on the demo, with every number computed here by
the functions of cap_min.py. The test in demo/test_demo.py keeps the file what this prints.

Run:   python demo/walk.py > demo/README.md        some seconds"""

import contextlib
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cap_min  # noqa: E402
from bert_min import from_pretrained  # noqa: E402
from data_glue import TASKS, load, load_tokenizer  # noqa: E402

ROWS, NAME, KEPT, ANCHOR = 1024, "bert.encoder.layer.0.attention.self.query", 0.2, 0


def prepare():
    """Everything that is there before the step: (args, rows, data, masked model, banks, teacher's
    logits). The rows are the first of train.tsv, the teacher has seen them twice, the snapshot is
    the pre-trained model with half of its weights."""
    args = cap_min.parse(["--device", "cpu", "--dtype", "fp32", "--epochs", "2"])
    cap_min.choose_device(args)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.model)
    rows = load("demo", "train")[:ROWS]
    model = from_pretrained(args.model, len(TASKS["demo"].words))
    data = cap_min.encode_task(rows, tokenizer, args.max_length)
    teacher = copy.deepcopy(model)
    cap_min.train_teacher(args, data, teacher, lambda entry: None)
    banks, teacher_logits = cap_min.first_banks(args, data, model, teacher)
    cap_min.add_masks(model, "magnitude")
    cap_min.set_masks(model, 0.5)
    banks.add("snc", cap_min.encode(model, data))
    cap_min.set_masks(model, KEPT)
    return args, rows, data, model.eval(), banks, teacher_logits


def numbers(values, digits=2):
    return " ".join(f"{value:.{digits}f}" for value in values)


def show(example):
    return f"{example.text_a}  {example.text_b}  -> {TASKS['demo'].words[example.label]}"


def mask_section(model):
    layer = model.get_submodule(NAME)
    scores, some = layer.scores.detach(), slice(0, 8)
    k = round(KEPT * scores.numel())
    threshold = scores[layer.mask].min()
    return f"""## 1. One mask, eq. (1)

`{NAME}` is a matrix of {scores.size(0)} x {scores.size(1)} weights, of which this step keeps
{KEPT:.0%}: k = round({KEPT} x {scores.numel():,}) = {k:,}. The k-th largest score is
{threshold:.3f}. The first row begins

    weights W      {numbers(layer.weight[0, some].tolist(), 3)}
    scores S       {numbers(scores[0, some].tolist())}
    mask M         {' '.join(str(int(bit)) for bit in layer.mask[0, some])}
    W' = W * M     {numbers((layer.weight * layer.mask)[0, some].tolist(), 3)}

The scores are still |W| / std(W), as a short run starts them; eq. (2) will move them."""


def anchor_section(rows, data, q, banks, index, extra):
    own = index[ANCHOR]
    lines = [f"| {name.upper()[0] + name[1] + name[2].upper()} | {ancestor} | "
             f"{float(q[ANCHOR] @ banks.bank[name][own, 0].float()):.3f} |"
             for name, ancestor in (("prc", "pre-trained"), ("snc", "snapshot with 50 % kept"),
                                    ("fic", "fine-tuned"))]
    return f"""## 2. One anchor and its candidates, eq. (4)

The first of the batch's {len(index)} examples is row {int(own)} of the training set:

    {show(rows[own])}

Its pooled vector, divided by its length, is the anchor q. Beside it lie what the ancestors made of
the same example; the cosine tells how far q has come from them with {KEPT:.0%} of the weights:

| bank | ancestor | q . b |
|---|---|---|
""" + "\n".join(lines) + f"""

In each bank the anchor meets the {len(index) - 1} other anchors of the batch, the ancestor's
vectors of the {len(index)} examples of the batch, and those of {len(extra):,} more examples, E:
here all there are."""


def similarities(q, bank, index, extra, temperature):
    """s of the anchor with every vector of the bank that is a candidate, and with the others of
    the batch: (rows drawn, s with their bank vectors, s with the batch)."""
    drawn = torch.cat([index, extra])
    return drawn, bank[drawn, 0].float() @ q[ANCHOR] / temperature, q @ q[ANCHOR] / temperature


def positives_section(args, rows, data, q, banks, index, extra):
    drawn, s, batch = similarities(q, banks.bank["prc"], index, extra, args.temperature)
    batch[ANCHOR] = -torch.inf  # not itself
    everything = torch.cat([batch, s]).logsumexp(0)
    own, label = int(index[ANCHOR]), data.labels[index[ANCHOR]]
    same = drawn == own
    labels = torch.cat([data.labels[index], data.labels[drawn]]) == label
    labels[ANCHOR] = False
    log_p = torch.cat([batch, s]) - everything
    order = torch.where(same, -torch.inf, s).argsort(descending=True)
    nearest = list(dict.fromkeys(drawn[order].tolist()))[:2]
    cosines = (banks.bank["prc"][nearest, 0].float() @ q[ANCHOR]).tolist()
    lines = [f"    {cosine:.3f}  {show(rows[row])}" for cosine, row in zip(cosines, nearest)]
    own_s, own_log_p = float(s[same][0]), float(log_p[-len(s):][same][0])
    return f"""## 3. Its positives and negatives in PrC, eq. (5) and (6)

Unsupervised positives are the pre-trained vectors of this very example: {int(same.sum())} of the
{len(log_p) - 1:,} candidates, since E drew it as well. s = q . b / tau = {own_s:.2f}, and

    log p = s - log(sum of exp s over all candidates)
          = {own_s:.2f} - {float(everything):.2f} = {own_log_p:.2f}

The negatives that are nearest to the anchor, with their cosines:

""" + "\n".join(lines) + f"""

Supervised positives are the {int(labels.sum())} candidates whose label is
"{TASKS['demo'].words[label]}" as well; the mean of their log p is
{float(log_p[labels].mean()):.2f}."""


def loss_section(args, model, batch, pooled, logits, banks, teacher_logits, labels, extra):
    own = labels[batch["index"]]
    rows = []
    for name, bank in banks.items():
        unsup, sup = cap_min.contrastive_loss(pooled, batch["index"], own, bank, labels, extra,
                                              args.temperature)
        _, sup_b = cap_min.contrastive_loss(pooled, batch["index"], own, bank, labels, extra,
                                            args.temperature, "supcon")
        rows.append(f"| {name} | {unsup.item():.3f} | {sup.item():.5f} | {sup_b.item():.2f} |")
    terms = cap_min.cap_terms(logits, pooled, batch, teacher_logits, banks, labels, extra, args)
    shares = cap_min.gradient_shares(terms, pooled)
    values = [f"| {name} | {term.item():.3f} | {shares[name]:.2f} |"
              for name, term in terms.items()]
    total = sum(terms.values())
    section = """## 4. The loss, eq. (7) and (8)

Summed over the anchors and divided by the number of all their positives, the log p become

| bank | L^u | L^s | L^s, divided by the batch instead (SupCon) |
|---|---|---|---|
""" + "\n".join(rows) + f"""

The third column shows why the published weight of L^s, {args.w_sup:g}, means less than it seems.
With {args.w_unsup:g} L^u + {args.w_sup:g} L^s, {args.w_ce:g} cross-entropy and {args.w_kd:g}
distillation:

| term | value | share of the gradient on the pooled vectors |
|---|---|---|
""" + "\n".join(values) + f"""

The loss is their sum, {total.item():.3f}."""
    total.backward()
    return section


def gradient_section(model):
    layer = model.get_submodule(NAME)
    weight, mask = layer.weight, layer.mask
    of_mask = layer.scores.grad / weight.detach()  # dL/dW', from eq. (2)
    lines = []
    for what, row in (("kept", mask[0]), ("pruned", ~mask[0])):
        i = int((row * layer.scores.grad[0].abs()).argmax())
        gradients = (1e3 * grad[0, i].item() for grad in (of_mask, weight.grad, layer.scores.grad))
        lines.append(f"| {what}, W[0, {i}] = {weight[0, i].item():.3f} | "
                     f"{' | '.join(f'{value:.3f}' for value in gradients)} |")
    return """## 5. Back to the weights and the scores, eq. (2)

Of the first row of the same matrix, the kept and the pruned weight whose score moves most; all
gradients times 1,000:

| weight | dL/dW' | dL/dW = dL/dW' * M | dL/dS = dL/dW' * W |
|---|---|---|---|
""" + "\n".join(lines) + """

The pruned weight stands still, but its score does not: where dL/dS is negative the score grows, and
the weight can come back. That is movement pruning. Clipping, Adam and the next mask follow."""


def walk():
    """The text of demo/README.md."""
    with contextlib.redirect_stdout(sys.stderr):
        args, rows, data, model, banks, teacher_logits = prepare()
    batch = next(cap_min.batches(data, args.batch_size, args.seed))
    extra = torch.arange(ROWS)  # fewer rows than --extra: all are drawn
    logits, pooled = model(*cap_min.inputs(batch))
    q, index = F.normalize(pooled.detach(), dim=1), batch["index"]
    return "\n\n".join([
        f"""# One step of CAP, with its numbers

The first {len(rows):,} rows of `train.tsv` stand for the training set here. They ask for what only
the pre-training corpus tells about the animals ([make_demo.py](make_demo.py)):

    {show(rows[0])}
    {show(rows[1])}

Before the step there are the pre-trained model, a teacher fine-tuned for two epochs, and a
snapshot: the model with half of its weights. Each has encoded all rows once; these vectors are the
banks PrC, FiC and SnC. Now the model is to be trained with {KEPT:.0%} of its weights. Dropout is
off in this walk. Every number is printed by `python demo/walk.py`, and a test compares them.""",
        mask_section(model),
        anchor_section(rows, data, q, banks, index, extra),
        positives_section(args, rows, data, q, banks, index, extra),
        loss_section(args, model, batch, pooled, logits, banks, teacher_logits, data.labels, extra),
        gradient_section(model),
    ]) + "\n"


if __name__ == "__main__":
    print(walk(), end="")
