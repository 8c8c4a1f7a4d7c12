"""Detectors for tests: the heads, a backbone without weights, images with objects and without."""

import torch
from timm.models import FeatureInfo
from torch import nn

HEADS = ("mask_rcnn", "cascade_mask_rcnn", "faster_rcnn", "retinanet", "fcos")


class Pools(nn.Module):
    """A backbone without weights."""

    def __init__(self):
        super().__init__()
        rows = [{"num_chs": 3, "reduction": 4 * 2**i, "module": f"{i}"} for i in range(4)]
        self.feature_info = FeatureInfo(rows, (0, 1, 2, 3))

    def forward(self, x):
        return [nn.functional.avg_pool2d(x, 4 * 2**i) for i in range(4)]


def batch(objects=True):
    images = [torch.randn(3, 65, 90), torch.randn(3, 96, 80)]
    targets = []
    for image in images:
        count = 2 if objects and image is images[0] else 0
        boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])[:count]
        masks = torch.zeros(count, *image.shape[1:], dtype=torch.uint8)
        masks[:, 12:38, 22:38] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([0, 4])[:count], "masks": masks})
    return images, targets
