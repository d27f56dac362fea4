"""Write the tables of README.md from the records in this folder, the code and the tests.

Run:  python results/report.py             rewrites README.md in place
      python results/report.py --picture   draws demo.svg too (needs matplotlib)
A record is the record.json of a run, named TASK-METHOD-seedN.json; its log.jsonl lies beside it
as TASK-METHOD-seedN.jsonl. Those of `cap_min.py --compare 5` are in demo/, as METHOD-seedN.json.
Those of every pruning criterion are in methods/, as TASK-METHOD-TERMS.json (cap: with the
contrastive terms, kd: without), with the latencies and probes of some of them.
Text between `<!-- name -->` and `<!-- end -->` in README.md is made here."""

import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from cap_min import spread  # noqa: E402
from data_glue import load  # noqa: E402
from make_demo import right_without_facts  # noqa: E402

EQUATIONS = {1: "masked weight, exact top-k", 2: "straight-through gradient",
             3: "cubic schedule", 4: "candidates of an anchor", 5: "log-probability of a candidate",
             6: "positives", 7: "mean over positives, two norms", 8: "total loss"}
METHODS = {"dense": "dense (the teacher)", "magnitude": "magnitude", "movement": "movement",
           "movement-kd": "movement + KD", "cap": "CAP", "cap-no-prc": "CAP without PrC",
           "cap-no-snc": "CAP without SnC", "cap-no-fic": "CAP without FiC"}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def records(paths=None):
    """{task: {method: {seed: record}}}. AssertionError unless the runs of a task differ in method
    alone: the same options, training rows, source and dense scores."""
    found = {}
    for path in sorted(paths or HERE.glob("*-seed*.json")):
        method, seed = re.fullmatch(r"(.+)-seed(\d+)", path.stem).groups()
        record = read(path)
        task = record["config"]["task"]
        methods = found.setdefault(task, {})
        methods.setdefault(method.removeprefix(f"{task}-"), {})[int(seed)] = record
    for task, methods in found.items():
        for runs in methods.values():
            assert all(same(run) == same(methods["cap"][seed]) for seed, run in runs.items()), task
            assert runs.keys() == methods["cap"].keys(), f"{task}: other seeds"
    return found


def same(record):
    """What two runs that are compared must share."""
    config = {key: value for key, value in record["config"].items()
              if key not in ("without", "teacher", "method")}
    return config, record["train_sha256"], record["source_sha256"], record["dense"]


def scores(runs, which):
    return ", ".join(f"{name} {spread([100 * run[which][name] for run in runs])}"
                     for name in runs[0][which])


def results_table():
    """One row for each task and model."""
    rows = ["| task | rows, epochs, lr | model | weights left | dev score | seeds |",
            "|---|---|---|---|---|---|"]
    for task, methods in records().items():
        for method, name in METHODS.items():
            if method not in ("dense", *methods):
                continue
            runs = list(methods["cap" if method == "dense" else method].values())
            first, config = runs[0], runs[0]["config"]
            which = "dense" if method == "dense" else "pruned"
            left = 100 if method == "dense" else 100 - 100 * first["sparsity"]["total"]
            rows.append(f"| {task} | {first['examples']['train']:,}, {config['epochs']}, "
                        f"{config['lr']:g} | {name} | {left:.2f} % | {scores(runs, which)} "
                        f"| {len(runs)} |")
    return "\n".join(rows)


def epochs_table():
    """One row for each pruned run: dev score after each epoch, and who steered the encoder."""
    rows = ["| run | dev score after each epoch (weights kept) | mean gradient share |",
            "|---|---|---|"]
    for path in sorted(HERE.glob("*-seed*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line.get("phase") == "prune"]
        dev = ", ".join(f"{100 * next(iter(line['dev'].values())):.1f} ({line['kept']:.0%})"
                        for line in lines if "dev" in line)
        shares = [line["gradient_share"] for line in lines if "gradient_share" in line]
        means = ", ".join(f"{name} {statistics.mean(s.get(name, 0) for s in shares):.2f}"
                          for name in shares[-1])
        rows.append(f"| {path.stem} | {dev} | {means} |")
    return "\n".join(rows)


def demo_scores():
    """{run: {metric: [percent of each seed]}} of the demo's comparison, dense first."""
    methods = records(HERE.glob("demo/*-seed*.json"))["demo"]
    found = {}
    for method in METHODS:
        runs = methods["cap" if method == "dense" else method]
        which = "dense" if method == "dense" else "pruned"
        found[method] = {metric: [100 * runs[seed][which][metric] for seed in sorted(runs)]
                         for metric in ("accuracy", "accuracy_unseen")}
    return found


def demo_table():
    """One row for each run: mean and standard deviation over the seeds, and what CAP has more."""
    found = demo_scores()
    ours = found["cap"]
    rows = [f"| {len(ours['accuracy'])} seeds | animals seen in fine-tuning | known only from "
            "pre-training | CAP minus this: seen | only pre-training |", "|---|---|---|---|---|"]
    for method, scores in found.items():
        cells = [spread(values) for values in scores.values()]
        cells += ["", ""] if method == "cap" else [
            spread([mine - other for mine, other in zip(ours[metric], values)])
            for metric, values in scores.items()]
        rows.append(f"| {METHODS[method]} | {' | '.join(cells)} |")
    floor = [f"{100 * right_without_facts(load('demo', split)):.1f}"
             for split in ("dev", "dev_unseen")]
    return "\n".join([*rows, f"| a rule that knows no animal | {' | '.join(floor)} | | |"])


def draw_demo():
    """results/demo.svg: a dot for each seed, a line at the mean."""
    import matplotlib
    matplotlib.rcParams["svg.hashsalt"] = "demo"
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(8, 3.6))
    found = demo_scores()
    styles = {"accuracy": (-0.17, "#7f7f7f", "animals seen in fine-tuning"),
              "accuracy_unseen": (0.17, "#1f77b4", "animals known only from pre-training")}
    for metric, (shift, color, label) in styles.items():
        for place, scores in enumerate(found.values()):
            values = scores[metric]
            axis.plot([place + shift] * len(values), values, "o", color=color, alpha=0.5,
                      label=label if place == 0 else None)
            axis.hlines(statistics.mean(values), place + shift - 0.14, place + shift + 0.14, color)
    axis.axhline(100 * right_without_facts(load("demo", "dev_unseen")), color="#7f7f7f", ls=":",
                 label="a rule that knows no animal")
    axis.set_xticks(range(len(found)), [METHODS[name].replace(" without ", "\nwithout ").replace(
        " (the teacher)", "").replace(" + ", "\n+ ") for name in found])
    axis.set_ylabel("dev accuracy, %")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "demo.svg", metadata={"Date": None})


def method_records():
    """{task: {METHOD-TERMS: record}} of methods/. AssertionError unless the runs of a task have the
    same rows, source and teacher, and each the options of the one with the contrastive terms."""
    found = {}
    for task in ("sst2", "mnli"):
        runs = found[task] = {path.stem.removeprefix(f"{task}-"): read(path)
                              for path in (HERE / "methods").glob(f"{task}-*.json")}
        for name, run in runs.items():
            assert same(run)[1:] == same(runs["movement-cap"])[1:], f"{task}-{name}"
            assert same(run) == same(runs[name.split("-")[0] + "-cap"]), f"{task}-{name}"
    return found


def methods_table():
    """Every criterion without and with the contrastive terms, on each task."""
    lines = ["| task | weights left | criterion | without contrastive terms | with them | "
             "difference |", "|---|---|---|---|---|---|"]
    for task, runs in method_records().items():
        plain = runs["movement"]
        lines += [f"| {task} | 100.0 % | none: the teacher | {show(plain['dense'])} | | |",
                  f"| {task} | {100 - 100 * plain['sparsity']['total']:.1f} % | movement, "
                  f"cross-entropy alone | {show(plain['pruned'])} | | |"]
        for name, method in (("movement", "movement (CAP-m)"), ("soft", "soft (CAP-soft)"),
                             ("magnitude", "magnitude"), ("structured", "heads, neurons (CAP-f)")):
            without, with_them = (runs[f"{name}-{terms}"]["pruned"] for terms in ("kd", "cap"))
            left = 100 - 100 * runs[f"{name}-cap"]["sparsity"]["total"]
            more = "/".join(f"{100 * (with_them[key] - without[key]):+.1f}" for key in without)
            lines.append(f"| {task} | {left:.1f} % | {method} | {show(without)} | "
                         f"{show(with_them)} | {more} |")
    return "\n".join(lines)


def show(scores):
    return "/".join(f"{100 * value:.1f}" for value in scores.values())


def structured_table():
    """CAP-f on SST-2 at several sparsities: its score, size, and speed beside the dense teacher."""
    records, lines = method_records()["sst2"], []
    for name in ("structured50-cap", "structured80-cap", "structured-cap"):
        latency = read(HERE / "methods" / f"latency-sst2-{name}.json")
        rows = [row for row in latency["rows"] if row["threads"] == 1]
        whole, left = (latency["bytes"][f"encoder matrices, {form}"] / 1e6
                       for form in ("dense fp32", "plain"))
        faster = " | ".join(f"{row['ratios']['transformers fp32']:.1f}" for row in rows)
        lines.append(f"| {latency['sparsity']:.1%} | {show(records[name]['pruned'])} | "
                     f"{left:.1f} of {whole:.1f} | {faster} |")
    sizes = " | ".join(f"{row['batch']} x {row['length']}" for row in rows)
    return "\n".join([f"| weights removed | dev score | encoder matrices, MB | {sizes} |",
                      "|---" * (3 + len(rows)) + "|", *lines])


def probe_table():
    """Linear classifiers on the frozen encoders of MNLI's runs, for other tasks."""
    lines = ["| probed task, rows | metric | pre-trained | fine-tuned, dense | movement | "
             "movement + KD | CAP |", "|---" * 7 + "|"]
    for task in ("rte", "mrpc", "cola", "snli"):
        probes = [read(HERE / "methods" / f"probe-mnli-{run}-{task}.json")
                  for run in ("movement", "movement-kd", "movement-cap")]
        first = probes[0]
        assert all(probe["train_sha256"] == first["train_sha256"] for probe in probes)
        for metric in first["dense"]:
            cells = [first["pretrained"], first["dense"], *(probe["pruned"] for probe in probes)]
            lines.append(f"| {task}, {first['examples']['train']:,} | {metric} | "
                         + " | ".join(f"{100 * cell[metric]:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def throughput_table(machine):
    """A record of bench/throughput.py: one row for each comparison, one column for each task."""
    record = read(HERE / f"throughput-{machine}.json")
    tasks, config = record["tasks"], record["config"]

    def row(what, show):
        return f"| {what} | {' | '.join(show(task, figures) for task, figures in tasks.items())} |"

    def against(side):
        return lambda task, figures: (f"{figures['prune_against'][side]:.2f}"
                                      if side in figures["prune_against"] else "not timed")

    def share(part):
        return lambda task, figures: f"{part(figures) / figures['parts_ms']['whole step']:.1%}"

    def memory(figures):
        peak = figures["peak_memory_bytes"]
        return (peak["prune"] - figures["bank_bytes"]) / peak["transformers"]

    growth = {rows: f"{ms:.0f}" for rows, ms in record["growth"].items() if rows.isdigit()}
    return "\n".join([
        f"| {record['machine']}, torch {record['torch']}; {config['rows']:,} rows, "
        f"{config['epochs']} epochs, {config['repeats']} repeats | {' | '.join(tasks)} |",
        "|---" * (1 + len(tasks)) + "|",
        row("pruning phase, examples/s", lambda t, f: f"{f['examples_per_second']['prune']:.0f}"),
        row("against transformers' fine-tuning", against("transformers")),
        row("against bert_min's dense fine-tuning, embeddings frozen", against("dense")),
        row("against the published code", against("published")),
        row("masks, share of a step at 97 %", share(lambda f: f["parts_ms"]["masks"])),
        row("contrastive terms, forward and backward, share of a step",
            share(lambda f: f["contrastive_ms"])),
        row("a snapshot, share of the steps of an epoch",
            lambda t, f: f"{f['snapshot_of_epoch']:.2f}"),
        row("peak memory against transformers' fine-tuning, banks left out",
            lambda t, f: f"{memory(f):.2f}"),
        row("WordPiece against the tokenizers library, one core each",
            lambda t, f: f"{record['tokenising'][t]['ratio']:.1f}"),
        row("start to end of the first step, 20,000 rows",
            lambda t, f: f"{record['start_up'][t]['seconds']:.1f} s"),
        f"| ms a step at {', '.join(f'{int(rows):,}' for rows in growth)} rows of 16 tokens "
        f"| {', '.join(growth.values())} |" + " |" * (len(tasks) - 1)])


def profile_table():
    """Milliseconds of each part of a pruning step at the final sparsity, before and after."""
    tasks = read(HERE / "throughput-epyc.json")["tasks"]
    columns = [parts for figures in tasks.values()
               for parts in (figures["before"]["parts_ms"], figures["parts_ms"])]
    rows = [f"| part | {' | '.join(f'{task}, before | after' for task in tasks)} |",
            "|---" * (1 + len(columns)) + "|"]
    for name in columns[0]:
        cells = (f"{parts[name]:.0f} ({parts[name] / parts['whole step']:.0%})"
                 for parts in columns)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def latency_table():
    """One row for each model, batch and length: ours beside transformers, with one thread and with
    all; under them the sizes of the files."""
    records = [read(path) for path in sorted(HERE.glob("latency-*.json"))]
    threads = sorted({row["threads"] for row in records[0]["rows"]})
    names = [f"{count} thread{'s' * (count > 1)}" for count in threads]
    lines = [f"| model, sparsity | batch x length | {' | '.join(f'ours, {n}' for n in names)} | "
             f"{' | '.join(f'against fp32, {n}' for n in names)} | "
             f"{' | '.join(f'against bf16, {n}' for n in names)} | logits differ by |",
             "|---" * (3 + 3 * len(threads)) + "|"]
    for record in records:
        rows = {(row["batch"], row["length"], row["threads"]): row for row in record["rows"]}
        for batch, length in sorted({key[:2] for key in rows}):
            found = [rows[batch, length, count] for count in threads]
            cells = [f"{row['ms']['ours']:.1f} ms" for row in found]
            cells += [f"{row['ratios'][f'transformers {dtype}']:.1f}"
                      for dtype in ("fp32", "bf16") for row in found]
            lines.append(f"| {record['what']}, {record['sparsity']:.0%} | {batch} x {length} | "
                         f"{' | '.join(cells)} | {max(row['difference'] for row in found):.0e} |")
    sizes = ["| encoder matrices, MB | dense fp32 | plain file | compact file |",
             "|---|---|---|---|"]
    for record in records:
        found = record["bytes"]
        sizes.append(f"| {record['what']}, {record['sparsity']:.0%} | " + " | ".join(
            f"{found[f'encoder matrices, {name}'] / 1e6:.1f}"
            for name in ("dense fp32", "plain", "compact")) + " |")
    return "\n".join([*lines, "", *sizes])


def banks_table():
    """Bytes of all banks: N rows x D numbers x 2 bytes, for PrC, FiC and 9 snapshots."""
    lines = ["| task, rows | hidden size 384 | 768 | 1024 |", "|---|---|---|---|"]
    for task, rows in (("SST-2", 67_349), ("QQP", 363_846), ("MNLI", 392_702)):
        cells = (f"{11 * rows * size * 2 / 1e9:.1f} GB" for size in (384, 768, 1024))
        lines.append(f"| {task}, {rows:,}, 9 snapshots | {' | '.join(cells)} |")
    return "\n".join(lines)


def equations():
    """[(number, what, lines of cap_min.py, tests that name it)]."""
    lines = (ROOT / "cap_min.py").read_text(encoding="utf-8").splitlines()
    tests = re.findall(r"def (test_\w+)\([^)]*\):\n    \"\"\"(.*?)\"\"\"",
                       (ROOT / "test_cap_min.py").read_text(encoding="utf-8"), re.DOTALL)
    rows = []
    for number, what in EQUATIONS.items():
        marks = [i for i, line in enumerate(lines, 1)
                 if re.search(rf"# .*eq\. \({number}\)", line)]
        named = [name for name, docstring in tests if number in numbers_in(docstring)]
        rows.append((number, what, marks, named))
    return rows


def numbers_in(docstring):
    """The equations a docstring names at its end: "Eq. (1)." or "Eq. (4) to (7)."."""
    match = re.search(r"Eq\. \((\d)\)(?: to \((\d)\))?\.?\s*$", docstring)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()


def equation_table():
    rows = ["| eq. | what | cap_min.py, line | test_cap_min.py |", "|---|---|---|---|"]
    for number, what, lines, tests in equations():
        places = ", ".join(f"[{line}](cap_min.py#L{line})" for line in lines)
        rows.append(f"| ({number}) | {what} | {places} | {', '.join(f'`{t}`' for t in tests)} |")
    return "\n".join(rows)


def render(text):
    """README's text with its tables made anew."""
    for name, table in (("demo", demo_table), ("results", results_table), ("epochs", epochs_table),
                        ("methods", methods_table), ("structured", structured_table),
                        ("probes", probe_table),
                        ("throughput, xeon", lambda: throughput_table("xeon")),
                        ("throughput, epyc", lambda: throughput_table("epyc")),
                        ("profile", profile_table),
                        ("latency", latency_table), ("banks", banks_table),
                        ("equations", equation_table)):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                      lambda match: match[1] + table() + "\n" + match[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    if "--picture" in sys.argv:
        draw_demo()
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")
