"""BERT for sequence classification, small enough to read in one sitting: the model, and its weights
in and out of Hugging Face's format (config.json, model.safetensors).

Paper:  Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (arXiv 1810.04805).
Use:    from bert_min import from_pretrained, save_pretrained
        model = from_pretrained("bert-base-uncased", num_labels=3)
        logits, pooled = model(input_ids, attention_mask, token_type_ids)

Symbols in the shape comments
    B  examples in a batch          D  hidden_size           F  intermediate_size
    T  tokens in the longest one    H  attention heads       L  num_labels
    Q  queries: T, or 1 where the last layer computes [CLS] alone
Modules are named as in `BertForSequenceClassification`, so that files go both ways untranslated."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import re
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # layers without heads
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

# ---------------------------------------------------------------------------- config

@dataclasses.dataclass
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

    @classmethod
    def from_json(cls, path):
        """The configuration in a Hugging Face config.json, where null stands for the default.
        ValueError where it is malformed or not that of a plain BERT."""
        raw, config = read_json(path), cls()
        known = {"model_type": ["bert"], "hidden_act": ["gelu", "gelu_python"],  # the same function
                 "position_embedding_type": ["absolute"],
                 "tokenizer_class": ["BertTokenizer", "BertTokenizerFast"]}
        for key, values in known.items():
            if raw.get(key) not in (None, *values):
                raise ValueError(f"{path}: {key} is {raw[key]!r:.99}, not {values[0]!r}")
        for name in vars(config):
            if raw.get(name) is not None:
                setattr(config, name, raw[name])
        # classes are counted by their words, whose numbers JSON has as strings
        if config.id2label:
            try:
                config.id2label = {int(i): str(word) for i, word in config.id2label.items()}
            except (AttributeError, ValueError):
                raise ValueError(f"{path}: id2label does not number its labels") from None
            config.num_labels = len(config.id2label)
        return config

    def to_json(self, path):
        """Write a config.json that transformers reads as a `BertForSequenceClassification`."""
        raw = dataclasses.asdict(self)
        # what transformers wants beside the fields
        labels = self.id2label or {i: f"LABEL_{i}" for i in range(self.num_labels)}
        raw.update(id2label=labels, label2id={word: i for i, word in labels.items()},
                   architectures=["BertForSequenceClassification"], model_type="bert")
        if self.num_labels == 1:
            raw["problem_type"] = "regression"  # else transformers' pipeline takes a sigmoid
        write_json(raw, path)


# ------------------------------------------------------------------------ embeddings

class Dropout(nn.Dropout):
    """Dropout with 16 random bits an element on a CPU, drawn 4 at a time: 3 times as fast."""

    def forward(self, x):
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        # dropped if its 16-bit number, -2^15 to 2^15 - 1, is among the lowest p * 2^16
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2 ** 63, None)
        bits = bits.view(torch.int16)[:x.numel()].view_as(x)
        keep = bits.ge_(round(self.p * 2 ** 16) - 2 ** 15)  # 1 or 0
        return x * keep.to(x.dtype).div_(1 - self.p)


class Embeddings(nn.Module):
    """Sum of word, position and segment embeddings, normalised (paper, figure 2)."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size,
                                            padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids):
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        positions = self.position_embeddings.weight[:input_ids.size(1)]  # (T, D)
        return self.dropout(self.LayerNorm(x + positions))  # (B, T, D)


# ------------------------------------------------------------------------- attention

class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D/H)) V over H heads; padded keys get no weight."""

    def __init__(self, config, heads):
        super().__init__()
        self.shape = heads, config.hidden_size // config.num_attention_heads  # H, D/H
        size = math.prod(self.shape)  # D, or less where heads were removed
        self.query = nn.Linear(config.hidden_size, size)
        self.key = nn.Linear(config.hidden_size, size)
        self.value = nn.Linear(config.hidden_size, size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(self, x, key_mask, queries):
        q = self.query(queries).unflatten(2, self.shape).transpose(1, 2)  # (B, H, Q, D/H)
        k = self.key(x).unflatten(2, self.shape).transpose(1, 2)  # (B, H, T, D/H)
        v = self.value(x).unflatten(2, self.shape).transpose(1, 2)  # (B, H, T, D/H)
        if x.device.type == "cpu":
            # written out: here the fused kernel takes up to 10 times as long, backward included
            scores = (q / math.sqrt(q.size(-1))) @ k.mT + key_mask  # (B, H, Q, T)
            x = self.dropout(scores.softmax(-1).to(v.dtype)) @ v  # (B, H, Q, D/H)
        else:
            rate = self.dropout.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, key_mask, rate)  # (B, H, Q, D/H)
        return x.transpose(1, 2).flatten(2)  # (B, Q, D)


class ProjectAddNorm(nn.Module):
    """Linear map, dropout, residual connection, LayerNorm: it closes both halves of a layer."""

    def __init__(self, config, in_size):
        super().__init__()
        self.dense = nn.Linear(in_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)  # (B, Q, D)


# --------------------------------------------------------------- feed-forward, layer

class Layer(nn.Module):
    """Attention, then two linear maps with the exact, erf form of gelu between them."""

    def __init__(self, config, heads, neurons):
        super().__init__()
        attention = SelfAttention(config, heads)
        self.attention = nn.ModuleDict({
            "self": attention, "output": ProjectAddNorm(config, attention.query.out_features)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, neurons)})
        self.output = ProjectAddNorm(config, neurons)

    def forward(self, x, key_mask, queries):
        """queries: x, or only its first tokens, whose output is wanted; all tokens are keys."""
        x = self.attention["output"](self.attention["self"](x, key_mask, queries), queries)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)  # (B, Q, F) to (B, Q, D)


# ---------------------------------------------------------------- encoder and pooler

class Bert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        full = [config.num_attention_heads, config.intermediate_size]
        sizes = config.layer_sizes or [full] * config.num_hidden_layers
        layers = nn.ModuleList([Layer(config, heads, neurons) for heads, neurons in sizes])
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, cls_only=False):
        """input_ids (B,T) to hidden (B,T,D) and pooled (B,D). attention_mask: 1 = token,
        0 = padding (default: all 1). token_type_ids: 0 = first text, 1 = second (default: 0).
        cls_only: the last layer computes [CLS] alone, all that pooled needs: hidden is (B,1,D)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        # what is added to similarities: 0 where a key is a token
        key_mask = torch.where(attention_mask[:, None, None] == 0, -torch.inf, 0.0)  # (B, 1, 1, T)
        # all layers but the last
        hidden = self.embeddings(input_ids, token_type_ids)  # (B, T, D)
        *layers, last = self.encoder["layer"]
        for layer in layers:
            hidden = layer(hidden, key_mask, hidden)  # (B, T, D)
        # every token is a key of the last layer, but only [CLS] need be a query of it
        queries = hidden[:, :1] if cls_only else hidden
        hidden = last(hidden, key_mask, queries)
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

SPARSE_DENSITY = 0.15  # a layer of a higher density is faster dense


def sparse_linear(*linears):
    """The function of x (in, N) that gives W x + b (out, N), with W in CSR, of one linear layer or
    of several, stacked. It reads rows of x: activations are feature-major, one feature a row."""
    csr = torch.cat([linear.weight for linear in linears]).to_sparse_csr()
    # MKL wants 32-bit indices
    rows, columns = csr.crow_indices().int(), csr.col_indices().int()
    weight = torch.sparse_csr_tensor(rows, columns, csr.values(), csr.shape, check_invariants=True)
    bias = torch.cat([linear.bias for linear in linears])[:, None]
    return functools.partial(torch.addmm, bias, weight)


class SparseLayer(nn.Module):
    """What `Layer` computes in eval mode, with `sparse_linear`; N = B T tokens, Q queries."""

    def __init__(self, layer):
        super().__init__()
        attention = layer.attention["self"]
        self.shape = attention.shape
        self.query_key_value = sparse_linear(attention.query, attention.key, attention.value)
        self.project = sparse_linear(layer.attention["output"].dense)
        self.widen = sparse_linear(layer.intermediate["dense"])
        self.narrow = sparse_linear(layer.output.dense)
        self.norms = layer.attention["output"].LayerNorm, layer.output.LayerNorm

    def forward(self, x, key_mask, queries):
        count, length, size = queries.shape  # B, Q, D
        # attention: queries, keys and values by one product
        features = x.permute(2, 0, 1).contiguous()  # (D, B, T), no copy of what a SparseLayer made
        qkv = self.query_key_value(features.flatten(1))  # (3 D, B T)
        qkv = qkv.view(3, *self.shape, count, x.size(1)).permute(0, 3, 1, 2, 4)
        q, k, v = qkv  # (B, H, D/H, T) each
        q = q[..., :length].mT / math.sqrt(q.size(2))  # (B, H, Q, D/H)
        scores = (q @ k).add_(key_mask)  # (B, H, Q, T)
        context = v @ scores.softmax(-1).mT  # (B, H, D/H, Q)
        context = context.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # (D, B Q)
        residual = features[..., :length].flatten(1)  # (D, B Q)
        x = norm_columns(residual + self.project(context), self.norms[0])
        # feed-forward
        x = norm_columns(x + self.narrow(F.gelu(self.widen(x))), self.norms[1])
        return x.view(size, count, length).permute(1, 2, 0)  # (B, Q, D), still feature-major


def norm_columns(x, norm):
    """LayerNorm of the columns of x (D, N), not transposed: as a batch norm over D examples."""
    x = F.batch_norm(x, None, None, training=True, eps=norm.eps)
    return torch.addcmul(norm.bias[:, None], x, norm.weight[:, None])


def to_sparse(model):
    """A copy of a pruned `BertClassifier` for inference on the CPU, not to be saved or trained. Its
    forward is the same: layers of a density up to SPARSE_DENSITY compute with CSR matrices."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    layers = model.bert.encoder["layer"]
    for i, layer in enumerate(layers):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        weights = torch.cat([linear.weight.flatten() for linear in linears])
        if int(weights.count_nonzero()) <= SPARSE_DENSITY * weights.numel():
            layers[i] = SparseLayer(layer)
    return model


# --------------------------------------------------------------------- load and save

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}

REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
BERT_BASE_URL = f"{HUB}/google-bert/bert-base-uncased/resolve/{REVISION}"
BERT_BASE_FILES = {  # name: SHA-256
    "config.json": "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"}


def cache_folder():
    """Where downloads lie: CAP_CACHE, or ~/.cache/cap."""
    return Path(os.environ.get("CAP_CACHE", "~/.cache/cap")).expanduser()


def download(address, path, sha256):
    """`path`, with the file of `address` in it; one that is there is taken as it is. OSError, with
    what to do, if the file cannot be had or has another SHA-256; then nothing is left of it."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {address}", flush=True)
    try:
        torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256)
    except Exception as error:  # urllib and torch raise half a dozen types here
        raise OSError(f"{address} could not be downloaded ({str(error).strip()}); put the file at "
                      f"{path} by hand, or pass --model or --data-dir") from None
    return path


def model_folder(path_or_name):
    """The folder of a model: itself, or for `bert-base-uncased` the cache, filled on first use."""
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    if str(path_or_name).removeprefix("google-bert/") != "bert-base-uncased":
        raise FileNotFoundError(f"{path_or_name}: no such folder, nor the name bert-base-uncased")
    folder = cache_folder() / "bert-base-uncased"
    for name, sha256 in BERT_BASE_FILES.items():
        download(f"{BERT_BASE_URL}/{name}", folder / name, sha256)
    return folder


def from_pretrained(path_or_name, num_labels=2):
    """A `BertClassifier` in eval mode, from a folder (config.json with model.safetensors or
    pytorch_model.bin) or by the name `bert-base-uncased`. A pooler or classifier that is absent or
    of another size is newly initialised, other tensors are ignored, and a line tells of both;
    num_labels=None: a fine-tuned model, which must have them. ValueError, naming the first tensors,
    if one is missing, of another shape or not finite; FileNotFoundError if a file is missing."""
    folder = model_folder(path_or_name)
    config = BertConfig.from_json(folder / "config.json")
    if num_labels not in (None, config.num_labels):
        config = dataclasses.replace(config, num_labels=num_labels, id2label=None)
    path, tensors = read_weights(folder)
    tensors = {current_name(name): tensor for name, tensor in tensors.items()}
    # which tensors fit is known from shapes alone, before any memory is taken for the model
    try:
        with torch.device("meta"):
            expected = BertClassifier(config).state_dict()
    except Exception as error:  # torch raises half a dozen types here
        raise ValueError(f"{folder}/config.json: impossible sizes ({error!r:.300})") from None
    fitting, unfit = {}, []
    for name, wanted in expected.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape == wanted.shape and tensor.is_floating_point():
            fitting[name] = tensor
        elif num_labels is None or not name.startswith(("bert.pooler.", "classifier.")):
            unfit.append(name)
    if unfit:
        raise ValueError(f"{path}: {len(unfit)} tensors are missing or of another shape or type "
                         f"than config.json says: {unfit[:3]}")
    # the model itself
    model = BertClassifier(config)
    fresh = model.load_state_dict(fitting, strict=False).missing_keys
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: damaged, {name} is not finite")
    # what the user should know
    ignored = sorted(tensors.keys() - expected.keys())
    if ignored or fresh:
        print(f"{path}: ignored {len(ignored)} tensors {ignored[:2]}, newly initialised {fresh}")
    return model.eval()


def read_weights(folder):
    """(path, {name: tensor}) of the weight file in `folder`."""
    for name, load in (("model.safetensors", load_safetensors), ("pytorch_model.bin", load_bin)):
        path = folder / name
        if path.exists():
            return path, load(path)
    if any(folder.glob("*.index.json")):
        raise ValueError(f"{folder}: its weights lie in several files; load it in transformers and "
                         "save it with max_shard_size='100GB'")
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")


def current_name(name):
    """The name of a tensor in `BertClassifier`: unwrapped, with `bert.`, gamma and beta renamed."""
    name = re.sub(r"^(module\.|_orig_mod\.)*", "", name)  # DistributedDataParallel, torch.compile
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    return name


def save_pretrained(model, path):
    """Write a folder that transformers loads as a `BertForSequenceClassification`."""
    os.makedirs(path, exist_ok=True)
    model.config.to_json(f"{path}/config.json")
    save_safetensors(model.state_dict(), f"{path}/model.safetensors")


def load_bin(path):
    """{name: tensor} of a pytorch_model.bin. ValueError if anything else is in it, such as code."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors.get("state_dict", tensors)
        return {str(name): tensor.detach() for name, tensor in tensors.items()}
    except Exception:  # torch raises half a dozen types here
        raise ValueError(f"{path}: not a weight file of tensors alone") from None


def load_safetensors(path):
    """{name: tensor} of a file of 8 bytes with the length n of the header (little-endian), n bytes
    of JSON {name: {dtype, shape, data_offsets}}, then the raw data without gaps. ValueError, before
    memory is taken for any tensor, if these do not fit one another."""
    tensors = {}
    with open(path, "rb") as file:
        try:
            planned = read_header(file)
        except Exception as error:  # json and torch raise half a dozen types here
            raise ValueError(f"{path}: not a whole safetensors file ({error!r:.300})") from None
        for name, like in planned.items():
            tensors[name] = torch.empty_like(like, device="cpu")
            file.readinto(tensors[name].flatten().view(torch.uint8).numpy())
    return tensors


def read_header(file):
    """{name: tensor without memory} in the order of the data. An error, of whatever type, unless
    they fill what is left of the file, each as its dtype and shape say."""
    length = int.from_bytes(file.read(8), "little")
    if length > 10 ** 7:  # BERT-base's has 24,000 bytes
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    planned, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
        first, end = end, end + tensor.nbytes
        if entry["data_offsets"] != [first, end]:
            raise ValueError(f"{name!r:.100} does not lie at {first} to {end}")
        planned[name] = tensor
    size = os.fstat(file.fileno()).st_size - file.tell()
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, of which {size} are there")
    return planned


def save_safetensors(tensors, path):
    """Write {name: tensor} as `load_safetensors` reads it."""
    # where each tensor will lie
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for the format
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape,
                        "data_offsets": [first, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data starts aligned
    # header and tensors
    with replacing(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy(force=True))


def read_json(path, default=None):
    """The object in a JSON file, or a `default` if there is none. ValueError, naming the file, if
    it is no such file."""
    if default is not None and not Path(path).exists():
        return default
    try:
        found = json.loads(Path(path).read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not a JSON file ({error})") from None
    return found


def write_json(content, path):
    """Write an object as JSON; a file that is there is whole."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


@contextlib.contextmanager
def replacing(path):
    """A file to write to, renamed to `path` once whole, else deleted. OSError that names `path`."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave an empty file of that name
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # the second is torch's
        raise OSError(f"{path} could not be written, the disk may be full; what was there is kept "
                      f"({error})") from None
    finally:
        temporary.unlink(missing_ok=True)
