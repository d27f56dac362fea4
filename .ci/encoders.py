"""Encoders of pruned models, small enough to come back from a GPU machine: the values that are
left, without the embeddings, which are those of the pre-trained model.

Run:  python .ci/encoders.py pack GRID OUT           OUT/encoders-N.tar, at most 4 of 15 MB, of runs
          that ended in GRID, the folder of studies.py grid
      python .ci/encoders.py unpack GRID MODEL TAR   GRID/work/NAME for each run in TAR, for
          studies.py probe --encoders pruned pretrained; MODEL: the checkpoint that was pruned
CAP-f's models are not taken: they have other sizes."""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cap_min  # noqa: E402
from bert_min import from_pretrained, load_safetensors, read_json, replacing  # noqa: E402
from data_glue import TASKS, load_tokenizer  # noqa: E402


def pack(grid, out):
    """Those that ended first come first; what was packed before lies in GRID/packed."""
    (grid / "packed").mkdir(exist_ok=True)
    tars, size = [[]], 0
    for record in sorted(grid.glob("*.json"), key=lambda path: path.stat().st_mtime):
        path = grid / "packed" / f"{record.stem}.npz"
        if read_json(record)["config"]["method"] == "structured":
            continue
        if not path.exists():
            with replacing(path) as file:
                np.savez_compressed(file, **packed_weights(grid / "work" / record.stem / "model"))
        more = path.stat().st_size + 1024
        if size + more > 15e6:
            tars.append([])
            size = 0
        size += more
        tars[-1].append(path)
    for i, paths in enumerate(tars[:4]):
        with replacing(out / f"encoders-{i}.tar") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for path in paths:
                    tar.add(path, path.name)
    if tars[4:]:
        print(f"{sum(map(len, tars[4:]))} encoders are left out")


def packed_weights(folder):
    """The arrays of an npz: of each tensor which values are not 0, as bits, and these values."""
    arrays = {}
    for name, tensor in load_safetensors(folder / "model.safetensors").items():
        if ".embeddings." not in name:
            values = tensor.numpy().ravel()
            arrays[f"{name} mask"] = np.packbits(values != 0)
            arrays[f"{name} values"] = values[values != 0]
    return arrays


def unpack(grid, model_folder, tar):
    (grid / "packed").mkdir(exist_ok=True)
    with tarfile.open(tar) as packed:
        packed.extractall(grid / "packed", filter="data")
        names = [Path(name).stem for name in packed.getnames()]
    for name in names:
        arrays = np.load(grid / "packed" / f"{name}.npz")
        record = read_json(grid / f"{name}.json")
        task = record["config"]["task"]
        model = from_pretrained(model_folder, num_labels=max(1, len(TASKS[task].words)))
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if f"{key} mask" in arrays:
                    left = np.unpackbits(arrays[f"{key} mask"])[:tensor.numel()].astype(bool)
                    values = np.zeros(tensor.numel(), np.float32)
                    values[left] = arrays[f"{key} values"]
                    tensor.copy_(torch.from_numpy(values).view_as(tensor))
        assert cap_min.sparsity_report(model)["kept"] == record["sparsity"]["kept"], name
        run = grid / "work" / name
        (run / "model").mkdir(parents=True, exist_ok=True)
        cap_min.export(model, load_tokenizer(model_folder), task, run / "model")
        record["config"]["model"] = model_folder
        (run / "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    what, grid, *more = sys.argv[1:]
    if what == "pack":
        pack(Path(grid), Path(more[0]))
    else:
        unpack(Path(grid), *more)
