"""Whole models of some families, written out in plain torch from what is known of the published code.

Each takes a state dict in the published names and an image (B, 3, H, W), and gives what the published code gives, or
the norms of its dense-prediction version. Depths and widths are those of the tensors. Nothing of the zoo is used.
"""

from itertools import count

import torch
from torch.nn import functional as F


class Weights(dict):
    """A state dict, and the layers that are made of it, by their names."""

    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def norm(self, name, x, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)

    def group_norm(self, name, x):
        return F.group_norm(x, 1, self[f"{name}.weight"], self[f"{name}.bias"])

    def conv(self, name, x, stride=1, padding=0):
        """A convolution of NCHW maps, depthwise where its weight is."""
        weight = self[f"{name}.weight"]
        return F.conv2d(x, weight, self.get(f"{name}.bias"), stride, padding, groups=x.shape[1] // weight.shape[1])

    def conv_last(self, name, x, stride=1, padding=0):
        """The same for NHWC maps."""
        return self.conv(name, x.permute(0, 3, 1, 2), stride, padding).permute(0, 2, 3, 1)

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def numbered(self, template):
        """0, 1, ... as long as there is a name that begins with the template of it."""
        for i in count():
            if not any(key.startswith(template.format(i)) for key in self):
                return
            yield i


def attend(q, k, v, bias=0):
    """(..., N, D), (..., M, D), (..., M, D) -> what is attended (..., N, D), and how much (..., N, M)."""
    attention = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return attention @ v, attention


def split(x, heads):
    """(B, N, C) -> (B, heads, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x):
    """(B, heads, N, D) -> (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def tiles(x, window):
    """An NHWC map, filled with zeros at the bottom and right, as tokens of windows (B * windows, window ** 2, C)."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % window, 0, -x.shape[1] % window))
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def untiled(x, size, window):
    """The inverse of `tiles`, cut to (height, width)."""
    rows, columns = (-(-side // window) for side in size)
    x = x.unflatten(1, (window, window)).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


def swin_bias(table, window):
    """Swin's table ((2 * window - 1) ** 2, heads) by query - key, as (heads, window ** 2, window ** 2)."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = places[:, None] - places + window - 1
    return table[apart[..., 0] * (2 * window - 1) + apart[..., 1]].permute(2, 0, 1)


def gcvit(state, x, windows, detection=False):
    """GC ViT with windows of so many tokens a side in its stages. Detection: its four normed maps, NHWC."""
    w = Weights(state)

    def convs(name, x):
        y = F.gelu(w.conv(f"{name}.conv.0", x, padding=1))
        gate = w.linear(f"{name}.conv.2.fc.2", F.gelu(w.linear(f"{name}.conv.2.fc.0", y.mean((2, 3))))).sigmoid()
        return x + w.conv(f"{name}.conv.3", y * gate[:, :, None, None])

    def reduce(name, x):
        x = convs(name, w.norm(f"{name}.norm1", x).permute(0, 3, 1, 2))
        return w.norm(f"{name}.norm2", w.conv(f"{name}.reduction", x, 2, 1).permute(0, 2, 3, 1))

    x = reduce("patch_embed.conv_down", w.conv("patch_embed.proj", x, 2, 1).permute(0, 2, 3, 1))
    features = []
    for level, window in enumerate(windows):
        heads = x.shape[-1] // 32
        query, name = x.permute(0, 3, 1, 2), f"levels.{level}.q_global_gen.to_q_global"
        for step in range((3, 2, 1, 1)[level]):
            query = convs(f"{name}.{step}", query)
            if level < 2 or (level == 2 and detection and window != 14):
                query = F.max_pool2d(query, 3, 2, 1)
        if query.shape[2:] != (window, window):
            query = F.interpolate(query, (window, window), mode="bicubic", align_corners=False)
        query = split(query.flatten(2).mT, heads)
        for j in w.numbered(f"levels.{level}.blocks.{{}}."):
            name = f"levels.{level}.blocks.{j}"
            tokens = tiles(w.norm(f"{name}.norm1", x), window)
            parts = w.linear(f"{name}.attn.qkv", tokens).unflatten(-1, (-1, heads, 32)).permute(2, 0, 3, 1, 4)
            *own, k, v = parts
            q = query.repeat_interleave(len(tokens) // len(x), 0) if j % 2 else own[0]
            table = w.get(f"{name}.attn.relative_position_bias_table")
            out = join(attend(q, k, v, 0 if table is None else swin_bias(table, window))[0])
            out = untiled(w.linear(f"{name}.attn.proj", out), x.shape[1:3], window)
            x = x + w.get(f"{name}.gamma1", 1) * out
            x = x + w.get(f"{name}.gamma2", 1) * w.mlp(f"{name}.mlp", w.norm(f"{name}.norm2", x))
        features.append(x)
        if level < 3:
            x = reduce(f"levels.{level}.downsample", x)
    if detection:
        return [w.norm(f"norm{level}", feature) for level, feature in enumerate(features)]
    return w.linear("head", w.norm("norm", x).mean((1, 2)))


def davit(state, x, window):
    """DaViT with windows of so many tokens a side."""
    w = Weights(state)

    def heads(name, x):  # (B, N, C) -> q, k, v (B, heads, N, 32)
        return w.linear(f"{name}.attn.qkv", x).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)

    for stage in w.numbered("patch_embeds.{}."):
        name = f"patch_embeds.{stage}"
        if stage == 0:
            x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
            x = w.norm(f"{name}.norm", w.conv(f"{name}.proj", x, 4, 3).permute(0, 2, 3, 1))
        else:
            x = F.pad(w.norm(f"{name}.norm", x), (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = w.conv_last(f"{name}.proj", x, 2)
        for layer in w.numbered(f"main_blocks.{stage}.{{}}."):
            for kind in (0, 1):
                name = f"main_blocks.{stage}.{layer}.{kind}"
                x = x + w.conv_last(f"{name}.cpe.0.proj", x, padding=1)
                y = w.norm(f"{name}.norm1", x)
                if kind == 0:
                    out = w.linear(f"{name}.attn.proj", join(attend(*heads(name, tiles(y, window)))[0]))
                    x = x + untiled(out, x.shape[1:3], window)
                else:
                    q, k, v = heads(name, y.flatten(1, 2))
                    channels = (32**-0.5 * k.mT @ v).softmax(-1)
                    x = x + w.linear(f"{name}.attn.proj", join(q @ channels.mT)).view_as(x)
                x = x + w.conv_last(f"{name}.cpe.1.proj", x, padding=1)
                x = x + w.mlp(f"{name}.mlp", w.norm(f"{name}.norm2", x))
    return w.linear("head", w.norm("norms", x.mean((1, 2))))


def sgformer(state, x, heads):
    """SG-Former with so many heads in its stages, for a map of as many tokens as the table of positions has."""
    w = Weights(state)

    def stem(name, x, stride):
        return w.group_norm(f"{name}.bn", w.conv(f"{name}.c", x, stride, 1))

    def pairs(name, x, count):  # k and v of so many heads
        return (split(half, count) for half in w.linear(name, x).chunk(2, -1))

    def hybrid(name, y, count, ratio):
        b, height, width, _ = y.shape
        reduced = F.gelu(w.norm(f"{name}.norm", w.conv_last(f"{name}.sr", y, ratio)))
        k, v = pairs(f"{name}.kv1", reduced.flatten(1, 2), count // 2)
        far, attention = attend(split(w.linear(f"{name}.q1", y.flatten(1, 2)), count // 2), k, v)
        received = attention.mean((1, 2)).view(b, 1, *reduced.shape[1:3])
        received = F.interpolate(received, (height, width), mode="nearest")[:, 0]
        inside = tiles(y, 7)
        k, v = pairs(f"{name}.kv2", inside, count // 2)
        near, attention = attend(split(w.linear(f"{name}.q2", inside), count // 2), k, v)
        here = untiled(attention.mean((1, 2))[..., None], (height, width), 7)[..., 0]
        near = untiled(join(near), (height, width), 7)
        return torch.cat([join(far), near.flatten(1, 2)], -1), (received + here).flatten(1)

    def guided(name, y, count, significance, stage):
        y = y.flatten(1, 2)
        order = significance.argsort(1)
        ranked = y.gather(1, order[..., None].expand_as(y))
        quarter = y.shape[1] // 4
        groups = ranked.split((2 * quarter, 2 * quarter) if stage == 2 else (quarter, 2 * quarter, quarter), 1)
        merged = []
        for number, group in enumerate(groups, 1):
            run = w[f"{name}.f{number}.weight"].shape[1]
            merged.append(w.linear(f"{name}.f{number}", group.unflatten(1, (-1, run)).mT).squeeze(-1))
        merged = torch.cat(merged, 1)
        halves = [list(pairs(f"{name}.{kv}", merged, count // 2)) for kv in ("kv1", "kv2")]
        k, v = (torch.cat(both, 1) for both in zip(*halves, strict=True))
        return join(attend(split(w.linear(f"{name}.q", y), count), k, v)[0])

    x = F.gelu(stem("patch_embed1.conv.0", x, 2))
    x = F.gelu(stem("patch_embed1.conv.2", x, 1))
    x = w.norm("patch_embed1.norm", stem("patch_embed1.conv.4", x, 2).permute(0, 2, 3, 1))
    x = x + w["pos_embed"].view(x.shape[1:])
    for stage, number in enumerate(heads):
        if stage:
            name, x = f"patch_embed{stage + 1}", x.permute(0, 3, 1, 2)
            x = F.gelu(w.group_norm(f"{name}.conv1.bn", w.conv(f"{name}.conv1.c", x)))
            x = F.gelu(w.group_norm(f"{name}.conv2.bn", w.conv(f"{name}.conv2.c", x, 2, 1)))
            x = w.group_norm(f"{name}.conv3.bn", w.conv(f"{name}.conv3.c", x)).permute(0, 2, 3, 1)
        significance = None
        for j in w.numbered(f"block{stage + 1}.{{}}."):
            block = f"block{stage + 1}.{j}"
            name, y = f"{block}.attn", w.norm(f"{block}.norm1", x, 1e-6)
            if stage == 3:
                k, v = pairs(f"{name}.kv", y.flatten(1, 2), number)
                out = join(attend(split(w.linear(f"{name}.q", y.flatten(1, 2)), number), k, v)[0])
            elif j % 2 == 0:
                out, significance = hybrid(name, y, number, (8, 4, 2)[stage])
            else:
                out = guided(name, y, number, significance, stage)
            beside = w.conv_last(f"{name}.lepe_conv", w.linear(f"{name}.lepe_linear", y), padding=1)
            x = x + w.linear(f"{name}.proj", out.view_as(y) + beside)
            hidden = w.linear(f"{block}.mlp.fc1", w.norm(f"{block}.norm2", x, 1e-6))
            hidden = F.gelu(hidden + w.conv_last(f"{block}.mlp.dwconv.dwconv", hidden, padding=1))
            x = x + w.linear(f"{block}.mlp.fc2", hidden)
        x = w.norm(f"norm{stage + 1}", x, 1e-6)
    return w.linear("head", x.mean((1, 2)))
