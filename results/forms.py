"""Forms of CAP that were tried beside those of cap_min.py, which has none of them: each changes
functions of it. results/details.md tells what came of them.

Run:  python results/forms.py --form snc-times-k [options of cap_min.py]
Lists of studies.py grid take --form too."""

import argparse
import hashlib
import sys
from pathlib import Path

import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cap_min  # noqa: E402

published = argparse.Namespace(**vars(cap_min))  # the functions as they are
density_now = [1.0]  # of the step
masks = []  # of the model


# ----------------------------------------------------------------- forms of the contrast


def mean_off(queries, index, labels, bank, *more):
    """Eq. (4) to (7) with an ancestor's mean vector taken off its vectors, and the mean of all
    ancestors' off the anchors."""
    bank = [vectors.to(queries.device, queries.dtype) for vectors in bank]
    means = [vectors.mean(0) for vectors in bank]  # (D,) each
    centred = [F.normalize(vectors - mean, dim=-1) for vectors, mean in zip(bank, means)]
    anchors = F.normalize(queries, dim=-1) - sum(means) / len(means)
    return published.contrastive_loss(anchors, index, labels, centred, *more)


def snc_times_k(logits, pooled, batch, ancestors, extra, args):
    """Eq. (8) with SnC's term times the number of snapshots, by which (7) makes it smaller."""
    terms = published.cap_terms(logits, pooled, batch, ancestors, extra, args)
    if "snc" in terms:
        terms["snc"] = terms["snc"] * len(ancestors.banks["snc"])
    return terms


def once_pruned(logits, pooled, batch, ancestors, extra, args):
    """Eq. (8) without contrastive terms while all weights are there."""
    if density_now[0] == 1:
        ancestors = cap_min.Ancestors({}, ancestors.logits, ancestors.labels)
    return published.cap_terms(logits, pooled, batch, ancestors, extra, args)


def watched_density(*position):
    density_now[0] = published.cubic_density(*position)
    return density_now[0]


def weights_only(logits, pooled, batch, ancestors, extra, args):
    """Eq. (8) whose contrastive terms train the weights alone: their gradient does not reach the
    scores, so that task and teacher decide what is kept. They are not logged."""
    terms = published.cap_terms(logits, pooled, batch, ancestors, extra, args)
    contrast = [terms.pop(name) for name in list(terms) if name in ancestors.banks]
    if not contrast:
        return terms
    sum(contrast).backward(retain_graph=True)
    for module in masks:
        module.scores.grad = None
    return terms


def known_masks(model, score_init):
    published.add_masks(model, score_init)
    masks[:] = published.masks_of(model)


# ------------------------------------------------------------------ forms of the criterion


def one_topk(model, density):
    """One top-k over all matrices in place of one in each."""
    cap_min.set_soft_masks(model, density, sparsity=0)  # which is reached: no threshold


def by_mean_score(model, density, sparsity):
    """A top-k in each matrix, whose density is in proportion to its mean sigmoid(S): SMP-S (arXiv
    2210.06210). No matrix can keep more than all; what it leaves the others share."""
    modules = cap_min.masks_of(model)
    sizes = [module.mask.numel() for module in modules]
    means = [module.scores.detach().sigmoid().mean().item() for module in modules]
    densities, left = {}, density * sum(sizes)
    # matrices that keep all, the highest means first
    for i in sorted(range(len(modules)), key=lambda i: -means[i]):
        others = [j for j in range(len(modules)) if j not in densities]
        share = left / sum(means[j] * sizes[j] for j in others)
        densities[i] = min(1.0, share * means[i])
        left -= densities[i] * sizes[i]
    for i, module in enumerate(modules):
        module.mask = cap_min.topk_mask(module.scores, densities[i])


FORMS = {  # name: {function of cap_min: what it is in this form}
    "mean-off": {"contrastive_loss": mean_off},
    "snc-times-k": {"cap_terms": snc_times_k},
    "once-pruned": {"cap_terms": once_pruned, "cubic_density": watched_density},
    "weights-only": {"cap_terms": weights_only, "add_masks": known_masks},
    "one-topk": {"set_masks": one_topk},
    "smp-s": {"set_soft_masks": by_mean_score},
}
METHODS_OF = {  # with others these forms change nothing, or there is no cubic density or no score
    "once-pruned": ["magnitude", "movement", "soft"], "one-topk": ["movement"], "smp-s": ["soft"],
    "weights-only": ["movement", "soft"]}


def parse(argv):
    """cap_min's command line, in which --form may stand; its record tells of it. A form that is
    none of this --method is refused."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--form", choices=FORMS)
    given, rest = parser.parse_known_args(argv)
    args = published.parse(rest)
    if given.form is not None:
        methods = METHODS_OF.get(given.form, [args.method])
        if args.method not in methods:
            parser.error(f"--form {given.form} is one of --method {' or '.join(methods)}")
        args.form = [given.form]  # a list, as in older records
        args.forms_sha256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return args


def main(argv=None):
    """As cap_min.main."""
    for form in getattr(parse(argv), "form", []):
        for name, function in FORMS[form].items():
            setattr(cap_min, name, function)
    cap_min.parse = parse
    return cap_min.main(argv)


if __name__ == "__main__":
    sys.exit(main())
