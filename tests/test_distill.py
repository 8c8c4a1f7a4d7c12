"""Learning from a teacher: what the loss is, what the teacher sees, and what is left in the run's folder."""

import math
import shutil
from statistics import fmean
from types import SimpleNamespace

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from children import SMALL, lines, lost_after, newest, note_overrides, train_here
from ranks import on_ranks
from recipes import checkpoint, config, distill, models, schedule
from recipes.config import ConfigError
from recipes.tasks import classify
from recipes.teacher import Teacher
from recipes.weights import find_checkpoint

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STUDENT = ["train.steps=4", "train.save_every=2", "data.workers=0", "sched.warmup=0"]
KINDS = ("soft", "hard", "feature")


def of(classes):
    """Data of which only the description is asked for."""
    return SimpleNamespace(num_classes=classes, mean=MEAN, std=STD)


def test_soft_is_the_divergence_of_the_shares():
    student, teacher, temperature = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [4.0, 0.0]]), 2.0
    expected = 0.0
    for ours, theirs in ((1.0 - 3.0, 2.0), (0.0, 4.0)):  # of two classes the difference of the logits says it all
        q, p = (1 / (1 + math.exp(-difference / temperature)) for difference in (ours, theirs))
        expected += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert distill.soft(student, teacher, temperature).item() == pytest.approx(temperature**2 * expected / 2, rel=1e-5)
    assert distill.soft(teacher, teacher + 7, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_hard_is_the_cross_entropy_of_the_likeliest_class():
    student, teacher = torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[0.1, 0.2, 0.3]])
    expected = math.log(sum(math.exp(x) for x in (1, 3, 0)))
    assert distill.hard(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_feature_is_the_angle_between_maps_whatever_their_lengths():
    student = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).reshape(1, 2, 1, 2)  # (3, 4) at one place, (0, 2) at the other
    teacher = torch.tensor([[10.0, 5.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # (10, 0) and (5, 0)
    assert distill.feature(student, teacher).item() == pytest.approx(1 - (0.6 + 0.0) / 2)
    assert distill.feature(student, 9 * student).item() == pytest.approx(0, abs=1e-6)
    coarse = teacher[..., :1]  # a map of another size is resized to the student's
    assert distill.feature(student, coarse).item() == pytest.approx(1 - (0.6 + 0.0) / 2)


def test_a_larger_map_of_a_teacher_is_smoothed_before_it_is_reduced():
    """Stripes of two columns: a column of half as many gets 1, 3, 3, 1 parts of four of them, three at the ends."""
    stripes = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]).expand(1, 1, 8, 8)
    teacher = torch.cat([stripes, 1 - stripes], 1)
    expected = 1 - (3 / math.hypot(3, 1) + 6 / math.hypot(6, 1)) / 2
    assert distill.feature(teacher[..., ::2, ::2], teacher).item() == pytest.approx(expected, rel=1e-5)


class Fixed(nn.Module):
    """A teacher that always answers the same."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_loss_is_the_share_of_each(kind):
    logits, answer = torch.randn(4, 5), torch.randn(4, 5)
    cfg = OmegaConf.create({"kind": kind, "weight": 0.3, "temperature": 2.0})
    term = {"soft": distill.soft(logits, answer, 2.0), "hard": distill.hard(logits, answer)}[kind]
    loss = distill.Distillation(cfg, Fixed(answer))(logits, torch.zeros(4, 3, 8, 8), lambda x: x.square().mean())
    assert loss.item() == pytest.approx((0.7 * logits.square().mean() + 0.3 * term).item(), rel=1e-6)


def test_a_teacher_sees_the_images_normalised_as_it_learned_them():
    model, images = timm.create_model("test_resnet").eval(), torch.rand(2, 3, 40, 40)
    own, theirs = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), (MEAN, STD)

    def normalised(mean, std):
        return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    teacher = Teacher(model, "x", of(1000), *own)
    torch.testing.assert_close(teacher(normalised(*theirs)), model(normalised(*own)), rtol=1e-4, atol=1e-5)
    assert torch.equal(Teacher(model, "x", of(1000), *theirs)(images), model(images))
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(images).requires_grad and teacher.features(images).shape == (2, teacher.width, 2, 2)


def test_a_teacher_of_one_size_sees_the_image_at_that_size():
    sizes = []
    cfg = config.compose(["teacher.kind=soft", "teacher.name=test_vit", "teacher.pretrained=true"]).teacher
    model = timm.create_model("test_vit")  # learns and answers at 160 pixels alone
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    teacher = patched(cfg, of(1000), model)
    assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 1000) and sizes == [(160, 160)]
    assert teacher.features(torch.randn(2, 3, 64, 64)).shape == (2, teacher.width, 10, 10)


@pytest.mark.parametrize("name, mean", [("maxvit_b", 0.5), ("maxvit_b.timm_tf_in1k", 0.485)])
def test_a_teacher_s_file_sees_images_as_its_release_did(tmp_path, name, mean):
    """A file that is called after a release, whose model has others."""
    file = tmp_path / "models--timm--maxvit_base_tf_224.in21k" / "snapshots" / "model.safetensors"
    file.parent.mkdir(parents=True)
    model = timm.create_model("test_resnet", num_classes=10)
    model.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    save_file(model.state_dict(), file)
    given = ["teacher.kind=soft", f"teacher.name={name}", f"teacher.checkpoint={file}"]
    teacher = patched(config.compose(given).teacher, of(10), model)
    white = (1 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert teacher.prepared(white)[0, 0] == pytest.approx((1 - mean) / (0.5 if mean == 0.5 else 0.229), rel=1e-4)


def patched(cfg, data, model):
    """The teacher of these keys with this model, so that no weights are fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.models.build", lambda *_: model)
        return Teacher.create(cfg, data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, and a student of each kind, with Mixup and a moving average."""
    out = tmp_path_factory.mktemp("runs")
    train_here(out, *SMALL, "train.steps=10", "name=teacher")
    for kind in KINDS:
        options = student(out, kind)
        train_here(out, *options, f"name={kind}")
        note_overrides(out / kind, options)
    return out


def student(out, kind):
    return [*SMALL, *STUDENT, f"teacher.checkpoint={out / 'teacher'}", f"teacher.kind={kind}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_its_own_model(runs, kind):
    """The teacher and the projection are in no file that is evaluated or exported."""
    cfg = OmegaConf.load(runs / kind / "config.yaml")
    model = models.create(cfg, SimpleNamespace(num_classes=10, img_size=32, val=None))
    best = find_checkpoint(runs / kind)
    for part in ("model", "ema"):
        model.load_state_dict(best.tensors(part))  # strict
    last = newest(runs / kind)
    assert last.has("beside") == (kind == "feature") and not best.has("beside")
    losses = [line["loss"] for line in lines(runs / kind) if "loss" in line]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_was_stopped_ends_with_the_same_bits(runs, kind, tmp_path):
    again = lost_after(2, runs / kind, tmp_path / kind)
    train_here(tmp_path, f"resume={again}")
    parts = [path.name for path in (runs / kind / "checkpoints" / "step-00000004").glob("*.safetensors")]
    assert len(parts) == (4 if kind == "feature" else 3)
    for part in parts:
        file = f"checkpoints/step-00000004/{part}"
        assert (runs / kind / file).read_bytes() == (again / file).read_bytes(), part


def test_the_projection_learns(runs):
    with_it, without = (newest(runs / kind).tree("optimizer") for kind in ("feature", "soft"))
    assert len(with_it["state"]) == len(without["state"]) + 2
    paths = sorted((runs / "feature" / "checkpoints").glob("step-*"))
    first, last = (checkpoint.read(path).tensors("beside")["weight"] for path in paths)
    assert not torch.equal(first, last)


def test_the_norm_of_the_gradient_is_of_all_that_learns(runs, tmp_path):
    norms = []

    def note(optimizer, *_):
        grads = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(nn.utils.get_total_norm(grads).item())

    hook = register_optimizer_step_pre_hook(note)
    try:
        train_here(tmp_path, *student(runs, "feature"), "train.steps=2", "train.clip_grad=null", "name=run")
    finally:
        hook.remove()
    assert [line["grad_norm"] for line in lines(tmp_path / "run") if "loss" in line] == pytest.approx(norms, rel=1e-5)


def test_the_projection_is_in_the_table_of_the_schedule(runs):
    made = schedule.describe(config.compose(student(runs, "feature")), 1617)
    groups = newest(runs / "feature").tree("optimizer")["param_groups"]
    assert len(made.parameters) == sum(len(group["params"]) for group in groups)
    assert [(p.name, p.weight_decay) for p in made.parameters[-2:]] == [("beside.weight", 0.05), ("beside.bias", 0.05)]


def test_a_student_begins_as_without_a_teacher(runs):
    def made(*overrides):
        torch.manual_seed(0)
        task = classify.Task(config.compose([*SMALL, *overrides]))
        return task.build_model(task.build_data()).state_dict()

    alone, taught = made(), made(f"teacher.checkpoint={runs / 'teacher'}", "teacher.kind=feature")
    assert all(torch.equal(tensor, taught[name]) for name, tensor in alone.items())


def test_two_processes_learn_from_a_teacher_as_one(runs, tmp_path):
    options = [*student(runs, "feature"), "train.accumulate=2"]
    train_here(tmp_path, *options, "name=alone")
    assert on_ranks(2, train_here, tmp_path, *options, "name=ddp") == [None, None]
    ours, theirs = (newest(tmp_path / name) for name in ("ddp", "alone"))
    for part in ("model", "beside"):
        for name, tensor in theirs.tensors(part).items():
            assert torch.allclose(ours.tensors(part)[name].double(), tensor.double(), rtol=1e-3, atol=2e-3), name
    failed = on_ranks(2, train_here, tmp_path, *options, "name=fsdp", "hardware.parallel=fsdp")
    assert all(isinstance(error, ConfigError) and "hardware.parallel=ddp" in str(error) for error in failed)


def test_matched_students_answer_as_they_do_alone():
    for name in ("test_resnet", "test_vit", "nat_m"):
        options = {"img_size": 64} if name != "test_resnet" else {}
        model = timm.create_model(name, num_classes=3, **options).eval()
        images = torch.randn(2, 3, 64, 64)
        logits, features = distill.Matched(model, 5)(images)
        torch.testing.assert_close(logits, model(images))
        assert features.shape[:2] == (2, 5) and features.ndim == 4


def made_teacher(data, *overrides):
    return Teacher.create(config.compose(overrides).teacher, data)


def test_teachers_that_cannot_teach(runs, tmp_path):
    run, digits = f"teacher.checkpoint={runs / 'teacher'}", [str(digit) for digit in range(10)]
    with pytest.raises(ConfigError, match=r"needs a trained teacher: give teacher\.checkpoint=runs/<name>"):
        made_teacher(of(10), "teacher.kind=soft", "teacher.name=test_resnet")
    with pytest.raises(ConfigError, match=r"teacher\.checkpoint=runs/typo is not a run folder"):
        made_teacher(of(10), "teacher.kind=soft", "teacher.checkpoint=runs/typo")
    shutil.copytree(runs / "teacher", tmp_path / "dense")
    cfg = OmegaConf.load(tmp_path / "dense" / "config.yaml")
    OmegaConf.save({**cfg, "task": {"name": "segment"}}, tmp_path / "dense" / "config.yaml")
    with pytest.raises(ConfigError, match="is a run of task=segment"):
        made_teacher(of(10), "teacher.kind=soft", f"teacher.checkpoint={tmp_path / 'dense'}")
    with pytest.raises(ConfigError, match="a teacher is named, but not what to learn from it"):
        config.compose([run])
    with pytest.raises(ConfigError, match="knows 10 classes, the student learns 3: fine-tune the teacher"):
        made_teacher(of(3), "teacher.kind=soft", run).check_classes(3, ["a", "b", "c"])
    teacher = made_teacher(of(10), "teacher.kind=hard", run)
    teacher.check_classes(10, digits)
    with pytest.raises(ConfigError, match="knows other classes, or these in another order"):
        teacher.check_classes(10, digits[::-1])
    with pytest.raises(ConfigError, match="trained test_resnet, and this is test_vit"):
        made_teacher(of(10), "teacher.kind=hard", run, "teacher.name=test_vit")
    file = find_checkpoint(runs / "teacher").path / "ema.safetensors"
    of_file = ["teacher.name=test_resnet", f"teacher.checkpoint={file}"]
    assert made_teacher(of(10), "teacher.kind=soft", *of_file).model.num_classes == 10
    with pytest.raises(ConfigError, match="does not know the 3 classes"):
        made_teacher(of(3), "teacher.kind=soft", *of_file)
    assert made_teacher(of(3), "teacher.kind=feature", *of_file).width > 0
    with pytest.raises(ConfigError, match=rf"is not a run folder but holds weights: give one of its files, {file}"):
        made_teacher(of(10), "teacher.kind=soft", *of_file[:1], f"teacher.checkpoint={file.parent}")


def test_a_teacher_s_own_start_is_no_advice_for_its_student(runs, tmp_path, capsys):
    """A run of a recipe that starts from weights; one of the oldest, which have no task."""
    old = shutil.copytree(runs / "teacher", tmp_path / "old")
    cfg = OmegaConf.load(old / "config.yaml")
    del cfg["task"]
    start = {"pretrained": True, "name": cfg.model.name}
    recipe = {"recipe": {"name": "paper"}, "paper": {"phase": "imagenet1k_finetune_384"}}
    OmegaConf.save(OmegaConf.merge(cfg, recipe, {"model": start}), old / "config.yaml")
    assert made_teacher(of(10), "teacher.kind=soft", f"teacher.checkpoint={old}").model.num_classes == 10
    assert "pretrained" not in capsys.readouterr().out


def test_a_teacher_that_has_changed_is_noticed(runs, tmp_path, capsys):
    shutil.copytree(runs / "teacher", tmp_path / "teacher")
    options = [*student(tmp_path, "soft"), "train.steps=2", "train.save_every=1"]
    train_here(tmp_path, *options, "name=student")
    note_overrides(tmp_path / "student", options)
    run = lost_after(1, tmp_path / "student", tmp_path / "copy")
    train_here(tmp_path, f"resume={shutil.copytree(run, tmp_path / 'same')}")
    assert "the teacher's weights" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "teacher")
    train_here(tmp_path, *SMALL, "train.steps=2", "seed=1", "name=teacher")
    train_here(tmp_path, f"resume={run}")
    assert "the teacher's weights are not those of the last start" in capsys.readouterr().out


def test_what_becomes_of_a_teacher_s_file_is_said(tmp_path, capsys):
    """That its windows are others than those it learned with, for one."""
    small = timm.create_model("maxvit_t", img_size=64, num_classes=10)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    given = ["teacher.kind=soft", "teacher.name=maxvit_t", f"teacher.checkpoint={tmp_path / 'small.safetensors'}"]
    made_teacher(of(10), *given)
    assert "small.safetensors: layout 'zoo'" in (said := capsys.readouterr().out) and "interpolated to other" in said
    made_teacher(of(10), *given, "teacher.img_size=64")
    assert "small.safetensors: layout 'zoo'" in (said := capsys.readouterr().out) and "interpolated" not in said


def test_models_without_maps(runs):
    cfg = config.compose([f"teacher.checkpoint={runs / 'teacher'}", "teacher.kind=feature"])
    with pytest.raises(ConfigError, match=r"teacher\.kind=feature needs feature maps, and maxvit_t gives none"):
        distill.create(cfg, of(10), nn.Linear(1, 1))


# 359 scans to learn from; the teacher, of the student's size, sees them 25 times, the students five times
FEW = ["model=timm", "model.name=test_resnet", "data.img_size=32", "data.val_fraction=0.8", "data.workers=0"]
SHORT = [*FEW, "train.epochs=5", "train.eval_every=5", "train.ema=null", "optim.lr=3e-3", "data.batch_size=16"]


@pytest.mark.slow
def test_a_student_beats_its_twin_without_a_teacher(tmp_path):
    """Same seeds, images and steps; what is measured was learned by nobody."""
    train_here(tmp_path, *FEW, "train.epochs=25", "train.eval_every=25", "optim.lr=3e-3", "name=teacher")
    taught = [f"teacher.checkpoint={tmp_path / 'teacher'}", "teacher.kind=soft", "teacher.weight=1.0"]
    scores = {"twin": [], "student": []}
    for seed in range(3):
        for name, own in (("twin", []), ("student", [*taught, "teacher.temperature=4"])):
            train_here(tmp_path, *SHORT, *own, f"seed={seed}", f"name={name}-{seed}")
            scores[name].append(lines(tmp_path / f"{name}-{seed}")[-1]["val_top1"])
    print(f"teacher {lines(tmp_path / 'teacher')[-1]['val_top1']}, {scores}")
    assert fmean(scores["student"]) > fmean(scores["twin"])
