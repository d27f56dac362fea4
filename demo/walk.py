"""Print demo/README.md: one training step of CAP on the demo, with every number computed here by
the functions of cap_min.py, but for section 3, which does eq. (4) to (6) by hand for one anchor.
The test in demo/test_demo.py keeps the file what this prints.

Run:   python demo/walk.py > demo/README.md        some seconds"""

import contextlib
import copy
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cap_min  # noqa: E402
from bert_min import from_pretrained  # noqa: E402
from data_glue import TASKS, load, load_tokenizer  # noqa: E402

ROWS, NAME, KEPT, ANCHOR = 1024, "bert.encoder.layer.0.attention.self.query", 0.5, 0
WORDS = TASKS["demo"].words


def prepare():
    """Everything that is there before the step: (args, rows, data, masked model, banks, teacher's
    logits). The teacher has seen the rows twice, the model once, still with all its weights."""
    args = cap_min.parse(["--device", "cpu", "--dtype", "fp32", "--epochs", "2"])
    cap_min.choose_device(args)
    torch.manual_seed(0)
    rows = load("demo", "train")[:ROWS]
    model = from_pretrained(args.model, len(WORDS))
    data = cap_min.encode_task(rows, load_tokenizer(args.model), args.max_length)
    teacher = copy.deepcopy(model)
    cap_min.train_teacher(args, data, teacher, lambda entry: None)
    banks, teacher_logits = cap_min.first_banks(args, data, model, teacher)
    cap_min.add_masks(model, "magnitude")

    def loss_terms(logits, pooled, batch, chance):
        return cap_min.cap_terms(logits, pooled, batch, teacher_logits, banks, data.labels,
                                 torch.arange(ROWS), args)

    cap_min.train(model, data, loss_terms, args, lambda entry: None, epochs=1,
                  set_density=lambda step, total: 1.0)
    banks.add("snc", cap_min.encode(model, data))
    cap_min.set_masks(model, KEPT)
    return args, rows, data, model.eval(), banks, teacher_logits


def paragraph(text):
    """Text with its numbers in it, in lines of at most 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100, break_long_words=False,
                         break_on_hyphens=False)


def table(*rows):
    """A table whose first row is its heading."""
    rows = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([rows[0], "|---" * (rows[0].count("|") - 1) + "|", *rows[1:]])


def numbers(values, digits=2):
    return " ".join(f"{value:.{digits}f}" for value in values)


def show(example):
    return f"{example.text_a}  {example.text_b}  -> {WORDS[example.label]}"


def mask_section(model):
    layer = model.get_submodule(NAME)
    scores, some = layer.scores.detach(), slice(0, 8)
    k, smallest = round(KEPT * scores.numel()), scores[layer.mask].min().item()
    text = paragraph(f"""`set_masks` keeps, in this step, {100 * KEPT:g} % of each matrix. `{NAME}`
        has {scores.size(0)} x {scores.size(1)} weights, so k = round({KEPT} x {scores.numel():,}) =
        {k:,}; the k-th largest score is {smallest:.3f}. Its first row begins""")
    return f"""## 1. One mask, eq. (1)

{text}

    weights W      {numbers(layer.weight[0, some].tolist(), 3)}
    scores S       {numbers(scores[0, some].tolist(), 3)}
    mask M         {' '.join(str(int(bit)) for bit in layer.mask[0, some])}
    W' = W * M     {numbers((layer.weight * layer.mask + 0.0)[0, some].tolist(), 3)}

The scores started at |W| / std(W), as in every short run, and have moved for one epoch."""


def anchor_section(rows, q, banks, index, extra):
    own = index[ANCHOR]
    ancestors = (("PrC", "pre-trained"), ("SnC", "itself, a moment ago, with all weights"),
                 ("FiC", "fine-tuned"))
    cosines = (q[ANCHOR] @ banks.bank[name.lower()][0][own].float() for name, _ in ancestors)
    lines = [(*both, f"{cosine.item():.3f}") for both, cosine in zip(ancestors, cosines)]
    text = paragraph(f"""In each bank (`contrastive_loss` is called once for each) the anchor meets
        the {len(index) - 1} other anchors of the batch, the ancestor's vectors of the batch's
        {len(index)} examples, and those of the examples E that were drawn. Here E is the whole
        training set, {len(extra):,} rows, so that the batch's own occur twice.""")
    return f"""## 2. One anchor and its candidates, eq. (4)

The first of the batch's {len(index)} examples is row {int(own)} of the training set:

    {show(rows[own])}

Its pooled vector, divided by its length, is the anchor q. What the ancestors made of the same
example, by the cosine with q:

{table(("bank", "ancestor", "q . b"), *lines)}

{text}"""


def positives_section(args, rows, data, q, banks, index, extra):
    bank_rows = torch.cat([index, extra])
    vectors = banks.bank["prc"][0][bank_rows].float()
    candidates = torch.cat([q, vectors])  # (C, D)
    row_of = torch.cat([index, bank_rows])  # of each candidate
    s = candidates @ q[ANCHOR] / args.temperature
    s[ANCHOR] = -torch.inf  # not itself
    log_p = s.log_softmax(0)
    own, label = int(index[ANCHOR]), int(data.labels[index[ANCHOR]])
    same = row_of == own
    alike = data.labels[row_of] == label
    same[ANCHOR] = alike[ANCHOR] = False
    own_s = s[same][0].item()
    lines = []
    for name, among in (("other", ~alike), ("same", alike & ~same)):
        i = int(torch.where(among, s, -torch.inf).argmax())
        where = "the batch" if i < len(q) else "the bank"
        lines.append((f"{name} label, in {where}", f"{s[i].item() * args.temperature:.3f}",
                      show(rows[int(row_of[i])])))
    first = paragraph(f"""Positives of L^u are the pre-trained vectors of this very example:
        {int(same.sum())} of {len(s) - 1:,} candidates, since E has it too. With
        s = q . b / tau = {own_s:.2f},""")
    last = paragraph(f"""Positives of L^s are the {int(alike.sum()):,} candidates with the label
        "{WORDS[label]}"; the mean of their log p is {log_p[alike].mean().item():.2f}. All with
        another label are negatives of both.""")
    return f"""## 3. Its positives and negatives in PrC, eq. (5) and (6)

{first}

    log p = s - log(sum of exp s over all candidates)
          = {own_s:.2f} - {s.logsumexp(0).item():.2f} = {log_p[same][0].item():.2f}

The nearest candidate of another label, and the nearest of the same that is another example:

{table(("candidate", "cosine", "example"), *lines)}

{last}"""


def loss_section(args, batch, pooled, logits, banks, teacher_logits, labels, extra):
    title = {"prc": "PrC", "snc": "SnC", "fic": "FiC", "ce": "cross-entropy", "kd": "distillation"}
    own, rows = labels[batch["index"]], []
    for name, bank in banks.items():
        given = pooled, batch["index"], own, bank, labels, extra, args.temperature
        values = [*cap_min.contrastive_loss(*given), *cap_min.contrastive_loss(*given, "supcon")]
        rows.append((title[name], *(f"{value.item():.4f}" for value in values)))
    terms = cap_min.cap_terms(logits, pooled, batch, teacher_logits, banks, labels, extra, args)
    shares = cap_min.gradient_shares(terms, pooled)
    values = [(title[name], f"{term.item():.3f}", f"{shares[name]:.2f}")
              for name, term in terms.items()]
    total = sum(terms.values())
    total.backward()
    text = paragraph(f"""SupCon's form divides by the number of anchors instead. The more positives,
        the smaller is L^s beside that: its published weight, {args.w_sup:g}, means less than it
        seems. `cap_terms` weighs {args.w_unsup:g} L^u + {args.w_sup:g} L^s for each bank,
        {args.w_ce:g} cross-entropy and {args.w_kd:g} distillation:""")
    return f"""## 4. The loss, eq. (7) and (8)

For each anchor, the mean of log p over its positives; these means, summed over the anchors, divided
by the number of positives of all anchors, with the sign changed:

{table(("bank", "L^u", "L^s", "L^u, SupCon", "L^s, SupCon"), *rows)}

{text}

{table(("term", "value", "share of the gradient on the pooled vectors"), *values)}

The loss is their sum, {total.item():.3f}."""


def gradient_section(layer, x, grad_output):
    """x, grad_output: what went into the layer, and the gradient that came back to its output."""
    weight, scores = layer.weight, layer.scores
    of_masked = grad_output.flatten(0, 1).T @ x.flatten(0, 1)  # dL/dW', (out, in)
    lines = []
    for what, growth in (("kept", layer.mask[0] * scores.grad[0].abs()),
                         ("pruned", ~layer.mask[0] * -scores.grad[0])):
        i = int(growth.argmax())
        gradients = (grad[0, i].item() for grad in (of_masked, weight.grad, scores.grad))
        lines.append((f"{what}, W[0, {i}] = {weight[0, i].item():.3f}",
                      *(f"{1e3 * value + 0.0:.3f}" for value in gradients)))
    heading = "weight", "dL/dW'", "dL/dW = dL/dW' * M", "dL/dS = dL/dW' * W"
    return f"""## 5. Back to the weights and the scores, eq. (2)

`StraightThrough`. Of the first row of the same matrix, the kept weight whose score has the largest
gradient, and the pruned one whose score grows most; all gradients times 1,000:

{table(heading, *lines)}

The pruned weight gets no gradient (Adam's momentum may still move it, which is why the export is
W * M). Its score does: dL/dS is negative, so the score grows, and the weight can come back. That is
movement pruning. Clipping, Adam and the next mask follow."""


def walk():
    """The text of demo/README.md."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums, and so the last digits, depend on how work is split
    with contextlib.redirect_stdout(sys.stderr):
        args, rows, data, model, banks, teacher_logits = prepare()
    torch.set_num_threads(threads)
    batch = next(cap_min.batches(data, args.batch_size, args.seed))
    extra = torch.arange(ROWS)  # fewer rows than --extra: all are drawn
    layer, passed = model.get_submodule(NAME), []

    def watch(module, given, output):
        passed.append(given[0].detach())
        output.register_hook(passed.append)  # its gradient, once there is one

    layer.register_forward_hook(watch)
    logits, pooled = model(*cap_min.inputs(batch))
    q, index = F.normalize(pooled.detach(), dim=1), batch["index"]
    start = paragraph(f"""The first {ROWS:,} rows of `train.tsv` are the training set here. They ask
        for facts about animals, which the pre-training corpus told
        ([make_demo.py](make_demo.py)):""")
    before = paragraph(f"""Before the step there are the pre-trained model, a teacher fine-tuned for
        two epochs, and a snapshot of the model itself after its first epoch, still with all
        weights. Each has encoded all rows once; these unit vectors are the banks PrC, FiC and SnC.
        Now the model is to be trained with {100 * KEPT:g} % of its weights. (A run prunes in small
        steps, and has dropout on.) Every number is printed by `python demo/walk.py`, and a test
        compares them.""")
    return "\n\n".join([
        "# One step of CAP, with its numbers", start, f"    {show(rows[0])}\n    {show(rows[1])}",
        before, mask_section(model), anchor_section(rows, q, banks, index, extra),
        positives_section(args, rows, data, q, banks, index, extra),
        loss_section(args, batch, pooled, logits, banks, teacher_logits, data.labels, extra),
        gradient_section(layer, *passed)]) + "\n"


if __name__ == "__main__":
    print(walk(), end="")
