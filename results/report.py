"""Write the tables of README.md, bench/README.md and the pages in results/ from the records there,
the code and the tests.

Run:  python results/report.py             rewrites the pages in place
      python results/report.py --picture   draws the pictures too (needs matplotlib)

In a page, what lies between `<!-- NAME -->` and `<!-- end -->` is made by the function
TABLES[NAME].
A record is the record.json of a run; results/details.md tells which file is which."""

import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "results")]

from bert_min import read_json  # noqa: E402
from data_glue import load  # noqa: E402
from make_demo import right_without_facts  # noqa: E402
from studies import by_score, difference, paired, spread, table  # noqa: E402

PAGES = [ROOT / "README.md", HERE / "README.md", HERE / "details.md", ROOT / "bench" / "README.md"]

ARMS = {"kd": "movement + KD", "cap": "CAP-m", "soft-kd": "soft + KD", "cap-soft": "CAP-soft"}
ARMS_AND_DENSE = {"dense": "dense (the teacher)", **ARMS}
WITHOUT_KD = {"movement": "movement, no KD", "magnitude": "magnitude, no KD"}
WITHOUT_A_TERM = {"cap-no-prc": "CAP-m without PrC", "cap-no-snc": "CAP-m without SnC",
                  "cap-no-fic": "CAP-m without FiC"}
ADDED = {"contrast adds to movement + KD": ("cap", "kd"),
         "contrast adds to soft + KD": ("cap-soft", "soft-kd"),
         "soft minus movement, both + KD": ("soft-kd", "kd")}
DIFFERENCES = {**ADDED, "KD adds to movement": ("kd", "movement"),
            "movement minus magnitude, no KD": ("movement", "magnitude")}

# --------------------------------------------------------------------------- records


def comparison(prefix):
    """{METHOD-seedN: record} of the files PREFIX + METHOD-seedN.json, and the teachers as
    "dense-seedN". AssertionError unless the runs of a seed differ in nothing but the method."""
    found, first = {}, {}
    for path in sorted(HERE.glob(f"{prefix}*-seed*.json")):
        name = path.relative_to(HERE).as_posix().removeprefix(prefix).removesuffix(".json")
        record = found[name] = read_json(path)
        other = first.setdefault(record["seed"], record)
        assert setting(record) == setting(other), f"{prefix}{name}: not as others of its seed"
    for seed, record in first.items():
        found[f"dense-seed{seed}"] = record | {"pruned": record["dense"]}
    return found


def arm_scores(prefix):
    """{(task, metric): {arm: {seed: score}}} of a `comparison`."""
    return by_score(comparison(prefix))


def setting(record):
    """What two runs that are compared must have in common."""
    config = {name: value for name, value in record["config"].items()
              if name not in ("method", "without", "teacher", "weights_sha256", "score_init")}
    return config, record["train_sha256"], record["source_sha256"], record["dense"]


# ------------------------------------------------------------------------------ demo

DEMO_MODELS = {
    "dense": "dense (the teacher)", "magnitude": "magnitude", "movement": "movement",
    "movement-kd": "movement + KD", "cap": "CAP-m", **WITHOUT_A_TERM}


def demo_floor(split):
    """Accuracy of a rule that knows no animal, in percent."""
    return 100 * right_without_facts(load("demo", split))


def demo_rows(scores, names, pairs):
    """A row for each of names: mean and standard deviation on both dev sets, and, if it has a pair,
    what the first of that has more than the second."""
    rows = []
    for method, name in names.items():
        cells, differences = [], []
        for found in scores.values():
            assert found[method].keys() == found["dense"].keys(), f"{method}: its seeds"
            cells.append(spread(found[method].values()))
            more = ""
            if method in pairs:
                ours, theirs = (found[name] for name in pairs[method])
                more = paired(ours, theirs).partition(" (")[0]
            differences.append(more)
        rows.append([name, *cells, *differences])
    return rows


def demo_head(scores, difference):
    """The head above `demo_rows`, whose methods all have the teacher's seeds."""
    seeds = len(next(iter(scores.values()))["dense"])
    return [f"{seeds} seeds", "animals seen in fine-tuning", "known only from pre-training",
            f"{difference}: seen", "only pre-training"]


def demo_table():
    """One row for each of ARMS, and what the contrast adds."""
    pairs = {"cap": ("cap", "kd"), "cap-soft": ("cap-soft", "soft-kd")}
    scores = arm_scores("demo-arms/")
    rows = demo_rows(scores, ARMS_AND_DENSE, pairs)
    floor = [f"{demo_floor(split):.1f}" for split in ("dev", "dev_unseen")]
    rows.append(["the floor: a rule that knows no animal", *floor, "", ""])
    return table(demo_head(scores, "contrast adds"), rows)


def demo_verdicts():
    """`verdict_table` of the demo's two dev sets."""
    return verdict_table([("10 %", arm_scores("demo-sparsities/90-")),
                          ("3 %", arm_scores("demo-arms/")),
                          ("1 %", arm_scores("demo-sparsities/99-"))])


def ablation_table():
    """One row for each of DEMO_MODELS, and what CAP-m has more."""
    pairs = {method: ("cap", method) for method in DEMO_MODELS if method != "cap"}
    scores = arm_scores("demo/")
    return table(demo_head(scores, "CAP-m minus this"), demo_rows(scores, DEMO_MODELS, pairs))


def save(figure, name):
    """A picture whose file is the same whenever it is drawn."""
    import matplotlib
    matplotlib.rcParams["svg.hashsalt"] = name.removesuffix(".svg")
    figure.tight_layout()
    figure.savefig(HERE / name, metadata={"Date": None})


def draw_geometry():
    """results/geometry.svg: what the losses ask of a model that still is what its ancestor was."""
    from matplotlib import pyplot
    figure, (losses, cosines, snapshots) = pyplot.subplots(1, 3, figsize=(10, 3.2))
    records = geometry_records()
    for i, (name, found) in enumerate(records.items()):
        losses.plot([found["best_loss"], found["loss"]], [-i, -i], "-", color="gray")
        losses.plot(found["loss"], -i, "o", color="tab:red")
        losses.plot(found["best_loss"], -i, "o", color="tab:green")
        cosines.barh(-i, found["best_cosine"], color="tab:green")
        if "mean" not in name:
            snapshots.plot(range(1, 10), found["snapshots"], label=name)
    losses.set_yticks(range(0, -len(records), -1), records, fontsize=8)
    losses.set_title("loss: now (red), at best (green)", fontsize=9)
    cosines.set_yticks([])
    cosines.set_xlim(0, 1)
    cosines.set_title("cosine of the best to the ancestor", fontsize=9)
    snapshots.set_xlabel("snapshots K", fontsize=8)
    snapshots.set_yscale("log")
    snapshots.legend(fontsize=7)
    snapshots.set_title("gradient of such a bank", fontsize=9)
    save(figure, "geometry.svg")


# ------------------------------------------------------------------------------ GLUE


def task_scores(folder, tasks=("mnli", "qqp", "sst2")):
    """`arm_scores` of these tasks in answer/, answer-90/ or without-kd/."""
    found = {}
    for task in tasks:
        found |= arm_scores(f"{folder}/{task}-")
    return found


def answer_scores():
    """`task_scores` of answer/, and of the runs without KD in answer-no-kd/, which have a teacher
    and a source of their own."""
    return with_seeds(task_scores("answer"), task_scores("answer-no-kd"), WITHOUT_KD)


def with_seeds(scores, more, arms):
    """A copy of {(task, metric): {arm: {seed: score}}} with the seeds that these arms have in
    `more`. AssertionError if they are there already."""
    joined = {column: dict(found) for column, found in scores.items()}
    for column, found in more.items():
        for arm in arms:
            seeds = joined[column].get(arm, {})
            assert not seeds.keys() & found[arm].keys(), f"{arm}: a seed twice"
            joined[column][arm] = seeds | found[arm]
    return joined


def answer_table(scores, added):
    """One column for each score of a task: mean and standard deviation of the teacher, ARMS and
    what else was run, and, paired by seed, the differences `added`, {name: (arm, other arm)}. The
    number of seeds stands behind what has fewer than the teacher."""
    head, rows = ["dev score, %"], {}
    for (task, metric), found in scores.items():
        head.append(f"{task}, {metric}")
        for arm, name in (ARMS_AND_DENSE | WITHOUT_KD).items():
            if arm in found:
                text, count = spread(found[arm].values()), len(found[arm])
                if count < len(found["dense"]):
                    text += f" (n = {count})"
                rows.setdefault(name, [name]).append(text)
        for name, (arm, other) in added.items():
            count, mean, error = difference(found[arm], found[other])
            assert count == len(found["dense"]), f"{task}: {arm} and {other}"
            rows.setdefault(name, [name]).append(f"{mean:+.2f} ± {error:.2f}")
    return table(head, rows.values())


def verdict_table(scores):
    """What each of DIFFERENCES adds, a row for each of [(weights left, {(task, metric): {arm: {seed:
    score}}}), ...] that has two seeds of it; the first has all columns. In bold what is above twice
    its standard error."""
    columns, rows = list(scores[0][1]), []
    for name, (arm, other) in DIFFERENCES.items():
        for weights_left, found in scores:
            cells = []
            for column in columns:
                arms = found.get(column, {})
                count, mean, error = difference(arms.get(arm, {}), arms.get(other, {}))
                cell = f"{mean:+.2f} ± {error:.2f} ({count})" if count > 1 else ""
                cells.append(f"**{cell}**" if abs(mean) > 2 * error else cell)
            if any(cells):
                rows.append([name, weights_left, *cells])
    return table(["what", "weights left", *(f"{task}, {metric}" for task, metric in columns)], rows)


def dev_verdicts():
    """`verdict_table` of the dev sets."""
    return verdict_table([("10 %", task_scores("answer-90")), ("3 %", answer_scores())])


def held_out_verdicts():
    """`verdict_table` of the held-out rows, with the two seeds of selection/ added at 3 %, and there
    the runs without KD, which have a teacher of their own."""
    found = sparsity_scores()
    found["97"] = with_seeds(found["97"], form_scores("selection"), ARMS)
    densities = [(SPARSITIES[percent], scores) for percent, scores in found.items()]
    return verdict_table([*densities, ("3 %", task_scores("without-kd", ("qqp", "sst2")))])


def pruning_log(run):
    """Entries of the pruning phase in the log of a run, named by its path in results/."""
    lines = (HERE / f"{run}.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["phase"] == "prune"]


def draw_epochs():
    """results/mnli.svg: dev scores of MNLI's four runs, and who steers the encoder of CAP."""
    from matplotlib import pyplot
    figure, (scores, shares) = pyplot.subplots(1, 2, figsize=(10, 3.4))
    for arm, name in ARMS.items():
        found = [entry for entry in pruning_log(f"answer/mnli-{arm}-seed0") if "dev" in entry]
        scores.plot([100 * entry["dev"]["accuracy"] for entry in found], "o-", label=name)
    scores.set_xticks(range(len(found)),
                      [f"{i}\n{entry['kept']:.0%}" for i, entry in enumerate(found, 1)])
    scores.set_xlabel("epoch, and weights kept at its end")
    scores.set_ylabel("dev accuracy, %")
    scores.grid(axis="y", alpha=0.3)
    scores.legend(fontsize=8)
    found = [entry for entry in pruning_log("answer/mnli-cap-seed0") if "gradient_share" in entry]
    terms = found[-1]["gradient_share"]
    shares.stackplot([entry["step"] for entry in found],
                     [[entry["gradient_share"].get(term, 0) for entry in found] for term in terms],
                     labels=terms)
    shares.set_xlabel("step of CAP-m")
    shares.set_ylabel("share of the gradient")
    shares.legend(fontsize=8, loc="lower right")
    save(figure, "mnli.svg")


KINDS = {"attention.self.query": "query", "attention.self.key": "key",
         "attention.self.value": "value", "attention.output.dense": "output",
         "intermediate.dense": "feed-forward in", "output.dense": "feed-forward out"}


def percents_kept(records):
    """What each layer keeps of its KINDS, in percent: a list for each layer, mean over records."""
    layers = []
    for layer in range(6):
        row = []
        for kind in KINDS:
            name = f"bert.encoder.layer.{layer}.{kind}.weight"
            row.append(statistics.mean(100 - 100 * record["sparsity"]["matrices"][name]
                                       for record in records))
        layers.append(row)
    return layers


def draw_kept():
    """results/kept.svg: what one threshold over all matrices leaves of each, mean over seeds."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.4))
    for column, task in zip(axes.T, ("mnli", "qqp", "sst2")):
        found = comparison(f"answer/{task}-")
        for axis, arm in zip(column, ("soft-kd", "cap-soft")):
            kept = percents_kept([record for name, record in found.items()
                                  if name.startswith(f"{arm}-seed")])
            axis.imshow(kept, "Blues", vmin=0, vmax=8, aspect="auto")
            for layer, row in enumerate(kept):
                for i, percent in enumerate(row):
                    axis.text(i, layer, f"{percent:.1f}", ha="center", va="center", fontsize=8)
            axis.set_title(f"{task}, {ARMS[arm]}", fontsize=9)
            axis.set_xticks([])
            axis.set_ylabel("layer", fontsize=8)
        axis.set_xticks(range(len(KINDS)), KINDS.values(), rotation=40, ha="right", fontsize=8)
    save(figure, "kept.svg")


def probe_table():
    """Linear classifiers on frozen encoders, for other tasks: one row for each score of a task and
    the encoders with so many weights left that were pruned for another. AssertionError if two
    encoders had other rows of a task."""
    rows, examples = [], {}
    for folder, left in (("probes", "3 %"), ("probes-90", "10 %")):
        found = {}  # {(pruned for, task, metric): {encoder: {seed: score}}}
        for path in sorted((HERE / folder).glob("*.json")):
            pruned_for, arm, seed, task = re.fullmatch(r"(\w+?)-(.+)-seed(\d)-(\w+)",
                                                       path.stem).groups()
            record = read_json(path)
            assert examples.setdefault(task, record["train_sha256"]) == record["train_sha256"], path
            for metric, score in record["pruned"].items():
                scores = found.setdefault((pruned_for, task, metric), {})
                scores.setdefault(arm, {})[seed] = 100 * score
                if "pretrained" in record:
                    scores["pretrained"] = {seed: 100 * record["pretrained"][metric]}
        for (pruned_for, task, metric), scores in found.items():
            row = [f"{pruned_for}, {left}", f"{task}, {metric}"]
            row += [spread(scores[arm].values()) for arm in ("pretrained", *ARMS)]
            row.append(paired(scores["cap"], scores["kd"]))
            row.append(paired(scores["cap-soft"], scores["soft-kd"]))
            rows.append(row)
    head = ["pruned for, weights left", "probed task", "pre-trained, dense", *ARMS.values()]
    return table([*head, "contrast adds to movement + KD", "to soft + KD"], rows)


def geometry_records():
    """{"TASK, BANK": figures} of what `studies.py geometry` found."""
    found = {}
    for path in sorted(HERE.glob("geometry-*.json")):
        task = path.stem.removeprefix("geometry-")
        for bank, figures in read_json(path)["banks"].items():
            found[f"{task}, {bank.replace('prc', 'PrC').replace('fic', 'FiC')}"] = figures
    return found


def geometry_table():
    """One row for each bank."""
    rows = []
    for name, found in geometry_records().items():
        official, supcon = found["supervised"].values()
        first, *_, last = found["snapshots"]
        rows.append([name, f"{found['mean_cosine']:.2f}", f"{found['loss']:.2f}",
                     f"{found['best_loss']:.2f}", f"{found['best_cosine']:.2f}",
                     f"{official:.3f}", f"{supcon:.2f}", f"{first:.3f}", f"{last:.4f}"])
    return table(["bank", "mean cosine of two examples", "L^u now", "at best", "cosine of that to "
                  "the ancestor", "gradient of w_s L^s over w_u L^u", "the same, supcon, w_s = 1",
                  "gradient, K = 1", "K = 9"], rows)


FORM_NAMES = {  # FORM in the name of a record's file: the name of its row
    "kd": "movement + KD", "cap": "CAP-m", **WITHOUT_A_TERM,
    "supcon-s0.03": "CAP-m, supcon, w_s 0.03",
    "supcon-s0.1": "CAP-m, supcon, w_s 0.1", "supcon-s0.3-u0": "CAP-m, supcon, w_s 0.3, w_u 0",
    "supcon-s1": "CAP-m, supcon, w_s 1", "mean-off": "CAP-m, ancestors' mean off",
    "once-pruned": "CAP-m, contrast once pruning begins", "snc-times-k": "CAP-m, SnC times K",
    "weights-only": "CAP-m, contrast trains weights alone",
    "temperature-0.05": "CAP-m, temperature 0.05", "one-topk-kd": "one top-k + KD",
    "smp-s-kd": "SMP-S + KD", "soft-kd": "soft + KD", "cap-soft": "CAP-soft",
    "soft-once-pruned": "CAP-soft, contrast once pruning begins"}


def held_out(*folders):
    """{TASK-FORM-seedN: record} of folders of results/. AssertionError unless the runs of a task
    and seed share rows, source, teacher, epochs, batches, learning rate and number type."""
    records, common = {}, {}
    for folder in folders:
        for path in sorted((HERE / folder).glob("*.json")):
            assert path.stem not in records, f"{path}: there twice"
            record = records[path.stem] = read_json(path)
            config = record["config"]
            fixed = [config.get(name) for name in ("epochs", "batch_size", "lr", "dtype")]
            facts = fixed, setting(record)[1:]
            assert common.setdefault((config["task"], record["seed"]), facts) == facts, (
                f"{path}: not as others")
    return records


def by_form(records):
    """{(task, metric): {form: {seed: score}}} of {TASK-FORM-seedN: record}."""
    found = {}
    for (task, metric), runs in by_score(records).items():
        found[task, metric] = {run.removeprefix(f"{task}-"): runs[run] for run in runs}
    return found


def form_scores(*folders):
    """`by_form` of the records in folders of results/. AssertionError unless all have the same
    sparsity."""
    records = held_out(*folders)
    assert len({record["config"].get("sparsity") for record in records.values()}) == 1, folders
    return by_form(records)


def forms_table(columns):
    """One row for each of FORM_NAMES that has scores in {(task, metric): {form: {seed: score}}}:
    its score, and what it has more than the first one, for each score of each task."""
    rows = []
    for form, name in FORM_NAMES.items():
        row = [name]
        for scores in columns.values():
            ours = scores.get(form)
            row.append(spread(ours.values()) if ours else "")
            row.append(paired(ours, scores["kd"]) if ours and form != "kd" else "")
        if any(row[1:]):
            rows.append(row)
    head = ["held-out rows, %"]
    for task, metric in columns:
        head += [f"{task}, {metric}", "minus row 1"]
    return table(head, rows)


SPARSITIES = {"90": "10 %", "97": "3 %", "99": "1 %"}  # in the name of a record: weights left


def sparsity_scores():
    """{one of SPARSITIES: `by_form` of the records in sparsity/}; the arm "dense" is the teacher.
    MNLI's two dev sets are the same held-out rows, and one is shown."""
    records = {percent: {} for percent in SPARSITIES}
    for name, record in held_out("sparsity").items():
        task, arm, percent, seed = re.fullmatch(r"(\w+?)-(.+)-(\d+)-(seed\d)", name).groups()
        assert 100 * record["config"]["sparsity"] == float(percent), f"{name}: its sparsity"
        records[percent][f"{task}-{arm}-{seed}"] = record
        records[percent][f"{task}-dense-{seed}"] = record | {"pruned": record["dense"]}
    found = {percent: by_form(records[percent]) for percent in SPARSITIES}
    for scores in found.values():
        scores.pop(("mnli", "accuracy_mm"), None)
    return found


def density_table():
    """One row for each score and density: the teacher and ARMS."""
    rows = []
    for percent, columns in sparsity_scores().items():
        for (task, metric), scores in columns.items():
            row = [f"{task}, {metric}", SPARSITIES[percent]]
            for arm in ARMS_AND_DENSE:
                row.append(spread(scores[arm].values()) if arm in scores else "")
            rows.append(row)
    return table(["held-out rows, %", "weights left", *ARMS_AND_DENSE.values()], rows)


def ten_percent():
    """Scores for `forms_table` of QQP and SST-2 at 10 %: seeds 0 and 1, with which other forms were
    tried there too."""
    columns = {}
    for (task, metric), scores in sparsity_scores()["90"].items():
        if task != "mnli":
            columns[task, metric] = {form: {seed: found[seed] for seed in (0, 1)}
                                     for form, found in scores.items() if {0, 1} <= found.keys()}
    return columns


def draw_density():
    """results/density.svg: a dot for each run over the densities, a line for each of ARMS through
    the means of its seeds, which need not be the same everywhere."""
    from matplotlib import pyplot
    found = sparsity_scores().values()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.4))
    for axis, task in zip(axes, ("qqp", "sst2")):
        for i, (arm, name) in enumerate(ARMS.items()):
            scores = [of_density[task, "accuracy"][arm].values() for of_density in found]
            axis.plot([statistics.mean(values) for values in scores], color=f"C{i}", label=name)
            for column, values in enumerate(scores):
                axis.plot([column] * len(values), values, "o", color=f"C{i}", alpha=0.5)
        axis.set_xticks(range(len(SPARSITIES)), SPARSITIES.values())
        axis.set_xlabel(f"{task}: weights left")
        axis.set_ylabel("accuracy on held-out rows, %")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, "density.svg")


STRUCTURED = {"cap": "CAP-f", "kd": "CAP-f without contrast", "lower3": "the lowest 3 layers",
              "lower1": "the lowest layer"}


def structured_scores(task):
    """{run of STRUCTURED: {percent of encoder weights left: {seed: score}}} on 2,000 held-out rows:
    at the end of each stage of CAP-f, and of a model of fewer layers after its last epoch.
    AssertionError unless the runs of a seed share rows, source and teacher."""
    found, common = {}, {}
    for run in STRUCTURED:
        scores = found[run] = {}
        for path in sorted(HERE.glob(f"structured/{task}-{run}-seed*.jsonl")):
            record = read_json(path.with_suffix(".json"))
            facts = setting(record)[1:]
            assert common.setdefault(record["seed"], facts) == facts, f"{path}: not as others"
            for entry in pruning_log(f"structured/{path.stem}"):
                if "dev" not in entry:
                    continue
                left = entry["kept"]
                if run.startswith("lower"):  # whose record knows nothing of the layers above
                    left *= int(run[-1]) / 6
                seeds = scores.setdefault(round(100 * left), {})
                seeds[record["seed"]] = 100 * entry["dev"]["accuracy"]
    return found


def structured_table():
    """One row for each density of a task, from the most weights to the fewest."""
    rows = []
    for task in ("sst2", "mnli"):
        found = structured_scores(task)
        densities = {left for scores in found.values() for left in scores}
        for left in sorted(densities, reverse=True):
            row = [task, f"{left} %"]
            for scores in found.values():
                row.append(spread(scores[left].values()) if left in scores else "")
            more = ""
            if left in found["cap"]:
                more = paired(found["cap"][left], found["kd"].get(left, {}))
            rows.append([*row, more])
    return table(["task", "encoder weights left", *STRUCTURED.values(), "contrast adds"], rows)


TIMED = {  # record in results/, all of one teacher: name of its row
    "structured/sst2-cap-50-seed0": "CAP-f", "structured/sst2-cap-80-seed0": "CAP-f",
    "structured/sst2-cap-seed0": "CAP-f", "structured/sst2-lower3-seed0": "lowest 3 layers",
    "structured/sst2-lower1-seed0": "lowest layer", "sparsity/sst2-soft-kd-90-seed0": "soft + KD"}


def timed_models():
    """[(name, fraction of the teacher's encoder weights that is left, accuracy on all held-out
    rows, {(batch, length, number type): how many times as fast as the dense model})] of TIMED, the
    teacher first. AssertionError unless all have one teacher and were timed on one machine."""
    records = {run: read_json(HERE / f"{run}.json") for run in TIMED}
    latencies = {run: read_json(HERE / f"structured/latency/{Path(run).name}.json")
                 for run in TIMED}
    assert len({str(record["dense"]) for record in records.values()}) == 1, "other teachers"
    assert len({latency["processor"] for latency in latencies.values()}) == 1, "other machines"
    weights = max(record["sparsity"]["weights"] for record in records.values())
    dense = next(iter(records.values()))["dense"]["accuracy"]
    found = [("dense (the teacher)", 1.0, dense, {})]
    for run, record in records.items():
        found.append((TIMED[run], record["sparsity"]["kept"] / weights,
                      record["pruned"]["accuracy"], speedups(latencies[run])))
    return found


def speed_table():
    """One row for each model that was timed: its score, and how many times as fast it is."""
    columns, rows = [(1, 32, "fp32"), (8, 128, "fp32"), (1, 32, "bf16"), (8, 128, "bf16")], []
    for name, left, accuracy, faster in timed_models():
        row = [name, f"{left:.0%}", f"{100 * accuracy:.1f}"]
        for column in columns:
            row.append(f"{faster[column]:.1f}" if faster else "1")
        rows.append(row)
    return table(["sst2, one seed", "encoder weights left", "accuracy, 8,000 held-out rows",
                  *(f"{batch} x {length}, {dtype}" for batch, length, dtype in columns)], rows)


def draw_structured():
    """results/structured.svg: scores of SST-2 over densities, a dot for each seed and a line at the
    mean of each of STRUCTURED, and over the speed of what was timed."""
    from matplotlib import pyplot
    figure, (densities, speeds) = pyplot.subplots(1, 2, figsize=(10, 3.4))
    for i, (run, scores) in enumerate(structured_scores("sst2").items()):
        means = [statistics.mean(seeds.values()) for seeds in scores.values()]
        densities.plot(scores.keys(), means, "-", color=f"C{i}", label=STRUCTURED[run])
        for left, seeds in scores.items():
            densities.plot([left] * len(seeds), seeds.values(), "o", color=f"C{i}", alpha=0.5)
    densities.invert_xaxis()
    densities.set_xlabel("encoder weights left, %")
    densities.set_ylabel("accuracy on 2,000 held-out rows, %")
    points = {}  # {name: [(speed, score)]}
    for name, left, accuracy, faster in timed_models():
        point = faster.get((1, 32, "fp32"), 1), 100 * accuracy
        points.setdefault(name, []).append(point)
        speeds.annotate(f"{left:.0%}", point, (4, 5), textcoords="offset points", fontsize=8)
    for name, found in points.items():
        speeds.plot(*zip(*found), "o-", label=name)
    speeds.set_xscale("log")
    speeds.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    speeds.set_xlabel("times as fast as dense, fp32, one text of 32 tokens")
    speeds.set_ylabel("accuracy on 8,000 held-out rows, %")
    speeds.margins(0.1)
    for axis in (densities, speeds):
        axis.legend(fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    save(figure, "structured.svg")


# ------------------------------------------------------------------------ fewer rows


def fewer_rows_table():
    """What the contrast adds to movement + KD on SST-2 at 10 %, by the number of training rows."""
    rows, column = [], ("sst2", "accuracy")
    found = {"12,000": ten_percent()[column]}
    for count in ("4,000", "1,000"):
        prefix = f"fewer-rows/{count.replace(',', '')}-"
        found[count] = arm_scores(prefix)[column]
    for count, scores in found.items():
        row = [count]
        for arm in ("kd", "cap"):
            row.append(spread(scores[arm].values()))
        rows.append([*row, paired(scores["cap"], scores["kd"])])
    return table(["training rows", "movement + KD", "CAP-m", "contrast adds"], rows)


# ----------------------------------------------------------------------------- speed


def throughput_table():
    """Records of bench/throughput.py: one column for each machine and task."""
    columns = []
    for machine in ("xeon", "epyc", "h100", "h100-minilm"):
        record = read_json(HERE / f"throughput-{machine}.json")
        for task, figures in record["tasks"].items():
            against, memory = figures["prune_against"], figures["peak_memory_bytes"]
            step = figures["parts_ms"].pop("whole step")
            more_memory = (memory["prune"] - figures["bank_bytes"]) / memory["transformers"]
            column = {
                "": f"{machine}, {task}",
                "pruning phase, examples/s": f"{figures['examples_per_second']['prune']:.0f}",
                "against transformers' fine-tuning": f"{against['transformers']:.2f}",
                "against bert_min's dense fine-tuning": f"{against['dense']:.2f}",
                "a snapshot, in epochs of steps": f"{figures['snapshot_of_epoch']:.2f}",
                "peak memory without banks, against transformers": f"{more_memory:.2f}",
                "a step at 97 %, ms": f"{step:.0f}",
                "contrastive terms, of a step": f"{figures['contrastive_ms'] / step:.0%}"}
            for part, ms in figures["parts_ms"].items():
                column[f"{part}, of a step"] = f"{ms / step:.0%}"
            columns.append(column)
    head, *rows = [[what, *(column[what] for column in columns)] for what in columns[0]]
    return table(head, rows)


def speedups(latency):
    """{(batch, length, number type): how many times as fast as the dense model by transformers} of
    a record of bench/latency.py, with one thread."""
    faster = {}
    for row in latency["rows"]:
        if row["threads"] == 1:
            for dtype in ("fp32", "bf16"):
                ratio = row["ratios"][f"transformers {dtype}"]
                faster[row["batch"], row["length"], dtype] = ratio
    return faster


def latency_table():
    """A row for each model and number type, a column for each batch x length of `speedups`."""
    sizes = [(batch, length) for batch in (1, 8) for length in (32, 128, 384)]
    lines = []
    for model in ("all-MiniLM-L6-v2", "random-base"):
        record = read_json(HERE / f"latency-{model}.json")
        name = f"{model}, {record['sparsity']:.0%}"
        faster = speedups(record)
        for dtype in ("fp32", "bf16"):
            line = [name, dtype]
            for batch, length in sizes:
                ratio = faster.get((batch, length, dtype))
                line.append("" if ratio is None else f"{ratio:.1f}")
            lines.append(line)
    return table(["model, pruned", "against", *(f"{batch} x {length}" for batch, length in sizes)],
                 lines)


# ------------------------------------------------------------------------- equations


def equations():
    """[(number, lines of cap_min.py that compute it, tests whose docstring names it)]."""
    code = (ROOT / "cap_min.py").read_text(encoding="utf-8").splitlines()
    tests = re.findall(r"def (test_\w+)\([^)]*\):\n    \"\"\"(.*?)\"\"\"",
                       (ROOT / "test_cap_min.py").read_text(encoding="utf-8"), re.DOTALL)
    rows = []
    for number in range(1, 9):
        # a comment behind code marks the line; one on a line of its own only points there
        mark = re.compile(rf"\s*[^\s#].*# .*eq\. \({number}\)")
        lines = [i for i, line in enumerate(code, 1) if mark.match(line)]
        named = [name for name, docstring in tests
                 if re.search(rf"Eq\. .*\({number}\)", docstring)]
        rows.append((number, lines, named))
    return rows


def equation_table():
    rows = []
    for number, lines, tests in equations():
        links = ", ".join(f"[{line}](cap_min.py#L{line})" for line in lines)
        rows.append([f"({number})", links, ", ".join(f"`{test}`" for test in tests)])
    return table(["eq.", "cap_min.py, line", "test_cap_min.py"], rows)


# ----------------------------------------------------------------------------- pages

TABLES = {"demo": demo_table, "demo-sparsities": demo_verdicts,
          "verdict": dev_verdicts, "verdict-held-out": held_out_verdicts,
          "answer": lambda: answer_table(answer_scores(), ADDED),
          "answer-90": lambda: answer_table(task_scores("answer-90"), {}),
          "ablations": ablation_table, "probes": probe_table, "geometry": geometry_table,
          "selection": lambda: forms_table(form_scores("selection")),
          "other-forms": lambda: forms_table(form_scores("other-forms")),
          "temperature": lambda: forms_table(form_scores("without-kd", "temperature")),
          "fewer-rows": fewer_rows_table,
          "forms-90": lambda: forms_table(ten_percent()), "density": density_table,
          "structured": structured_table, "speed": speed_table,
          "throughput": throughput_table, "latency": latency_table, "equations": equation_table}


def render():
    """{path: text} of the pages, with their tables made anew."""
    def made_anew(match):
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    pages = {}
    for path in PAGES:
        pages[path] = re.sub(r"<!-- ([^>]+) -->\n.*?<!-- end -->", made_anew,
                             path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return pages


if __name__ == "__main__":
    if "--picture" in sys.argv:
        draw_geometry()
        draw_epochs()
        draw_kept()
        draw_density()
        draw_structured()
    for path, text in render().items():
        path.write_text(text, encoding="utf-8")
