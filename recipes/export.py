"""Export what a run learned as an ONNX file or a `torch.export` program, and compare it with what it came from.

    python -m recipes.export runs/<name> model.onnx
    python -m recipes.export runs/<name> model.pt2 --dynamic --any-size

What was written is read again and run beside the model itself, as zoo.export does, whose exit code and options these
are. Without --size it is for images as large as those that the run was measured on, or for segmentation its crops.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import nn

import zoo
from recipes import distributed, noted
from recipes.data import DataError
from recipes.data.build import preprocessing
from recipes.eval import config_of, load
from recipes.run import find_weights
from recipes.settings import RunError
from recipes.task import create
from zoo import export


def build(folder: Path, weights: str = "auto") -> nn.Module:
    """The model of a run with its best weights, in evaluation mode.

    weights  "auto" those that the run measured, "raw", or "ema"

    Raises RunError for a folder without a run or a whole checkpoint, weights that it lacks, and a detector.
    """
    cfg = config_of(folder, [])
    task = create(cfg)
    if cfg.task.name == "detect":
        raise RunError(
            f"{folder} is a run of task=detect: boxes, of which each image has its own number, are not exported"
        )
    with distributed.apart():  # a shell within a job of several processes has a launcher's variables
        model = load(task, noted.described(folder, cfg), find_weights(folder, weights)).eval()
    model.pretrained_cfg["input_size"] = (3, *preprocessing(cfg).size)
    return model


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    return export.parse_written(parser, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        model = build(args.run, args.weights)
        shapes = export.write(model, args)
    except (RunError, DataError, zoo.CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return export.report(model, args.out, shapes, args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
