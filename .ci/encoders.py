"""Encoders of pruned models, small enough to come back from a GPU machine: the values that are
left, without the embeddings, which are those of the pre-trained model.

Run:  python .ci/encoders.py pack GRID OUT           OUT/encoders-N.tar, 12 runs each, of the first
          48 runs that ended in GRID, the folder of studies.py grid
      python .ci/encoders.py unpack GRID MODEL TAR   GRID/work/NAME for each run in TAR, with what
          studies.py probe needs"""

import json
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cap_min  # noqa: E402
from bert_min import from_pretrained, load_safetensors, read_json, replacing  # noqa: E402
from data_glue import TASKS, load_tokenizer  # noqa: E402


def pack(grid, out):
    """A tar is written once its runs have ended, the last one each time."""
    records = sorted(grid.glob("*.json"), key=lambda path: path.stat().st_mtime)[:48]
    for first in range(0, len(records), 12):
        path = out / f"encoders-{first // 12}.tar"
        if path.exists() and first + 12 < len(records):
            continue
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for record in records[first:first + 12]:
                packed = packed_weights(grid / "work" / record.stem / "model")
                entry = tarfile.TarInfo(f"{record.stem}.npz")
                entry.size = len(packed)
                tar.addfile(entry, BytesIO(packed))


def packed_weights(folder):
    """The bytes of an npz: of each tensor which values are not 0, as bits, and these values."""
    arrays = {}
    for name, tensor in load_safetensors(folder / "model.safetensors").items():
        if ".embeddings." not in name:
            values = tensor.numpy().ravel()
            arrays[f"{name} mask"] = np.packbits(values != 0)
            arrays[f"{name} values"] = values[values != 0]
    file = BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def unpack(grid, model_folder, tar):
    for entry in tarfile.open(tar):
        name = Path(entry.name).stem
        arrays = np.load(BytesIO(tarfile.open(tar).extractfile(entry).read()))
        record = read_json(grid / f"{name}.json")
        task = record["config"]["task"]
        model = from_pretrained(model_folder, num_labels=len(TASKS[task].words))
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if f"{key} mask" in arrays:
                    left = np.unpackbits(arrays[f"{key} mask"])[:tensor.numel()].astype(bool)
                    values = np.zeros(tensor.numel(), np.float32)
                    values[left] = arrays[f"{key} values"]
                    tensor.copy_(torch.from_numpy(values).view_as(tensor))
        run = grid / "work" / name
        (run / "model").mkdir(parents=True, exist_ok=True)
        cap_min.export(model, load_tokenizer(model_folder), task, run / "model")
        record["config"]["model"] = model_folder
        (run / "record.json").write_text(json.dumps(record))
        assert cap_min.sparsity_report(model)["kept"] == record["sparsity"]["kept"], name


if __name__ == "__main__":
    what, grid, *more = sys.argv[1:]
    if what == "pack":
        pack(Path(grid), Path(more[0]))
    else:
        unpack(Path(grid), *more)
