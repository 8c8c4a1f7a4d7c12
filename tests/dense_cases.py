"""Dense tasks on scenes, and a segmenter, small enough for tests."""

from zoo.heads import segmenter

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


def tiny(**kwargs):
    return segmenter("dinat_m", 5, **{"channels": 16, "dims": (32, 64, 64, 64), "depths": (1, 1, 1, 1), **kwargs})
