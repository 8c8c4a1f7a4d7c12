"""Export the model of a run as an ONNX file or a `torch.export` program, and compare it with the original.

    python -m recipes.export runs/<name> model.onnx
    python -m recipes.export runs/<name> model.pt2 --dynamic --any-size

The written file is loaded again and run beside the model itself; exit code and options are those of zoo.export. Without
--size it is exported for the image size of the run's evaluation, or, for segmentation, for the size of its crops.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import nn

import zoo
from ops.tool import tool
from recipes import card, data_record, distributed
from recipes.data import DataError
from recipes.data.build import preprocessing
from recipes.eval import config_of, load
from recipes.settings import RunError
from recipes.task import create
from recipes.weights import find_weights
from zoo import export


def build(folder: Path, weights: str = "auto") -> nn.Module:
    """The model of a run with its best weights, in evaluation mode.

    Its `pretrained_cfg` has the run's preprocessing, the names of its classes, and a note on the weights that training
    started from: `zoo.save_for_hf` writes them too.

    weights  "auto" those that the run evaluated, "raw", or "ema"

    Raises RunError for a folder without a run or an intact checkpoint, for weights that it lacks, and for a detector.
    """
    cfg = config_of(folder, [])
    task = create(cfg)
    if cfg.task.name == "detect":
        raise RunError(
            f"{folder} is a run of task=detect: detectors, whose number of boxes varies per image, are not exported"
        )
    with distributed.apart():  # a shell inside a job of several processes has the launcher's variables
        data = data_record.described(folder, cfg)
        model = load(task, data, find_weights(folder, weights)).eval()
    prep = vars(preprocessing(cfg)).copy()
    model.pretrained_cfg.update(input_size=(3, *prep.pop("size")), **prep, notes=(card.begins(cfg),))
    export.name_classes(model, data.class_names)
    model.of_release = False  # whichever release the run started from, these weights are its own
    return model


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    return export.parse_written(parser, argv)


def _check_size(model: nn.Module, args: argparse.Namespace) -> None:
    """Raise RunError if the run's own size is smaller than a program for any size takes."""
    sides = model.pretrained_cfg["input_size"][1:]
    if args.any_size and args.size is None and min(sides) < export.LEAST_OF_ANY:
        raise RunError(
            f"{args.run} has images of {sides[0]} x {sides[1]} pixels, and --any-size needs {export.LEAST_OF_ANY} or "
            "more a side: give --size H W"
        )


@tool
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        model = build(args.run, args.weights)
        _check_size(model, args)
        shapes = export.write(model, args)
    except (RunError, DataError, zoo.CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return export.report(model, args.out, shapes, args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
