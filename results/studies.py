"""Studies made of several runs of cap_min.py: methods compared, encoders probed, runs scored on
other data, lists of runs, held-out rows to choose settings on, and models of fewer layers.

Run:  python results/studies.py compare --task sst2 --seeds 5 [options of cap_min.py]
          CAP-m, its ablations and plain pruning on equal data and budget: OUT/compare.md
      python results/studies.py probe RUN --task rte
          what the encoders of a finished run know of another task: RUN/probe_rte.json
      python results/studies.py score RUN... --data-dir GLUE
          finished runs on the dev sets of another data folder: RUN/scores.json
      python results/studies.py geometry RUN
          what the contrastive losses ask for, at the ancestors of a finished run: RUN/geometry.json
      python results/studies.py grid LIST --jobs 2 --minutes 170 --out FOLDER
          any runs, several at once: FOLDER/grid.md
      python results/studies.py hold-out --task sst2 --data-dir GLUE --rows 8000 --out FOLDER
          a data folder whose dev set is drawn from the training set, to choose settings on
      python results/studies.py lower-layers MODEL --layers 3 --out FOLDER
          the cheapest rival of CAP-f: a checkpoint with the lowest layers alone (arXiv 2004.03844)
After a stop the same command of compare and grid goes on; what is finished is not done again.

LIST has the options of one run a line, --form of forms.py too; # begins a comment. A name and a
colon may stand before them, else the run has the name that cap_min.py gives its folder:
TASK-SPARSITY[...]-seedSEED.

    cap-seed0: --task sst2 --seed 0
    kd-seed0:  --task sst2 --seed 0 --without prc snc fic --teacher {teacher:cap-seed0}

{teacher:NAME} is the teacher of a run of a line above, for which a run waits. A finished run has
its record and log in FOLDER/NAME.json and NAME.jsonl; its own folder is FOLDER/work/NAME, whatever
its --out, and what it printed is in FOLDER/work/NAME.txt."""

import argparse
import hashlib
import math
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import cap_min  # noqa: E402
import forms  # noqa: E402
from bert_min import (  # noqa: E402
    from_pretrained, read_json, replacing, save_pretrained, to_sparse, write_json)
from data_glue import (  # noqa: E402
    TASKS, encode_task, is_quoted, load, load_tokenizer, read_text, save_tokenizer)

# ----------------------------------------------------------------------------- table


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(records, path):
    """Write and print a table of {run: record}: of each task's scores, in percent, mean and
    standard deviation over the runs that differ in nothing but "-seedN" at the end of their names,
    and what they have more than the first ones, with its standard error, over the seeds of both."""
    rows = []
    for (task, metric), found in by_score(records).items():
        first = next(iter(found.values()))
        for run, scores in found.items():
            more = "" if scores is first else paired(scores, first)
            rows.append([task, metric, run, str(len(scores)), spread(scores.values()), more])
    text = table(["task", "dev score", "run", "n", "%", "minus the first"], rows)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())
    print("", text, f"see {path}", sep="\n", flush=True)


def by_score(records):
    """{(task, metric): {run: {seed: score}}} of {run + "-seedN": record}, in percent."""
    tables = {}
    for name, record in records.items():
        run = re.sub(r"-seed\d+$", "", name)
        for metric, value in record["pruned"].items():
            found = tables.setdefault((record["config"]["task"], metric), {})
            found.setdefault(run, {})[record["seed"]] = 100 * value
    return tables


def spread(values):
    """Mean, with the standard deviation where there are several values."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def difference(scores, others):
    """(n, mean, standard error) of the difference of two {seed: score} over their n common seeds;
    the error of a single one is infinite."""
    found = [scores[seed] - others[seed] for seed in scores if seed in others]
    mean = statistics.mean(found) if found else 0.0
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.inf
    return len(found), mean, error


def paired(scores, others):
    """`difference` in words."""
    count, mean, error = difference(scores, others)
    if count == 0:
        return "no common seed"
    if count == 1:
        return f"{mean:+.2f} (n = 1)"
    return f"{mean:+.2f} ± {error:.2f} (n = {count})"


# --------------------------------------------------------------------------- compare

COMPARED = {  # run: (method, terms left out)
    "cap": ("movement", []),
    "cap-no-prc": ("movement", ["prc"]),
    "cap-no-snc": ("movement", ["snc"]),
    "cap-no-fic": ("movement", ["fic"]),
    "movement-kd": ("movement", ["fic", "prc", "snc"]),
    "movement": ("movement", ["fic", "kd", "prc", "snc"]),
    "magnitude": ("magnitude", ["fic", "kd", "prc", "snc"]),
}


def compare(args, seeds):
    """Every run of COMPARED with so many seeds from args.seed on, each seed's with the teacher of
    its first run; in the table, compare.md, the teachers are the row "dense"."""
    records, dense = {}, {}
    for seed in range(args.seed, args.seed + seeds):
        teacher = args.teacher
        for name, (method, without) in COMPARED.items():
            name = f"{name}-seed{seed}"
            print(f"\n{name}", flush=True)
            options = {"seed": seed, "teacher": teacher, "method": method, "without": without,
                       "out": args.out / name}
            record = cap_min.cap(argparse.Namespace(**vars(args) | options))
            records[name] = record
            if teacher is None:
                teacher = str((args.out / name / "teacher").resolve())
        dense[f"dense-seed{seed}"] = record | {"pruned": record["dense"]}
    write_table(records | dense, args.out / "compare.md")


# --------------------------------------------------------------------- a finished run


def read_run(run):
    """(configuration, {"pruned", "dense", "pretrained": folder}) of a finished run. ValueError if
    it is none, or of a task that is not in data_glue.TASKS."""
    try:
        config = read_json(run / "record.json")["config"]
        folders = {"pruned": run / "model", "dense": config["teacher"] or run / "teacher",
                   "pretrained": config["model"]}
        if not {"max_length", "extra"} <= config.keys():
            raise KeyError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{run} is no finished run with a record.json") from None
    if config["task"] not in TASKS:
        raise ValueError(f"{run}: its task, {config['task']}, is not in data_glue.TASKS")
    return config, folders


def origin(device):
    """What made a record: versions, machine and source."""
    source = b"".join((ROOT / name).read_bytes() for name in (
        "bert_min.py", "data_glue.py", "cap_min.py", "results/studies.py"))
    machine = f"{platform.machine()}, {device.type}, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "machine": machine}
    return {"versions": versions, "source_sha256": hashlib.sha256(source).hexdigest()}


# ----------------------------------------------------------------------------- probe


def probe(run, args):
    """Scores on args.task of a linear classifier on the frozen pooled vectors of args.encoders of a
    finished run, pruned, dense (its teacher) and pre-trained, to RUN/probe_TASK.json. ValueError or
    FileNotFoundError, before any work, if the run or a model of it is not there."""
    run_config, folders = read_run(run)
    # models and data; of a model without a pooler this is drawn
    torch.manual_seed(0)
    args.max_length = run_config["max_length"]
    args.model, args.dtype = str((run / "model").resolve()), "fp32"
    device = cap_min.choose_device(args)
    classes = max(1, len(TASKS[args.task].words))
    models = {name: from_pretrained(folders[name], classes) for name in args.encoders}
    first, tokenizer = models[args.encoders[0]], load_tokenizer(run / "model")
    data, dev_sets = cap_min.load_data(args, tokenizer, first.config)
    # a classifier for each encoder
    scores, penalties = {}, {}
    for name, model in models.items():
        model.to(device)
        if device.type == "cpu":  # there a pruned encoder is several times as fast so
            model = to_sparse(model)
        penalties[name] = fit_classifier(model, data)
        scores[name] = cap_min.evaluate(model, args.task, dev_sets)
        print(f"{name}, dev: {cap_min.show_scores(scores[name])}", flush=True)
    # the record
    config = cap_min.run_config(args, data, dev_sets, first, None)
    examples = {"train": len(data)}
    for split, dev in dev_sets.items():
        examples[split] = len(dev)
    write_json({"run": run_config, "config": config, **origin(device),
                "train_sha256": config["train_sha256"], "examples": examples,
                "penalties": penalties, **scores},
               run / f"probe_{args.task}.json")


PENALTIES = [10.0 ** -i for i in range(8)]  # on |W|^2 of a classifier


def fit_classifier(model, data):
    """Set the model's classifier to the one that minimises the task's loss on the frozen pooled
    vectors, with that of PENALTIES with which nine tenths of the rows fit the last tenth best.
    Returns it. It is found for numbers of mean 0 and deviation 1, so that a penalty means the same
    for every encoder."""
    pooled = cap_min.encode(model, data)  # (N, D)
    mean, deviation = pooled.mean(0), pooled.std(0).clamp_min(1e-6)
    pooled = (pooled - mean) / deviation
    labels = data.labels.to(pooled.device)
    held_out = torch.arange(len(labels), device=pooled.device) % 10 == 9
    losses = {}
    for penalty in PENALTIES:
        minimise(model.classifier, pooled[~held_out], labels[~held_out], penalty)
        loss = cap_min.task_loss(model.classifier(pooled[held_out]), labels[held_out])
        losses[penalty] = loss.item()
    best = min(losses, key=losses.get)
    minimise(model.classifier, pooled, labels, best)
    # the same for the vectors as they are
    weight, bias = model.classifier.weight.data, model.classifier.bias.data
    weight /= deviation
    bias -= weight @ mean
    return best


def minimise(classifier, pooled, labels, penalty):
    """Minimise the task's loss and penalty |W|^2, by L-BFGS from 0: there is no chance in it."""
    for parameter in classifier.parameters():
        torch.nn.init.zeros_(parameter.requires_grad_())
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=500,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = cap_min.task_loss(classifier(pooled), labels)
        value = value + penalty * classifier.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


# ----------------------------------------------------------------------------- score


def score_again(run, args):
    """The record of a finished run, but with the scores of its pruned model and its teacher on the
    dev sets in args.data_dir, to RUN/scores.json: a run that trained on rows of hold-out is scored
    there on GLUE's own. ValueError or FileNotFoundError if the run, a model or data are missing."""
    config, folders = read_run(run)
    args.dtype = "fp32"
    device, task = cap_min.choose_device(args), config["task"]
    tokenizer, dev_sets = load_tokenizer(run / "model"), {}
    for split in TASKS[task].files:
        if split != "train":
            rows = load(task, split, args.data_dir)
            dev_sets[split] = encode_task(rows, tokenizer, config["max_length"])
    pruned = from_pretrained(folders["pruned"], num_labels=None)
    dense = cap_min.load_fine_tuned(folders["dense"], argparse.Namespace(**config), pruned.config)
    record = read_json(run / "record.json") | origin(device)
    record["config"] = config | {"data_dir": args.data_dir,
                                 "dev_sha256": [rows.sha256() for rows in dev_sets.values()]}
    for name, model in (("dense", dense), ("pruned", pruned)):
        record[name] = cap_min.evaluate(model.to(device), task, dev_sets)
        print(f"{run}: {name}, dev: {cap_min.show_scores(record[name])}", flush=True)
    for split, dev in dev_sets.items():
        record["examples"][split] = len(dev)
    write_json(record, run / "scores.json")


# -------------------------------------------------------------------------- geometry

BATCH = 32  # anchors


def geometry(run, device):
    """What eq. (5) to (7) ask of a model that still is what an ancestor was, to RUN/geometry.json:
    see `facts`, for the pre-trained model and the teacher of a finished run, as their banks are,
    and with the mean of each bank's vectors taken off. Nothing is trained."""
    config, folders = read_run(run)
    args = argparse.Namespace(**config | {"device": device})
    args.max_train = min(BATCH + args.extra, args.max_train or math.inf)
    if args.w_unsup == 0:
        raise ValueError(f"{run} gave the unsupervised terms no weight, with which others compare")
    device = cap_min.choose_device(args)
    classes, found = max(1, len(TASKS[args.task].words)), {}
    for name, folder in (("prc", folders["pretrained"]), ("fic", folders["dense"])):
        torch.manual_seed(args.seed)  # of a pooler, where there is none
        model = from_pretrained(folder, classes).to(device)
        if not found:
            data, _ = cap_min.load_data(args, load_tokenizer(run / "model"), model.config)
            if len(data) <= BATCH:
                raise ValueError(f"{run} has no more than a batch of {BATCH} examples")
        pooled, labels = cap_min.encode(model, data), data.labels.round().to(device)
        found[name] = facts(pooled, labels, args)
        found[f"{name}, mean taken off"] = facts(pooled - pooled.mean(0), labels, args)
        print(name, found[name], flush=True)
    write_json({"config": config, **origin(device), "train_sha256": data.sha256(),
                "examples": len(data), "banks": found}, run / "geometry.json")


def facts(pooled, labels, args):
    """Figures of one bank, whose vectors (N, D), not yet of length 1, are `pooled`. The first BATCH
    examples are the batch, of a model that gives just these vectors; all others are drawn.

    mean_cosine: of two different examples. loss, best_loss: L^u there, and at the vectors that
    minimise it, whose cosine to the ancestor's is best_cosine. supervised: how large the gradient
    of w_s L^s is beside that of w_u L^u, in both norms; "supcon" with a tenth of w_s. snapshots:
    the gradient of both together from a bank of K = 1 to 9 such ancestors."""
    bank, size = F.normalize(pooled, dim=-1), len(pooled)
    index, extra = torch.arange(size, device=bank.device).split([BATCH, size - BATCH])

    def losses(queries, count=1, norm=args.norm):
        return cap_min.contrastive_loss(queries, index, labels[:BATCH], [bank] * count, labels,
                                        extra[:args.extra // count], args.temperature, norm)

    def gradient(loss):
        return torch.autograd.grad(loss, anchors, retain_graph=True)[0].norm().item()

    anchors = bank[:BATCH].clone().requires_grad_()
    others = (bank.sum(0).square().sum() - size) / (size * (size - 1))
    found = {"mean_cosine": others.item(), "supervised": {}, "snapshots": []}
    for norm, w_sup in (("official", args.w_sup), ("supcon", args.w_sup / 10)):
        unsup, sup = losses(anchors, norm=norm)
        found["supervised"][norm] = gradient(w_sup * sup) / gradient(args.w_unsup * unsup)
    for count in range(1, 10):
        unsup, sup = losses(anchors, count)
        found["snapshots"].append(gradient(args.w_unsup * unsup + args.w_sup * sup))
    # the best vectors, by Adam
    found["loss"] = losses(anchors)[0].item()
    best = bank[:BATCH].clone().requires_grad_()
    optimizer = torch.optim.Adam([best], lr=0.01)
    for _ in range(500):
        loss = losses(best)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found["best_loss"] = loss.item()
    found["best_cosine"] = F.cosine_similarity(best, bank[:BATCH]).mean().item()
    return found


# -------------------------------------------------------------------------- hold-out


def hold_out(task, data_dir, count, out):
    """Write to `out` a task's folder whose dev sets are `count` rows of its training set, drawn by
    a fixed seed, and whose training set has the others. ValueError if it has no more, if it is
    written with quotes, as pandas does, or if `out` is where its data lie."""
    task = TASKS[task]
    if out.resolve() == data_dir.resolve():
        raise ValueError(f"{out} has the task's own files: choose another --out")
    path = data_dir / task.folder / task.files["train"]
    if is_quoted(read_text(path)):
        raise ValueError(f"{path}: only files without quoting can be divided")
    lines = path.read_bytes().split(b"\n")
    rows, header = [line for line in lines if line.rstrip(b"\r")], []
    if rows and (not task.header or task.label.encode() in rows[0].split(b"\t")):
        header.append(rows.pop(0))
    if count >= len(rows):
        raise ValueError(f"its training set has {len(rows)} rows, no more than {count}")
    chosen = set(random.Random(1).sample(range(len(rows)), count))
    (out / task.folder).mkdir(parents=True, exist_ok=True)
    for split, name in task.files.items():
        of_split = [row for i, row in enumerate(rows) if (i in chosen) == (split != "train")]
        with replacing(out / task.folder / name) as file:
            file.write(b"\n".join([*header, *of_split, b""]))


# ---------------------------------------------------------------------- lower layers


def lower_layers(folder, count, out):
    """Write to `out` the checkpoint in `folder` with its lowest `count` layers alone. To fine-tune
    it by cap_min.py, without pruning but with the same distillation: --model OUT --sparsity 0
    --teacher FOLDER --without prc snc fic. ValueError if it has no more layers than that, or if
    `out` is where it lies."""
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out} has the checkpoint itself: choose another --out")
    tokenizer, model = load_tokenizer(folder), from_pretrained(folder)
    if count >= model.config.num_hidden_layers or model.config.layer_sizes:
        raise ValueError(f"{folder} does not have more than {count} whole layers")
    del model.bert.encoder["layer"][count:]
    model.config = replace(model.config, num_hidden_layers=count)
    save_pretrained(model, out)
    save_tokenizer(tokenizer, out, model.config.max_position_embeddings)


# ------------------------------------------------------------------------------ grid

COMMAND = [sys.executable, str(ROOT / "results" / "forms.py")]
TEACHER_OF = re.compile(r"\{teacher:(.*?)\}")
GRACE = 10  # seconds that a run has to end after it was told to


def read_list(path):
    """{name: options} of a list's runs. ValueError, naming the line, for what cannot be run."""
    runs = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, text = re.fullmatch(r"(?:(\w[\w.-]*):)?(.*)", line.strip()).groups()
        try:
            options = shlex.split(text, comments=True)
            if name is None and not options:
                continue
            args = forms.parse(options)
            name = name or args.out.name
            if name in runs:
                raise ValueError(f"a line above is named {name} too")
            for teacher in teachers(options):
                if teacher not in runs:
                    raise ValueError(f"no line above is named {teacher}")
        except SystemExit:  # argparse has told why
            raise ValueError(f"{path}, line {number}: no options of cap_min.py") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        runs[name] = options
    return runs


SETTLED = {"dtype", "score_init", "model", "teacher", "data_dir", "forms_sha256"}


def is_done(path, options):
    """Whether a run's record is at `path`. ValueError if it is of a run with other options, but for
    SETTLED ones: those that a run or its machine settles, and paths."""
    if not path.exists():
        return False
    wanted = {"form": None} | vars(forms.parse(options))
    found = wanted | {"form": None} | read_json(path)["config"]
    for name, value in wanted.items():
        if name not in SETTLED and found[name] != value:
            raise ValueError(f"{path} is of a run with {name} {found[name]}: this one needs another "
                             "name")
    return True


def teachers(options):
    """Names of the runs whose teachers a run takes."""
    return TEACHER_OF.findall(" ".join(options))


def grid(path, out, jobs, minutes):
    """Run what the list at `path` has, `jobs` at once; True if none has failed. After `minutes`, or
    if this process is interrupted, those that run are stopped; the table is made in any case."""
    # what is to be done
    runs = read_list(path)
    (out / "work").mkdir(parents=True, exist_ok=True)
    done = {name for name in runs if is_done(out / f"{name}.json", runs[name])}
    waiting = [name for name in runs if name not in done]
    running, failed = {}, set()
    begin, done_before = time.monotonic(), len(done)

    def tell(what):
        eta = ""
        if len(done) > done_before:
            each = (time.monotonic() - begin) / (len(done) - done_before)
            left = len(runs) - len(done) - len(failed)
            eta = f", eta {timedelta(seconds=int(each * left))}"
        print(f"{what} | {len(done)} of {len(runs)} done{eta}", flush=True)

    try:
        while (waiting or running) and time.monotonic() < begin + 60 * minutes:
            # what has ended
            for name, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[name]
                if status == 0:
                    collect(name, out)
                    done.add(name)
                    tell(f"{name} ended")
                else:
                    failed.add(name)
                    tell(f"{name} failed ({status}): {last_line(name, out)}")
            # what can begin
            for name in list(waiting):
                untrained = {run for run in teachers(runs[name])
                             if not (out / "work" / run / "teacher" / "model.safetensors").exists()}
                if untrained & (failed | done):
                    waiting.remove(name)
                    failed.add(name)
                    tell(f"{name} failed: it has no teacher")
                elif len(running) < jobs and not untrained:
                    waiting.remove(name)
                    running[name] = start(name, runs[name], out, jobs)
                    tell(f"{name} begins")
            time.sleep(0.1)
        if waiting or running:
            tell(f"{minutes:g} minutes are over; the same command goes on")
    finally:
        stop(running.values())
        records = {name: read_json(out / f"{name}.json") for name in runs if name in done}
        write_table(records, out / "grid.md")
    return not failed


def start(name, options, out, jobs):
    """Begin a run in a process of its own, which has its part of the cores."""
    work = (out / "work").as_posix()
    options = [TEACHER_OF.sub(rf"{work}/\1/teacher", option) for option in options]
    threads = max(1, os.cpu_count() // jobs)
    with open(f"{work}/{name}.txt", "a") as printed:
        return subprocess.Popen([*COMMAND, *options, "--out", f"{work}/{name}"], stdout=printed,
                                stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def collect(name, out):
    """Copy a finished run's log and, last, its record, by which it counts as done."""
    for source, copy in (("log.jsonl", f"{name}.jsonl"), ("record.json", f"{name}.json")):
        with replacing(out / copy) as file:
            file.write((out / "work" / name / source).read_bytes())


def last_line(name, out):
    """The last line that a run has printed."""
    printed = (out / "work" / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
    return printed.strip().rpartition("\n")[2]


def stop(processes):
    """End these processes: they are told to, and after GRACE seconds killed."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------- command line


def main(argv=None):
    """Exit status: 0, 1 if a run of a grid failed, 2 after a one-sentence error, 130 after
    Ctrl-C."""
    # one command a study; compare hands on to cap_min what it does not know
    parser = argparse.ArgumentParser(description="Studies made of several runs of cap_min.py.")
    studies = parser.add_subparsers(dest="study", required=True)
    add = studies.add_parser("compare", allow_abbrev=False, help="CAP-m, its ablations, plain "
                             "pruning; takes all options of cap_min.py too").add_argument
    add("--seeds", type=cap_min.number(int, 1), default=1, help="how many, from --seed on")
    add("--out", type=Path, help="folder; None: runs/TASK-SPARSITY-compare")
    add = studies.add_parser("probe", help="linear classifiers on frozen encoders").add_argument
    add("run", type=Path, help="folder of a finished run")
    add("--task", choices=TASKS, required=True)
    add("--data-dir", type=os.path.abspath, help="folder with the task's folder; None: downloaded")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--max-train", type=cap_min.number(int, 1), help="training rows; None: all")
    encoders = ["pruned", "dense", "pretrained"]
    add("--encoders", nargs="+", choices=encoders, default=encoders, help="those to be probed")
    add = studies.add_parser("score", help="runs on the dev sets of other data").add_argument
    add("runs", type=Path, nargs="+", metavar="run", help="folder of a finished run")
    add("--data-dir", type=os.path.abspath, help="folder with the task's folder; None: downloaded")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add = studies.add_parser("geometry", help="what the losses ask for").add_argument
    add("run", type=Path, help="folder of a finished run")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add = studies.add_parser("grid", help="a list of runs, several at once").add_argument
    add("list", type=Path, help="file with the options of one run a line")
    add("--jobs", type=cap_min.number(int, 1), default=1, help="runs at once")
    add("--minutes", type=cap_min.number(float, 0), default=math.inf, help="after which it ends")
    add("--out", type=Path, required=True, help="folder")
    add = studies.add_parser("hold-out", help="a dev set from the training set").add_argument
    add("--task", choices=TASKS, required=True)
    add("--data-dir", type=Path, required=True, help="folder with the task's folder")
    add("--rows", type=cap_min.number(int, 1), default=8000, help="of the new dev set")
    add("--out", type=Path, required=True, help="folder for the task's folder")
    add = studies.add_parser("lower-layers", help="a model of fewer layers").add_argument
    add("model", type=Path, help="folder of a checkpoint")
    add("--layers", type=cap_min.number(int, 1), required=True, help="how many it keeps")
    add("--out", type=Path, required=True, help="folder")
    args, rest = parser.parse_known_args(argv)
    if rest and args.study != "compare":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # the study
    cap_min.tune_cpu()
    try:
        if args.study == "compare":
            for option in rest:
                if option.partition("=")[0] in ("--method", "--without"):
                    raise ValueError("compare sets --method and --without itself")
            run_args = cap_min.parse(rest)
            run_args.out = args.out
            if args.out is None:
                run_args.out = Path("runs", f"{run_args.task}-{run_args.sparsity:g}-compare")
            compare(run_args, args.seeds)
        elif args.study == "probe":
            run = args.run
            del args.run, args.study  # what is left is the probe's configuration
            probe(run, args)
        elif args.study == "score":
            for run in args.runs:
                score_again(run, args)
        elif args.study == "geometry":
            geometry(args.run, args.device)
        elif args.study == "hold-out":
            hold_out(args.task, args.data_dir, args.rows, args.out)
        elif args.study == "lower-layers":
            lower_layers(args.model, args.layers, args.out)
        else:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops its runs too
            if not grid(args.list, args.out, args.jobs, args.minutes):
                return 1
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print("error:", (str(error) or "out of memory").splitlines()[0], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
