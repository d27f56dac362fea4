"""Compare WordPiece with the tokenizers library on real texts of every task that is there.

Use: python .ci/check_tokenizer.py MODEL DATA_DIR"""

import sys
from pathlib import Path

from tokenizers import BertWordPieceTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from data_glue import TASKS, WordPiece, load

vocab_file = str(Path(sys.argv[1]) / "vocab.txt")
ours, theirs = WordPiece(vocab_file), BertWordPieceTokenizer(vocab_file)
pairs = singles = 0
for task in TASKS:
    for split in TASKS[task].files:
        if not (Path(sys.argv[2]) / TASKS[task].folder / TASKS[task].files[split]).exists():
            continue
        examples = load(task, split, sys.argv[2])[:10_000]
        wanted = theirs.encode_batch([e.text_a if e.text_b is None else (e.text_a, e.text_b)
                                      for e in examples])
        for (text_a, text_b, _), encoding in zip(examples, wanted):
            got = ours.encode(text_a, text_b, max_length=100_000)
            assert got == (encoding.ids, encoding.type_ids), (task, split, text_a, text_b)
            pairs, singles = pairs + (text_b is not None), singles + (text_b is None)
print(f"WordPiece: the same ids as the tokenizers library for {pairs} pairs, {singles} sentences")
