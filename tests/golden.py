"""Golden records: what a published implementation computes, as small JSON files.

A record holds the parameter names and shapes of one published model (its checkpoint layout), and what that
model returned for weights and an input that anyone can make again from those names alone:

* weights: `fill(key, shape)`, seeded by the key's own text, so a record needs no weight file;
* input: `image(height, width)`, two images, float64;
* logits, one gradient norm per parameter for the loss `(logits * probe(logits.shape)).sum()`, and samples of
  the gradient of the input at `input_grad_positions`, all computed in float64 and eval mode by the published code.

`official_state_dict(record)` is thus a checkpoint in the published layout whose right answer is known.
Needs numpy and torch, nothing else.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).with_name("golden")


def fill(key: str, shape: tuple) -> np.ndarray:
    """float64 values for one entry of a state dict: the same on every machine, scaled to keep activations finite."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    values = rng.standard_normal(shape)
    if key.endswith("running_var"):
        return 1.0 + 0.2 * np.abs(values)
    if key.endswith("running_mean"):
        return 0.1 * values
    if (len(shape) >= 2 and max(shape[1:]) > 1) or len(shape) == 2:
        return values / np.sqrt(max(1, int(np.prod(shape[1:]))))
    # vectors: scales sit around 1, everything else around 0
    is_scale = key.rsplit(".", 1)[-1] in (
        "weight",
        "gamma",
        "gamma1",
        "gamma2",
        "gamma_1",
        "gamma_2",
        "gamma3",
        "layer_scale_1",
        "layer_scale_2",
        "scale",
        "temperature",
    )
    return 1.0 + 0.1 * values if is_scale else 0.1 * values


def image(height: int, width: int) -> torch.Tensor:
    """(2, 3, height, width) float64, the input of every record of that size."""
    return torch.from_numpy(np.random.default_rng(height * 10007 + width).standard_normal((2, 3, height, width)))


def probe(shape: tuple) -> torch.Tensor:
    """float64 weights of the scalar loss that the gradients belong to."""
    return torch.from_numpy(np.random.default_rng(7).standard_normal(tuple(shape)))


def pack(tensor: torch.Tensor) -> dict:
    array = tensor.detach().cpu().double().contiguous().numpy()
    return {"shape": list(array.shape), "float64": base64.b64encode(array.tobytes()).decode()}


def unpack(packed: dict) -> torch.Tensor:
    return torch.from_numpy(
        np.frombuffer(base64.b64decode(packed["float64"]), dtype=np.float64).reshape(packed["shape"]).copy()
    )


def positions(numel: int) -> list:
    """Evenly spread positions in a flat tensor of `numel` values."""
    count = min(256, numel)
    return [i * (numel - 1) // max(1, count - 1) for i in range(count)]


def samples(tensor: torch.Tensor, where: list) -> torch.Tensor:
    """The values at a record's `input_grad_positions`."""
    return tensor.detach().reshape(-1)[torch.tensor(where)]


def filled(entries: list, dtype=torch.float64) -> dict:
    """A state dict from a record's entries [key, shape, kind].

    Kind 'buffer' (a mask, a constant kernel) and 'integer' (an index table, a counter) hold no knowledge and are zeros
    here: an implementation computes its own.
    """
    out = {}
    for key, shape, kind in entries:
        if kind == "value":
            out[key] = torch.from_numpy(np.asarray(fill(key, tuple(shape)))).to(dtype)
        else:
            out[key] = torch.zeros(shape, dtype=torch.long if kind == "integer" else dtype)
    return out


def official_state_dict(record: dict, dtype=torch.float64) -> dict:
    """The record's checkpoint, in the published layout. (In float32 it can answer to about 1e-6 only.)"""
    return filled(record["entries"], dtype)


def record(
    model: torch.nn.Module, path: str, *, name: str, source: str, size: tuple, forward=None, note: str = ""
) -> dict:
    """Fills `model` in place, runs it in float64 and writes the record to `path`.

    name: what the record calls the model; source: repository@commit; size: (height, width) of the input;
    forward: how logits come from the model where it is not `model(x)`.
    """
    model = model.double().eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    entries, state = [], model.state_dict()
    for key, value in state.items():
        learned = key in parameters or key.endswith(("running_mean", "running_var"))
        kind = "value" if learned else ("buffer" if value.is_floating_point() else "integer")
        entries.append([key, list(value.shape), kind])
        if kind == "value":
            state[key] = torch.from_numpy(np.asarray(fill(key, tuple(value.shape))))
    model.load_state_dict(state)
    x = image(*size).requires_grad_(True)
    logits = (forward or model)(x)
    (logits * probe(logits.shape)).sum().backward()
    out = {
        "name": name,
        "source": source,
        "size": list(size),
        "note": note,
        "parameters": sum(p.numel() for p in model.parameters()),
        "entries": entries,
        "logits": pack(logits),
        "input_grad_positions": positions(x.grad.numel()),
        "input_grad_samples": pack(samples(x.grad, positions(x.grad.numel()))),
        "grad_norms": {k: float(p.grad.norm()) for k, p in model.named_parameters() if p.grad is not None},
        "unused_parameters": [k for k, p in model.named_parameters() if p.grad is None],
    }
    Path(path).write_text(json.dumps(out))
    return out


def load(path) -> dict:
    return json.loads(Path(path).read_text())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
