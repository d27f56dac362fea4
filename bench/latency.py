"""Latency of a pruned model: what `bert_min` makes of its zeros, or of its missing heads and
neurons, beside transformers' dense forward.

Run:  pip install -r bench/requirements.txt
      python bench/latency.py runs/sst2-0.97-seed0           a finished run of cap_min.py
      python bench/latency.py runs/lower --dense TEACHER     the same beside another dense model
      python bench/latency.py MODEL                          a model's folder, or random-base for
                                                             random weights in BERT-base's sizes:
                                                             pruned by magnitude to 97 %
Prints sizes and times, and writes them to --out. What is timed:
    transformers fp32, bf16   the dense model: the pruned weights as they are, zeros included, or,
                              where heads and neurons are gone, the fine-tuned one of full size
    ours                      bert_min.to_sparse of the run's model, fp32: CSR where little is left.
                              Its logits are compared with transformers', or where the dense model
                              is another with those of the same weights, not in CSR
Each is timed for a while, then the next, in several rounds; a figure is the median over the
rounds of a round's median, a ratio the median of the rounds' ratios: read ratios. All is done
with one thread and with all: on a shared machine a second core comes and goes."""

import argparse
import gzip
import itertools
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import bert_min  # noqa: E402
import cap_min  # noqa: E402
from throughput import processor  # noqa: E402


def folders(name, scratch):
    """(pruned model's folder, dense model's folder for transformers) of what the command names."""
    run = Path(name)
    if not (run / "record.json").exists():
        if name == "random-base":
            model = bert_min.BertClassifier(bert_min.BertConfig())
        else:
            model = bert_min.from_pretrained(run)
        cap_min.add_masks(model, "none")
        cap_min.set_masks(model, 0.03)
        cap_min.apply_masks(model)
        bert_min.save_pretrained(model, scratch)
        return scratch, scratch
    config = bert_min.read_json(run / "record.json")["config"]
    if config["method"] != "structured":
        return run / "model", run / "model"
    dense = run / "teacher"
    if config["teacher"] is not None:
        dense = ROOT / config["teacher"]
    return run / "model", dense


def file_sizes(folder):
    """Bytes of the weight file and of the encoder matrices in it, and of both after `gzip`."""
    model = bert_min.from_pretrained(folder, None)
    file = (folder / "model.safetensors").read_bytes()
    matrices = b"".join(layer.weight.detach().numpy().tobytes()
                        for layer in cap_min.encoder_linears(model).values())
    return {"encoder matrices, dense fp32": 4 * cap_min.sparsity_report(model)["weights"],
            "plain file": len(file), "encoder matrices, plain": len(matrices),
            "gzip file": len(gzip.compress(file, 6)),
            "encoder matrices, gzip": len(gzip.compress(matrices, 6))}


def contenders(pruned, dense, device):
    """({name: function of (input_ids, attention_mask) to logits}, the pruned model)."""
    theirs = AutoModelForSequenceClassification.from_pretrained(dense).eval().to(device)
    model = bert_min.from_pretrained(pruned, None).eval().to(device)
    ours = bert_min.to_sparse(model) if device.type == "cpu" else model

    def plain(ids, mask):
        return theirs(input_ids=ids, attention_mask=mask).logits

    def autocast(ids, mask):
        with torch.autocast(device.type, torch.bfloat16):
            return plain(ids, mask)

    return {"transformers fp32": plain, "transformers bf16": autocast,
            "ours": lambda ids, mask: ours(ids, mask)[0]}, model


def time_one(function, device, seconds):
    """Median time of a call, of as many as fit into `seconds`, at least 3, after 2 to warm up."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def time_all(functions, ids, mask, options):
    """({name: ms}, {name: its ms / those of "ours"})."""
    times = {name: [] for name in functions}
    for _ in range(options.rounds):
        for name, function in functions.items():
            times[name].append(time_one(lambda: function(ids, mask), ids.device, options.seconds))
    ms, ratios = {}, {}
    for name in functions:
        ms[name] = statistics.median(times[name])
        ratios[name] = statistics.median(
            other / ours for other, ours in zip(times[name], times["ours"]))
    return ms, ratios


def measure(options, device):
    """The record: sizes, and for each batch and length {name: ms}, ratios, logit difference."""
    with tempfile.TemporaryDirectory() as scratch:
        pruned, dense = folders(options.run, Path(scratch))
        if options.dense is not None:
            dense = options.dense
        if not Path(dense).is_dir():
            sys.exit(f"{dense}, the dense model to compare {options.run} with, is not there")
        sizes = file_sizes(pruned)
        functions, reference = contenders(pruned, dense, device)
    config, rows = reference.config, []
    for threads, batch, length in itertools.product(options.threads, options.batches,
                                                    options.lengths):
        if length > config.max_position_embeddings:
            continue
        torch.set_num_threads(threads)
        ids = torch.randint(1, config.vocab_size, (batch, length), device=device)
        mask = torch.ones_like(ids)
        ms, ratios = time_all(functions, ids, mask, options)
        if dense == pruned:
            wanted = functions["transformers fp32"](ids, mask)
        else:  # which has other weights
            wanted = reference(ids, mask)[0]
        difference = (functions["ours"](ids, mask) - wanted).abs().max().item()
        rows.append({"threads": threads, "batch": batch, "length": length, "ms": ms,
                     "ratios": ratios, "difference": difference})
        shown = [f"{name} {ms[name]:.2f} ms ({ratios[name]:.2f} x ours)" for name in functions]
        print(f"{threads} threads, batch {batch}, length {length}: {', '.join(shown)}, "
              f"logits differ by {difference:.0e}", flush=True)
    return {"what": Path(options.run).name, "processor": processor(), "device": str(device),
            "rounds": options.rounds, "sparsity": cap_min.sparsity_report(reference)["total"],
            "layer_sizes": config.layer_sizes, "bytes": sizes, "rows": rows,
            "torch": torch.__version__, "date": str(date.today())}


def main():
    parser = argparse.ArgumentParser(description="Latency of a pruned model.")
    parser.add_argument("run", help="run folder of cap_min.py, model folder, or random-base")
    parser.add_argument("--dense", type=Path, help="folder of the dense model; None: the run's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 384])
    parser.add_argument("--threads", type=int, nargs="+",
                        default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each in a round, at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="file for the record; None: it is not kept")
    options = parser.parse_args()
    cap_min.tune_cpu()
    torch.manual_seed(0)
    device = torch.device(options.device)
    with torch.inference_mode():
        record = measure(options, device)
    for name, size in record["bytes"].items():
        print(f"{name}: {size / 1e6:.2f} MB")
    if device.type == "cuda":
        print("on CUDA unstructured zeros gain nothing: ours is the dense forward there")
    if options.out is not None:
        cap_min.write_json(record, options.out)
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
