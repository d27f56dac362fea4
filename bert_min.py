"""BERT for sequence classification, small enough to read in one sitting: the model, and its weights
in and out of Hugging Face's format (config.json, model.safetensors). Torch and numpy are needed.

Paper:  Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (arXiv 1810.04805).
Use:    from bert_min import from_pretrained, save_pretrained
        model = from_pretrained("bert-base-uncased", num_labels=3)
        logits, pooled = model(input_ids, attention_mask, token_type_ids)

Symbols in the shape comments
    B  examples in a batch          D  hidden_size           F  intermediate_size
    T  tokens in the longest one    H  attention heads       L  num_labels
Module names follow Hugging Face's, so that `state_dict()` has the names of
`BertForSequenceClassification` and files go both ways without a translation table.
"""

import contextlib
import copy
import dataclasses
import hashlib
import http.client
import json
import math
import os
import sys
import time
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # layers without heads
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

# ---------------------------------------------------------------------------- config

SIZE_LIMIT, LAYER_LIMIT = 2 ** 24, 200  # a config.json beyond them is damaged


@dataclass
class BertConfig:
    """Sizes and rates under Hugging Face's field names; the defaults are BERT-base's."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    num_labels: int = 2
    id2label: dict | None = None  # {0: "entailment", ...}
    layer_sizes: list | None = None  # [[heads, neurons], ...] of each layer; None: none removed

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            high = LAYER_LIMIT if field.name == "num_hidden_layers" else SIZE_LIMIT
            if field.type is int and (
                    type(value) is not int or not (field.default > 0) <= value <= high):
                raise ValueError(f"{field.name} is {value!r}, not a whole number up to {high}")
            rate = field.type is float or (field.type == float | None and value is not None)
            if rate and (type(value) not in (int, float) or not 0 <= value <= 1):
                raise ValueError(f"{field.name} is {value!r}, not a number from 0 to 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide {self.hidden_size}")
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not in the vocabulary")
        full = self.full_sizes
        if self.layer_sizes is not None and not (
                len(self.layer_sizes) == len(full) and
                all(type(n) is int and 0 <= n <= most for sizes, limits in
                    zip(self.layer_sizes, full) for n, most in zip(sizes, limits, strict=True))):
            raise ValueError(f"layer_sizes are {self.layer_sizes!r}, at most {full[0]} a layer")

    @property
    def full_sizes(self):
        """`layer_sizes` of the model before anything is removed."""
        return [[self.num_attention_heads, self.intermediate_size]] * self.num_hidden_layers

    @classmethod
    def from_json(cls, path):
        """Read a Hugging Face config.json. ValueError where it is malformed or not a plain BERT."""
        wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            for key, value in wanted.items():
                if raw.get(key, value) != value:
                    raise ValueError(f"{key} is {raw[key]!r}, only {value!r} is known here")
            if raw.get("id2label"):
                raw["id2label"] = {int(i): str(word) for i, word in raw["id2label"].items()}
                raw["num_labels"] = len(raw["id2label"])
                if sorted(raw["id2label"]) != list(range(raw["num_labels"])):
                    raise ValueError(f"id2label numbers its labels {list(raw['id2label'])}")
            known = {field.name for field in dataclasses.fields(cls)}
            return cls(**{key: value for key, value in raw.items() if key in known})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a BERT configuration ({str(error):.300})") from None

    def to_json(self, path):
        """Write a config.json that transformers reads as a `BertForSequenceClassification`."""
        raw = dataclasses.asdict(self)
        if self.layer_sizes is None:
            del raw["layer_sizes"]
        count = raw.pop("num_labels")  # transformers counts id2label instead
        labels = self.id2label or {i: f"LABEL_{i}" for i in range(count)}
        raw |= {"id2label": labels, "label2id": {word: i for i, word in labels.items()},
                "architectures": ["BertForSequenceClassification"], "model_type": "bert"}
        with replacing(path) as file:
            file.write(json.dumps(raw, indent=2).encode() + b"\n")


# ------------------------------------------------------------------------ embeddings


class Dropout(nn.Module):
    """F.dropout; on the CPU with 16 random bits an element, drawn 4 at a time: 3 times as fast."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate in (0, 1) or x.device.type != "cpu":
            return F.dropout(x, self.rate, self.training)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
        bits = bits.view(torch.int16)[:x.numel()].view_as(x)
        keep = bits.ge_(round(self.rate * 2 ** 16) - 2 ** 15)  # 1 or 0; bits begin at -2^15
        return x * keep.to(x.dtype).div_(1 - self.rate)


class Embeddings(nn.Module):
    """Sum of word, position and segment embeddings, normalised (paper, figure 2)."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size,
                                            padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids):
        positions = torch.arange(input_ids.size(1), device=input_ids.device)  # (T,)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))  # (B, T, D)


# ------------------------------------------------------------------------- attention


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D/H)) V over H heads; padded keys get no weight."""

    def __init__(self, config, heads):
        super().__init__()
        self.shape = heads, config.hidden_size // config.num_attention_heads  # H, D/H
        self.query = nn.Linear(config.hidden_size, math.prod(self.shape))
        self.key = nn.Linear(config.hidden_size, math.prod(self.shape))
        self.value = nn.Linear(config.hidden_size, math.prod(self.shape))
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(self, x, key_mask, queries):
        q, k, v = (y.unflatten(-1, self.shape).transpose(1, 2)  # (B, H, T, D/H)
                   for y in (self.query(queries), self.key(x), self.value(x)))
        if x.device.type != "cpu":
            rate = self.dropout.rate if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, key_mask, rate)
        else:  # the fused kernel would take up to 10 times as long, backward included
            scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-1, -2)  # (B, H, T, T)
            if key_mask is not None:
                scores = scores + torch.where(key_mask, 0.0, -torch.inf)
            x = self.dropout(scores.softmax(-1).to(v.dtype)) @ v  # (B, H, T, D/H)
        return x.transpose(1, 2).flatten(2)  # (B, T, D)


class ProjectAddNorm(nn.Module):
    """Linear map, dropout, residual connection, LayerNorm: it closes both halves of a layer."""

    def __init__(self, config, in_size):
        super().__init__()
        self.dense = nn.Linear(in_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)  # (B, T, D)


# --------------------------------------------------------------- feed-forward, layer


class Layer(nn.Module):
    """Attention, then two linear maps with the exact, erf form of gelu between them."""

    def __init__(self, config, heads, neurons):
        super().__init__()
        attention = SelfAttention(config, heads)
        self.attention = nn.ModuleDict({
            "self": attention, "output": ProjectAddNorm(config, math.prod(attention.shape))})
        wide = nn.Linear(config.hidden_size, neurons)
        self.intermediate = nn.ModuleDict({"dense": wide})
        self.output = ProjectAddNorm(config, neurons)

    def forward(self, x, key_mask, queries):
        """queries: x, or only its first tokens, whose output is wanted; all tokens are keys."""
        x = self.attention["output"](self.attention["self"](x, key_mask, queries), queries)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)  # (B, T, F) to (B, T, D)


# ---------------------------------------------------------------- encoder and pooler


class Bert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        sizes = config.layer_sizes or config.full_sizes
        layers = nn.ModuleList([Layer(config, heads, neurons) for heads, neurons in sizes])
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, cls_only=False):
        """input_ids (B,T) to hidden (B,T,D) and pooled (B,D). attention_mask: 1 = token,
        0 = padding (default: all 1). token_type_ids: 0 = first text, 1 = second (default: 0).
        cls_only: the last layer computes [CLS] alone, all that pooled needs: hidden is (B,1,D)."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        key_mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        hidden = self.embeddings(input_ids, token_type_ids)  # (B, T, D)
        *layers, last = self.encoder["layer"]
        for layer in layers:
            hidden = layer(hidden, key_mask, hidden)  # (B, T, D); key_mask is (B, 1, 1, T)
        hidden = last(hidden, key_mask, hidden[:, :1] if cls_only else hidden)
        return hidden, torch.tanh(self.pooler["dense"](hidden[:, 0]))  # (B, D), from [CLS]


# ------------------------------------------------------------------------ classifier


class BertClassifier(nn.Module):
    """BERT and a linear classifier on the pooled vector."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        rate = config.classifier_dropout
        self.dropout = Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.apply(self.initialise)

    def initialise(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """Arguments as for `Bert`. Returns logits (B,L) and pooled (B,D), before any dropout."""
        _, pooled = self.bert(input_ids, attention_mask, token_type_ids, cls_only=True)
        return self.classifier(self.dropout(pooled)), pooled


# ------------------------------------------------------------------ sparse inference

SPARSE_DENSITY = 0.15  # a layer with a greater share of its weights left is faster dense


class SparseLinear(nn.Module):
    """W x + b with W (out, in) in CSR, of one linear layer or of several, stacked. The product
    reads rows of x (in, N), so activations are kept feature-major: a row for each feature."""

    def __init__(self, *linears):
        super().__init__()
        csr = torch.cat([linear.weight.detach() for linear in linears]).to_sparse_csr()
        rows, columns = csr.crow_indices().int(), csr.col_indices().int()  # as MKL wants them
        self.weight = torch.sparse_csr_tensor(rows, columns, csr.values(), csr.shape,
                                              check_invariants=True)
        self.bias = torch.cat([linear.bias.detach() for linear in linears])[:, None]

    def forward(self, x):
        return torch.addmm(self.bias, self.weight, x)  # (out, N)


class SparseLayer(nn.Module):
    """What `Layer` computes in eval mode, with `SparseLinear`s; N = B T tokens, Q queries."""

    def __init__(self, layer):
        super().__init__()
        attention = layer.attention["self"]
        self.shape = attention.shape
        self.query_key_value = SparseLinear(attention.query, attention.key, attention.value)
        self.project = SparseLinear(layer.attention["output"].dense)
        self.widen = SparseLinear(layer.intermediate["dense"])
        self.narrow = SparseLinear(layer.output.dense)
        self.norms = layer.attention["output"].LayerNorm, layer.output.LayerNorm

    def forward(self, x, key_mask, queries):
        count, length, size = queries.shape  # B, Q, D
        q, k, v = (self.query_key_value(feature_major(x)).view(3, *self.shape, count, x.size(1))
                   .permute(0, 3, 1, 2, 4))  # (B, H, D/H, T) each
        q = q[..., :length].transpose(-1, -2) / math.sqrt(q.size(2))  # (B, H, Q, D/H)
        scores = q @ k  # (B, H, Q, T)
        if key_mask is not None and not key_mask.all():
            scores += torch.where(key_mask, 0.0, -torch.inf)
        context = v @ scores.softmax(-1).transpose(-1, -2)  # (B, H, D/H, Q)
        context = context.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # (D, B Q)
        x = norm_columns(feature_major(queries) + self.project(context), self.norms[0])
        x = norm_columns(x + self.narrow(F.gelu(self.widen(x))), self.norms[1])
        return x.view(size, count, length).permute(1, 2, 0)  # (B, Q, D), still feature-major


def feature_major(x):
    """(B, T, D) to (D, B T), without a copy where a `SparseLayer` made x."""
    return x.permute(2, 0, 1).flatten(1).contiguous()


def norm_columns(x, norm):
    """LayerNorm of the columns of x (D, N): a batch normalisation of D examples, for which no
    transposition is needed."""
    x = F.batch_norm(x, None, None, training=True, eps=norm.eps)
    return torch.addcmul(norm.bias[:, None], x, norm.weight[:, None])


def to_sparse(model):
    """A copy of a pruned `BertClassifier` for inference on the CPU, not to be saved or trained,
    with the same forward: layers of which at most SPARSE_DENSITY is left compute with CSR
    matrices, the others stay dense."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    layers = model.bert.encoder["layer"]
    for i, layer in enumerate(layers):
        weights = [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        kept = sum(int(weight.count_nonzero()) for weight in weights)
        if kept <= SPARSE_DENSITY * sum(weight.numel() for weight in weights):
            layers[i] = SparseLayer(layer)
    return model


# --------------------------------------------------------------------- load and save

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
HEADER_LIMIT = 10 ** 7  # bytes; BERT-base's header has 24,000

REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"
BERT_BASE_URL = f"https://huggingface.co/google-bert/bert-base-uncased/resolve/{REVISION}"
BERT_BASE_FILES = {  # name: (bytes, SHA-256)
    "config.json": (570, "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20"),
    "vocab.txt": (231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    "model.safetensors": (
        440449768, "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"),
}


def model_folder(path_or_name):
    """The folder of a model: itself, or for `bert-base-uncased` the cache, filled on first use."""
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    if str(path_or_name) != "bert-base-uncased":
        raise FileNotFoundError(f"{path_or_name}: no such folder (bert-base-uncased is the only "
                                "model that is downloaded by name)")
    folder = Path(os.environ.get("CAP_CACHE", "~/.cache/cap")).expanduser() / "bert-base-uncased"
    for name, (size, sha256) in BERT_BASE_FILES.items():
        download(f"{BERT_BASE_URL}/{name}", folder / name, size, sha256)
    return folder


SCHEME = "https://"  # nothing else is asked, and no redirect to anything else is read
PAUSES = (1, 4)  # seconds before the second and the third try
TIMEOUT = 30  # seconds without a byte


def download(address, target, size, sha256):
    """The path `target`, with the file of `address` in it; one that is there is only checked.

    OSError, with what to do, after three tries; ValueError if the file that is there is another.
    bert_min.py and data_glue.py both have this function, so that each can be taken alone."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    for pause in (*PAUSES, None):
        if target.exists():  # it was there, or another process was faster
            break
        try:
            receive(address, temporary, size, sha256)
            os.replace(temporary, target)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())
            if pause is None:
                raise OSError(f"{address} could not be downloaded ({reason}); without a network, "
                              f"put the file at {target} by hand or pass --model or --data-dir"
                              ) from None
            print(f"\n{reason}: next try in {pause} s", flush=True)
            time.sleep(pause)
        finally:
            temporary.unlink(missing_ok=True)
    with open(target, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{target} is not the file of {address}: delete it")
    return target


def receive(address, path, size, sha256):
    """Write the file of `address` to `path`. OSError unless it has `size` bytes of that SHA-256."""
    print(f"downloading {address} ({size / 1e6:.1f} MB)", flush=True)
    digest, done, start = hashlib.sha256(), 0, time.perf_counter()
    if not address.startswith(SCHEME):
        raise OSError(f"it does not start with {SCHEME}")
    request = urllib.request.Request(address, headers={"User-Agent": "cap_min"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(path, "wb") as file:
        if not response.url.startswith(SCHEME):
            raise OSError(f"it redirects to {response.url}")
        while done <= size and (part := response.read(1 << 18)):
            digest.update(part)
            done += file.write(part)
            rate = done / (time.perf_counter() - start)  # bytes per second
            if sys.stdout.isatty():
                print(f"\r{done / size:4.0%}, {rate / 1e6:.1f} MB/s, eta "
                      f"{max(0, size - done) / rate:.0f} s   ", end="", flush=True)
    if sys.stdout.isatty():
        print()
    if (done, digest.hexdigest()) != (size, sha256):
        raise OSError(f"{done} bytes of {size}, SHA-256 {digest.hexdigest()[:8]}...: another file")


def from_pretrained(path_or_name, num_labels=2):
    """Load a `BertClassifier` from a folder (config.json with model.safetensors or
    pytorch_model.bin) or by the name `bert-base-uncased`, and print what became of the tensors.

    Names with or without the prefix `bert.` and LayerNorm's old gamma/beta are understood;
    pre-training heads are ignored; a classifier that is absent or of another size is newly
    initialised. num_labels=None: a fine-tuned model, its classifier must be there as well.
    ValueError, naming the first tensors, if one that must be there is missing, of another shape
    or not finite; FileNotFoundError if a file is missing."""
    folder = model_folder(path_or_name)
    config = BertConfig.from_json(folder / "config.json")
    if num_labels not in (None, config.num_labels):
        config = dataclasses.replace(config, num_labels=num_labels, id2label=None)
    with torch.device("meta"):  # shapes alone: no memory before they are known to fit
        expected = BertClassifier(config).state_dict()
    source, tensors = read_weights(folder)
    tensors = unpack(tensors, expected, source)
    current = {current_name(name): tensor for name, tensor in tensors.items()}
    fits = {name: current[name] for name, tensor in expected.items() if name in current
            and current[name].shape == tensor.shape and current[name].is_floating_point()}
    fresh = [name for name in expected if name not in fits]
    wrong = [name for name in fresh if num_labels is None or not name.startswith("classifier.")]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors are missing or of another shape or type "
                         f"than config.json says: {', '.join(wrong[:3])}")
    model = BertClassifier(config)
    model.load_state_dict(fits, strict=False)
    wrong = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"{source}: damaged, {len(wrong)} tensors are not finite: "
                         f"{', '.join(wrong[:3])}")
    ignored = [name for name in tensors if current_name(name) not in expected]
    print(f"{source}: loaded {len(fits)} tensors ({sum(name not in tensors for name in fits)} "
          f"renamed), ignored {len(ignored)} {ignored[:2]}, newly initialised {fresh}")
    return model


def read_weights(folder):
    """(path, {name: tensor}) of the weight file in `folder`."""
    for name in ("model.safetensors", COMPACT_FILE, "pytorch_model.bin"):
        if (folder / name).exists():
            read = load_bin if name.endswith(".bin") else load_safetensors
            return folder / name, read(folder / name)
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")


def current_name(name):
    """The name a tensor has in `BertClassifier`: with prefix `bert.`, gamma/beta replaced."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    return "bert." + name if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def save_pretrained(model, path, compact=False):
    """Write config.json and model.safetensors that transformers'
    `BertForSequenceClassification.from_pretrained(path)` loads unchanged. compact: encoder
    matrices as `pack` makes them, in a file that `from_pretrained` here reads alone."""
    Path(path).mkdir(parents=True, exist_ok=True)
    model.config.to_json(Path(path) / "config.json")
    name, other = "model.safetensors", COMPACT_FILE
    tensors = model.state_dict()
    if compact:
        name, other, tensors = COMPACT_FILE, "model.safetensors", pack(tensors)
    save_safetensors(tensors, Path(path) / name)
    (Path(path) / other).unlink(missing_ok=True)  # of another model


COMPACT_FILE = "model_compact.safetensors"


def pack(tensors):
    """Each encoder matrix X as X.kept, a bit for each weight that is not 0, and X.values, those
    weights in half precision: at 97 % sparsity a 22nd of the bytes."""
    packed = {}
    for name, tensor in tensors.items():
        if name.startswith("bert.encoder.") and tensor.ndim == 2:
            kept = tensor != 0
            packed[name + ".kept"] = torch.from_numpy(np.packbits(kept.cpu().numpy()))
            packed[name + ".values"] = tensor[kept].half()
        else:
            packed[name] = tensor
    return packed


def unpack(tensors, expected, source):
    """Undo `pack`, to the shapes of `expected`. ValueError if bits and values do not fit."""
    tensors = dict(tensors)
    for name in [name for name in expected if name + ".kept" in tensors]:
        kept, values = tensors.pop(name + ".kept"), tensors.pop(name + ".values", torch.empty(0))
        count = expected[name].numel()
        fit = kept.dtype == torch.uint8 and kept.numel() == -(-count // 8)
        bits = np.unpackbits(kept.numpy()) if fit else np.zeros(1)
        if not fit or bits.sum() != values.numel() or bits[count:].any():
            raise ValueError(f"{source}: damaged, {name} has {values.numel()} values, not those of "
                             f"its {count} weights that are kept")
        tensors[name] = torch.zeros(expected[name].shape)
        tensors[name].view(-1)[torch.from_numpy(bits[:count]).bool()] = values.flatten().float()
    return tensors


def load_bin(path):
    """A pytorch_model.bin, by torch's restricted unpickler: a file cannot run code."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            odd = [name for name, tensor in tensors.items() if not is_plain(tensor)]
        if odd:
            raise TypeError(f"{odd[0]!r:.100}")
        return {str(name): tensor.detach() for name, tensor in tensors.items()}
    except Exception as error:  # torch raises half a dozen types here
        kind = f"{type(error).__name__}{f': {error}' if isinstance(error, TypeError) else ''}"
        raise ValueError(f"{path}: not a weight file of tensors alone ({kind})") from None


def is_plain(tensor):
    """Whether it is a dense tensor of numbers that are all there; a sparse one has no storage."""
    return (type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
            and not tensor.is_nested and not tensor.is_quantized
            and tensor.nbytes <= tensor.untyped_storage().nbytes())


def load_safetensors(path):
    """Read {name: tensor}. The file is 8 bytes with the length n of the header (little-endian),
    n bytes of JSON {name: {dtype, shape, data_offsets}}, then the raw data without gaps.
    ValueError, before any tensor is made, if these do not fit one another."""
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size - 8
        try:
            if length > HEADER_LIMIT:
                raise ValueError(f"{length} bytes of header in {size + 8}")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            header = check_header(header, size - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged, not a whole safetensors file "
                             f"({str(error):.300})") from None
        tensors = {}
        for name, entry in header.items():  # one after another, as they lie in the file
            first, last = entry["data_offsets"]
            raw, dtype = np.empty(last - first, np.uint8), DTYPES[entry["dtype"]]
            file.readinto(raw)
            flat = torch.from_numpy(raw).view(dtype) if len(raw) else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry["shape"])
        return tensors


def check_header(header, size):
    """The header in the order of the offsets. ValueError unless the tensors fill exactly `size`
    bytes, each as its dtype and shape say."""
    header, end = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), 0
    for name, entry in header.items():
        (first, last), shape = entry["data_offsets"], entry["shape"]
        if (len(shape) > 64 or not all(type(n) is int and n >= 0 for n in (first, last, *shape))
                or math.prod(max(1, n) for n in shape) >= 2 ** 48):
            raise ValueError(f"{name!r} has the shape {shape} at {first}")
        length = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
        if first != end or last - first != length:
            raise ValueError(f"{name!r:.100} of {length} bytes is said to lie at {first} to {last}")
        end = last
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, of which {size} are there")
    return header


def save_safetensors(tensors, path):
    """Write {name: tensor} as `load_safetensors` reads it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for the format
    for name, tensor in tensors.items():
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end := end + tensor.nbytes]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data starts aligned
    with replacing(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def replacing(path):
    """A file beside `path`, to write to, that takes its place once it is whole; where writing
    fails, nothing is left of it. OSError that names `path`."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
