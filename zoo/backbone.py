"""What all families share: a stem, stages, a head, and the whole interface that timm's users expect, in one place.

Maps are (B, H, W, C) between modules; only `Backbone` itself takes and returns NCHW.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, fx, nn

from ops.sizes import surely

from .blocks import check_classes, image_sides, init_linear, number, recomputed

OTHER_NAMES = (
    "to load a file with other names than the zoo's, give pretrained=True, pretrained_cfg_overlay=dict(file=...) to "
    "timm.create_model instead of checkpoint_path=, or call zoo.load_checkpoint(model, file)"
)


@fx.wrap
def check_images(x: Tensor, least: int) -> None:
    """Raise ValueError unless x is (B, C, H, W) with `least` pixels a side; torch.fx cannot trace such a branch."""
    if x.dim() != 4:
        raise ValueError(f"images are {x.shape}: expected (B, in_chans, H, W)")
    if surely(x.shape[2] < least) or surely(x.shape[3] < least):
        raise ValueError(f"images are {x.shape}: expected at least {least} pixels a side")


def channels_last(x: Tensor, least: int) -> Tensor:
    """The same (B, C, H, W) in channels-last memory; vmap does not take torch.channels_last."""
    check_images(x, least)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "0", name)


class Stage(nn.Module):
    """Blocks at one resolution, (B, H, W, C) -> (B, H', W', C'); `downsample` opens it, `norm` closes it."""

    def __init__(
        self, blocks: Sequence[nn.Module], *, downsample: nn.Module | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = recomputed(block, x)
        else:
            x = self.blocks(x)
        return self.norm(x)


class Head(nn.Module):
    """fc(drop(after(pool(before(x))))): a norm or other layers before the pooling, a norm or other layers after it.

    dim          input channels of `fc`, after `before` and `after`
    num_classes  0 leaves `fc` out
    norm         of features, as timm's models have them: `Backbone.forward_features` applies it, `forward` does not
    before       layers of the classifier, in place of `norm`; either is the module `before`
    pool         "avg", "max", "avgmax", or "" for none: then the output is a map, (B, H, W, ...)
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        norm: nn.Module | None = None,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
        pool: str = "avg",
        drop_rate: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.bias = bias
        self.before = norm or before or nn.Identity()
        self.norms_features = before is None
        self.pool = _pool(pool)
        self.after = nn.Identity() if after is None else after
        self.drop = nn.Dropout(number("drop_rate", drop_rate, "a probability, from 0 to 1", 0, 1))
        self.fc: nn.Module = self._classifier(num_classes)

    def _classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.dim, num_classes, self.bias) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def reset(self, num_classes: int, pool: str | None, like: Tensor) -> None:
        """Make a newly initialised classifier, with the device and dtype of `like`; change the pooling if given.

        What is new trains if the head does.
        """
        self.pool = self.pool if pool is None else _pool(pool).train(self.training)
        self.fc = self._classifier(num_classes).train(self.training)
        init_linear(self.fc)
        self.fc.to(device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # (B, H, W, C)
        if not self.norms_features:
            x = self.before(x)
        x = self.drop(self.after(self.pool(x)))
        return x if pre_logits else self.fc(x)


def _nothing(training: bool) -> nn.Identity:
    return nn.Identity().train(training)


def _pool(kind: str) -> SelectAdaptivePool2d:
    if kind not in ("", "avg", "max", "avgmax"):
        raise ValueError(f"global_pool is {kind!r}; it must be 'avg', 'max', 'avgmax' or '' (no pooling)")
    return SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind), input_fmt="NHWC")


class Backbone(nn.Module):
    """stem -> stages -> head, for any image of at least `min_img_size` pixels a side, 32 or fewer with four stages.

    stem           (B, C, H, W) -> (B, h, w, c)
    stages         each (B, h, w, c) -> (B, h', w', c'); a feature is what leaves a stage
    dims           channels of each feature
    reductions     pixels of the image per pixel of each feature, along a side; default: 4, 8, 16 and so on
    img_size       image that the model is meant for, pixels a side or (height, width)
    feature_norms  a LayerNorm of its own on every feature that `forward_intermediates` and `features_only` return, as
                   in the published dense-prediction versions. A classifier does not use them: they have no gradients,
                   which DistributedDataParallel reports as an error
    """

    no_decay: tuple[str, ...] = ()  # last components of parameter names that never decay
    feature_norm_eps: float = 1e-5
    reduction: int = 32  # pixels of the image per pixel of the last map of the variants, along a side
    output_fmt: str = "NCHW"  # of forward_features; its stages are NHWC, as hooks and torch.fx see them

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        head: Head,
        *,
        dims: Sequence[int],
        reductions: Sequence[int] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int],
        feature_norms: bool = False,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = image_sides(img_size)
        self.num_features = dims[-1]
        self.head_hidden_size = head.dim
        self.min_img_size = self.min_img_size_for(len(self.stages))
        reductions = [4 * 2**i for i in range(len(dims))] if reductions is None else reductions
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        norms = [nn.LayerNorm(dim, self.feature_norm_eps) if feature_norms else nn.Identity() for dim in dims]
        self.feature_norms = nn.ModuleList(norms)

    @staticmethod
    def min_img_size_for(stages: int) -> int:
        """Side in pixels of the smallest image for which this many stages have maps: 32 or fewer for four."""
        return 1

    @staticmethod
    def args_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Arguments besides a variant's that a model was built with, as far as the shapes of its weights show them.

        The value is None where they do not show it, though without it another model would be built.
        """
        return {}

    @property
    def global_pool(self) -> str:
        """The head's current pooling; timm reads it when it saves a model's configuration."""
        return self.head.pool.pool_type

    def forward_features(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, C, h, w)
        x = self.stem(channels_last(x, self.min_img_size))
        for stage in self.stages:
            x = stage(x)
        return self.normed(x).permute(0, 3, 1, 2)

    def normed(self, x: Tensor) -> Tensor:
        """The last stage's map (B, h, w, C) after the norm before the pooling, for models that have one."""
        return self.head.before(x) if self.head.norms_features else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # (B, C, h, w) -> (B, num_classes)
        x = self.head(x.permute(0, 2, 3, 1), pre_logits)
        if self.head.pool.pool_type == "":
            x = x.permute(0, 3, 1, 2)
        return x

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, num_classes)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the stages, shallowest first, and (unless `intermediates_only`) what `forward_features` returns.

        indices     which stages: None for all, an int for the last n, a list for those (negative from the end)
        norm        apply the norm before the pooling, for models that have one, to the last stage's feature (STViT's
                    layers there belong to its classifier)
        stop_early  do not run the stages after the last one asked for; what is returned beside the features is then
                    that stage's map
        output_fmt  "NCHW" or "NHWC", of the features
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is '{output_fmt}'; it must be 'NCHW' or 'NHWC'")
        take, last = feature_take_indices(len(self.stages), indices)
        features = []
        x = self.stem(channels_last(x, self.min_img_size))
        for i, (stage, own) in enumerate(zip(self.stages, self.feature_norms)):  # noqa: B905 (TorchScript has no strict)
            if i <= last or not stop_early:
                x = stage(x)
            if i in take:
                feature = own(self.normed(x) if norm and i == len(self.stages) - 1 else x)
                features.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return features
        if last == len(self.stages) - 1 or not stop_early:
            x = self.normed(x)
        return x.permute(0, 3, 1, 2), features

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features `indices` do not need, so that every parameter left gets a gradient.

        prune_norm  also the norm before the head
        prune_head  also the head. If the last stage goes, for which norm and head were made, both go in any case.
                    `reset_classifier` then makes a classifier on the last remaining stage
        """
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        drops_head = prune_head or cut
        del self.stages[last + 1 :], self.feature_norms[last + 1 :]
        for i in range(last + 1):
            if i not in take:
                self.feature_norms[i] = _nothing(self.training)
        if cut or (prune_norm if self.head.norms_features else drops_head):
            self.head.before = _nothing(self.training)
        if drops_head:
            self.head.after = _nothing(self.training)
            self.num_features = self.head_hidden_size = self.head.dim = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        self.min_img_size = self.min_img_size_for(len(self.stages))
        return take

    def init_layers(self) -> None:
        """Initialise, as published, what torch initialises in another way. Constructors call this last."""
        self.apply(init_linear)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise all parameters and buffers as in a new model: for one from the meta device, after `to_empty`."""
        for module in reversed(list(self.modules())):  # some set values in the layers that they contain
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.init_layers()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in any module; if names differ, as with timm's `checkpoint_path`, the error says how to convert them."""
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            own, given = self.state_dict(), {_unnumbered(key) for key in state_dict}
            if own.keys() <= state_dict.keys() or given <= {_unnumbered(key) for key in own}:
                raise
            raise RuntimeError(f"{error}\n{OTHER_NAMES}") from None

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier with `num_classes` outputs (0: none); change the pooling if `global_pool` is given.

        Raises ValueError for an invalid number of classes or pooling; the model then stays unchanged.
        """
        check_classes(num_classes)
        self.head.reset(num_classes, global_pool, like=next(self.stem.parameters()))
        self.num_classes = num_classes

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay: a group per stage if `coarse`, else per block."""
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|query)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
            (r"^feature_norms|^head\.before" if self.head.norms_features else r"^feature_norms", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in self.no_decay}

    @torch.jit.ignore
    def lr_scales(self) -> dict[str, float]:
        """Factors on the learning rate, by name, for the parameters that the published recipe trains at another one."""
        return {}
