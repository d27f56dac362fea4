"""Compare WordPiece on real texts: with the tokenizers library in every task that is there, and
with transformers under each setting of a tokenizer_config.json.

Use: python .ci/check_tokenizer.py MODEL DATA_DIR"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from data_glue import TASKS, WordPiece, load, load_tokenizer, save_tokenizer

SOME = 5000  # texts for each setting
SETTINGS = [
    {"do_lower_case": True}, {"do_lower_case": False}, {"strip_accents": False},
    {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False}]
INSERTED = ["caf\u00e9 NA\u00cfVE", "\u4e2d\u6587good\u4e2d", "\u00e9lan", "E\u0301lan", "The"]

model, data_dir = Path(sys.argv[1]), sys.argv[2]
vocab_file = str(model / "vocab.txt")
ours, theirs = WordPiece(vocab_file), BertWordPieceTokenizer(vocab_file)
pairs = singles = 0
texts = []
for task in TASKS:
    for split in TASKS[task].files:
        if not (Path(data_dir) / TASKS[task].folder / TASKS[task].files[split]).exists():
            continue
        examples = load(task, split, data_dir)[:10_000]
        wanted = theirs.encode_batch([e.text_a if e.text_b is None else (e.text_a, e.text_b)
                                      for e in examples])
        for (text_a, text_b, _), encoding in zip(examples, wanted):
            got = ours.encode(text_a, text_b, max_length=100_000)
            assert got == (encoding.ids, encoding.type_ids), (task, split, text_a, text_b)
            pairs, singles = pairs + (text_b is not None), singles + (text_b is None)
        texts += [example.text_a for example in examples[:400]]
print(f"WordPiece: the same ids as the tokenizers library for {pairs} pairs, {singles} sentences")

# something in the middle of every text
for i, text in enumerate(texts):
    words = text.split(" ")
    words.insert(len(words) // 2, INSERTED[i % len(INSERTED)])
    texts[i] = " ".join(words)
texts = texts[:SOME]
for setting in SETTINGS:
    with tempfile.TemporaryDirectory() as work:
        given, saved, export = Path(work) / "given", Path(work) / "saved", Path(work) / "export"
        given.mkdir()
        export.mkdir()
        shutil.copy(model / "config.json", given)
        shutil.copy(vocab_file, given)
        (given / "tokenizer_config.json").write_text(json.dumps(setting))
        theirs = AutoTokenizer.from_pretrained(given)
        wanted = theirs(texts)["input_ids"]
        # as given, as transformers saves it, and as we export that
        theirs.save_pretrained(saved)
        save_tokenizer(load_tokenizer(saved), export, max_length=512)
        shutil.copy(model / "config.json", export)
        assert AutoTokenizer.from_pretrained(export)(texts)["input_ids"] == wanted
        for folder in (given, saved, export):
            ours = load_tokenizer(folder)
            for text, ids in zip(texts, wanted):
                assert ours.encode(text, max_length=100_000)[0] == ids, (setting, folder, text)
            assert len(ours.listed) == len(theirs)
    print(f"WordPiece: the same ids as transformers for {len(texts)} texts with {setting}")
