"""Tests of the pages and of report.py, which makes their tables.

Run:  python -m pytest -q results/test_report.py"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402
import studies  # noqa: E402

import cap_min  # noqa: E402

ROOT = HERE.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OF_OTHER_TOOLS = {"--help", "--no-deps", "--extra-index-url", "--nproc-per-node", "--nnodes",
                  "--node-rank", "--master-addr"}  # pip's and torchrun's


def test_spread():
    """(1, 3) has mean 2 and standard deviation sqrt(((1 - 2)^2 + (3 - 2)^2) / (2 - 1)) = 1.4; of
    one value, or the difference of one, there is none."""
    assert report.spread([1, 3]) == "2.0 ± 1.4"
    assert report.spread([68.77]) == "68.8"
    assert report.paired({0: 3, 1: 9}, {0: 1}) == "+2.00 (n = 1)"


@pytest.mark.parametrize("change, same", [
    ({"method": "magnitude", "without": ["prc"], "teacher": "x"}, True), ({"epochs": 2}, False)])
def test_only_runs_that_differ_in_the_method_are_compared(change, same, tmp_path, monkeypatch):
    """A record with another method, terms or teacher is taken, one with other epochs is not. The
    teacher's scores are those of the row "dense"."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    record = json.loads((HERE / "demo" / "cap-seed0.json").read_text())
    (tmp_path / "x-cap-seed0.json").write_text(json.dumps(record))
    record["config"] |= change
    (tmp_path / "x-other-seed0.json").write_text(json.dumps(record))
    if same:
        found = report.comparison("x-")
        assert list(found) == ["cap-seed0", "other-seed0", "dense-seed0"]
        assert found["dense-seed0"]["pruned"] == record["dense"]
    else:
        with pytest.raises(AssertionError, match="x-other-seed0: not as others of its seed"):
            report.comparison("x-")


def test_forms_share_their_teacher(tmp_path, monkeypatch):
    """Of CAP's 0.9 and 0.8 over KD's 0.5 and 0.6 the differences are 40 and 20, mean 30, standard
    error 10. A run of the same task and seed with another teacher or other epochs is refused."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    for form, scores in (("kd", (0.5, 0.6)), ("cap", (0.9, 0.8))):
        for seed, score in enumerate(scores):
            record = {"config": {"task": "sst2"}, "train_sha256": "a", "source_sha256": "b",
                      "seed": seed, "dense": {"accuracy": 1 - seed / 10},
                      "pruned": {"accuracy": score}}
            (tmp_path / f"sst2-{form}-seed{seed}.json").write_text(json.dumps(record))
    head, _, *rows = report.forms_table(report.form_scores(".")).splitlines()
    assert "| sst2, accuracy | minus row 1 |" in head
    assert rows == ["| movement + KD | 55.0 ± 7.1 |  |",
                    "| CAP-m | 85.0 ± 7.1 | +30.00 ± 10.00 (n = 2) |"]
    (tmp_path / "more").mkdir()
    (tmp_path / "sst2-cap-seed1.json").rename(tmp_path / "more" / "sst2-cap-seed1.json")
    assert report.form_scores(".", "more")["sst2", "accuracy"]["cap"] == {0: 90, 1: 80}
    with pytest.raises(AssertionError, match="there twice"):
        report.form_scores("more", "more")
    for change in ({"dense": {"accuracy": 1}}, {"config": {"task": "sst2", "epochs": 3}}):
        (tmp_path / "sst2-cap-seed1.json").write_text(json.dumps(record | change))
        with pytest.raises(AssertionError, match="seed1.json: not as others"):
            report.form_scores(".")


def test_rows_of_a_density(tmp_path, monkeypatch):
    """With 10 % of the weights CAP-m has 0.9 and 0.8 where KD has 0.5 and 0.6: 30 more, standard
    error 10. Soft has one seed. MNLI has no soft, and its second score is the first one. Forms are
    compared by seeds 0 and 1, without what has not both."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "sparsity").mkdir()
    scores = {"sst2-kd": (0.5, 0.6), "sst2-cap": (0.9, 0.8), "sst2-soft-kd": (0.6,),
              "sst2-cap-soft": (0.4,), "sst2-cap-no-prc": (0.7, 0.7), "mnli-kd": (0.4,),
              "mnli-cap": (0.3,)}
    for run, found in scores.items():
        for seed, score in enumerate(found):
            pruned, task = {"accuracy": score}, run.partition("-")[0]
            if task == "mnli":
                pruned["accuracy_mm"] = score
            record = {"config": {"task": task, "sparsity": 0.9}, "seed": seed,
                      "train_sha256": "a", "source_sha256": "b",
                      "dense": dict.fromkeys(pruned, 1), "pruned": pruned}
            (tmp_path / "sparsity" / f"{run}-90-seed{seed}.json").write_text(json.dumps(record))
    assert report.density_table().splitlines()[2:] == [
        "| mnli, accuracy | 10 % | 100.0 | 40.0 | 30.0 |  |  |",
        "| sst2, accuracy | 10 % | 100.0 ± 0.0 | 55.0 ± 7.1 | 85.0 ± 7.1 | 60.0 | 40.0 |"]
    assert report.forms_table(report.ten_percent()).splitlines()[2:] == [
        "| movement + KD | 55.0 ± 7.1 |  |", "| CAP-m | 85.0 ± 7.1 | +30.00 ± 10.00 (n = 2) |",
        "| CAP-m without PrC | 70.0 ± 0.0 | +15.00 ± 5.00 (n = 2) |"]


def test_verdicts(monkeypatch):
    """On the dev sets at 3 % CAP-m is 30 above KD, standard error 10: over twice that, and bold.
    Soft is 20 above movement, but for the error, 10, this is not more than twice; what fewer than
    two seeds have has no row. Movement has a seed in answer/ and one in answer-no-kd/. On held-out
    rows at 3 % there are two seeds of sparsity/ and two of selection/, and by other runs KD adds 9.5
    to movement; at 1 % there is one seed."""
    kd, cap, one = {0: 50, 1: 60}, {0: 90, 1: 80}, {0: 1}
    soft, column = {0: 80, 1: 70}, ("sst2", "accuracy")

    def arms(**scores):
        return {column: {"cap": cap, "soft-kd": {0: 50}, "cap-soft": {}} | scores}

    scores = {"without-kd": {column: {"kd": {0: 60, 1: 60}, "movement": {0: 50, 1: 51}}}}
    scores["answer-90"] = arms(kd=kd, **{"soft-kd": soft})
    scores["answer"] = arms(kd=kd, **{"soft-kd": soft, "movement": {0: 40}})
    scores["answer-no-kd"] = {column: {"movement": {1: 49}, "magnitude": {1: 9}}}
    monkeypatch.setattr(report, "task_scores", lambda folder, *tasks: scores[folder])
    monkeypatch.setattr(report, "sparsity_scores", lambda: {
        "90": arms(kd=kd), "97": arms(kd=kd), "99": arms(kd=one, cap=one)})
    more = {2: 55, 3: 55}
    monkeypatch.setattr(report, "form_scores", lambda folder: {column: dict.fromkeys(
        report.ARMS, more)})
    rows = [row.split(" | ")[1:] for row in report.dev_verdicts().splitlines()[2:]]
    assert len(rows) == 5
    assert rows[1] == ["3 %", "**+30.00 ± 10.00 (2)** |"]
    assert rows[3] == ["3 %", "+20.00 ± 10.00 (2) |"]
    assert rows[4] == ["3 %", "**+10.50 ± 0.50 (2)** |"]
    rows = [row.split(" | ")[1:] for row in report.held_out_verdicts().splitlines()[2:]]
    assert rows[0] == ["10 %", "**+30.00 ± 10.00 (2)** |"]
    assert rows[1] == ["3 %", "+15.00 ± 9.57 (4) |"]
    assert [row[0] for row in rows] == ["10 %", "3 %", "3 %", "3 %", "3 %"]
    assert rows[4] == ["3 %", "**+9.50 ± 0.50 (2)** |"]


def test_seeds_of_a_table():
    """Behind what has fewer seeds than the teacher stands their number: movement has seed 0 and, of
    other runs, seed 1; magnitude has one. A seed that is there already is refused."""
    column = "sst2", "accuracy"
    scores = {column: {"dense": {0: 90, 1: 92}, "kd": {0: 60, 1: 62}, "cap": {0: 61, 1: 65},
                       "movement": {0: 50}}}
    more = {column: {"movement": {1: 52}, "magnitude": {1: 40}}}
    found = report.with_seeds(scores, more, report.WITHOUT_KD)
    assert report.answer_table(found, {"more": ("cap", "kd")}).splitlines()[2:] == [
        "| dense (the teacher) | 91.0 ± 1.4 |", "| movement + KD | 61.0 ± 1.4 |",
        "| CAP-m | 63.0 ± 2.8 |", "| movement, no KD | 51.0 ± 1.4 |",
        "| magnitude, no KD | 40.0 (n = 1) |", "| more | +2.00 ± 1.00 |"]
    with pytest.raises(AssertionError, match="movement: a seed twice"):
        report.with_seeds(found, more, report.WITHOUT_KD)


def test_stages_beside_fewer_layers(tmp_path, monkeypatch):
    """CAP-f has a row after each stage, with the mean of its seeds and what the contrast adds; of
    fewer layers the score after the last of two epochs counts, and 3 of 6 layers are half of the
    weights. A run with another teacher than the others of its seed is refused."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "structured").mkdir()
    record = {"config": {}, "train_sha256": "a", "source_sha256": "b", "dense": {"accuracy": 0.9}}
    for run, scores in {"sst2-cap-seed0": [(0.899, 0.9), (0.5, 0.8)],
                        "sst2-cap-seed1": [(0.9, 0.7)], "sst2-kd-seed0": [(0.9, 0.7)],
                        "mnli-lower3-seed0": [(1, 0.5), (1, 0.6)],
                        "sst2-lower1-seed0": [(1, 0.4)]}.items():
        lines = [{"phase": "prune", "kept": 1, "loss": 2}]
        for kept, accuracy in scores:
            lines.append({"phase": "prune", "kept": kept, "dev": {"accuracy": accuracy}})
        (tmp_path / "structured" / f"{run}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / "structured" / f"{run}.json").write_text(
            json.dumps(record | {"seed": int(run[-1])}))
    assert report.structured_table().splitlines()[2:] == [
        "| sst2 | 90 % | 80.0 ± 14.1 | 70.0 |  |  | +20.00 (n = 1) |",
        "| sst2 | 50 % | 80.0 |  |  |  | no common seed |",
        "| sst2 | 17 % |  |  |  | 40.0 |  |", "| mnli | 50 % |  |  | 60.0 |  |  |"]
    (tmp_path / "structured" / "sst2-kd-seed0.json").write_text(
        json.dumps(record | {"seed": 0, "dense": {"accuracy": 0.8}}))
    with pytest.raises(AssertionError, match="sst2-kd-seed0.*: not as others"):
        report.structured_table()


def test_scores_beside_speed(tmp_path, monkeypatch):
    """Of 8 weights CAP-f has 2 left, and a smaller model all 4 of its own, half of the teacher's.
    What was timed on another machine, or has another teacher, is refused."""
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "TIMED", {"cap-f": "CAP-f", "small": "small"})
    (tmp_path / "structured" / "latency").mkdir(parents=True)

    def write(run, kept, weights, **changes):
        record = {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": 0.8},
                  "sparsity": {"kept": kept, "weights": weights}}
        rows = []
        for batch, length in ((1, 32), (8, 128)):
            ratios = {"transformers fp32": 2 * batch, "transformers bf16": batch, "ours": 1}
            rows.append({"threads": 1, "batch": batch, "length": length, "ratios": ratios})
        latency = {"processor": "fast", "rows": rows}
        for path, content in ((f"{run}.json", record), (f"structured/latency/{run}.json", latency)):
            found = {name: changes.get(name, value) for name, value in content.items()}
            (tmp_path / path).write_text(json.dumps(found))

    write("cap-f", 2, 8)
    write("small", 4, 4)
    assert report.speed_table().splitlines()[2:] == [
        "| dense (the teacher) | 100% | 90.0 | 1 | 1 | 1 | 1 |",
        "| CAP-f | 25% | 80.0 | 2.0 | 16.0 | 1.0 | 8.0 |",
        "| small | 50% | 80.0 | 2.0 | 16.0 | 1.0 | 8.0 |"]
    for change, sentence in (({"processor": "slow"}, "other machines"),
                             ({"dense": {"accuracy": 1}}, "other teachers")):
        write("small", 4, 4, **change)
        with pytest.raises(AssertionError, match=sentence):
            report.speed_table()


def test_records_are_what_their_names_say():
    """Method, terms left out and seed of the runs of the arms that are compared."""
    every, seen = ["fic", "prc", "snc"], 0
    arms = {"kd": ("movement", every), "cap": ("movement", []), "soft-kd": ("soft", every),
            "cap-soft": ("soft", []), "movement": ("movement", ["fic", "kd", "prc", "snc"]),
            "magnitude": ("magnitude", ["fic", "kd", "prc", "snc"])}
    for term in every:
        arms[f"cap-no-{term}"] = "movement", [term]
    name = re.compile(rf"((?!soft)[a-z0-9]+-)?({'|'.join(arms)})(-\d\d)?-seed(\d)")
    for path in HERE.glob("*/*.json"):
        match = name.fullmatch(path.stem)
        if match and path.parent.name != "structured":
            record, seen = json.loads(path.read_text()), seen + 1
            config = record["config"]
            assert (config["method"], config["without"]) == arms[match[2]], path
            assert record["seed"] == config["seed"] == int(match[4]), path
    assert seen > 300


@pytest.mark.parametrize("path", sorted(HERE.glob("*/list.txt")), ids=lambda path: path.parent.name)
def test_records_are_runs_of_their_lists(path):
    """Every line has a record, of a run with its options."""
    for name, options in studies.read_list(path).items():
        assert studies.is_done(path.parent / f"{name}.json", options), name


def test_every_record_of_a_form_is_in_a_table():
    """Of each folder that `forms_table` shows; in sparsity/ those without KD are in others."""
    for folder in ("selection", "other-forms", "temperature", "sparsity"):
        names = {re.fullmatch(r"[a-z0-9]+-(.+?)(-\d\d)?-seed\d", path.stem)[1]
                 for path in (HERE / folder).glob("*.json")}
        assert names <= {*report.FORM_NAMES, *report.WITHOUT_KD}


def test_pages_are_current():
    """The tables are what report.py makes of the records, the code and the tests, and each of them
    stands in one page."""
    pages = report.render()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run python results/report.py"
    names = re.findall(r"<!-- (.+) -->\n\|", "".join(pages.values()))
    assert sorted(names) == sorted(report.TABLES)


def test_every_equation_has_a_line_and_a_test():
    for number, lines, tests in report.equations():
        assert lines and tests, f"eq. ({number})"


def test_readme_is_short():
    assert len(README.splitlines()) <= 320


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.parent.name)
def test_pages_name_only_what_is_there(path):
    """Every flag is one of a program here, every relative link leads to a file, and to a heading in
    it."""
    text = path.read_text(encoding="utf-8")
    known = set(OF_OTHER_TOOLS)
    for program in ("cap_min.py", "results/studies.py", "results/report.py", "bench/throughput.py",
                    "bench/latency.py"):
        known.update(re.findall(r'"(--[a-z-]+)"', (ROOT / program).read_text(encoding="utf-8")))
    assert set(re.findall(r"(?<!-)--[a-z][a-z-]*[a-z]", text)) <= known
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target, _, heading = link.partition("#")
        if target.startswith("https:"):
            continue
        file = path.parent / target
        assert file.exists(), link
        if heading and file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, link


def test_commands_are_understood():
    """The options that stand behind cap_min.py, and in the table of commands without a program."""
    lines = re.findall(r"cap_min\.py( --[^#`\n]*)", README)
    lines += re.findall(r"^\|[^|]*\| `(--[^`]*)`", README, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        cap_min.parse(shlex.split(line))


def test_exercises_select_tests():
    tests = re.findall(r"def (test_\w+)", (ROOT / "test_cap_min.py").read_text(encoding="utf-8"))
    selections = re.findall(r'-k "?([a-z_ ]+)', README.partition("## Exercises")[2])
    assert len(selections) == 6
    for selection in selections:
        for word in selection.split(" or "):
            assert any(word in test for test in tests), word


def test_a_task_of_ones_own(tmp_path):
    """The script that README shows, on eight sentences, with the demo's model."""
    script = re.search(r"    import sys\n(    .+\n)+", README)[0]
    (tmp_path / "mine.py").write_text(script.replace("    ", ""))
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    rows = ["the owl sleeps by the river\t1", "no owl sleeps by the river\t0"] * 4
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join(["text\tlabel", *rows]) + "\n")
    options = ["--model", str(ROOT / "demo" / "model"), "--max-length", "32",
               "--batch-size", "1", "--epochs", "2"]
    done = subprocess.run([sys.executable, "mine.py", *options], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "runs" / "mine-0.97-seed0" / "model" / "config.json").read_text()
    assert json.loads(config)["id2label"] == {"0": "no", "1": "yes"}
