"""Feed the readers of files with damaged ones: whatever the bytes, a reader returns a result, or
raises a ValueError or OSError whose first line is short, in a few seconds and in little memory.

Use: python .ci/fuzz.py --cases 100         (of each kind of file; exit status 1 if one breaks this)
     python .ci/fuzz.py --seed 17 --cases 1 (the case that was reported as seed 17)"""

import argparse
import contextlib
import copy
import io
import json
import math
import random
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bert_min import BertClassifier, BertConfig, from_pretrained, save_pretrained
from data_glue import TASKS, load, load_tokenizer

SECONDS, LETTERS = 5, 600  # that a reader may take, and that its sentence may have
SPARE = 2 ** 25  # bytes that it may take beside twice the file
FILES = ("model.safetensors", "config.json", "tokenizer_config.json", "vocab.txt", "train.tsv")
PIECES = "[PAD] [UNK] [CLS] [SEP] a good bad film is un ##aff ##able ##s ! 中 ##文".split()
ODD_BYTES = [b"", b"\n", b"\t", b"\r", b"\xff", b"\0", b"\xef\xbb\xbf", b'"', b"\xe2\x80\xa8",
             b"nan", b"9" * 5000, b"[" * 5000]
ODD_VALUES = [0, -1, 1, 4, 2 ** 24, 2 ** 40, 2 ** 63, 10 ** 400, 1.5, math.nan, True, None, "",
              "F16", "a\nb\ud800", [], [0], [0, 0], [2 ** 40] * 3, [1] * 10_000, {}, {"0": "a"}]


def make_folder(folder, task, rng):
    """A tiny model, and a train.tsv of the task in which some label may be odd."""
    config = BertConfig(vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=32, max_position_embeddings=32,
                        num_labels=3, layer_sizes=[[2, 32], [1, 8]])
    save_pretrained(BertClassifier(config), folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES), "utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 32}')
    labels = [*(task.words or ("2.5", "4", "nan", "1e999", "5.1")), "0", "-"]
    rows = [["film", rng.choice(labels), "*", "a good film"]]  # CoLA's, which has no header
    if not task.header:
        columns = [task.label, task.text_a, task.text_b or "index"]
        rows = [columns] + [[rng.choice(labels), f"film {i} 中", "good"] for i in range(4)]
    (folder / "train.tsv").write_text("\n".join("\t".join(row) for row in rows), "utf-8")


def mutate_bytes(data, rng):
    """1 to 3 of: a byte flipped, a stretch cut out, doubled or overwritten, the end cut off."""
    for _ in range(rng.randint(1, 3)):
        first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        last = min(last, first + rng.choice((1, 8, 2 ** 20)))
        odd = rng.choice([*ODD_BYTES, bytes([rng.randrange(256)])])
        data = rng.choice((data[:first] + odd + data[last:], data[:last] + data[first:],
                           data[:first] + odd + data[first + 1:], data[:first]))
    return data


def mutate_values(value, rng):
    """A value somewhere inside `value`, or a name, is replaced by an odd one, moved or dropped."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(value[key], (dict, list)) and rng.random() < 0.8:
        mutate_values(value[key], rng)
    elif isinstance(value, dict) and rng.random() < 0.3:
        value[rng.choice([*keys, "odd\n"])] = value.pop(key)
    else:
        odd = value[key] + rng.choice((-1, 1, 8)) if type(value[key]) is int else 0
        value[key] = copy.deepcopy(rng.choice([odd, value[rng.choice(keys)], *ODD_VALUES]))


def mutate(data, name, rng):
    """The bytes of a file; most of the JSON ones mutated as JSON, weights with a new length."""
    if name.endswith((".txt", ".tsv")) or rng.random() < 0.5:
        return mutate_bytes(data, rng)
    weights = name == "model.safetensors"
    header, rest = data, b""
    if weights:
        length = int.from_bytes(data[:8], "little")
        header, rest = data[8:8 + length], data[8 + length:]
    tree = json.loads(header)
    for _ in range(rng.randint(1, 3)):
        mutate_values(tree, rng)
    if type(tree.get("num_hidden_layers")) is int:  # a million layers may be what is wanted
        tree["num_hidden_layers"] = min(tree["num_hidden_layers"], 100)
    header = json.dumps(tree).encode()
    return (len(header).to_bytes(8, "little") if weights else b"") + header + rest


class TooLong(BaseException):
    """Not an Exception, which a reader may catch."""


def out_of_time(*_):
    raise TooLong(f"it takes over {SECONDS} s")


def peak():
    """Most bytes that this process has held since the peak was last forgotten."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(name, seed, folder):
    """Mutate one file and read it; the sentence with which it was refused, or ""."""
    rng = random.Random(f"{name} {seed}")
    task = rng.choice(list(TASKS))
    make_folder(folder, TASKS[task], rng)
    data, sentence = mutate((folder / name).read_bytes(), name, rng), ""
    (folder / name).write_bytes(data)
    (folder / TASKS[task].folder).symlink_to(folder)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = peak()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if name == "train.tsv":
                load(task, "train", folder)
            else:
                load_tokenizer(folder)
                from_pretrained(folder, rng.choice((None, 2, 3)))
    except (ValueError, OSError) as error:
        sentence = str(error).split("\n")[0]
        assert len(sentence) <= LETTERS, sentence
    finally:
        signal.alarm(0)
    assert peak() - before <= 2 * len(data) + SPARE, f"it takes {peak() - before} bytes"
    return sentence


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, out_of_time)
    with tempfile.TemporaryDirectory() as folder:  # what torch loads the first time is not counted
        make_folder(Path(folder), TASKS["mnli"], random.Random(0))
        from_pretrained(folder, 3)
    broken = 0
    for name in FILES:
        refused = 0
        for seed in range(args.seed, args.seed + args.cases):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    refused += bool(fuzz(name, seed, Path(folder)))
                except (Exception, TooLong):
                    broken += 1
                    print(f"{name}, seed {seed}:\n{traceback.format_exc()[-2000:]}")
        print(f"{name}: {args.cases} cases, {refused} refused")
    return broken > 0


if __name__ == "__main__":
    sys.exit(main())
