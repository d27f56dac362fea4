"""Tests of the demo's world, task and model, and of its walk. Run: python -m pytest -q demo"""

import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import make_demo  # noqa: E402
from bert_min import BertConfig, from_pretrained, load_safetensors  # noqa: E402
from cap_min import encoder_linears, inputs  # noqa: E402
from data_glue import NLI, TASKS, encode_task, load, load_tokenizer  # noqa: E402

WORLD = make_demo.make_world()
NAMES = list(WORLD)
SPLITS = {split: load("demo", split) for split in TASKS["demo"].files}
FORMS = {"colour": r"(\w+) animal", "home": r"animal from the (\w+)",
         "prey": r"animal that hunts the (\w+)", "food": r"animal that eats (\w+)",
         "kind or class": r"(\w+)"}
NLI_WORDS = list(NLI)


def words_of(text):
    return set(text.split())


def rule(premise, hypothesis):
    """What follows, told from the words alone and the facts: NLI's label."""
    name, doing = re.fullmatch(r"(\w+) (\w+ by the \w+) \.", premise).groups()
    some, who, asked = re.fullmatch(r"(a|an|no) (.+) (\w+ by the \w+) \.", hypothesis).groups()
    form, value = next((form, match[1]) for form, pattern in FORMS.items()
                       if (match := re.fullmatch(pattern, who)))
    facts = WORLD[name]
    fits = value in ([facts["kind"], facts["class"]] if form == "kind or class" else [facts[form]])
    if not fits or doing != asked:
        return "neutral"
    return "contradiction" if some == "no" else "entailment"


def test_the_files_are_what_the_seed_gives():
    """Made anew, all rows are those of the files; another seed makes others."""
    rows = make_demo.make_task(WORLD, {split: len(found) for split, found in SPLITS.items()})
    for split, found in SPLITS.items():
        assert [(e.text_a, e.text_b, NLI_WORDS[e.label]) for e in found] == rows[split]
    assert make_demo.make_world(0) == WORLD != make_demo.make_world(1)
    assert make_demo.make_task(WORLD, {"dev": 50}, 1)["dev"] != rows["dev"][:50]
    corpora = [make_demo.make_corpus(WORLD, 20, seed) for seed in (0, 0, 1)]
    assert corpora[0] == corpora[1] != corpora[2]


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
            names = (words_of(premise) | words_of(hypothesis)) & (seen | unseen)
            assert len(names) == 1 and names <= (unseen if split == "dev_unseen" else seen)
    rows = [row for examples in SPLITS.values() for row in examples]
    assert len({row[:2] for row in rows}) == len(rows)
    told = {(words[0], word) for first, _, _ in make_demo.make_corpus(WORLD, 50_000, 0)
            for words in [first.split()] for word in words}
    for name, facts in WORLD.items():
        assert all((name, value) in told for value in facts.values()), name


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
    kept = (corrupted == ids)[hidden]
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / 95, abs=0.01)
    assert (corrupted[hidden] >= 4).all()


def test_the_model_is_small_and_transformers_loads_it():
    """About a million encoder weights in fp16, at most 4 MB; transformers makes the same pooled
    vectors of it, and every word of the task is in its vocabulary."""
    transformers = pytest.importorskip("transformers")
    folder = HERE / "model"
    stored = load_safetensors(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert (folder / "model.safetensors").stat().st_size < 4e6
    ours = from_pretrained(folder, 3).eval()
    assert sum(layer.weight.numel() for layer in encoder_linears(ours).values()) == 995_328
    data = encode_task(SPLITS["dev_unseen"][:50], load_tokenizer(folder), 48)
    assert not (data.tokens == 1).any()  # [UNK]
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    ids, mask, segments = inputs(data.batch(torch.arange(50)))
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask, token_type_ids=segments).pooler_output
        assert torch.allclose(ours(ids, mask, segments)[1], wanted, atol=1e-5)
    assert BertConfig.from_json(folder / "config.json").hidden_size == 144
