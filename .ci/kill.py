"""Kill runs of the demo by SIGKILL in the teacher, the banks, the steps, a save and the export, go on
each time by the same command, and compare with a run that nobody killed: the same last bit.

Use: python .ci/kill.py     (some minutes; exit status 1 if a method's weights or log differ)"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"movement": ["--sparsity", "0.9"], "soft": ["--sparsity", "0.9"],
           "structured": ["--sparsity", "0.2"]}
STATE = "checkpoint/state.pt"
PLACES = ((STATE, 20), ("teacher/model.safetensors", 1), ("checkpoint/fic-0.pt", 1), (STATE, 10),
          ("checkpoint/snc-0.pt", 1), (STATE, 15), (STATE, 3), ("model/vocab.txt", 1))


def command(method, out):
    return [sys.executable, str(ROOT / "cap_min.py"), "--method", method, *METHODS[method],
            "--epochs", "2", "--max-train", "900", "--device", "cpu", "--dtype", "fp32",
            "--checkpoint-minutes", "0", "--out", str(out)]


def kill_at(path, count, options, seconds):
    """Start the run and kill it so many seconds after the file was written for the count-th time;
    whether it was still at work."""
    process = subprocess.Popen(options, stdout=subprocess.DEVNULL)
    written = path.stat().st_mtime_ns if path.exists() else 0
    while count > 0 and process.poll() is None:
        time.sleep(0.001)
        now = path.stat().st_mtime_ns if path.exists() else written
        if now != written:
            written, count = now, count - 1
    time.sleep(seconds)
    process.kill()
    return process.wait() != 0


def outcome(out):
    """The weights of both models, and the log but for times."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("ms", None)
        line.pop("examples_per_second", None)
    return ((out / "teacher" / "model.safetensors").read_bytes(),
            (out / "model" / "model.safetensors").read_bytes(), log)


def main():
    os.environ["OMP_NUM_THREADS"] = "1"
    chance, status = random.Random(0), 0
    for method in METHODS:
        folder = Path(tempfile.mkdtemp())
        whole, cut = folder / "whole", folder / "cut"
        subprocess.run(command(method, whole), check=True, stdout=subprocess.DEVNULL)
        kills = 0
        for name, count in PLACES:
            kills += kill_at(cut / name, count, command(method, cut), chance.uniform(0, 0.05))
        subprocess.run(command(method, cut), check=True, stdout=subprocess.DEVNULL)
        same = outcome(whole) == outcome(cut)
        status |= not same
        print(f"{method}: {kills} kills, {'the same last bit' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
