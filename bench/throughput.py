"""How fast the pruning phase is, beside plain fine-tuning of the same model by transformers and by
bert_min, on the same rows and batches. Writes a record such as README.md shows, --out.

Run:   pip install -r bench/requirements.txt
       python bench/throughput.py --model FOLDER --data-dir FOLDER
Sides: "transformers" BertForSequenceClassification with sdpa attention, all weights, fused AdamW
       "dense"        bert_min by cap_min.train, embeddings frozen
       "prune"        cap_min.first_banks and cap_min.prune with all terms, everything counted:
                      both banks, masks, losses, a snapshot and a dev score after each epoch
All have the same bucketed batches, number type, clipping and schedule. Each side of each repeat is
a process of its own, in turn, so that memory is counted apart and the machine's moods are shared.
With --before FOLDER, a checkout of an older commit, the steps of its pruning phase are profiled.
With --published PYTHON FOLDER a further side times the published code, from a checkout of its
folder UnstructuredPruning, by a PYTHON that has a transformers of its time (4.30 works): steps, and
batches of the encoding that it makes once an epoch."""

import argparse
import copy
import hashlib
import json
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
sys.path.insert(0, os.environ.get("CAP_SOURCE", str(ROOT)))  # an older source, for "before"

import numpy as np  # noqa: E402
import torch  # noqa: E402

import cap_min  # noqa: E402
from bert_min import BertClassifier, BertConfig, from_pretrained  # noqa: E402
from data_glue import TASKS, Encoded, WordPiece, batches, encode_task, load  # noqa: E402
from data_glue import load_tokenizer  # noqa: E402

PARTS = {"masks": (cap_min, "set_masks"), "forward": (BertClassifier, "forward"),
         "loss": (cap_min, "cap_terms"), "backward": (torch.Tensor, "backward"),
         "clipping": (torch.nn.utils, "clip_grad_norm_"), "Adam": (torch.optim.AdamW, "step")}


# ------------------------------------------------------------------------------ data


def setup(options):
    """(args of cap_min, pre-trained model, training set)."""
    args = cap_min.parse(["--task", options.task, "--epochs", str(options.epochs), "--lr", "2e-4",
                          "--device", options.device, "--dtype", options.dtype])
    device = cap_min.choose_device(args)
    args.score_init = "magnitude"
    labels = max(1, len(TASKS[options.task].words))
    torch.manual_seed(0)
    if options.model == "base":  # BERT-base's sizes, random weights and full-length random rows
        model, length = BertClassifier(BertConfig(num_labels=labels)), 128
        data = Encoded(torch.randint(1000, 30000, (options.rows * length,), dtype=torch.int32),
                       torch.arange(options.rows + 1) * length,
                       torch.full((options.rows,), length), torch.arange(options.rows) % labels)
    else:
        model = from_pretrained(options.model, labels)
        rows = load(options.task, "train", options.data_dir)
        rows = random.Random(0).sample(rows, min(options.rows, len(rows)))
        data = encode_task(rows, load_tokenizer(options.model))
    return args, model.to(device), data


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock():
    synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------- sides


def transformers_side(options):
    """One epoch of plain fine-tuning, after some steps that are not counted."""
    import transformers
    args, model, data = setup(options)
    device = model.classifier.weight.device
    with tempfile.TemporaryDirectory() as folder:
        cap_min.save_pretrained(model, folder)
        theirs = transformers.BertForSequenceClassification.from_pretrained(
            folder, attn_implementation="sdpa").to(device).train()
    total = len(data) // args.batch_size
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, total // 10, 2 * total)

    def step(batch):
        batch = cap_min.move(batch, device)
        del batch["index"]
        with cap_min.autocast(device, args.compute_dtype):
            loss = theirs(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    for batch in list(batches(data, args.batch_size, 1))[:options.warm]:
        step(batch)
    start = clock()
    for batch in batches(data, args.batch_size, 0):
        step(batch)
    return {"examples_per_second": len(data) / (clock() - start)}


def dense_side(options):
    """The same by bert_min, embeddings frozen."""
    cap_min.tune_cpu()
    args, model, data = setup(options)
    model.bert.embeddings.requires_grad_(False)

    def terms(logits, pooled, batch, chance):
        return {"ce": cap_min.task_loss(logits, batch["labels"])}

    def epoch(rows):
        start = clock()
        cap_min.train(model, rows, terms, args, lambda entry: None, epochs=1)
        return len(rows) / (clock() - start)

    epoch(data.head(options.warm * args.batch_size))
    speed = epoch(data)
    weights = sum(p.numel() for p in model.bert.encoder.parameters())
    return {"examples_per_second": speed,
            "encoder_tflops": 6e-12 * weights * speed * data.lengths.float().mean().item()}


def prune_side(options):
    """The pruning phase, and the milliseconds of each part of a step at the final sparsity."""
    if hasattr(cap_min, "tune_cpu"):  # not in every older commit
        cap_min.tune_cpu()
    args, model, data = setup(options)
    dev = {"dev": data.head(len(data) // 100)}  # SST-2's and MNLI's share of their training sets
    device = model.classifier.weight.device
    args.epochs, some, other = 2, data.head(options.warm * args.batch_size), copy.deepcopy(model)
    cap_min.prune(args, some, dev, other, *cap_min.first_banks(args, some, other, other), print)
    del other  # whose memory is no part of what is measured
    args.epochs = options.epochs
    spent, encoding = {name: [] for name in PARTS}, []
    starts = []  # of the steps: each begins with its masks

    def timed(name, owner, attribute):
        original = getattr(owner, attribute)

        def wrapper(*given, **named):
            start = clock()
            if name == "masks":
                starts.append(start)
            result = original(*given, **named)
            if torch.is_grad_enabled():  # forward passes of an encoding are no part of a step
                spent[name].append(clock() - start)
            return result

        setattr(owner, attribute, wrapper)

    def timed_encode(*given, original=cap_min.encode):
        start = clock()
        result = original(*given)
        if len(given[1]) == len(data):
            encoding.append(clock() - start)
        return result

    for name, place in PARTS.items():
        timed(name, *place)
    cap_min.encode = timed_encode
    start = clock()
    banks, logits = cap_min.first_banks(args, data, model, model)
    cap_min.prune(args, data, dev, model, banks, logits, lambda entry: None)
    total = clock() - start
    steps = args.epochs * -(-len(data) // args.batch_size)
    cool = 3 * cap_min.warmup_steps(args, steps)
    parts = {name: 1e3 * statistics.median(times[-cool:]) for name, times in spent.items()}
    parts["whole step"] = 1e3 * statistics.median(np.diff(starts[-cool:]))
    snapshot = statistics.mean(encoding[2:])  # the first two are the banks of dense models
    return {"examples_per_second": args.epochs * len(data) / total, "parts_ms": parts,
            "contrastive_ms": contrastive_ms(args, data, banks, device),
            "snapshot_of_epoch": snapshot * args.epochs / (total - sum(encoding)),
            "bank_bytes": sum(vectors.nbytes for _, bank in banks.items()
                              for vectors in bank)}


def contrastive_ms(args, data, banks, device):
    """Forward and backward of the three contrastive terms, as in a step of the last epoch."""
    labels = data.labels.to(device)
    teacher = torch.zeros(len(data), 1 + int(labels.max()), device=device)
    times = []
    for batch in list(batches(data, args.batch_size, 2))[:30]:
        batch = cap_min.move(batch, device)
        pooled = torch.randn(len(batch["index"]), banks.bank["prc"][0].size(1), device=device,
                             requires_grad=True)
        extra = torch.randperm(len(data))[:args.extra].to(device)
        logits = teacher[batch["index"]]
        start = clock()
        terms = cap_min.cap_terms(logits, pooled, batch, teacher, banks, labels, extra, args)
        sum(terms[name] for name, _ in banks.items()).backward()
        times.append(clock() - start)
    return 1e3 * statistics.median(times)


def published_side(options):
    """An epoch of the published code: teacher run each step, all padded to 128, and as many batches
    of the bank that is encoded before it. Its fine-tuned bank and dev scores are not counted. Run
    by its own PYTHON, in the folder of the checkout."""
    sys.path.insert(0, os.getcwd())
    from emmental import MaskedBertConfig, MaskedBertForSequenceClassification
    config = MaskedBertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536,
                              pruning_method="topK", mask_init="constant", mask_scale=0.0)
    config.num_labels = 2
    model = MaskedBertForSequenceClassification(config, True, 0.1, 4096, 0.1, 10, "cls", 0.1)
    from transformers import BertConfig as TheirConfig, BertForSequenceClassification
    teacher = BertForSequenceClassification(TheirConfig(
        hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_labels=2)).eval()
    rows = max(options.rows, 4096)  # it draws as many extra examples
    bank = torch.nn.functional.normalize(torch.randn(rows, 1, 384), dim=-1)
    model.global_representations_bank_pretrained = bank
    model.global_representations_bank_finetuned = bank
    model.global_representations_bank_snaps = bank.expand(-1, 2, -1).contiguous()
    model.global_labels_bank = torch.arange(rows) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    times, encoding = [], []
    for _ in range(6):
        ids, index = torch.randint(1000, 30000, (32, 128)), torch.randperm(rows)[:32]
        start = time.perf_counter()
        mask = torch.ones_like(ids)
        loss, logits = model(input_ids=ids, attention_mask=mask, labels=index % 2, idx=index,
                             token_type_ids=torch.zeros_like(ids), threshold=0.03)
        with torch.no_grad():
            wanted = teacher(input_ids=ids, attention_mask=mask).logits
        loss = loss + 0.9 * 4 * torch.nn.functional.kl_div(
            (logits / 2).log_softmax(-1), (wanted / 2).softmax(-1), reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, labels=index % 2, idx=index,
                  token_type_ids=torch.zeros_like(ids), threshold=0.03, encode_example=True)
        encoding.append(time.perf_counter() - start)
    step, bank = statistics.median(times[1:]), statistics.median(encoding[1:])
    return {"examples_per_second": 32 / (step + bank), "step_s": step, "encode_batch_s": bank}


# ------------------------------------------------------------------- single measures


def tokenising(options):
    """WordPiece on one core against the tokenizers library on one core: ratio of examples/s."""
    from tokenizers import BertWordPieceTokenizer
    from data_glue import encode_rows  # not in every older commit
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    examples = load(options.task, "train", options.data_dir)
    vocab = str(Path(options.model) / "vocab.txt")
    texts = [e.text_a if e.text_b is None else (e.text_a, e.text_b) for e in examples]
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        encode_rows(examples, WordPiece(vocab), 128)
        middle = time.perf_counter()
        theirs = BertWordPieceTokenizer(vocab)
        theirs.enable_truncation(128)
        theirs.encode_batch(texts)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return {"ratio": statistics.median(ratios), "examples": len(examples)}


def growth(options):
    """Milliseconds of a pruning step for growing training sets, all rows of 16 tokens."""
    cap_min.tune_cpu()
    args, model, _ = setup(argparse.Namespace(**{**vars(options), "rows": 64}))
    cap_min.add_masks(model, "magnitude")
    device, result = model.classifier.weight.device, {}
    for rows in (1_000, 10_000, 100_000, 400_000):
        data = Encoded(torch.randint(1000, 30000, (rows * 16,), dtype=torch.int32),
                       torch.arange(rows + 1) * 16, torch.full((rows,), 16),
                       torch.arange(rows) % model.config.num_labels)
        banks = cap_min.Banks(["prc", "snc", "fic"], device)
        for name, place in (("prc", 0), ("fic", 0), ("snc", 0), ("snc", 1)):
            banks.add(name, torch.randn(rows, model.config.hidden_size, device=device), place)
        result[rows] = step_ms(args, model, data, banks)
    return result


def step_ms(args, model, data, banks, count=60):
    """Median of the first `count` steps of `cap_min.train` with every term."""
    device, times = model.classifier.weight.device, []
    labels, logits = data.labels.to(device), torch.randn(len(data), 3, device=device)
    logits = logits[:, :model.config.num_labels]

    class Enough(Exception):
        pass

    def terms(student, pooled, batch, chance):
        extra = chance.choice(len(data), min(args.extra, len(data)), replace=False)
        return cap_min.cap_terms(student, pooled, batch, logits, banks, labels,
                                 torch.from_numpy(extra).to(device), args)

    def set_density(step, total):
        times.append(clock())
        if len(times) > count:
            raise Enough
        cap_min.set_masks(model, 0.03)
        return 0.03

    epochs = -(-count * args.batch_size // len(data)) + 1
    try:
        cap_min.train(model, data, terms, args, lambda entry: None, epochs, set_density)
    except Enough:
        pass
    return 1e3 * statistics.median(np.diff(times)[10:])


def start_up(options):
    """Seconds from `python cap_min.py` on 20,000 rows to the end of its first training step."""
    times = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log.jsonl"
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "cap_min.py"), "--task", options.task, "--model",
                 options.model, "--data-dir", options.data_dir, "--max-train", "20000",
                 "--out", folder], stdout=subprocess.DEVNULL)
            while not (log.exists() and '"step"' in log.read_text()):
                time.sleep(0.02)
            times.append(time.perf_counter() - start)
            process.kill()
            process.wait()
    return {"seconds": statistics.median(times[1:])}  # the first one warms the machine's caches


SIDES = {"transformers": transformers_side, "dense": dense_side, "prune": prune_side,
         "published": published_side, "tokenising": tokenising, "growth": growth,
         "start_up": start_up}


# ------------------------------------------------------------------------------ table


def measure(side, options, task, source=ROOT):
    """Run one side in a process of its own."""
    python, folder = options.published if side == "published" else (sys.executable, None)
    command = [python, str(Path(__file__).resolve()), "--side", side, "--task", task]
    for name in ("rows", "epochs", "warm", "device", "dtype"):
        command += ["--" + name, str(getattr(options, name))]
    command += ["--data-dir", options.data_dir] if options.data_dir else []
    model = options.model if options.model == "base" else str(Path(options.model).resolve())
    done = subprocess.run([*command, "--model", model], cwd=folder, text=True, check=True,
                          stdout=subprocess.PIPE, env={**os.environ, "CAP_SOURCE": str(source)})
    result = json.loads(done.stdout.splitlines()[-1])
    print(task, side, "before" if source != ROOT else "", json.dumps(result), flush=True)
    return result


class Sitting:
    """Results on disk as soon as they are there: what was cut off goes on with them, if the program
    and its options are the same."""

    def __init__(self, path, settings):
        self.path, self.done = path, {"settings": settings}
        if path.exists():
            done = json.loads(path.read_text(encoding="utf-8"))
            self.done = done if done["settings"] == settings else self.done

    def result(self, name, work):
        if name not in self.done:
            self.done[name] = work()
            cap_min.write_json(self.done, self.path)
        return self.done[name]


def compare(options, task, sitting):
    """Medians over the repeats, of the speeds and of their ratios."""
    sides = ["transformers", "dense", "prune"]
    sides += ["published"] if options.published and task == "sst2" else []
    few = argparse.Namespace(**{**vars(options), "epochs": 3})  # enough for a profile
    before = options.before and sitting.result(
        f"{task}, before", lambda: measure("prune", few, task, options.before))
    repeats = [sitting.result(f"{task}, repeat {repeat}",
                              lambda: {side: measure(side, options, task) for side in sides})
               for repeat in range(options.repeats)]
    last = repeats[-1]["prune"]

    def median(value):
        return statistics.median(value(repeat) for repeat in repeats)

    return {
        "examples_per_second": {s: median(lambda r: r[s]["examples_per_second"]) for s in sides},
        "prune_against": {s: median(lambda r: r["prune"]["examples_per_second"]
                                    / r[s]["examples_per_second"]) for s in sides if s != "prune"},
        "peak_memory_bytes": {s: median(lambda r: r[s]["peak_memory_bytes"]) for s in sides},
        "bank_bytes": last["bank_bytes"], "encoder_tflops": repeats[-1]["dense"]["encoder_tflops"],
        "parts_ms": {name: median(lambda r: r["prune"]["parts_ms"][name])
                     for name in last["parts_ms"]},
        "before": before,
        "contrastive_ms": median(lambda r: r["prune"]["contrastive_ms"]),
        "snapshot_of_epoch": median(lambda r: r["prune"]["snapshot_of_epoch"])}


def processor():
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
    parser.add_argument("--before", type=Path, metavar="FOLDER")
    parser.add_argument("--published", nargs=2, metavar=("PYTHON", "FOLDER"))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "throughput.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        result = SIDES[options.side](options)
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
        print(json.dumps({**result, "peak_memory_bytes": cap_min.peak_memory(device)}))
        return
    preloaded = "".join(f", {Path(name).name}" for name in os.environ.get("LD_PRELOAD", "").split())
    settings = {"machine": f"{processor()}, {os.cpu_count()} cores{preloaded}",
                "python": platform.python_version(), "torch": torch.__version__,
                "transformers": __import__("transformers").__version__,
                "source_sha256": hashlib.sha256(b"".join(
                    (ROOT / name).read_bytes()
                    for name in ("bert_min.py", "data_glue.py", "cap_min.py"))).hexdigest(),
                "config": {key: value for key, value in vars(options).items()
                           if key in ("rows", "epochs", "warm", "repeats", "device", "dtype")}}
    sitting = Sitting(options.out.with_suffix(".partial.json"), settings)
    record = {"date": str(date.today()), **settings,
              "tasks": {task: compare(options, task, sitting) for task in options.tasks}}
    if options.model != "base":
        record |= {name: {task: sitting.result(f"{task}, {name}", lambda: measure(
            name, options, task)) for task in options.tasks} for name in ("tokenising", "start_up")}
        record["growth"] = sitting.result("growth", lambda: measure("growth", options, "sst2"))
    cap_min.write_json(record, options.out)
    sitting.path.unlink()


if __name__ == "__main__":
    main()
