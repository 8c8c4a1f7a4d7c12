"""Write zoo/golden.json: how far every model is from the published code, in float64 and float32.

python tests/measure_golden.py
"""

import json
import sys
import tempfile
from datetime import date
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import golden  # noqa: E402
from families import RECORDS  # noqa: E402
from golden_cases import answer, pretrained, recorded  # noqa: E402


def errors(stem: str) -> list[float]:
    """Relative errors of what a record's checkpoint answers in our model, float64 and float32."""
    record = recorded(stem)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "released.pth"
        torch.save({"model": golden.official_state_dict(record)}, path)
        return [error(record, path, dtype) for dtype in (torch.float64, torch.float32)]


@torch.no_grad()
def error(record: dict, path: Path, dtype: torch.dtype) -> float:
    out = answer(pretrained(record, path, dtype=dtype), record, golden.image(*record["size"]).to(dtype))
    return golden.relative_error(out, golden.unpack(record["logits"]))


if __name__ == "__main__":
    worst: dict[str, list[float]] = {}
    for stem, model in RECORDS.items():
        new = errors(stem)
        worst[model] = [max(pair) for pair in zip(new, worst.get(model, new), strict=True)]
        print(f"{stem}: {model} {new[0]:.1e} {new[1]:.1e}", flush=True)
    out = {"date": str(date.today()), "torch": torch.__version__, "timm": timm.__version__, "errors": worst}
    (ROOT / "zoo" / "golden.json").write_text(json.dumps(out, indent=1) + "\n")
