"""Inference of a segmenter on images: as a whole, in overlapping windows, at several scales and flipped.

Nothing here turns gradients off or changes the model's mode. `size` (H, W) is that of the original image, if the
network saw a resized one: logits are first resized to what the network saw, then to this.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from .layers import resize

Size = tuple[int, int]
Infer = Callable[[nn.Module, Tensor], Tensor]


def whole(model: nn.Module, images: Tensor, size: Size | None = None) -> Tensor:
    """Logits (B, classes, H, W) of images (B, 3, H, W) in one pass, at their own size or at `size`."""
    return resize(model(images), size or images.shape[-2:])


def slide(model: nn.Module, images: Tensor, crop: Size, stride: Size, size: Size | None = None) -> Tensor:
    """Logits as in `whole`: the mean over windows of `crop` pixels, every `stride` pixels.

    The last window of a row or column ends at the border; a side shorter than the crop is one window. Raises ValueError
    if the stride would leave pixels between windows.
    """
    if any(not 0 < step <= side for side, step in zip(crop, stride, strict=True)):
        raise ValueError(
            f"stride is {tuple(stride)} for windows of {tuple(crop)}: it must be from 1 to the window's side"
        )
    rows, columns = (_windows(*sides) for sides in zip(images.shape[-2:], crop, stride, strict=True))
    total = count = None
    for row in rows:
        for column in columns:
            logits = model(images[..., row, column])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
                count = logits.new_zeros(images.shape[-2:])
            total[..., row, column] += logits
            count[row, column] += 1
    return resize(total.div_(count), size or images.shape[-2:])


def augmented(
    model: nn.Module,
    images: Tensor,
    scales: Sequence[float | Size] = (1.0,),
    flip: bool = True,
    size: Size | None = None,
) -> Tensor:
    """Probabilities (B, classes, H, W), the mean over the images at several scales, unflipped and flipped.

    Each scale is resized from `images`, bilinearly, without antialiasing. If `images` were shrunk before, larger scales
    do not recover what was lost: if you have the originals, resize them and use `averaged`.

    scales      factors on the images' sides, or sizes (H, W)
    flip, size  as in `averaged`; `size` defaults to that of the images

    Raises ValueError if there is no scale.
    """
    return averaged(model, scaled(images, scales), size or images.shape[-2:], flip)


def averaged(model: nn.Module, looks: Iterable[Tensor], size: Size, flip: bool = True, infer: Infer = whole) -> Tensor:
    """Probabilities (B, classes, H, W), the mean over `looks`, unflipped and flipped.

    The logits of each are resized to `size` before the softmax. Three tensors of that size exist at a time, however
    many looks there are.

    looks  the images at several sizes, (B, 3, h, w) each
    flip   also use a horizontal flip of each
    infer  (model, images) -> logits: `whole`, or `slide` with its windows filled in

    Raises ValueError if there is no look.
    """
    total, count = None, 0
    for look in looks:
        for mirrored in (False, True) if flip else (False,):
            logits = infer(model, look.flip(-1)).flip(-1) if mirrored else infer(model, look)
            shares = resize(logits, size).softmax(1)
            total = shares.clone() if total is None else total.add_(shares)  # softmax needs its own for the gradient
            count += 1
            del shares
    if total is None:
        raise ValueError("no images to average over: give them at one size or more")
    return total.div_(count)


def scaled(images: Tensor, scales: Sequence[float | Size]) -> Iterator[Tensor]:
    """The images (B, 3, H, W) at each scale, a factor on their sides or a size (H, W), one after the other.

    Raises ValueError if there is no scale.
    """
    if not scales:
        raise ValueError("scales are empty: give one or more, (1.0,) for the images as they are")
    return (resize(images, _scaled(images, scale)) for scale in scales)


def _windows(side: int, crop: int, stride: int) -> list[slice]:
    count = max(side - crop + stride - 1, 0) // stride + 1
    starts = [min(i * stride, max(side - crop, 0)) for i in range(count)]
    return [slice(start, start + crop) for start in starts]


def _scaled(images: Tensor, scale: float | Size) -> Size:
    if isinstance(scale, (int, float)):
        return tuple(max(1, int(side * scale + 0.5)) for side in images.shape[-2:])
    return tuple(scale)
