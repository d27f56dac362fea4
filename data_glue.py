"""GLUE as BERT sees it: the tasks' files, WordPiece, length-bucketed batches and GLUE's metrics.

Papers: Wang et al., "GLUE" (arXiv 1804.07461); WordPiece as in BERT (arXiv 1810.04805, section 3).
Use:    from data_glue import TASKS, WordPiece, load, encode_task, batches, score
        data = encode_task(load("mnli", "train"), WordPiece("vocab.txt"), max_length=128)
        for batch in batches(data, batch_size=32, seed=0, epoch=0): ...
Sizes:  N examples in a split, B in a batch, T tokens in the longest one
"""

import array
import functools
import hashlib
import math
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bert_min import cache_folder, download, read_json, replacing, write_json

# ----------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """Where a task's texts and labels stand, and how it is scored.
    `labels` maps a label as the file writes it to its word, in the order of the classifier's
    outputs; None means regression. A column is named by its header (in CoLA, which has none, by
    its position). A task of single sentences has no `text_b`."""

    folder: str
    text_a: str | int
    text_b: str | None
    label: str | int
    labels: dict | None
    metrics: tuple = ("accuracy",)
    archive: str | None = None  # of GLUE's server
    dev: tuple = (("dev", "dev.tsv"),)  # (split, file)

    @property
    def files(self):
        return {"train": "train.tsv", **dict(self.dev)}

    @property
    def words(self):
        """The labels' words in the order of the classifier's outputs; [] for regression."""
        if self.labels is None:
            return []
        return list(self.labels.values())


def same(*words):
    return {word: word for word in words}


def numbered(*words):
    return {str(i): word for i, word in enumerate(words)}


NLI = same("entailment", "neutral", "contradiction")
ENTAILMENT = same("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", 3, None, 1, numbered("unacceptable", "acceptable"), ("matthews",),
                 "CoLA.zip"),
    "sst2": Task("SST-2", "sentence", None, "label", numbered("negative", "positive"),
                 archive="SST-2.zip"),
    "mrpc": Task("MRPC", "#1 String", "#2 String", "Quality",
                 numbered("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Task("QQP", "question1", "question2", "is_duplicate",
                numbered("not_duplicate", "duplicate"), ("accuracy", "f1"), "QQP-clean.zip"),
    "stsb": Task("STS-B", "sentence1", "sentence2", "score", None, ("pearson", "spearman"),
                 "STS-B.zip"),
    "mnli": Task("MNLI", "sentence1", "sentence2", "gold_label", NLI, archive="MNLI.zip",
                 dev=(("dev", "dev_matched.tsv"), ("dev_mm", "dev_mismatched.tsv"))),
    "qnli": Task("QNLI", "question", "sentence", "label", ENTAILMENT, archive="QNLIv2.zip"),
    "rte": Task("RTE", "sentence1", "sentence2", "label", ENTAILMENT, archive="RTE.zip"),
    "wnli": Task("WNLI", "sentence1", "sentence2", "label",
                 numbered("not_entailment", "entailment"), archive="WNLI.zip"),
    "snli": Task("snli", "sentence1", "sentence2", "gold_label", NLI),
    "demo": Task("demo", "premise", "hypothesis", "label", NLI,
                 dev=(("dev", "dev.tsv"), ("dev_unseen", "dev_unseen.tsv"))),
}


class Example(NamedTuple):
    text_a: str
    text_b: str | None
    label: int | float  # position in the task's labels, or the value of a regression


def load(task, split, data_dir=None):
    """The examples of `split` ("train", "dev"; MNLI's mismatched set is "dev_mm").

    data_dir: the folder that holds the task's folder; without it, the demo's lies beside this file,
    and GLUE's own are downloaded once into the cache. ValueError, naming file and line, for what is
    not as the task says; FileNotFoundError for a file that is not there."""
    name = TASKS[task].files[split]
    if task == "demo" and data_dir is None:
        data_dir = Path(__file__).parent
    if data_dir is None:
        path = fetch_glue(task, name)
    else:
        path = Path(data_dir) / TASKS[task].folder / name
    return read_examples(TASKS[task], path)


def read_examples(task, path):
    """list[Example] of a file whose columns are named by `task`."""
    rows = read_rows(path)
    columns, header = [task.text_a, task.text_b, task.label], range(4)
    # a header names the columns, but in CoLA, which has four and no header
    if isinstance(task.label, str):
        number, header = next(rows, (1, []))
        for i, column in enumerate(columns):
            if column is None:
                continue
            if column not in header:
                raise ValueError(f"{path}, line {number}: no column {column!r}, only "
                                 f"{str(header):.300}")
            columns[i] = header.index(column)
    # a row each, but for those without a label
    text_a, text_b, label = columns
    examples = []
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} columns, not {len(header)}")
        # "-": SNLI's annotators did not agree
        if row[label] == "-" and task.labels == NLI:
            continue
        value = read_label(task, row[label], f"{path}, line {number}")
        second = None if text_b is None else row[text_b]
        examples.append(Example(row[text_a], second, value))
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return examples


def read_rows(path):
    """(line number, columns) for each line. GLUE's files know no quoting: only tabs separate."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}: not valid UTF-8") from None
            if text:
                yield number, text.split("\t")


def read_label(task, written, where):
    """A label's position in the task's labels, or the value of a regression. ValueError if none."""
    if task.labels is not None:
        if written not in task.labels:
            raise ValueError(f"{where}: label {written[:50]!r}, not one of "
                             f"{', '.join(task.labels)}")
        return list(task.labels).index(written)
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 5:  # STS-B's scale
        raise ValueError(f"{where}: {written[:50]!r} is not a number from 0 to 5")
    return value


# -------------------------------------------------------------------------- download

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"
SENTEVAL_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
SHA256 = {  # of the files there
    "CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff",
    "SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
    "QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0",
    "STS-B.zip": "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85",
    "MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633",
    "QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5",
    "RTE.zip": "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee",
    "WNLI.zip": "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46",
    "msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
}


def fetch_glue(task, name):
    """Path of GLUE's own file `name` in the cache, downloaded and unpacked on first use."""
    cache = cache_folder() / "glue"
    path = cache / TASKS[task].folder / name
    if path.exists():
        return path
    # MRPC has two sources, the others one archive
    if task == "mrpc":
        corpus, dev_ids = "msr_paraphrase_train.txt", "mrpc_dev_ids.tsv"
        text = split_mrpc(
            download(f"{SENTEVAL_URL}/{corpus}", cache / corpus, SHA256[corpus]),
            download(f"{GLUE_URL}/{dev_ids}", cache / dev_ids, SHA256[dev_ids]), name)
    elif TASKS[task].archive is not None:
        archive = TASKS[task].archive
        packed = download(f"{GLUE_URL}/{archive}", cache / archive, SHA256[archive])
        try:
            with zipfile.ZipFile(packed) as unpacked:
                text = unpacked.read(f"{TASKS[task].folder}/{name}")
        except (zipfile.BadZipFile, KeyError):  # put there by hand
            raise ValueError(f"{packed} is not GLUE's archive: delete it") from None
    else:
        raise FileNotFoundError(f"{path}: {task} is not downloaded; put the file there by hand "
                                "or pass --data-dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text)
    return path


def split_mrpc(corpus, dev_ids, name):
    """The bytes of MRPC's train.tsv or dev.tsv: `dev_ids` lists those pairs of the corpus."""
    dev = {tuple(line.split("\t")) for line in dev_ids.read_text().splitlines()}
    header, *rows = corpus.read_bytes().splitlines(keepends=True)
    chosen = [header]
    for row in rows:
        in_dev = tuple(row.decode().split("\t")[1:3]) in dev
        if in_dev == (name == "dev.tsv"):
            chosen.append(row)
    return b"".join(chosen)


# ------------------------------------------------------------------------- WordPiece

CJK_BLOCKS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
              (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


def clean(char):
    """What a character becomes first: nothing, a space, itself, or a word of its own."""
    category = unicodedata.category(char)
    if char in "\t\n\r":
        return " "
    if char in "\0\ufffd" or category in ("Cc", "Cf"):
        return ""
    if any(first <= ord(char) <= last for first, last in CJK_BLOCKS):
        return f" {char} "  # each ideograph is a word
    return char


def is_punctuation(char):
    """Unicode's punctuation, and every ASCII character that is no letter, digit or space."""
    return unicodedata.category(char)[0] == "P" or (char.isascii() and not char.isalnum())


class WordPiece:
    """BERT's tokenizer: the same ids as Google's for words of up to 100 characters. README tells,
    under deviations, where Google's and transformers' differ.

    vocab_file: one piece per line, its id is the line number from 0. ValueError if it is not valid
    UTF-8 or a special token is not in it."""

    def __init__(self, vocab_file, lowercase=True):
        self.vocab_file, self.lowercase = Path(vocab_file), lowercase
        lines = self.vocab_file.read_bytes().removesuffix(b"\n").split(b"\n")
        self.vocab, self.size = {}, len(lines)
        for i, line in enumerate(lines):
            try:
                self.vocab[line.decode("utf-8").strip()] = i
            except UnicodeDecodeError:
                raise ValueError(f"{vocab_file}, line {i + 1}: not valid UTF-8") from None
        for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            if token not in self.vocab:
                raise ValueError(f"{vocab_file}: not a BERT vocabulary, {token} is missing")
        # texts repeat their words, so each is cut only once
        self.cached_ids = functools.lru_cache(maxsize=1 << 18)(self.ids)

    def words(self, text):
        """Google's basic tokenization: clean, lower-case, strip accents, split punctuation off."""
        for token in "".join(map(clean, text)).split():
            if self.lowercase:
                token = unicodedata.normalize("NFD", token.lower())
                token = "".join(char for char in token if unicodedata.category(char) != "Mn")
            spaced = (f" {char} " if is_punctuation(char) else char for char in token)
            yield from "".join(spaced).split()

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

    def ids(self, text):
        return [i for word in self.words(text) for i in self.pieces(word)]

    def encode(self, text_a, text_b=None, max_length=128):
        """[CLS] a [SEP] or [CLS] a [SEP] b [SEP] as (input_ids, token_type_ids), two lists of at
        most max_length. Of a pair that is too long, the longer text loses its last piece, and
        where both are equally long the second, until it fits."""
        # no rule looks across a plain space, so the stretches between them can be cached
        a = [i for stretch in text_a.split(" ") for i in self.cached_ids(stretch)]
        b = [i for stretch in (text_b or "").split(" ") for i in self.cached_ids(stretch)]
        # a pair that is too long
        room = max_length - (2 if text_b is None else 3)
        while len(a) + len(b) > room:
            (a if len(a) > len(b) else b).pop()
        # special tokens and segments
        separator = [self.vocab["[SEP]"]]
        first = [self.vocab["[CLS]"], *a, *separator]
        second = [] if text_b is None else b + separator
        return first + second, [0] * len(first) + [1] * len(second)


def load_tokenizer(folder):
    """The WordPiece of a model's folder. ValueError if a file of it is damaged."""
    path, lowercase = Path(folder) / "tokenizer_config.json", True
    if path.exists():
        lowercase = read_json(path).get("do_lower_case", True)
    if type(lowercase) is not bool:
        raise ValueError(f"{path}: do_lower_case is neither true nor false")
    return WordPiece(Path(folder) / "vocab.txt", lowercase)


def save_tokenizer(tokenizer, folder, max_length):
    """Write vocab.txt and tokenizer_config.json as transformers reads them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "vocab.txt").write_bytes(tokenizer.vocab_file.read_bytes())
    write_json({"tokenizer_class": "BertTokenizer", "do_lower_case": tokenizer.lowercase,
                "model_max_length": max_length}, Path(folder) / "tokenizer_config.json")


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
        # which positions are tokens
        device, lengths = self.tokens.device, self.lengths[index, None]  # (B, 1)
        position = torch.arange(int(lengths.max()), device=device)[None]  # (1, T)
        index, lengths = sent(index, device), sent(lengths, device)
        real = position < lengths  # (B, T)
        # where they lie; padding reads the example's last token, which then becomes [PAD]
        where = self.starts[index][:, None] + position.minimum(lengths - 1)  # (B, T)
        second = real & (position >= self.first[index][:, None])  # (B, T)
        return {"input_ids": self.tokens[where].long() * real,  # [PAD] is id 0
                "attention_mask": real.long(), "token_type_ids": second.long(),
                "labels": self.labels[index], "index": index}


def encode_task(examples, tokenizer, max_length=128):
    """list[Example] -> Encoded, with at most `max_length` tokens an example."""
    tokens, lengths, first = array.array("i"), [], []
    for text_a, text_b, _ in examples:
        input_ids, token_type_ids = tokenizer.encode(text_a, text_b, max_length)
        tokens.extend(input_ids)
        lengths.append(len(input_ids))
        first.append(token_type_ids.count(0))
    lengths = torch.tensor(lengths)
    labels = torch.tensor([example.label for example in examples])
    return Encoded(torch.frombuffer(tokens, dtype=torch.int32), lengths.cumsum(0) - lengths,
                   lengths, torch.tensor(first), labels)


def inputs(batch):
    """What a model is called with."""
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


def sent(tensor, device):
    """A small CPU tensor on `device`; nothing waits until a GPU has it."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def batches_by_length(data, tokens):
    """All examples, the longest first, in batches of at most `tokens` with their padding."""
    lengths, order = data.lengths.sort(descending=True)
    while len(order):
        count = max(1, tokens // int(lengths[0]))
        yield data.batch(order[:count])
        lengths, order = lengths[count:], order[count:]


def batches(data, batch_size, seed, epoch=0, start=0):
    """The shuffled batches of one epoch, each of examples of similar length.

    The order is a function of (seed, epoch) alone, so (epoch, batches seen) is the whole state:
    `start` skips the batches that an interrupted epoch had already had."""
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
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    return {name: METRICS[name](predictions, labels) for name in TASKS[task].metrics}


def accuracy(predictions, labels):
    return float(np.mean(predictions == labels))


def f1(predictions, labels):
    hits = np.sum((predictions == 1) & (labels == 1))
    return float(2 * hits / max(1, np.sum(predictions == 1) + np.sum(labels == 1)))


def pearson(predictions, labels):
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
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
