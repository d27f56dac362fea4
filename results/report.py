"""Write the tables of README.md from the records in this folder, the code and the tests.

Run:  python results/report.py          rewrites README.md in place
A record is the record.json of a run, named TASK-METHOD-seedN.json. Text between
`<!-- name -->` and `<!-- end -->` in README.md is made here."""

import json
import re
import statistics
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
EQUATIONS = {1: "masked weight, exact top-k", 2: "straight-through gradient",
             3: "cubic schedule", 4: "candidates of an anchor", 5: "log-probability of a candidate",
             6: "positives", 7: "mean over positives, two norms", 8: "total loss"}
METHODS = {"movement-kd": "movement + KD", "cap": "CAP"}


def records():
    """{(task, method): [record, ...]}, one for each seed."""
    found = {}
    for path in sorted(HERE.glob("*-seed*.json")):
        task, method = re.fullmatch(r"(\w+?)-(.+)-seed\d+", path.stem).groups()
        found.setdefault((task, method), []).append(json.loads(path.read_text()))
    return found


def spread(values):
    """Mean in percent, with the standard deviation where there are several seeds."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def results_table():
    """One row for each task and model; rows of one task have the same data, teacher and seeds."""
    found = records()
    rows = ["| task | rows, epochs, lr | model | weights left | dev score | seeds |",
            "|---|---|---|---|---|---|"]
    for task in sorted({task for task, _ in found}):
        methods = [method for method in METHODS if (task, method) in found]
        first = found[task, methods[0]]
        assert len({r["train_sha256"] for m in methods for r in found[task, m]}) == 1
        config = first[0]["config"]
        setting = f"{first[0]['examples']['train']:,}, {config['epochs']}, {config['lr']:g}"

        def row(model, runs, which, left):
            scores = ", ".join(f"{name} {spread([run[which][name] for run in runs])}"
                               for name in runs[0][which])
            return f"| {task} | {setting} | {model} | {left} | {scores} | {len(runs)} |"

        rows.append(row("dense teacher", first, "dense", "100 %"))
        for method in methods:
            runs = found[task, method]
            left = f"{100 - 100 * runs[0]['sparsity']['total']:.2f} %"
            rows.append(row(METHODS[method], runs, "pruned", left))
    return "\n".join(rows)


def equations():
    """[(number, what, lines of cap_min.py, tests that name it)]."""
    lines = (ROOT / "cap_min.py").read_text(encoding="utf-8").splitlines()
    tests = re.findall(r"def (test_\w+)\(.*?\):\n    \"\"\"(.*?)\"\"\"",
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
    for name, table in (("results", results_table), ("equations", equation_table)):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                      lambda match: match[1] + table() + "\n" + match[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")
