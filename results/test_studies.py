"""Tests of the studies: comparison and probe on a tiny model, the grid with a stand-in for cap_min.

Run:  python -m pytest -q results/test_studies.py"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import forms  # noqa: E402
import studies  # noqa: E402

import cap_min  # noqa: E402
from bert_min import BertClassifier, BertConfig, from_pretrained, save_pretrained  # noqa: E402
from data_glue import encode_task, load, load_tokenizer  # noqa: E402

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a good bad film is the !".split()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folder of a tiny BERT with random weights."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_pretrained(BertClassifier(BertConfig(
        vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.1)), folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return folder


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """A data folder with 88 + 40 sentences for sst2, of many lengths; "good" means positive."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "SST-2").mkdir()
    for name, count in (("train.tsv", 88), ("dev.tsv", 40)):
        rows = ["sentence\tlabel"]
        for i in range(count):
            rows.append(f"the film {'is ' * (i % 7)}{('bad', 'good')[i % 2]} !\t{i % 2}")
        (folder / "SST-2" / name).write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory, pretrained, glue):
    """(folder, options) of a finished comparison with one seed."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    options = ["compare", "--task", "sst2", "--sparsity", "0.9", "--model", str(pretrained),
               "--data-dir", str(glue), "--out", str(folder), "--epochs", "2", "--batch-size", "8",
               "--max-length", "16", "--device", "cpu", "--dtype", "fp32", "--lr", "1e-2"]
    assert studies.main(options) == 0
    return folder, options


# ------------------------------------------------------------------- table, compare


def test_compare_table(tmp_path, monkeypatch):
    """Two seeds of runs that score 0.25 and 0.75 where no term is left out, 0.5 elsewhere: the mean
    of CAP-m is 50.0, its standard deviation sqrt(2 * 25^2) = 35.4. The others have 25 points more,
    then 25 less: 0 on average, with the standard error 25 sqrt(2) / sqrt(2). A seed's runs differ
    in method, terms and folder alone, and all but the first take the first one's teacher."""
    given = []

    def run(args):
        given.append(args)
        score = 0.5 if args.without else {3: 0.25, 4: 0.75}[args.seed]
        return {"config": {"task": "demo"}, "seed": args.seed, "dense": {"accuracy": 0.9},
                "pruned": {"accuracy": score}}

    monkeypatch.setattr(cap_min, "cap", run)
    assert studies.main(["compare", "--seeds", "2", "--seed", "3", "--out", str(tmp_path)]) == 0
    rows = (tmp_path / "compare.md").read_text().splitlines()
    assert len(rows) == 2 + 7 + 1
    assert rows[2] == "| demo | accuracy | cap | 2 | 50.0 ± 35.4 |  |"
    assert rows[3] == "| demo | accuracy | cap-no-prc | 2 | 50.0 ± 0.0 | +0.00 ± 25.00 (n = 2) |"
    assert rows[9] == "| demo | accuracy | dense | 2 | 90.0 ± 0.0 | +40.00 ± 25.00 (n = 2) |"
    teachers = [str(tmp_path / f"cap-seed{seed}" / "teacher") for seed in (3, 4)]
    assert [args.seed for args in given] == [3] * 7 + [4] * 7
    assert [args.teacher for args in given] == [
        None, *[teachers[0]] * 6, None, *[teachers[1]] * 6]
    own = dict.fromkeys(("method", "without", "out", "seed", "teacher"))
    assert all({**vars(args), **own} == {**vars(given[0]), **own} for args in given)


def test_compare_runs_everything_once(compared, capsys):
    """7 runs with 7 different models and one teacher. Run again, nothing is done but the table."""
    folder, options = compared
    for name, (method, without) in studies.COMPARED.items():
        config = json.loads((folder / f"{name}-seed0" / "record.json").read_text())["config"]
        assert (config["method"], config["without"]) == (method, without)
    models = {path.read_bytes() for path in folder.glob("*/model/model.safetensors")}
    assert len(models) == 7 and len(list(folder.glob("*/teacher"))) == 1
    assert studies.main(options) == 0
    out = capsys.readouterr().out
    assert (folder / "compare.md").read_text() in out and "step" not in out


def test_compare_has_its_own_methods(monkeypatch, capsys):
    """One sentence, and nothing is run. Nor is an abbreviation known, which could hide one."""
    monkeypatch.setattr(cap_min, "cap", None)
    for options in (["--without", "prc"], ["--method=soft"]):
        assert studies.main(["compare", *options]) == 2
        assert "compare sets --method and --without itself" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        studies.main(["compare", "--meth=structured"])
    assert "unrecognized arguments: --meth" in capsys.readouterr().err


# ----------------------------------------------------------------------------- probe


def test_probe(compared, pretrained, glue, tmp_path, monkeypatch):
    """Each score is that of `fit_classifier` on the encoder it is named after; the teacher is found
    in another run's folder, from any current directory. The record has what report.py reads."""
    run = compared[0] / "movement-kd-seed0"
    monkeypatch.chdir(tmp_path)
    assert studies.main(["probe", str(run), "--task", "sst2", "--data-dir", str(glue),
                         "--device", "cpu"]) == 0
    record = json.loads((run / "probe_sst2.json").read_text())
    data, dev = (encode_task(load("sst2", split, glue), load_tokenizer(pretrained), 16)
                 for split in ("train", "dev"))
    for name, folder in (("pruned", run / "model"), ("pretrained", pretrained),
                         ("dense", compared[0] / "cap-seed0" / "teacher")):
        model = from_pretrained(folder)
        studies.fit_classifier(model, data)
        assert record[name] == cap_min.evaluate(model, "sst2", {"dev": dev})
    assert record["examples"] == {"train": 88, "dev": 40}
    assert record["train_sha256"] == data.sha256()
    assert record["run"] == json.loads((run / "record.json").read_text())["config"]
    assert record["config"]["data_dir"] == str(glue.resolve())
    assert {"versions", "source_sha256"} < record.keys()


def test_the_probe_is_at_its_minimum(pretrained, glue):
    """Cross-entropy and the penalty on |W|^2, of vectors of mean 0 and deviation 1, have gradient 0
    at the classifier that is found, whatever it was before; the encoder stays as it was."""
    model = from_pretrained(pretrained)
    data = encode_task(load("sst2", "train", glue), load_tokenizer(pretrained), 16)
    torch.nn.init.normal_(model.classifier.weight)
    penalty = studies.fit_classifier(model, data)
    pooled = cap_min.encode(model, data)
    loss = cap_min.task_loss(model.classifier(pooled), data.labels)
    loss = loss + penalty * (model.classifier.weight * pooled.std(0)).square().sum()
    for gradient in torch.autograd.grad(loss, list(model.classifier.parameters())):
        assert gradient.abs().max() < 1e-5
    before = from_pretrained(pretrained).bert.state_dict()
    assert all(torch.equal(before[name], p) for name, p in model.bert.state_dict().items())


@pytest.mark.parametrize("noisy, best", [(False, studies.PENALTIES[-1]), (True, 1)])
def test_the_penalty_of_the_probe(noisy, best, pretrained, monkeypatch):
    """Where the first number of a vector tells the label, the smallest penalty is best for rows
    held out; where all 16 are chance, in 100 rows, the largest."""
    chance = torch.Generator().manual_seed(0)
    model, labels = from_pretrained(pretrained), torch.arange(100) // 3 % 2
    pooled = torch.randn(100, 16, generator=chance)
    if not noisy:
        pooled = F.pad(2.0 * labels[:, None] - 1, (0, 15))  # 1 or -1, then zeros
    monkeypatch.setattr(cap_min, "encode", lambda model, data: pooled)
    assert studies.fit_classifier(model, argparse.Namespace(labels=labels)) == best


def test_what_cannot_be_probed(compared, pretrained, glue, tmp_path, capsys):
    """A folder without a record, and a run whose pre-trained model is gone: one sentence, before
    any classifier is fitted."""
    options = ["--task", "sst2", "--data-dir", str(glue), "--device", "cpu"]
    assert studies.main(["probe", str(pretrained), *options]) == 2
    assert "is no finished run with a record.json" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(compared[0] / "cap-seed0", run)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(studies.TASKS, "sst2")
        assert studies.main(["geometry", str(run)]) == 2
    assert "its task, sst2, is not in data_glue.TASKS" in capsys.readouterr().err
    record = json.loads((run / "record.json").read_text())
    record["config"]["model"] = "gone"
    (run / "record.json").write_text(json.dumps(record))
    assert studies.main(["probe", str(run), *options]) == 2
    out, error = capsys.readouterr()
    assert "gone: no such folder" in error and "dev:" not in out


# ----------------------------------------------------------------------------- score


def test_scores_on_other_data(compared, glue, tmp_path, capsys):
    """On the data that it had, a run has the scores of its record; on others, here the sentences
    that it trained on and no training set, those of its two models there. Without data: one
    sentence, and nothing is written."""
    run = shutil.copytree(compared[0] / "movement-kd-seed0", tmp_path / "run")
    first = json.loads((run / "record.json").read_text())
    (tmp_path / "other" / "SST-2").mkdir(parents=True)
    assert studies.main(["score", str(run), "--data-dir", str(tmp_path / "other")]) == 2
    assert "SST-2/dev.tsv is not in" in capsys.readouterr().err
    assert not (run / "scores.json").exists()
    both = [str(run), str(compared[0] / "cap-seed0")]
    shutil.copy(glue / "SST-2" / "train.tsv", tmp_path / "other" / "SST-2" / "dev.tsv")
    for folder, split in ((glue, "dev"), (tmp_path / "other", "train")):
        assert studies.main(["score", *both, "--data-dir", str(folder), "--device", "cpu"]) == 0
        assert capsys.readouterr().out.count("pruned, dev") == 2
        record = json.loads((run / "scores.json").read_text())
        rows = encode_task(load("sst2", split, glue), load_tokenizer(run / "model"), 16)
        for name, model in (("pruned", run / "model"),
                            ("dense", compared[0] / "cap-seed0" / "teacher")):
            wanted = cap_min.evaluate(from_pretrained(model), "sst2", {"dev": rows})
            assert record[name] == wanted
            assert split == "train" or wanted == first[name]
        assert record["examples"] == {"train": 88, "dev": len(rows)}
        assert record["config"] == first["config"] | {"data_dir": str(folder),
                                                      "dev_sha256": [rows.sha256()]}
        assert record["seed"] == 0 and record["source_sha256"] != first["source_sha256"]


# ----------------------------------------------------------------------------- forms


class Masked(torch.nn.Module):
    """Two matrices of four weights, with these scores."""

    def __init__(self, *scores):
        super().__init__()
        self.masks = torch.nn.ModuleList()
        for values in scores:
            mask = cap_min.Mask(torch.zeros(4), "zero")
            mask.scores.data = torch.logit(torch.tensor(values))
            self.masks.append(mask)

    def kept(self):
        return [mask.mask.tolist() for mask in self.masks]


def test_forms_of_the_criterion():
    """One top-k over both keeps the 4 largest of 8. By mean scores of 0.8 and 0.2, half of 8 is
    divided 0.8 to 0.2: round(3.2) and round(0.8). At 0.9 and 0.1, of three quarters the first would
    keep 1.35: it keeps all 4, and the second the other 2."""
    model = Masked([0.9, 0.8, 0.7, 0.1], [0.6, 0.2, 0.3, 0.4])
    forms.one_topk(model, 0.5)
    assert model.kept() == [[True, True, True, False], [True, False, False, False]]
    model = Masked([0.85, 0.8, 0.75, 0.8], [0.2, 0.3, 0.1, 0.2])
    forms.by_mean_score(model, 0.5, 0.5)
    assert model.kept() == [[True, True, False, True], [False, True, False, False]]
    model = Masked([0.9] * 4, [0.1] * 4)
    forms.by_mean_score(model, 0.75, 0.25)
    assert model.kept() == [[True] * 4, [True, True, False, False]]


def test_forms_of_the_contrast(monkeypatch):
    """With its mean off, a bank is that of the centred vectors, and a model equal to its ancestor
    that of the centred bank. SnC of two snapshots counts twice; while the density is 1 there are
    only the task and the teacher."""
    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(8, 4) + 3, dim=-1)
    labels, index, extra = torch.arange(8) % 2, torch.arange(2), torch.arange(2, 8)
    centred = torch.nn.functional.normalize(bank - bank.mean(0), dim=-1)
    got = forms.mean_off(bank[:2], index, labels[:2], [bank], labels, extra, 0.1, "official")
    wanted = cap_min.contrastive_loss(centred[:2], index, labels[:2], [centred], labels, extra)
    assert [loss.item() for loss in got] == pytest.approx([loss.item() for loss in wanted])
    ancestors = cap_min.Ancestors({"snc": [bank, bank]}, torch.zeros(8, 2), labels)
    case = (torch.zeros(2, 2), bank[:2], {"index": index, "labels": labels[:2]}, ancestors, extra,
            cap_min.parse([]))
    plain = cap_min.cap_terms(*case)
    assert forms.snc_times_k(*case)["snc"].item() == pytest.approx(2 * plain["snc"].item())
    monkeypatch.setattr(forms, "density_now", [1.0])
    assert list(forms.once_pruned(*case)) == ["ce", "kd"]
    assert forms.watched_density(5, 10, 1.0, 0.2, 0, 0) == forms.density_now[0] < 1
    assert list(forms.once_pruned(*case)) == ["ce", "kd", "snc"]


def test_a_contrast_that_trains_the_weights_alone(monkeypatch):
    """The weights get the gradient of all terms, the scores that of task and teacher. Without a
    contrastive term nothing changes."""
    torch.manual_seed(0)
    weight, x, labels = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4), torch.arange(2)
    bank = torch.nn.functional.normalize(torch.randn(2, 4), dim=-1)
    gradients = {}
    for name, function, banks in (("all", cap_min.cap_terms, {"prc": [bank]}),
                                  ("none", cap_min.cap_terms, {}),
                                  ("form", forms.weights_only, {"prc": [bank]}),
                                  ("nothing", forms.weights_only, {})):
        mask = cap_min.Mask(weight, "zero")
        monkeypatch.setattr(forms, "masks", [mask])
        pooled, weight.grad = x @ mask(weight).T, None
        ancestors = cap_min.Ancestors(banks, torch.zeros(2, 2), labels)
        batch = {"index": torch.arange(2), "labels": labels}
        terms = function(pooled[:, :2], pooled, batch, ancestors, torch.arange(0),
                         cap_min.parse([]))
        sum(terms.values()).backward()
        gradients[name] = weight.grad, mask.scores.grad
    torch.testing.assert_close(gradients["form"][0], gradients["all"][0])
    torch.testing.assert_close(gradients["form"][1], gradients["none"][1])
    torch.testing.assert_close(gradients["nothing"], gradients["none"])
    assert not torch.allclose(gradients["all"][1], gradients["none"][1])


def test_every_form_changes_what_is_there(monkeypatch):
    """Each is a function of cap_min, and a run's record tells it. A form is refused with a method
    that it does not change, or has no scores."""
    for changes in forms.FORMS.values():
        assert all(hasattr(cap_min, name) for name in changes)
    for name in ("cap", "cubic_density", "cap_terms", "parse"):
        monkeypatch.setattr(cap_min, name, getattr(cap_min, name))
    ran = []
    monkeypatch.setattr(cap_min, "cap", ran.append)
    monkeypatch.setattr(cap_min, "tune_cpu", lambda: None)
    for form, method in (("one-topk", "soft"), ("weights-only", "magnitude"),
                         ("once-pruned", "structured")):
        with pytest.raises(SystemExit):
            forms.parse(["--form", form, "--method", method])
    assert forms.main(["--form", "once-pruned", "--method", "movement", "--seed", "3"]) == 0
    assert ran[0].form == ["once-pruned"] and ran[0].seed == 3
    assert cap_min.cap_terms == forms.once_pruned
    assert cap_min.cubic_density == forms.watched_density
    assert not hasattr(forms.parse(["--task", "rte"]), "form")


# -------------------------------------------------------------------------- geometry


def test_geometry_of_orthogonal_vectors():
    """64 examples at right angles: each of the 32 anchors has similarity 1 to itself in the bank,
    0 to the other 63 there and to the 31 other anchors: L^u = log(1 + 94 e^-10). To move from there
    gains next to nothing. All labels differ, so that L^s is the same: its share is 10 / 0.1, with
    supcon 1 / 0.1; two ancestors halve the loss by (7), and share the candidates. With a vector
    added to all, the mean cosine is 4 / (1 + 4), and the best model is farther away."""
    args = cap_min.parse(["--extra", "32"])
    pooled, labels = torch.eye(64), torch.arange(64)
    found = studies.facts(pooled, labels, args)
    assert found["mean_cosine"] == pytest.approx(0, abs=1e-6)
    assert found["loss"] == pytest.approx(math.log(1 + 94 * math.exp(-10)), rel=1e-3)
    assert 0 < found["best_loss"] <= found["loss"] and found["best_cosine"] > 0.99
    assert found["supervised"] == pytest.approx({"official": 100, "supcon": 10}, rel=1e-3)
    one, two, *_ = found["snapshots"]
    assert two / one == pytest.approx(0.5, abs=0.15)
    common = torch.nn.functional.pad(pooled, (0, 1), value=2.0)
    assert studies.facts(common, labels, args)["mean_cosine"] == pytest.approx(0.8)
    assert studies.facts(common, labels, args)["best_cosine"] < 0.9


def test_geometry(compared, tmp_path):
    """Both ancestors of a run, each as it is and with its mean taken off; of 88 rows those that it
    was trained on."""
    run = shutil.copytree(compared[0] / "movement-kd-seed0", tmp_path / "run")
    first = json.loads((run / "record.json").read_text())
    for rows, examples in ((None, 88), (50, 50)):
        first["config"]["max_train"] = rows
        (run / "record.json").write_text(json.dumps(first))
        assert studies.main(["geometry", str(run), "--device", "cpu"]) == 0
        record = json.loads((run / "geometry.json").read_text())
        assert list(record["banks"]) == ["prc", "prc, mean taken off", "fic", "fic, mean taken off"]
        assert record["examples"] == examples and {"versions", "source_sha256"} < record.keys()


# -------------------------------------------------------------------------- hold-out


def test_held_out_rows_are_in_one_set_alone(tmp_path, capsys):
    """3 of 10 rows become the dev sets, both of MNLI's, the others stay; texts are as they were,
    the header is in each file. The same command draws the same rows; 10 rows are too many."""
    (tmp_path / "glue" / "MNLI").mkdir(parents=True)
    rows = [f"{i} \x85\t{i}\tneutral" for i in range(10)]
    header = "sentence1\tsentence2\tgold_label"
    (tmp_path / "glue" / "MNLI" / "train.tsv").write_text("\n".join([header, *rows]), "utf-8")
    command = ["hold-out", "--task", "mnli", "--data-dir", str(tmp_path / "glue"), "--rows"]
    for out in ("one", "two"):
        assert studies.main([*command, "3", "--out", str(tmp_path / out)]) == 0
    for name in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"):
        first, second = (tmp_path / out / "MNLI" / name for out in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        assert first.read_text("utf-8").startswith(header + "\n")
    train, dev = (load("mnli", split, tmp_path / "one") for split in ("train", "dev"))
    assert (len(train), len(dev)) == (7, 3) and dev == load("mnli", "dev_mm", tmp_path / "one")
    assert sorted(train + dev) == load("mnli", "train", tmp_path / "glue")
    assert studies.main([*command, "10", "--out", str(tmp_path / "one")]) == 2
    assert "its training set has 10 rows" in capsys.readouterr().err


# ---------------------------------------------------------------------- lower layers


def test_a_model_of_the_lower_layers(compared, pretrained, glue, tmp_path, capsys):
    """It pools what the first of two layers gives; a model of two has no more than two, and stays
    as it was. cap_min.py fine-tunes it with a teacher of two layers and prunes nothing."""
    command = ["lower-layers", str(pretrained), "--out", str(tmp_path / "lower"), "--layers"]
    assert studies.main([*command, "1"]) == 0
    whole, lower = from_pretrained(pretrained).bert, from_pretrained(tmp_path / "lower").bert
    ids = torch.tensor([[2, 5, 6, 3]])
    hidden = whole.embeddings(ids, torch.zeros_like(ids))
    hidden = whole.encoder["layer"][0](hidden, torch.zeros(1, 1, 1, 4), hidden)
    expected = whole.pooler["dense"](hidden[:, 0]).tanh()
    torch.testing.assert_close(lower(ids)[1], expected)
    options = ["--task", "sst2", "--data-dir", str(glue), "--model", str(tmp_path / "lower"),
               "--sparsity", "0", "--teacher", str(compared[0] / "cap-seed0" / "teacher"),
               "--without", "prc", "snc", "fic", "--epochs", "2", "--batch-size", "8",
               "--max-length", "16", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cap_min.main(options) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["sparsity"]["total"] == 0
    assert studies.main([*command, "2"]) == 2
    assert "does not have more than 2 whole layers" in capsys.readouterr().err
    command = ["lower-layers", str(pretrained), "--layers", "1", "--out", str(pretrained)]
    assert studies.main(command) == 2 and "the checkpoint itself" in capsys.readouterr().err


# ------------------------------------------------------------------------------ grid

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, does = Path(options["--out"]), options["--model"]
out.mkdir(exist_ok=True)
with open(out / "begun", "a") as file:
    print(os.getpid(), file=file)
if does == "fails":
    sys.exit("first line\\nthe disk is full")
if does == "is-deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if does == "interrupts":
    time.sleep(2)
    os.kill(os.getppid(), signal.SIGINT)
if not does.isdigit() and not (out / "go").exists():
    time.sleep(60)
if "--teacher" in options and not Path(options["--teacher"]).is_dir():
    sys.exit("no teacher")
(out / "teacher").mkdir(exist_ok=True)
(out / "teacher" / "model.safetensors").touch()
time.sleep(0.5)
(out / "log.jsonl").write_text("{}")
(out / "record.json").write_text(json.dumps({
    "config": {"task": options["--task"]}, "seed": int(options["--seed"]),
    "pruned": {"accuracy": int(does if does.isdigit() else 0) / 100},
    "threads": os.environ["OMP_NUM_THREADS"]}))
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """grid(lines, *options): exit status of a grid in the folder tmp_path / "out". In place of
    cap_min.py runs STAND_IN, whose --model is its score in percent, or what else it does."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(studies, "COMMAND", [sys.executable, str(tmp_path / "stand_in.py")])
    before = signal.getsignal(signal.SIGTERM)
    # which is ignored where the tests run in the background
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)

    def grid(lines, *options):
        (tmp_path / "list").write_text("\n".join(lines) + "\n")
        return studies.main(["grid", str(tmp_path / "list"), "--out", str(tmp_path / "out"),
                             *options])

    yield grid
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, interrupt)


def line(name, does, seed=0, more=""):
    return f"{name}: --task sst2 --seed {seed} --model {does} {more}"


def record_of(name, folder):
    return json.loads((folder / "out" / f"{name}.json").read_text())


def begun(name, folder):
    """The process ids of each time that a run was begun."""
    path = folder / "out" / "work" / name / "begun"
    return path.read_text().split() if path.exists() else []


def assert_gone(name, folder):
    """No process of this run is left."""
    for process in begun(name, folder):
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_grid_table(grid, tmp_path, capsys):
    """a scores 80, 90: mean 85.0, deviation sqrt(2 * 5^2) = 7.1. b scores 81, 93 with the same
    seeds, which is 1 and 3 more: 2 +- sqrt(2) / sqrt(2); with a third seed, which a has not, 96:
    mean 90.0, deviation sqrt((81 + 9 + 36) / 2) = 7.9. c has no seed of a. The line without a name
    is named as cap_min.py names its folder; its task is another, which has its own first run."""
    lines = ["# a comment", "", line("a-seed0", 80, 0), line("a-seed1", 90, 1) + " # one more",
             line("b-seed0", 81, 0), line("b-seed1", 93, 1), line("b-seed2", 96, 2),
             line("c", 70, 9), "--task rte --seed 4 --model 50 --sparsity 0.5"]
    assert grid(lines, "--jobs", "4") == 0
    table = (tmp_path / "out" / "grid.md").read_text()
    assert table.splitlines()[2:] == [
        "| sst2 | accuracy | a | 2 | 85.0 ± 7.1 |  |",
        "| sst2 | accuracy | b | 3 | 90.0 ± 7.9 | +2.00 ± 1.00 (n = 2) |",
        "| sst2 | accuracy | c | 1 | 70.0 | no common seed |",
        "| rte | accuracy | rte-0.5 | 1 | 50.0 |  |"]
    assert table in capsys.readouterr().out


def test_grid_runs_some_at_once_and_each_once(grid, tmp_path, capsys):
    """With --jobs 2 two of four runs are begun at once, a third when one has ended: of the lines
    printed so far two more, at most, begin than end. Each has half of the cores; after the first an
    eta is told, after the last it is 0. What has its record is not begun again, and the record of
    another run is not taken for its own."""
    names = ["one", "two", "three", "four"]
    lines = [line(name, 50) for name in names]
    assert grid(lines, "--jobs", "2") == 0
    out = capsys.readouterr().out
    told = re.findall(r"(begins|ended) \| (\d) of 4 done", out)
    running = list(itertools.accumulate({"begins": 1, "ended": -1}[what] for what, _ in told))
    assert running[:2] == [1, 2] and max(running) == 2 and running[-1] == 0
    assert re.search(r" ended \| 1 of 4 done, eta \d+:\d\d:\d\d\n", out)
    assert told[-1] == ("ended", "4") and " ended | 4 of 4 done, eta 0:00:00" in out
    assert record_of("one", tmp_path)["threads"] == str(max(1, os.cpu_count() // 2))
    assert (tmp_path / "out" / "one.jsonl").read_text() == "{}"
    (tmp_path / "out" / "one.json").unlink()
    assert grid(lines) == 0
    assert len(begun("one", tmp_path)) == 2 and len(begun("two", tmp_path)) == 1
    assert grid([line("one", 50, more="--form snc-times-k")]) == 2
    assert "one.json is of a run with form None" in capsys.readouterr().err
    assert grid(["one: --task rte --model 50"]) == 2
    assert "one.json is of a run with task sst2: this one needs" in capsys.readouterr().err


def test_a_failing_run_does_not_stop_the_others(grid, tmp_path, capsys):
    """Its last line is told. One that takes its teacher is not begun, nor one that takes that
    one's; the others are. The status is 1."""
    assert grid([line("bad", "fails"), line("child", 50, more="--teacher {teacher:bad}"),
                 line("grandchild", 50, more="--teacher {teacher:child}"), line("good", 50)]) == 1
    out = capsys.readouterr().out
    assert "bad failed (1): the disk is full | 0 of 4 done" in out
    assert "grandchild failed: it has no teacher" in out and "good ended | 1 of 4 done" in out
    assert not begun("child", tmp_path) and not begun("grandchild", tmp_path)
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["good.json"]


def test_a_run_waits_for_its_teacher(grid, tmp_path, capsys):
    """The second begins once the first has its teacher, before that ends, and finds it; the third,
    which needs none, does not wait."""
    assert grid([line("first", 50), line("second", 50, more="--teacher {teacher:first}"),
                 line("third", 50)], "--jobs", "3") == 0
    out = capsys.readouterr().out
    assert out.index("third begins") < out.index("second begins") < out.index("first ended")


def test_a_grid_ends_after_its_minutes_and_goes_on_later(grid, tmp_path, monkeypatch, capsys):
    """After 0.03 minutes both that run are stopped, the deaf one by force, the third is not begun,
    and the table has no row. None has failed: the status is 0. The same command goes on."""
    monkeypatch.setattr(studies, "GRACE", 0.5)
    lines = [line("slow", "sleeps"), line("deaf", "is-deaf"), line("later", 50)]
    assert grid(lines, "--jobs", "2", "--minutes", "0.03") == 0
    for name in ("slow", "deaf"):
        assert_gone(name, tmp_path)
        folder = tmp_path / "out" / "work" / name
        folder.mkdir(exist_ok=True)  # on a slow machine the run may not have got so far
        (folder / "go").touch()
    assert not begun("later", tmp_path)
    assert "0.03 minutes are over; the same command goes on | 0 of 3" in capsys.readouterr().out
    assert len((tmp_path / "out" / "grid.md").read_text().splitlines()) == 2
    assert grid(lines, "--jobs", "2", "--minutes", "1") == 0
    assert len((tmp_path / "out" / "grid.md").read_text().splitlines()) == 5


def test_ctrl_c_stops_all_runs(grid, tmp_path):
    """The second run interrupts the grid once the first has ended, while the third sleeps: none is
    left, the status is 130, and the table has the first."""
    assert grid([line("first", 50), line("loud", "interrupts", more="--teacher {teacher:first}"),
                 line("slow", "sleeps")], "--jobs", "2") == 130
    assert_gone("loud", tmp_path)
    assert_gone("slow", tmp_path)
    assert "| first | 1 | 50.0 |" in (tmp_path / "out" / "grid.md").read_text()


@pytest.mark.parametrize("lines, sentence", [
    (["a: --task sst2", "a: --task rte"], "list, line 2: a line above is named a too"),
    (["--lr 1e-3", "--lr 1e-4"], "list, line 2: a line above is named demo-0.97-seed0 too"),
    (["a: --teacher {teacher:b}", "b:"], "list, line 1: no line above is named b"),
    (["", "a: --no-such-option"], "list, line 2: no options of cap_min.py"),
    (["a: --task 'sst2"], "list, line 1: No closing quotation"),
])
def test_lists_that_cannot_be_run(lines, sentence, grid, tmp_path, capsys):
    """One sentence that names the line, before anything is begun."""
    assert grid(lines) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
