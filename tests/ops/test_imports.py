"""An op can be changed without changing another: they share modules of `ops/` itself, not each other's."""

import ast
from pathlib import Path

OPS = Path(__file__).parents[2] / "ops"
FOLDERS = {path.parent.name for path in OPS.glob("*/reference.py")}


def imported(path):
    """What a module in an op's folder imports from other folders, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level != 1:
            for alias in node.names:
                name = ".".join(filter(None, [node.module, alias.name])).removeprefix("ops.")
                if name.split(".")[0] in FOLDERS:
                    yield name


def test_ops_do_not_import_each_other():
    found = {(op, name) for op in FOLDERS for path in OPS.glob(f"{op}/*.py") for name in imported(path)}
    # where each line is one window, neighborhood attention is window attention
    windows = ("window_attention.torch_path.attend", "window_attention.triton_path")
    assert found == {("neighborhood_attention", name) for name in windows}
