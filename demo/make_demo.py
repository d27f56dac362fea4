"""Make the demo: a small world in controlled English, a BERT pre-trained on a corpus about it, and
a three-way inference task that asks for what only the corpus tells. All follows from a seed.

Run:   python demo/make_demo.py             writes demo/*.tsv and, in 10 minutes, demo/model/

The world has animals, each with a name, a kind and its class, a colour, a home, a food and, as
every animal of its kind, a prey. The corpus states these facts again and again. The task says what
an animal is doing ("riku sleeps by the river .") and asks what follows from it ("a white animal
sleeps by the river ."), which is for those to tell who know that riku is white. Two thirds of the
animals occur in train.tsv and dev.tsv, whose labels give their facts away as well. The others occur
in dev_unseen.tsv alone: what is asked there, fine-tuning never told."""

import itertools
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cap_min  # noqa: E402
from bert_min import BertClassifier, BertConfig, save_safetensors  # noqa: E402
from data_glue import TASKS, Example, WordPiece, batches, encode_task, inputs  # noqa: E402
from data_glue import save_tokenizer  # noqa: E402

# ----------------------------------------------------------------------------- world

ANIMALS, SEEN = 96, 64  # in the world; in the fine-tuning data
KIND_CLASS = {"heron": "bird", "owl": "bird", "trout": "fish", "pike": "fish",
              "wolf": "mammal", "hare": "mammal", "moth": "insect", "beetle": "insect"}
KINDS = list(KIND_CLASS)
PREY = dict(zip(KINDS, KINDS[3:] + KINDS[:3]))  # what a kind hunts
VALUES = {"kind": KINDS, "class": sorted(set(KIND_CLASS.values())), "prey": KINDS,
          "colour": "red blue green white black grey".split(),
          "home": "mill castle orchard harbour valley quarry".split(),
          "food": "seeds worms berries moss crumbs honey".split()}
ACTIONS = "sleeps sings waits plays hides rests swims digs".split()
PLACES = "river bridge tree road rock well gate hill".split()


def make_world(seed=0):
    """{name of an animal: {"kind", "class", "prey", "colour", "home", "food"}}; the first SEEN of
    them are those of the fine-tuning data."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    names = ["".join(pair) for pair in itertools.permutations(syllables, 2)]
    world = {}
    for name in rng.sample(names, ANIMALS):
        kind = rng.choice(KINDS)
        world[name] = {"kind": kind, "class": KIND_CLASS[kind], "prey": PREY[kind]}
        for fact in ("colour", "home", "food"):
            world[name][fact] = rng.choice(VALUES[fact])
    return world


def article(words):
    return "an" if words[0] in "aeiou" else "a"


def predicate(fact, value):
    """What is said of an animal with this fact: "is red", "eats seeds"."""
    return {"kind": f"is {article(value)} {value}", "class": f"is {article(value)} {value}",
            "colour": f"is {value}", "home": f"lives in the {value}", "food": f"eats {value}",
            "prey": f"hunts the {value}"}[fact]


def description(fact, value):
    """A noun phrase without article that only an animal with this fact fits: "red animal"."""
    habit = f"animal that {predicate(fact, value)}"
    return {"kind": value, "class": value, "colour": f"{value} animal",
            "home": f"animal from the {value}", "food": habit, "prey": habit}[fact]


def situation(rng):
    return f"{rng.choice(ACTIONS)} by the {rng.choice(PLACES)}"


# ---------------------------------------------------------------------------- corpus


def portrait(facts, rng):
    """A noun phrase of several facts: "red bird from the mill that hunts the moth"."""
    words = [rng.choice([facts["kind"], facts["class"], "animal"])]
    if rng.random() < 0.5:
        words.insert(0, facts["colour"])
    if rng.random() < 0.4:
        words.append(f"from the {facts['home']}")
    if rng.random() < 0.5:
        habit = rng.choice(["food", "food", "prey"])
        words.append(f"that {predicate(habit, facts[habit])}")
    return " ".join(words)


def one_fact(facts, rng):
    fact = rng.choice(list(facts))
    return predicate(fact, facts[fact])


def passage(first, second, rng):
    """Two sentences, the first about the animal `first` = (name, facts), by its name; the second
    about `second`, by "it" or by what it is. In the corpus both are the same animal."""
    (name, facts), (_, others) = first, second
    one, two = portrait(facts, rng), portrait(others, rng)
    [start] = rng.choices([f"{name} is {article(one)} {one}", f"{name} {one_fact(facts, rng)}",
                           f"{name} the {one} {situation(rng)}", f"{name} {situation(rng)}"],
                          [4, 2, 1, 3])
    some = rng.choice([article(two), "no", "the"])
    [end] = rng.choices([f"it is {article(two)} {two}", f"it {one_fact(others, rng)}",
                         f"the {two} {one_fact(others, rng)}", f"{some} {two} {situation(rng)}"],
                        [4, 2, 2, 2])
    return f"{start} .", f"{end} ."


def make_corpus(world, count, seed, strangers=0.0):
    """`count` passages as Examples; the label is 1 where the second sentence is about any animal
    at random, as happens to the share `strangers` of them, and 0 where it follows the first."""
    rng, animals = random.Random(f"corpus {seed}"), list(world.items())
    corpus = []
    for _ in range(count):
        first = second = rng.choice(animals)
        label = int(rng.random() < strangers)
        if label:
            second = rng.choice(animals)
        corpus.append(Example(*passage(first, second, rng), label))
    return corpus


# ------------------------------------------------------------------------------ task


def question(world, names, rng):
    """(premise, hypothesis, label) about one of the animals `names`."""
    name, fact = rng.choice(names), rng.choice(list(VALUES))
    doing = asked = situation(rng)
    value = world[name][fact]
    label = rng.choice(["entailment", "neutral", "contradiction"])
    negated = label == "contradiction"
    if label == "neutral":  # about some other animal, or about something else that is done
        negated = rng.random() < 0.5
        if rng.random() < 0.8:
            value = rng.choice([other for other in VALUES[fact] if other != value])
        while value == world[name][fact] and asked == doing:
            asked = situation(rng)
    words = description(fact, value)
    some = "no" if negated else article(words)
    return f"{name} {doing} .", f"{some} {words} {asked} .", label


def make_task(world, rows, seed=0):
    """{split: rows of (premise, hypothesis, label)}, no row twice. rows: {split: how many}."""
    names, taken, found = list(world), set(), {}
    for split, count in rows.items():
        rng = random.Random(f"{split} {seed}")
        group = names[SEEN:] if split == "dev_unseen" else names[:SEEN]
        found[split] = []
        while len(found[split]) < count:
            row = question(world, group, rng)
            if row not in taken:
                taken.add(row)
                found[split].append(row)
    return found


def right_without_facts(examples):
    """Share of examples that are labelled rightly by one who knows no animal: neutral where the
    hypothesis has another situation than the premise, else contradiction where it denies."""
    words, right = TASKS["demo"].words, 0
    for premise, hypothesis, label in examples:
        guess = "contradiction" if hypothesis.startswith("no ") else "entailment"
        if premise.split()[1:] != hypothesis.split()[-5:]:
            guess = "neutral"
        right += guess == words[label]
    return right / len(examples)


def write_task(world, folder):
    """train.tsv, dev.tsv and dev_unseen.tsv, as `data_glue.load("demo", ...)` reads them."""
    for split, rows in make_task(world, {"train": 9600, "dev": 1200, "dev_unseen": 1200}).items():
        lines = ["premise\thypothesis\tlabel", *("\t".join(row) for row in rows)]
        (folder / f"{split}.tsv").write_bytes(("\n".join(lines) + "\n").encode())


# ---------------------------------------------------------------------- pre-training


def make_vocabulary(corpus):
    """Special tokens, then every word of the corpus."""
    words = {word for passage in corpus for text in passage[:2] for word in text.split()}
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]


def hide(input_ids, mask_id, size, share):
    """BERT's corruption of `share` of the words: of these 80 % become [MASK], 10 % any word, 10 %
    stay. Returns (corrupted ids, which positions are to be predicted)."""
    hidden = (torch.rand(input_ids.shape) < share) & (input_ids > mask_id)
    fate = torch.rand(input_ids.shape)
    anything = torch.randint_like(input_ids, mask_id + 1, size)
    corrupted = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, anything, input_ids))
    return torch.where(hidden, corrupted, input_ids), hidden


def pretrain(model, data, epochs, device, dtype, mask_id=4, share=0.3, lr=1e-3, batch_size=128):
    """Masked-language modelling, and BERT's next-sentence task, which trains the pooler, on each
    (corpus, epochs) of `data` in turn. Dropout is off: the model is small, the corpus is not.
    Returns guess(hidden (M, D)) -> (M, vocabulary), the logits of the words."""
    width, size = model.config.hidden_size, model.config.vocab_size
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)).to(device)
    bias = nn.Parameter(torch.zeros(size, device=device))
    parameters = [*model.parameters(), *head.parameters(), bias]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    plan = [(corpus, epoch) for corpus, count in zip(data, epochs) for epoch in range(count)]
    total, step = sum(math.ceil(len(corpus) / batch_size) for corpus, _ in plan), 0

    def guess(hidden):
        return (head(hidden) @ model.bert.embeddings.word_embeddings.weight.T).float() + bias

    model.eval()
    for corpus, epoch in plan:
        for batch in batches(corpus, batch_size, 0, epoch):
            optimizer.param_groups[0]["lr"] = lr * cap_min.linear_lr(step, total, total // 10)
            ids, hidden = hide(batch["input_ids"], mask_id, size, share)
            hidden &= (batch["labels"] == 0)[:, None]  # only what fits together teaches facts
            wanted = batch["input_ids"][hidden].to(device)
            batch, hidden = batch | {"input_ids": ids}, hidden.to(device)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with cap_min.autocast(device, dtype):
                tokens, pooled = model.bert(*inputs(batch))
                words, follows = guess(tokens[hidden]), model.classifier(pooled)
            word_loss = F.cross_entropy(words, wanted)
            sentence_loss = F.cross_entropy(follows.float(), batch["labels"])
            (word_loss + sentence_loss).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 100 == 0:
                print(f"step {step}/{total} | words {word_loss:.2f} | next sentence "
                      f"{sentence_loss:.2f}", flush=True)
    return guess


@torch.no_grad()
def facts_guessed(model, guess, world, tokenizer, device):
    """Share of all facts of all animals that are guessed, among the values they might have, from
    the sentence that states them with the value hidden: "riku is [MASK] ."."""
    right = []
    for name, facts in world.items():
        for fact, value in facts.items():
            ids, _ = tokenizer.encode(f"{name} {predicate(fact, value)} .")
            position = ids.index(tokenizer.vocab[value])
            ids[position] = tokenizer.vocab["[MASK]"]
            logits = guess(model.bert(torch.tensor([ids], device=device))[0][0, position])
            right.append(value == max(VALUES[fact], key=lambda v: logits[tokenizer.vocab[v]]))
    return sum(right) / len(right)


def make_model(world, folder):
    """Pre-train the demo's model on two corpora, one after the other, and write it."""
    cap_min.tune_cpu()
    corpora = [make_corpus(world, 50_000, 0), make_corpus(world, 50_000, 1, strangers=0.5)]
    vocabulary = make_vocabulary(corpora[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = WordPiece(folder / "vocab.txt")
    args = cap_min.parse([])
    device = cap_min.choose_device(args)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=144, num_hidden_layers=4,
                        num_attention_heads=4, intermediate_size=576, max_position_embeddings=48,
                        initializer_range=0.06)
    model = BertClassifier(config).to(device)
    data = [encode_task(corpus, tokenizer, config.max_position_embeddings) for corpus in corpora]
    guess = pretrain(model, data, (4, 9), device, args.dtype)
    print(f"facts guessed: {facts_guessed(model, guess, world, tokenizer, device):.1%}")
    save_tokenizer(tokenizer, folder, config.max_position_embeddings)
    config.to_json(folder / "config.json")
    weights = {f"bert.{name}": tensor.half() for name, tensor in model.bert.state_dict().items()}
    save_safetensors(weights, folder / "model.safetensors")


if __name__ == "__main__":
    write_task(make_world(), HERE)
    make_model(make_world(), HERE / "model")
