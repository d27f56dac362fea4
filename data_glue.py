"""GLUE as BERT sees it: the tasks' files, WordPiece, length-bucketed batches and GLUE's metrics.

Papers: Wang et al., "GLUE" (arXiv 1804.07461); WordPiece as in BERT (arXiv 1810.04805, section 3).
Use:    from data_glue import TASKS, WordPiece, load, encode_task, batches, score
        data = encode_task(load("mnli", "train"), WordPiece("vocab.txt"), max_length=128)
        for batch in batches(data, batch_size=32, seed=0, epoch=0): ...
Sizes:  N examples in a split, B in a batch, T tokens in the longest one"""

import array
import csv
import functools
import hashlib
import io
import re
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bert_min import cache_folder, download, read_json, write_json

# ----------------------------------------------------------------------------- tasks

class Task(NamedTuple):
    """Where a task's texts and labels stand, and how it is scored.
    `text_a`, `text_b` (None: single sentences) and `label` are columns by name; `header` has the
    names where GLUE's file has none. A label is written as one of `words`, in the order of the
    outputs, or, if they begin with letters, by its position. No words: a regression, 0 to 5."""

    folder: str
    text_a: str
    text_b: str | None
    label: str
    words: list
    metrics: tuple = ("accuracy",)
    archive: str | None = None  # of GLUE's server
    files: dict = {"train": "train.tsv", "dev": "dev.tsv"}
    header: tuple = ()


NLI = ["entailment", "neutral", "contradiction"]
ENTAILMENT = ["entailment", "not_entailment"]
TASKS = {
    "cola": Task("CoLA", "sentence", None, "label", ["unacceptable", "acceptable"], ("matthews",),
                 "CoLA.zip", header=("source", "label", "mark", "sentence")),
    "sst2": Task("SST-2", "sentence", None, "label", ["negative", "positive"],
                 archive="SST-2.zip"),
    "mrpc": Task("MRPC", "#1 String", "#2 String", "Quality", ["not_equivalent", "equivalent"],
                 ("accuracy", "f1")),
    "qqp": Task("QQP", "question1", "question2", "is_duplicate", ["not_duplicate", "duplicate"],
                ("accuracy", "f1"), "QQP-clean.zip"),
    "stsb": Task("STS-B", "sentence1", "sentence2", "score", [], ("pearson", "spearman"),
                 "STS-B.zip"),
    "mnli": Task("MNLI", "sentence1", "sentence2", "gold_label", NLI, archive="MNLI.zip",
                 files={"train": "train.tsv", "dev": "dev_matched.tsv",
                        "dev_mm": "dev_mismatched.tsv"}),
    "qnli": Task("QNLI", "question", "sentence", "label", ENTAILMENT, archive="QNLIv2.zip"),
    "rte": Task("RTE", "sentence1", "sentence2", "label", ENTAILMENT, archive="RTE.zip"),
    "wnli": Task("WNLI", "sentence1", "sentence2", "label", ["not_entailment", "entailment"],
                 archive="WNLI.zip"),
    "snli": Task("snli", "sentence1", "sentence2", "gold_label", NLI),
    "demo": Task("demo", "premise", "hypothesis", "label", NLI,
                 files={"train": "train.tsv", "dev": "dev.tsv", "dev_unseen": "dev_unseen.tsv"}),
}
# what the datasets library calls these columns
OTHER_NAMES = {"#1 String": "sentence1", "#2 String": "sentence2", "sentence1": "premise",
               "sentence2": "hypothesis", "Quality": "label", "is_duplicate": "label",
               "score": "label", "gold_label": "label"}


class Example(NamedTuple):
    text_a: str
    text_b: str | None
    label: float  # position in the task's words, or the value of a regression


def load(task, split, data_dir=None):
    """The examples of `split` ("train", "dev"; MNLI's mismatched set is "dev_mm"). data_dir: the
    folder with the task's folder, or None: see `glue_root`. ValueError, naming file and line, for
    what is not as the task says; FileNotFoundError for a file that is not there."""
    known = TASKS[task]
    path = f"{known.folder}/{known.files[split]}"
    folder = cache_folder() / "glue" if data_dir is None else Path(data_dir)
    try:
        root = glue_root(task, folder) if data_dir is None else folder
        return read_examples(known, root / path)
    except (zipfile.BadZipFile, FileNotFoundError):
        raise FileNotFoundError(f"{path} is not in {folder}, or damaged: see --data-dir") from None


def read_examples(task, path):
    """list[Example] of a file whose columns are named by `task`, or as in the datasets library."""
    rows = read_rows(path)
    columns = (task.text_a, task.text_b, task.label)
    number, header = next(rows, (1, []))
    if task.header and task.label not in header:
        rows, header = read_rows(path), task.header
    # the task's own names of the columns
    own_names = {OTHER_NAMES.get(column): column for column in columns if column not in header}
    header = [own_names.get(name, name) for name in header]
    for column in columns:
        if column not in [*header, None]:
            raise ValueError(f"{path}, line {number}: no column {column!r}, only "
                             f"{str(header):.300}")
    # a row each, but for those on whose label SNLI's annotators did not agree
    examples = []
    for number, row in rows:
        where = f"{path}, line {number}"
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} columns, not {len(header)}")
        row = dict(zip(header, row))
        if task.words == NLI and row[task.label] in ("-", "-1"):
            continue
        label = read_label(task, row[task.label], where)
        examples.append(Example(row[task.text_a], row.get(task.text_b), label))
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return examples


def read_rows(path):
    """(number of its first line, columns) of each row."""
    text = read_text(path)
    number = 1
    if is_quoted(text):
        rows = csv.reader(io.StringIO(text), "excel-tab")
    else:
        rows = (line.rstrip("\r").split("\t") for line in text.split("\n"))
    try:
        for row in rows:
            if row not in ([], [""]):
                yield number, row
            number += 1 + "".join(row).count("\n")  # which a field in quotes may hold
    except csv.Error as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def read_text(path):
    """The text of a file. ValueError, naming file and line, if it is not valid UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {number}: not valid UTF-8") from None


# a field in quotes, between tabs or the ends of a line; to begin with the quote itself, and to look
# at what stands before it then, takes a fortieth of the time
QUOTED = re.compile(r'"(?<![^\t\n]")([^"]*(?:""[^"]*)*)"(?![^\t\r\n])')


def is_quoted(text):
    """Whether a table is as pandas writes it: each field with quotes in it stands in quotes and has
    its own doubled. GLUE's files have bare quotes, or none that is doubled: so one is needed."""
    fields = QUOTED.findall(text)
    inside = "".join(fields)
    return '"' in inside and text.count('"') == inside.count('"') + 2 * len(fields)


def read_label(task, written, where):
    """A label's position in the task's words, or the value of a regression. ValueError if none."""
    if task.words:
        known = task.words
        if known[0][0].isalpha():  # else they could be numbers
            known = known + [str(i) for i in range(len(known))]
        if written not in known:
            raise ValueError(f"{where}: label {written[:50]!r}, not one of {', '.join(known)}")
        return known.index(written) % len(task.words)
    if not re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?", written):  # STS-B's scale
        raise ValueError(f"{where}: {written[:50]!r} is not a number from 0 to 5")
    return float(written)


# -------------------------------------------------------------------------- download

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"
SHA256 = {  # of the files there
    "CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff",
    "SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
    "QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0",
    "STS-B.zip": "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85",
    "MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
    "QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5",
    "RTE.zip": "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee",
    "WNLI.zip": "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46",
}


def glue_root(task, folder):
    """Where the task's folder is: for the demo here, else in `folder` or a zip downloaded to it."""
    if task == "demo":
        return Path(__file__).parent
    name = TASKS[task].archive
    if name is None:
        return folder
    return zipfile.Path(download(f"{GLUE_URL}/{name}", folder / name, SHA256[name]))


# ------------------------------------------------------------------------- WordPiece

IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
                       "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")


def is_punctuation(char):
    """Unicode's punctuation, and every ASCII character but letters and digits; spaces too."""
    return unicodedata.category(char).startswith("P") or (char.isascii() and not char.isalnum())


def read_vocab(path):
    """The pieces of a vocab.txt or tokenizer.json in the order of their ids."""
    if path.suffix != ".json":
        return [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]
    pieces = {i: piece for piece, i in read_json(path)["model"]["vocab"].items()}
    return [pieces[i] for i in range(len(pieces))]


class WordPiece:
    """BERT's tokenizer: Google's ids, but for words over 100 characters; README tells, under
    deviations, where transformers' differ. vocab_file: one piece a line, its id is the line number
    from 0; or a tokenizer.json. strip_accents: None means as `lowercase`. ValueError if a special
    token is missing."""

    def __init__(self, vocab_file, lowercase=True, strip_accents=None, handle_chinese_chars=True):
        self.lowercase = lowercase
        self.handle_chinese_chars = handle_chinese_chars
        self.strip_accents = strip_accents
        if strip_accents is None:
            self.strip_accents = lowercase
        self.listed = read_vocab(Path(vocab_file))
        self.vocab = {piece: i for i, piece in enumerate(self.listed)}
        for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            if token not in self.vocab:
                raise ValueError(f"{vocab_file}: not a BERT vocabulary, {token} is missing")
        # texts repeat their words, so each is cut only once
        self.cached_ids = functools.lru_cache(maxsize=250_000)(self.stretch_ids)

    def words(self, text):
        """Google's basic tokenization: control characters and accents go, ideographs and
        punctuation are words, the rest is lower-cased."""
        dropped = "Cc Cf"  # categories of Unicode
        if self.strip_accents:
            text = unicodedata.normalize("NFD", text)
            dropped = "Cc Cf Mn"
        text = "".join(char for char in text.replace("\ufffd", "")
                       if char in "\t\n\r" or unicodedata.category(char) not in dropped)
        if self.handle_chinese_chars:
            text = IDEOGRAPH.sub(r" \g<0> ", text)
        if self.lowercase:
            text = text.lower()
        spaced = (f" {char} " if is_punctuation(char) else char for char in text)
        return "".join(spaced).split()

    def pieces(self, word):
        """Ids of the longest known prefix, then of the longest known "##rest", and so on;
        [UNK] for a word that cannot be cut up so, or has over 100 characters."""
        ids, start = [], 0
        while start < len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.vocab:
                    break
            else:
                return [self.vocab["[UNK]"]]
            ids.append(self.vocab[piece])
            start = end
        return ids or [self.vocab["[UNK]"]]

    def stretch_ids(self, stretch):
        return [i for word in self.words(stretch) for i in self.pieces(word)]

    def ids(self, text):
        # no rule looks across a plain space, so the stretches between them can be cached
        return [i for stretch in text.split(" ") for i in self.cached_ids(stretch)]

    def encode(self, text_a, text_b=None, max_length=128):
        """[CLS] a [SEP] or [CLS] a [SEP] b [SEP] as (input_ids, token_type_ids), two lists of at
        most max_length. The longer text, of equal ones b, loses pieces until a pair fits."""
        a, b = self.ids(text_a), self.ids(text_b or "")
        room = max_length - (2 if text_b is None else 3)
        while len(a) + len(b) > room:
            (a if len(a) > len(b) else b).pop()
        separator = [self.vocab["[SEP]"]]
        first = [self.vocab["[CLS]"], *a, *separator]
        second = [] if text_b is None else b + separator
        return first + second, [0] * len(first) + [1] * len(second)


def load_tokenizer(folder):
    """The WordPiece of a model's folder, with the ids of transformers 5, which takes the pieces
    from tokenizer.json, if there is one, and the settings from tokenizer_config.json. ValueError if
    a file of it is damaged, contradicts another or asks for what is not known here."""
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json", {})
    backend = read_json(folder / "tokenizer.json", {})
    settings = {"lowercase": config.get("do_lower_case", True),
                "strip_accents": config.get("strip_accents"),
                "handle_chinese_chars": config.get("tokenize_chinese_chars", True)}
    try:
        vocab_file = "vocab.txt"
        if backend:
            vocab_file = "tokenizer.json"
            # the two files must agree: which one transformers follows depends on the class
            prefix = backend["model"]["continuing_subword_prefix"]
            found = {**backend["normalizer"], "prefix": prefix}
            wanted = {"type": "BertNormalizer", "clean_text": True, **settings, "prefix": "##"}
            if found != wanted:
                raise ValueError(f"tokenizer.json: {str(found):.200}, tokenizer_config: {wanted}")
        tokenizer = WordPiece(folder / vocab_file, **settings)
        # texts are not searched for tokens that were added, of which one of three files tells
        added = list(read_json(folder / "added_tokens.json", {}))
        for token in [*config.get("added_tokens_decoder", {}).values(),
                      *backend.get("added_tokens", [])]:
            added.append(token["content"])
        if not set(added) <= {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}:
            raise ValueError(f"tokens were added to its vocabulary: {str(added):.200}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its tokenizer is not known here ({error})") from None
    # transformers lower-cases, if nothing says otherwise
    cased = sum(piece != piece.lower() for piece in tokenizer.vocab)
    if "do_lower_case" not in config and cased > 5 + len(tokenizer.vocab) / 20:
        raise ValueError(f"{folder}: {cased} pieces have upper-case letters; write do_lower_case, "
                         "true or false, into its tokenizer_config.json")
    return tokenizer


def save_tokenizer(tokenizer, folder, max_length):
    """Write vocab.txt and tokenizer_config.json, as transformers reads them, into a folder."""
    folder = Path(folder)
    (folder / "vocab.txt").write_bytes("\n".join(tokenizer.listed).encode())
    write_json({"tokenizer_class": "BertTokenizer", "do_lower_case": tokenizer.lowercase,
                "strip_accents": tokenizer.strip_accents,
                "tokenize_chinese_chars": tokenizer.handle_chinese_chars,
                "model_max_length": max_length}, folder / "tokenizer_config.json")


# --------------------------------------------------------------------------- batches

@dataclass
class Encoded:
    """A split as token ids, end to end without padding."""

    tokens: torch.Tensor  # (sum of lengths,) int32
    starts: torch.Tensor  # (N,) int64: example i is tokens[starts[i]:starts[i] + lengths[i]]
    lengths: torch.Tensor  # (N,) int64, on the CPU
    first: torch.Tensor  # (N,) int64: tokens of example i up to its first [SEP], which counts
    labels: torch.Tensor  # (N,) int64, or float32 for regression

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        """The same on another device, where its batches are then cut."""
        return Encoded(self.tokens.to(device), self.starts.to(device), self.lengths,
                       self.first.to(device), self.labels.to(device))

    def sha256(self):
        """Of the token ids and labels."""
        return hashlib.sha256(bytes(self.tokens.numpy()) + bytes(self.labels.numpy())).hexdigest()

    def head(self, count):
        """The first `count` examples, or all if there are fewer."""
        return Encoded(self.tokens, self.starts[:count], self.lengths[:count], self.first[:count],
                       self.labels[:count])

    def batch(self, index):
        """The examples `index` (B,), padded to the longest: a dict of input_ids, attention_mask,
        token_type_ids (B, T), labels (B,) and index (B,), where the tokens are."""
        device, lengths = self.tokens.device, self.lengths[index, None]  # (B, 1)
        position = torch.arange(int(lengths.max()), device=device)  # (T,)
        index, lengths = sent(index, device), sent(lengths, device)
        real = position < lengths  # (B, T)
        # where they lie; padding reads the example's last token, which then becomes [PAD]
        where = self.starts[index, None] + position.minimum(lengths - 1)  # (B, T)
        second = real & (position >= self.first[index, None])  # (B, T)
        return {"input_ids": self.tokens[where].long() * real,  # [PAD] is id 0
                "attention_mask": real.long(), "token_type_ids": second.long(),
                "labels": self.labels[index], "index": index}


def encode_task(examples, tokenizer, max_length=128):
    """list[Example] -> Encoded, with at most `max_length` tokens an example."""
    tokens, lengths, first, labels = array.array("i"), [], [], []
    for text_a, text_b, label in examples:
        input_ids, token_type_ids = tokenizer.encode(text_a, text_b, max_length)
        tokens.extend(input_ids)
        lengths.append(len(input_ids))
        first.append(token_type_ids.count(0))
        labels.append(label)
    lengths = torch.tensor(lengths)
    return Encoded(torch.frombuffer(tokens, dtype=torch.int32), lengths.cumsum(0) - lengths,
                   lengths, torch.tensor(first), torch.tensor(labels))


def inputs(batch):
    """What a model is called with."""
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


def sent(tensor, device):
    """A small CPU tensor on `device`; nothing waits until a GPU has it."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def batches_by_length(data, tokens):
    """All examples, the longest first, in batches of at most `tokens` with their padding."""
    order = data.lengths.argsort(descending=True)
    while len(order):
        count = max(1, tokens // int(data.lengths[order[0]]))
        yield data.batch(order[:count])
        order = order[count:]


def batches(data, batch_size, seed, epoch=0, start=0):
    """The shuffled batches of one epoch, each of examples of similar length. The order is a
    function of (seed, epoch) alone; `start` skips what an interrupted epoch had already had."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    # 50 batches of examples at random, cut into batches in the order of their lengths
    cut = []
    for bucket in torch.randperm(len(data), generator=generator).split(50 * batch_size):
        by_length = bucket[data.lengths[bucket].argsort(stable=True)]
        cut.extend(by_length.split(batch_size))
    # then these at random, so that long and short ones take turns
    for i in torch.randperm(len(cut), generator=generator)[start:].tolist():
        yield data.batch(cut[i])


# --------------------------------------------------------------------------- metrics

def score(task, predictions, labels):
    """GLUE's scores of a task, as fractions: {"accuracy": ..., "f1": ...} and the like.
    predictions, labels: (N,) class numbers, or values. What is not defined (no variance) is 0."""
    predictions = np.asarray(predictions)
    labels = np.asarray(labels)
    return {name: METRICS[name](predictions, labels) for name in TASKS[task].metrics}


def accuracy(predictions, labels):
    return float(np.mean(predictions == labels))


def f1(predictions, labels):
    """Of class 1 of two."""
    return float(2 * np.sum(predictions * labels) / max(1, np.sum(predictions + labels)))


def pearson(predictions, labels):
    if np.ptp(predictions) * np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


def ranks(values):
    """Rank of each value; equal values share their mean rank."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def spearman(predictions, labels):
    return pearson(ranks(predictions), ranks(labels))


# Matthews' coefficient of two classes is Pearson's of the 0/1 vectors
METRICS = {"accuracy": accuracy, "f1": f1, "matthews": pearson,
           "pearson": pearson, "spearman": spearman}
