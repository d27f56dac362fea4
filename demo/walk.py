"""Print demo/README.md: one training step of CAP-m on the demo, with every number computed here by
the functions of cap_min.py, but for section 3, which does eq. (4) to (6) by hand for one anchor.
The test in demo/test_demo.py keeps the file what this prints.

Run:   python demo/walk.py > demo/README.md        some seconds"""

import contextlib
import copy
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cap_min  # noqa: E402
from bert_min import from_pretrained  # noqa: E402
from data_glue import TASKS, batches, encode_task, inputs, load, load_tokenizer  # noqa: E402

ROWS, NAME, DENSITY, ANCHOR = 1024, "bert.encoder.layer.0.attention.self.query", 0.5, 0
WORDS = TASKS["demo"].words
TITLES = {"prc": "PrC", "snc": "SnC", "fic": "FiC", "ce": "cross-entropy", "kd": "distillation"}


def prepare(folder):
    """Everything that is there before the step: (args, rows, data, masked model, ancestors). The
    teacher has seen the rows three times, the model once, with all its weights."""
    args = cap_min.parse(["--method", "movement", "--device", "cpu", "--dtype", "fp32", "--epochs",
                          "2", "--sparsity", "0", "--out", folder])
    device = cap_min.choose_device(args)
    torch.manual_seed(0)
    rows = load("demo", "train")[:ROWS]
    model = from_pretrained(args.model, len(WORDS))
    data = encode_task(rows, load_tokenizer(args.model), args.max_length)
    cap_min.settle_schedule(args, ROWS)
    run = cap_min.Run(args, {})
    run.begin()
    # the teacher, and what it and the pre-trained model make of the rows
    teacher = copy.deepcopy(model)
    cap_min.train(run, teacher, data)
    cap_min.store_ancestors(run, model, teacher, data)
    ancestors = cap_min.load_ancestors(run, data, device)
    # the model's first epoch, and a snapshot of it
    cap_min.add_masks(model, args.score_init)
    args.epochs, run.stage, run.epoch = 1, 0, 0
    cap_min.train(run, model, data, ancestors, data)
    cap_min.add_snapshot(run, model, data, ancestors)
    cap_min.set_masks(model, DENSITY)
    return args, rows, data, model.eval(), ancestors


def paragraph(text):
    """Text with its numbers in it, in lines of at most 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100, break_long_words=False,
                         break_on_hyphens=False)


def table(*rows):
    """A table whose first row is its heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def numbers(values):
    return " ".join(f"{value:.3f}" for value in values)


def show(example):
    return f"{example.text_a}  {example.text_b}  -> {WORDS[example.label]}"


def mask_section(mask, weight):
    """mask: the `Mask` of one layer; weight: its W."""
    scores, k = mask.scores.detach(), round(DENSITY * weight.numel())
    text = paragraph(f"""`set_masks` keeps, in this step, {100 * DENSITY:g} % of each matrix.
        `{NAME}` has {weight.size(0)} x {weight.size(1)} weights, so k = round({DENSITY} x
        {weight.numel():,}) = {k:,}; the k-th largest score is {scores[mask.mask].min():.3f}. Its
        first row begins""")
    masked = weight * mask.mask + 0.0  # of which no 0 is -0
    return f"""## 1. One mask, eq. (1)

{text}

    weights W      {numbers(weight[0, :8])}
    scores S       {numbers(scores[0, :8])}
    mask M         {' '.join(str(int(bit)) for bit in mask.mask[0, :8])}
    W' = W * M     {numbers(masked[0, :8])}

The scores started at |W| / std(W), as in every short run, and have moved for one epoch."""


def anchor_section(rows, q, banks, index, extra):
    own, lines = index[ANCHOR], [("bank", "ancestor", "q . b")]
    ancestors = {"prc": "pre-trained", "snc": "itself, a moment ago, with all weights",
                 "fic": "fine-tuned"}
    for name, ancestor in ancestors.items():
        cosine = q[ANCHOR] @ banks[name][0][own].float()
        lines.append((TITLES[name], ancestor, f"{cosine:.3f}"))
    text = paragraph(f"""In each bank (`contrastive_loss` is called once for each) the anchor meets
        the {len(index) - 1} other anchors of the batch, the ancestor's vectors of the batch's
        {len(index)} examples, and those of the examples E that were drawn. Here E is the whole
        training set, {len(extra):,} rows, so that the batch's own occur twice.""")
    return f"""## 2. One anchor and its candidates, eq. (4)

The first of the batch's {len(index)} examples is row {own} of the training set:

    {show(rows[own])}

Its pooled vector, divided by its length, is the anchor q. What the ancestors made of the same
example, by the cosine with q:

{table(*lines)}

{text}"""


def positives_section(args, rows, data, q, bank, index, extra):
    # the candidates, which rows they are of, and the anchor's log p of each
    drawn = torch.cat([index, extra])
    row_of, candidates = torch.cat([index, drawn]), torch.cat([q, bank[drawn].float()])
    cosines = candidates @ q[ANCHOR]  # (C,)
    s = cosines / args.temperature
    s[ANCHOR] = -torch.inf  # not itself
    log_p = s.log_softmax(0)
    # the positives among them
    label, labels = data.labels[index[ANCHOR]], data.labels[row_of]
    same_example, same_label = row_of == index[ANCHOR], labels == label
    same_example[ANCHOR] = same_label[ANCHOR] = False
    # the nearest of the others
    lines = [("candidate", "cosine", "example")]
    for name, among in (("other", labels != label), ("same", same_label & ~same_example)):
        i = torch.where(among, s, -torch.inf).argmax()
        where = "the batch" if i < len(q) else "the bank"
        lines.append((f"{name} label, in {where}", f"{cosines[i]:.3f}", show(rows[row_of[i]])))
    own_s, own_log_p = s[same_example][0], log_p[same_example][0]
    first = paragraph(f"""Positives of L^u are the pre-trained vectors of this very example:
        {same_example.sum()} of {len(s) - 1:,} candidates, since E has it too. With
        s = q . b / tau = {own_s:.2f},""")
    last = paragraph(f"""Positives of L^s are the {same_label.sum():,} candidates with the label
        "{WORDS[label]}"; the mean of their log p is {log_p[same_label].mean():.2f}. All with
        another label are negatives of both.""")
    return f"""## 3. Its positives and negatives in PrC, eq. (5) and (6)

{first}

    log p = s - log(sum of exp s over all candidates)
          = {own_s:.2f} - {s.logsumexp(0):.2f} = {own_log_p:.2f}

The nearest candidate of another label, and the nearest of the same that is another example:

{table(*lines)}

{last}"""


def loss_section(args, batch, pooled, logits, ancestors, extra):
    labels = ancestors.labels
    losses = [("bank", "L^u", "L^s", "L^u, SupCon", "L^s, SupCon")]
    for name, bank in ancestors.banks.items():
        given = pooled, batch["index"], batch["labels"], bank, labels, extra, args.temperature
        values = [*cap_min.contrastive_loss(*given), *cap_min.contrastive_loss(*given, "supcon")]
        losses.append((TITLES[name], *(f"{value:.4f}" for value in values)))
    terms = cap_min.cap_terms(logits, pooled, batch, ancestors, extra, args)
    shares = cap_min.gradient_shares(terms, pooled)
    weighted = [("term", "value", "share of the gradient on the pooled vectors")]
    for name, term in terms.items():
        weighted.append((TITLES[name], f"{term:.3f}", f"{shares[name]:.2f}"))
    total = sum(terms.values())
    total.backward()
    text = paragraph(f"""SupCon's form divides by the number of anchors instead. The more positives,
        the smaller is L^s beside that: its published weight, {args.w_sup:g}, means less than it
        seems. `cap_terms` weighs {args.w_unsup:g} L^u + {args.w_sup:g} L^s for each bank,
        {args.w_ce:g} cross-entropy and {args.w_kd:g} distillation:""")
    return f"""## 4. The loss, eq. (7) and (8)

For each anchor, the mean of log p over its positives; these means, summed over the anchors, divided
by the number of positives of all anchors, with the sign changed:

{table(*losses)}

{text}

{table(*weighted)}

The loss is their sum, {total:.3f}."""


def gradient_section(mask, weight, of_masked):
    """of_masked: dL/dW'; the gradients of `weight` and of the mask's scores are there."""
    to_scores = mask.scores.grad[0]
    lines = [("weight", "dL/dW'", "dL/dW = dL/dW' * M", "dL/dS = dL/dW' * W")]
    for what, growth in (("kept", mask.mask[0] * to_scores.abs()),
                         ("pruned", ~mask.mask[0] * -to_scores)):
        i = growth.argmax()
        gradients = of_masked[0, i], weight.grad[0, i], to_scores[i]
        lines.append((f"{what}, W[0, {i}] = {weight[0, i]:.3f}",
                      *(f"{1e3 * value + 0.0:.3f}" for value in gradients)))
    return f"""## 5. Back to the weights and the scores, eq. (2)

`StraightThrough`. Of the first row of the same matrix, the kept weight whose score has the largest
gradient, and the pruned one whose score grows most; all gradients times 1,000:

{table(*lines)}

The pruned weight gets no gradient (Adam's momentum may still move it, which is why the export is
W * M). Its score does: dL/dS is negative, so the score grows, and the weight can come back. That is
movement pruning. Clipping, Adam and the next mask follow."""


def walk():
    """The text of demo/README.md."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums, and so the last digits, depend on how work is split
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with contextlib.redirect_stdout(sys.stderr):
            args, rows, data, model, ancestors = prepare(folder)
    torch.set_num_threads(threads)
    # the step
    batch = next(batches(data, args.batch_size, args.seed))
    index, extra = batch["index"], torch.arange(ROWS)  # fewer rows than --extra: all are drawn
    parametrized = model.get_submodule(NAME).parametrizations.weight
    mask, weight = parametrized[0], parametrized.original
    gradients = []  # dL/dW', once there is one

    def watch(module, given, masked):
        masked.register_hook(gradients.append)

    mask.register_forward_hook(watch)
    logits, pooled = model(*inputs(batch))
    q = F.normalize(pooled.detach(), dim=1)
    # what there is to tell of it
    start = paragraph(f"""The first {ROWS:,} rows of `train.tsv` are the training set here. They ask
        for facts about animals, which the pre-training corpus told
        ([make_demo.py](make_demo.py)):""")
    before = paragraph(f"""Before the step there are the pre-trained model, a teacher fine-tuned for
        three epochs, and a snapshot of the model itself after its first epoch, still with all
        weights. Each has encoded all rows once; these unit vectors are the banks PrC, FiC and SnC.
        Now the model is to be trained with {100 * DENSITY:g} % of its weights. (A run prunes in
        small steps, and has dropout on.) Every number is printed by `python demo/walk.py`, and a
        test compares them.""")
    sections = ["# One step of CAP-m, with its numbers", start,
                f"    {show(rows[0])}\n    {show(rows[1])}", before, mask_section(mask, weight),
                anchor_section(rows, q, ancestors.banks, index, extra),
                positives_section(args, rows, data, q, ancestors.banks["prc"][0], index, extra),
                loss_section(args, batch, pooled, logits, ancestors, extra)]
    sections.append(gradient_section(mask, weight, *gradients))
    sections.append(paragraph("""What the losses ask for beyond one step, here and on SST-2, is told
        in [results](../results/details.md#what-the-losses-ask-for):"""))
    sections.append("![Loss, best loss, and gradient by snapshots](../results/geometry.svg)")
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    print(walk(), end="")
