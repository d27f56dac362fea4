"""Tests of the demo: its world, task and model, and its walk.

Run:  python -m pytest -q demo"""

import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import make_demo  # noqa: E402
from walk import walk  # noqa: E402

from bert_min import BertClassifier, BertConfig, from_pretrained, load_safetensors  # noqa: E402
from cap_min import encoder_linears  # noqa: E402
from data_glue import NLI, TASKS, WordPiece, encode_task, inputs, load  # noqa: E402
from data_glue import load_tokenizer  # noqa: E402

WORLD = make_demo.make_world()
NAMES = list(WORLD)
SPLITS = {split: load("demo", split) for split in TASKS["demo"].files}
NLI_WORDS = list(NLI)


def rule(premise, hypothesis):
    """What follows, told from the words alone and the facts: NLI's label."""
    name, doing = re.fullmatch(r"(\w+) (\w+ by the \w+) \.", premise).groups()
    some, who, asked = re.fullmatch(r"(a|an|no) (.+) (\w+ by the \w+) \.", hypothesis).groups()
    facts = WORLD[name]
    fitting = (facts["kind"], facts["class"], f"{facts['colour']} animal",
               f"animal from the {facts['home']}", f"animal that eats {facts['food']}",
               f"animal that hunts the {facts['prey']}")
    if who not in fitting or doing != asked:
        return "neutral"
    return "contradiction" if some == "no" else "entailment"


def test_the_files_are_what_the_seed_gives(tmp_path):
    """Made anew, the files are the same byte for byte; another seed makes others."""
    make_demo.write_task(WORLD, tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.tsv").read_bytes() == (HERE / f"{split}.tsv").read_bytes()
    assert make_demo.make_world(0) == WORLD != make_demo.make_world(1)
    rows = [make_demo.make_task(WORLD, {"dev": 50}, seed) for seed in (0, 1)]
    assert rows[0] != rows[1]
    corpora = [make_demo.make_corpus(WORLD, 20, seed) for seed in (0, 0, 1)]
    assert corpora[0] == corpora[1] != corpora[2]


def test_what_can_be_told_without_facts():
    """Other words after the name: neutral. "no ...": contradiction, else entailment. This rule
    knows no animal and is right in 70 to 73 % of the rows: what the README calls the floor."""
    for split in SPLITS.values():
        assert 0.70 < make_demo.right_without_facts(split) < 0.73


@pytest.mark.parametrize("split", SPLITS)
def test_labels_follow_from_the_facts(split):
    """By `rule`, which reads the sentences; each label is about a third of the rows, and each
    half of the neutral ones is affirmed or denied."""
    counts = dict.fromkeys(NLI_WORDS, 0)
    denied = 0
    for premise, hypothesis, label in SPLITS[split]:
        assert rule(premise, hypothesis) == NLI_WORDS[label], (premise, hypothesis)
        counts[NLI_WORDS[label]] += 1
        denied += label == NLI_WORDS.index("neutral") and hypothesis.startswith("no ")
    size = len(SPLITS[split])
    assert all(abs(count / size - 1 / 3) < 0.05 for count in counts.values())
    assert abs(denied / counts["neutral"] - 1 / 2) < 0.07


def test_fine_tuning_never_tells_what_dev_unseen_asks():
    """No animal of dev_unseen occurs in the training data or in dev, so none of its facts does,
    and every row of dev_unseen is about one; all rows of all splits are different. The corpus
    tells every fact of every animal."""
    seen, unseen = set(NAMES[:make_demo.SEEN]), set(NAMES[make_demo.SEEN:])
    assert len(seen) == 64 and len(unseen) == 32
    for split, examples in SPLITS.items():
        for premise, hypothesis, _ in examples:
            names = set(f"{premise} {hypothesis}".split()) & (seen | unseen)
            assert len(names) == 1 and names <= (unseen if split == "dev_unseen" else seen)
    rows = [row for examples in SPLITS.values() for row in examples]
    assert len({row[:2] for row in rows}) == len(rows)
    told = {name: set() for name in NAMES}
    for first, _, _ in make_demo.make_corpus(WORLD, 50_000, 0):
        told[first.split()[0]] |= set(first.split())
    for name, facts in WORLD.items():
        assert told[name] >= set(facts.values()), name


def test_corruption_for_masked_language_modelling():
    """Of the words, here 30 % are to be predicted; of these 8 in 10 become [MASK], 1 in 10 any
    word. Special tokens, ids up to 4, are left alone."""
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (1000, 50))
    corrupted, hidden = make_demo.hide(ids, 4, 100, 0.3)
    assert not hidden[ids <= 4].any() and torch.equal(corrupted[~hidden], ids[~hidden])
    assert hidden[ids > 4].float().mean().item() == pytest.approx(0.3, abs=0.01)
    masked = corrupted[hidden] == 4
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.01)
    same = (corrupted == ids)[hidden]
    assert same.float().mean().item() == pytest.approx(0.1 + 0.1 / 95, abs=0.01)
    assert (corrupted[hidden] >= 4).all()


def test_facts_guessed(tmp_path):
    """Of the values a fact might have, the one with the highest logit is the guess: here always
    the last in the vocabulary, which is right for the animals that have it."""
    words = make_demo.make_vocabulary(make_demo.make_corpus(WORLD, 5000, 0))
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    model = BertClassifier(BertConfig(vocab_size=len(words), hidden_size=8, num_hidden_layers=1,
                                      num_attention_heads=1, intermediate_size=8)).eval()
    right = [value == max(make_demo.VALUES[fact], key=words.index)
             for facts in WORLD.values() for fact, value in facts.items()]
    share = make_demo.facts_guessed(model, lambda hidden: torch.arange(len(words)), WORLD,
                                    WordPiece(tmp_path / "vocab.txt"), torch.device("cpu"))
    assert share == sum(right) / len(right)


def test_the_model_is_small_and_transformers_loads_it():
    """About a million encoder weights in fp16, at most 4 MB; transformers makes the same pooled
    vectors of it, and every word of the task is in its vocabulary."""
    folder = HERE / "model"
    stored = load_safetensors(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert (folder / "model.safetensors").stat().st_size < 4e6
    ours = from_pretrained(folder, 3).eval()
    assert sum(layer.weight.numel() for layer in encoder_linears(ours).values()) == 995_328
    data = encode_task(SPLITS["dev_unseen"][:50], load_tokenizer(folder), 48)
    assert not (data.tokens == 1).any()  # [UNK]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(folder).float().eval()
    ids, mask, segments = inputs(data.batch(torch.arange(50)))
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask, token_type_ids=segments).pooler_output
        assert torch.allclose(ours(ids, mask, segments)[1], wanted, atol=1e-5)
    assert BertConfig.from_json(folder / "config.json").hidden_size == 144


def test_the_walk_is_true():
    """demo/README.md is what demo/walk.py computes: the same words, and the same numbers to 1 % or
    3 in the last digit: another processor rounds otherwise, and the teacher's training adds up what
    that changes."""
    number = r"-?\d[\d,]*(?:\.\d+)?"
    told, found = (HERE / "README.md").read_text(encoding="utf-8"), walk()
    assert len(told.splitlines()) <= 120
    assert re.sub(number, "#", told) == re.sub(number, "#", found), "run python demo/walk.py"
    for one, other in zip(re.findall(number, told), re.findall(number, found)):
        digits = len(one.partition(".")[2])  # the last one may differ by 3, of whole numbers by 0
        one, other = (float(text.replace(",", "")) for text in (one, other))
        assert abs(one - other) <= (max(3.03 * 10 ** -digits, 0.01 * abs(one)) if digits else 0)


def test_pre_training_learns_from_the_corpus(tmp_path):
    """A tiny BERT learns 32 passages by heart: of their words, hidden one at a time, it guesses
    over half, and whether the second sentence follows it knows of nine in ten. Of the words after
    a stranger, from which it must not learn facts, it guesses fewer."""
    corpus = make_demo.make_corpus(WORLD, 32, 0, strangers=0.5)
    vocabulary = make_demo.make_vocabulary(corpus)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    data = encode_task(corpus, WordPiece(tmp_path / "vocab.txt"), 48)
    torch.manual_seed(0)
    model = BertClassifier(BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=48, initializer_range=0.1))
    guess = make_demo.pretrain(model, [data], [150], torch.device("cpu"), "fp32", lr=1e-2)
    batch = data.batch(torch.arange(32))
    follows, _ = model(*inputs(batch))
    assert (follows.argmax(1) == batch["labels"]).float().mean() > 0.9
    right = {0: [], 1: []}
    ids, mask, segments = inputs(batch)
    for position in range(1, ids.size(1)):
        hidden = ids.clone()
        hidden[:, position] = 4  # [MASK]
        guessed = guess(model.bert(hidden, mask, segments)[0][:, position]).argmax(1)
        for word, wanted, label in zip(guessed, ids[:, position], batch["labels"]):
            if wanted > 4:  # no special token
                right[int(label)].append(bool(word == wanted))
    share = {label: sum(hits) / len(hits) for label, hits in right.items()}
    assert share[0] > 0.5 and share[0] > share[1] + 0.2
