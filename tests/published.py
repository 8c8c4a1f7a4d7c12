"""recipe=paper against the fact base: how a record of it is read, and what a recipe must have in common with it.

Nothing of recipes/ is imported: the configurations come from a process of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("composed.py")
UNKNOWN = "no source has it"
RULES = {"absolute": None, "linear/512": 512, None: UNKNOWN}
# fields of the fact base that a key has under another name
SAME = {
    "lr": "optim.lr", "batch_size": "data.batch_size", "weight_decay": "optim.weight_decay", "betas": "optim.betas",
    "eps": "optim.eps", "clip_grad": "train.clip_grad", "drop_path": "train.drop_path_rate", "min_lr": "sched.min_lr",
    "label_smoothing": "augment.label_smoothing", "mixup": "augment.mixup", "cutmix": "augment.cutmix",
    "mix_prob": "augment.mix_prob", "switch_prob": "augment.switch_prob", "random_erasing": "augment.re_prob",
    "color_jitter": "augment.color_jitter", "randaugment": "augment.auto_augment", "img_size": "data.img_size",
    "optimizer": "optim.opt", "dilations": "model.dilations", "regions": "model.n_win", "steps": "sched.milestones",
}  # fmt: skip


def composed(cases):
    """{(model, phase, task): what recipe=paper makes of it}, as composed.py gives it."""
    # beside the script lies a folder `ops`, of tests, which hides the package if an editable install has a finder
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    options = {"input": json.dumps(cases), "stdout": subprocess.PIPE, "text": True, "check": True, "env": env}
    run = subprocess.run([sys.executable, SCRIPT], **options)
    return dict(zip(cases, json.loads(run.stdout), strict=True))


def expected(fact, read):
    """What a record says: {key: value}, with None for what is off and UNKNOWN for what no source has.

    read  {field: function of field, value and record that gives such keys}, before those below
    """
    found = {}
    for field, value in fact.items():
        for key, said in {**READ, **read}.get(field, same)(field, value, fact).items():
            if found.get(key, UNKNOWN) == UNKNOWN:
                found[key] = said
            assert said in (found[key], UNKNOWN), (key, said, found[key])
    return found


def compare(found, said, besides):
    """Every value that is said is composed and called published; nothing else is, but for the keys `besides`."""
    known = {key: value for key, value in said.items() if value != UNKNOWN}
    assert {key: found["cfg"].get(key) for key in known} == known
    assert not known.keys() & set(found["chosen"])
    untold = set(found["published"]) - known.keys() - (besides - said.keys())
    assert not untold


def or_unknown(value):
    return UNKNOWN if value is None else value


def same(field, value, fact):
    return {SAME[field]: None if value is False else or_unknown(value)}


def nothing(field, value, fact):
    """For fields that are about the model or the machine, or say in words what another field says."""
    return {}


def no_decay(_, value, fact):
    """What has no weight decay by its shape; by its name: test_schedule.py and test_paper_dense.py."""
    return {"optim.filter_bias_and_bn": UNKNOWN if value is None else "regex" in value or value["ndim_le_1"]}


def ema(_, value, fact):
    if not value:
        return {"train.ema": UNKNOWN if value is None else None}
    every = {"train.ema_every": value["every_iters"]} if "every_iters" in value else {}
    return {"train.ema": or_unknown(value["decay"]), "train.ema_evaluated": or_unknown(value["evaluated"]), **every}


READ = {
    **dict.fromkeys(("source", "note", "amp", "kernel_size"), nothing),
    "lr_rule": lambda _, value, fact: {"optim.lr_base_batch": RULES[value]},
    "min_lr_rule": lambda _, value, fact: {"sched.lr_base_batch": RULES[value]},
    "no_decay": no_decay,
    "repeated_aug": lambda _, value, fact: {"augment.repeats": {None: UNKNOWN, True: 3, False: 1}[value]},
    "ema": ema,
}
