"""How fast the pruning phase is, beside plain fine-tuning of the same model by transformers and by
bert_min, on the same rows and batches. Writes a record, --out.

Run:   pip install -r bench/requirements.txt
       python bench/throughput.py --model FOLDER --data-dir FOLDER
       python bench/throughput.py --model base --tasks sst2 --device cuda
Sides: "transformers" BertForSequenceClassification with sdpa attention, all weights, fused AdamW
       "dense"        bert_min by cap_min.train, embeddings frozen
       "prune"        cap_min's pruning phase, CAP-m with all terms, everything counted: both banks,
                      masks, losses, a snapshot and a dev score after each epoch
All have the same bucketed batches, number type and clipping. Each side of each repeat is a process
of its own, in turn, so that memory is counted apart and the machine's moods are shared; a figure is
the median over the repeats."""

import argparse
import gc
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import cap_min  # noqa: E402
from bert_min import BertClassifier, BertConfig, from_pretrained, save_pretrained  # noqa: E402
from data_glue import (  # noqa: E402
    TASKS, Encoded, batches, encode_task, load, load_tokenizer)

# ------------------------------------------------------------------ model, data, run


def settle(options, folder):
    """(args of cap_min for a run in `folder`, its device)."""
    args = cap_min.parse(["--task", options.task, "--method", "movement", "--lr", "2e-4", "--out",
                          folder, "--epochs", str(options.epochs), "--device", options.device,
                          "--dtype", options.dtype])
    device = cap_min.choose_device(args)
    cap_min.settle_schedule(args, options.rows)
    return args, device


def make_model(options):
    """The pre-trained model; "base": BERT-base's sizes with random weights."""
    torch.manual_seed(0)
    labels = max(1, len(TASKS[options.task].words))
    if options.model == "base":
        return BertClassifier(BertConfig(num_labels=labels))
    return from_pretrained(options.model, labels)


def make_data(options):
    """The training set; for "base" random rows of 128 tokens."""
    if options.model != "base":
        rows = load(options.task, "train", options.data_dir)
        rows = random.Random(0).sample(rows, min(options.rows, len(rows)))
        return encode_task(rows, load_tokenizer(options.model))
    count = options.rows
    tokens = torch.randint(1000, 30000, (count * 128,), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((count,), 128)
    return Encoded(tokens.int(), torch.arange(count) * 128, lengths, lengths,
                   torch.arange(count) % len(TASKS[options.task].words))


def begin(args):
    """A run at its start. It saves no state: a real one does so once in ten minutes."""
    run = cap_min.Run(args, {})
    run.save = lambda model, optimizer: None
    run.begin()
    return run


# ------------------------------------------------------------------------------ time


def clock():
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def moment():
    """A time between two parts of a step; on a GPU an event in the queue of its work, since waiting
    for it there would slow the step down."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def median_ms(spans):
    """Median length of spans (moment, moment)."""
    lengths = []
    for start, end in spans:
        if isinstance(start, float):
            lengths.append(1e3 * (end - start))
        else:
            lengths.append(start.elapsed_time(end))
    return statistics.median(lengths)


def watch(owner, name):
    """Replace the function owner.name by one that does the same and enters the span of each call in
    the list that is returned."""
    spans, function = [], getattr(owner, name)

    def watched(*given, **named):
        start = moment()
        result = function(*given, **named)
        spans.append((start, moment()))
        return result

    setattr(owner, name, watched)
    return spans


def peak_tflops():
    """What this GPU reaches in bf16 products of 8192 x 8192 matrices."""
    matrix, times = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), []
    for _ in range(30):
        start = clock()
        matrix @ matrix
        times.append(clock() - start)
    return 2e-12 * 8192 ** 3 / statistics.median(times[10:])


# ----------------------------------------------------------------------------- sides


def transformers_side(options, folder):
    """An epoch of plain fine-tuning by transformers."""
    import transformers
    (args, device), data = settle(options, folder), make_data(options)
    save_pretrained(make_model(options), folder)
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder, attn_implementation="sdpa").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)

    def epoch(rows):
        for batch in batches(rows.to(device), args.batch_size, 0):
            del batch["index"]
            with cap_min.autocast(device, args.dtype):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return timed_epoch(epoch, data, options.warm * args.batch_size)


def dense_side(options, folder):
    """The same by cap_min.train, as a teacher is fine-tuned, but with the embeddings frozen."""
    cap_min.tune_cpu()
    (args, device), data = settle(options, folder), make_data(options)
    cap_min.TEACHER_EPOCHS = 1
    model = make_model(options).to(device)
    model.bert.embeddings.requires_grad_(False)

    def epoch(rows):
        cap_min.train(begin(args), model, rows.to(device))

    return timed_epoch(epoch, data, options.warm * args.batch_size)


def timed_epoch(epoch, data, warm_rows):
    """Speed of `epoch(data)`, after an epoch of fewer rows in which the products are counted; and
    how long a step is in it, which is not the mean, since an epoch has a beginning and an end."""
    some = data.head(warm_rows)
    with FlopCounterMode(display=False) as counter:
        epoch(some)
    steps = watch(torch.optim.AdamW, "step")
    start = clock()
    epoch(data)
    speed = len(data) / (clock() - start)
    return {"examples_per_second": speed,
            "tflops": 1e-12 * counter.get_total_flops() / len(some) * speed,
            "step_ms": median_ms(itertools.pairwise(first for first, _ in steps))}


def prune_side(options, folder):
    """The pruning phase, the parts of its steps at the final sparsity, and what CAP adds."""
    cap_min.tune_cpu()
    (args, device), data = settle(options, folder), make_data(options)
    data = data.to(device)
    args.epochs = 2
    pruning_phase(args, data.head(options.warm * args.batch_size), make_model(options).to(device))
    gc.collect()  # that model is no part of the memory that is measured
    # all of it, while the parts of cap_min.train's steps are watched
    args.epochs, model = options.epochs, make_model(options).to(device)
    spans = {"masks": watch(cap_min, "set_masks"), "forward": watch(cap_min, "batch_terms"),
             "loss": watch(cap_min, "cap_terms"), "backward": watch(torch.Tensor, "backward"),
             "clipping": watch(torch.nn.utils, "clip_grad_norm_"),
             "Adam": watch(torch.optim.AdamW, "step")}
    start = clock()
    ancestors = pruning_phase(args, data, model)
    total = clock() - start
    # the last steps, which have the final sparsity; one lasts from its masks to those of the next
    steps = args.epochs * math.ceil(len(data) / args.batch_size)
    final = 3 * round(args.warmup * steps)
    parts = {name: median_ms(found[-final:]) for name, found in spans.items()}
    parts["forward"] -= parts["loss"]  # which was watched within
    starts = [first for first, _ in spans["masks"][-final:]]
    parts["whole step"] = median_ms(itertools.pairwise(starts))
    # a snapshot beside the steps of an epoch: the training set was encoded twice for the banks, and
    # after each epoch but the last
    start = clock()
    cap_min.encode(model, data, args.dtype)
    snapshot = clock() - start
    epoch = (total - (args.epochs + 1) * snapshot) / args.epochs
    bank_bytes = sum(vectors.nbytes for bank in ancestors.banks.values() for vectors in bank)
    return {"examples_per_second": args.epochs * len(data) / total,
            "step_ms": parts["whole step"], "parts_ms": parts,
            "contrastive_ms": contrastive_ms(args, data, ancestors, device),
            "snapshot_of_epoch": snapshot / epoch, "bank_bytes": bank_bytes}


def pruning_phase(args, data, model):
    """The pruning phase as in cap_min.cap, of a model that is its own teacher; returns its
    ancestors. The dev set has SST-2's and MNLI's share of the training set."""
    run, dev = begin(args), data.head(math.ceil(len(data) / 100))
    cap_min.store_ancestors(run, model, model, data)
    ancestors = cap_min.load_ancestors(run, data, model.classifier.weight.device)
    cap_min.add_masks(model, args.score_init)
    run.stage = 0
    run.enter("prune")
    cap_min.train(run, model, data, ancestors, dev)
    return ancestors


def contrastive_ms(args, data, ancestors, device):
    """Forward and backward of the contrastive terms, as in a step of the last epoch."""
    times = []
    width = ancestors.banks["prc"][0].size(1)
    for batch in itertools.islice(batches(data, args.batch_size, 0), 30):
        pooled = torch.randn(len(batch["index"]), width, device=device, requires_grad=True)
        logits = ancestors.logits[batch["index"]]
        extra = torch.randperm(len(data))[:args.extra].to(device)
        start = clock()
        terms = cap_min.cap_terms(logits, pooled, batch, ancestors, extra, args)
        del terms["ce"], terms["kd"]
        sum(terms.values()).backward()
        times.append(clock() - start)
    return 1e3 * statistics.median(times)


# ---------------------------------------------------------------------------- record

SIDES = {"transformers": transformers_side, "dense": dense_side, "prune": prune_side}


def print_side(options):
    """Measure one side, in this process, and print what was found as the last line."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        result = SIDES[options.side](options, folder)
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    result["peak_memory_bytes"] = cap_min.peak_memory(device)
    if device.type == "cuda" and "tflops" in result:
        result["share_of_peak"] = result["tflops"] / peak_tflops()
    print(json.dumps(result))


def measure(side, task):
    """What a process of its own finds for one side."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--task", task]
    done = subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE)
    line = done.stdout.splitlines()[-1]
    print(task, side, line, flush=True)
    return json.loads(line)


def medians(results):
    """The results of several repeats as one, with the median of each number."""
    if isinstance(results[0], dict):
        return {name: medians([result[name] for result in results]) for name in results[0]}
    return statistics.median(results)


def compare(options, task):
    """The figures of one task. That of `prune_against` is the median of the repeats' ratios."""
    repeats = []
    for _ in range(options.repeats):
        found = {side: measure(side, task) for side in SIDES}
        for side in ("transformers", "dense"):
            found[side]["prune_against"] = (found["prune"]["examples_per_second"]
                                            / found[side]["examples_per_second"])
        repeats.append(found)
    found = medians(repeats)
    figures = {name: found["prune"][name] for name in ("bank_bytes", "parts_ms", "contrastive_ms",
                                                       "snapshot_of_epoch")}
    for name in ("examples_per_second", "prune_against", "step_ms", "peak_memory_bytes", "tflops",
                 "share_of_peak"):
        figures[name] = {side: found[side][name] for side in SIDES if name in found[side]}
    return figures


def processor():
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder, or base: BERT-base's sizes, random")
    parser.add_argument("--data-dir", help="folder with the tasks' folders")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mnli"])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=10, help="of pruning")
    parser.add_argument("--warm", type=int, default=128, help="steps before the clock starts: an "
                        "epoch of the default --rows, in which every length has been met")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "throughput.json")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--task", default="sst2", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print_side(options)
        return
    # what is measured, and where
    args, device = settle(options, "")
    machine = f"{processor()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    source = b"".join((ROOT / name).read_bytes()
                      for name in ("bert_min.py", "data_glue.py", "cap_min.py"))
    config = {"model": options.model, "rows": options.rows, "epochs": options.epochs,
              "warm": options.warm, "repeats": options.repeats, "device": device.type,
              "dtype": args.dtype}
    record = {"date": str(date.today()), "machine": machine, "python": platform.python_version(),
              "torch": torch.__version__, "source_sha256": hashlib.sha256(source).hexdigest(),
              "transformers": importlib.metadata.version("transformers"), "config": config,
              "tasks": {task: compare(options, task) for task in options.tasks}}
    cap_min.write_json(record, options.out)


if __name__ == "__main__":
    main()
