"""Layers that users replace or change: quantised, wrapped, hooked, pruned, without a bias."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from builds import every_small, small, trained


@pytest.mark.parametrize("name", ["maxvit_t", "davit_t"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_models(name):
    """By torch.fx, statically, and layer by layer, then scripted."""
    quantisation = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic

    model, x = trained(small(name)), torch.randn(1, 3, 80, 80)
    prepared = quantisation.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    want = model(x)
    whole = quantisation.convert_fx(prepared)  # activations too, in 8 bits
    linear = torch.jit.script(quantize_dynamic(model, {torch.nn.Linear}))
    for quantised, error in ((whole, 0.5), (linear, 0.1)):
        assert (quantised(x) - want).norm() < error * want.norm()


class Adapter(torch.nn.Module):
    """In place of a linear layer, with its answers doubled."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 2 * self.linear(x)


@every_small
def test_a_projection_may_be_wrapped(name):
    model = trained(small(name))
    x = torch.randn(1, 3, 80, 80)  # windows reach over the border of maps
    want = model(x)
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(getattr(module, "qkv", None), torch.nn.Linear):
                for parameter in module.qkv.parameters():
                    parameter.div_(2)
                module.qkv = Adapter(module.qkv)
    torch.testing.assert_close(model(x), want)


@every_small
@pytest.mark.parametrize("by", ["hook", "hook of all modules", "forward"])
def test_hooks_change_all_that_a_projection_gives(name, by, request):
    """Halved by hooks, or by another `forward`, it gives what it gives with halved weights, to what lies beyond the
    border too.
    """
    models = [trained(small(name)) for _ in range(2)]
    linear = {module for module in models[0].modules() if isinstance(module, torch.nn.Linear)}
    if by == "hook of all modules":
        hook = register_module_forward_hook(lambda module, args, out: out / 2 if module in linear else None)
        request.addfinalizer(hook.remove)
    for hooked, halved in zip(*(model.modules() for model in models), strict=True):
        if isinstance(hooked, torch.nn.Linear):
            if by == "hook":
                hooked.register_forward_hook(lambda module, args, out: out / 2)
            elif by == "forward":
                hooked.forward = lambda x, forward=hooked.forward: forward(x) / 2
            for parameter in halved.parameters():
                parameter.data /= 2
    for size in ((80, 80), (224, 224)):  # windows reach over the border of maps, and do not
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(models[0](x), models[1](x))


@pytest.mark.parametrize("name", ["davit_t", "gcvit_s", "dinat_b", "litv2_s"])
def test_what_records_a_projection_ends_with_the_map(name):
    """And sees nothing else where no window reaches over the border."""
    model = trained(small(name))
    for module in list(model.modules()):
        if isinstance(getattr(module, "qkv", None), torch.nn.Linear):
            module.qkv = Adapter(module.qkv)
    layers = {key: layer for key, layer in model.named_modules() if key.endswith("qkv")}
    seen = {key: [] for key in layers}
    for key, layer in layers.items():
        layer.register_forward_hook(lambda module, args, out, key=key: seen[key].append(tuple(out.shape[:3])))
    with torch.no_grad():
        model(torch.randn(2, 3, 224, 224))
        assert {len(shapes) for shapes in seen.values()} == {1}
        model(torch.randn(2, 3, 72, 88))
    assert {shapes[-1][0] for shapes in seen.values()} == {2}
    assert {shape for shapes in seen.values() for shape in shapes[1:-1]} == {(1, 1, 1)}


class OnlyLinear(torch.Tensor):
    """A weight that can be nothing but a linear layer's, like those of torchao: everything else is an error."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_ = data

    def __tensor_flatten__(self):
        return ["data_"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, ctx, size, stride):
        return cls(tensors["data_"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].data_, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_)
        raise NotImplementedError(f"{function} of a quantised weight")


@every_small
def test_weights_may_be_wrapped(name):
    model, x = trained(small(name, num_classes=5)), torch.randn(2, 3, 97, 65)
    with torch.no_grad():
        want = model(x)
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.weight = nn.Parameter(OnlyLinear(layer.weight.detach()), requires_grad=False)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@every_small
def test_linear_layers_may_be_quantised(name):
    model = trained(small(name))
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    x = torch.randn(1, 3, 80, 80)
    want = model(x)
    assert not torch.equal(quantised(x), want)
    assert (quantised(x) - want).norm() < 0.5 * want.norm()  # 0.3 where it moves routes or offsets, else below 0.1


def test_layers_that_merge_tokens_may_be_wrapped():
    model = trained(small("sgformer_b"))
    x = torch.randn(1, 3, 80, 80)
    want = model(x)
    with torch.no_grad():
        for module in list(model.modules()):
            for i, layer in enumerate(getattr(module, "merge", ())):
                for parameter in layer.parameters():
                    parameter.div_(2)
                module.merge[i] = Adapter(layer)
    torch.testing.assert_close(model(x), want)


@every_small
def test_layers_may_be_pruned(name):
    """Hooks, which make the weights of pruned layers in each forward pass, run on all of them."""
    model, other = trained(small(name)), small(name).eval()
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.3)
    x = torch.randn(1, 3, 80, 80)
    for _ in range(2):  # a weight that no hook makes anew keeps the graph that the first gradient has freed
        model(x).sum().backward()
    with torch.no_grad():
        for layer in layers:
            layer.weight_orig.mul_(1.5)
        want = model(x)
    for layer in layers:
        prune.remove(layer, "weight")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(want, other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["davit_t", "gcvit_s", "dinat_b", "litv2_s", "sgformer_b"])
def test_a_projection_may_have_no_bias(name):
    """Its answer to the zeros around a map, or to a run of tokens, is then zero."""
    model = trained(small(name))
    modules = list(model.modules())
    layers = [m.qkv for m in modules if hasattr(m, "qkv")]
    layers += [layer for m in modules for layer in getattr(m, "merge", ())]
    for layer in layers:
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(1, 3, 80, 80)
    want = model(x)
    for layer in layers:
        layer.bias = None
    torch.testing.assert_close(model(x), want)
