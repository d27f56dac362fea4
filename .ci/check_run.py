"""Check a finished run from outside: zeros counted in the file, the dev score by transformers.

Use: python .ci/check_run.py RUN DATA_DIR"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from data_glue import TASKS, load

run, data_dir = Path(sys.argv[1]), sys.argv[2]
record = json.loads((run / "record.json").read_text())
config = record["config"]

stored = load_file(run / "model" / "model.safetensors")
matrices = [name for name in stored if name.startswith("bert.encoder.") and stored[name].dim() == 2]
assert set(matrices) == set(record["sparsity"]["matrices"])
kept = {name: int((stored[name] != 0).sum()) for name in matrices}
sizes = {name: stored[name].numel() for name in matrices}
if config["method"] == "soft":  # its threshold is that of all matrices
    kept, sizes = {"all": sum(kept.values())}, {"all": sum(sizes.values())}
for name, size in sizes.items():
    assert kept[name] == round((1 - config["sparsity"]) * size), f"{name}: {kept[name]} of {size}"
print(f"{run.name}: exactly k weights kept in {len(matrices)} matrices, counted "
      f"{'together' if config['method'] == 'soft' else 'in each'}")

tokenizer = AutoTokenizer.from_pretrained(run / "model")
model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
for split in list(TASKS[config["task"]].files)[1:]:
    examples = sorted(load(config["task"], split, data_dir), key=lambda e: len(e.text_a))
    right = 0
    with torch.inference_mode():
        for first in range(0, len(examples), 64):
            part = examples[first:first + 64]
            second = [e.text_b for e in part] if part[0].text_b is not None else None
            batch = tokenizer([e.text_a for e in part], second, padding=True, truncation=True,
                              max_length=config["max_length"], return_tensors="pt")
            labels = torch.tensor([e.label for e in part])
            right += int((model(**batch).logits.argmax(1) == labels).sum())
    name = "accuracy" + split.removeprefix("dev")
    theirs, ours = right / len(examples), record["pruned"][name]
    # near-ties may fall to the other side under another order of additions
    assert abs(theirs - ours) <= 2 / len(examples), f"{name}: transformers {theirs}, record {ours}"
    print(f"{run.name}: {name} {ours:.4f} in the record, {theirs:.4f} by transformers; "
          f"dense {record['dense'][name]:.4f}")
