"""Dense tasks on scenes or on files, and a segmenter, small enough for tests."""

from functools import partial

import numpy as np
from PIL import Image

import source_cases
from recipes.config import compose
from recipes.data import dense
from zoo.heads import segmenter

KINDS = {"segment": "semantic", "detect": "instances"}
TINY = [
    "model=timm", "model.name=test_resnet", "data.img_size=64", "data.train_count=16", "data.val_count=7",
    "data.batch_size=4", "data.eval_batch_size=2", "data.workers=0", "train.steps=4", "train.eval_every=0.5",
    "train.save_every=2", "train.log_every=1", "sched.warmup=0", "logger=tensorboard",
]  # fmt: skip
TASKS = {
    "segment": ["task=segment"],
    "detect": ["task=detect", "task.head=fcos"],
    "masks": ["task=detect", "task.head=mask_rcnn"],
    "cascade": ["task=detect", "task.head=cascade_mask_rcnn", "task.channels=32"],
}

all_of = partial(source_cases.all_of, batch_size=4)


def build(task, *overrides, **options):
    if task == "detect":
        options = {"masks": True, **options}
    return dense.build(compose([f"task={task}", *overrides]), KINDS[task], **options)


def picture(path, size=(30, 20), colour=(90, 120, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def mask(path, values, size=(30, 20), mode="L"):
    """Halves of two labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full(size[::-1], values[0], np.uint8)
    labels[:, size[0] // 2 :] = values[1]
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette([channel for number in range(256) for channel in (255 - number, number, 9)])
    image.save(path)


def tiny(**kwargs):
    return segmenter("dinat_m", 5, **{"channels": 16, "dims": (32, 64, 64, 64), "depths": (1, 1, 1, 1), **kwargs})
