"""What is typed is held to ranges, and refused where nothing would read it, as in files of one's own."""

import itertools
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import recipes
from recipes.config import ConfigError, compose, contents
from recipes.config.idle import READ, TRAINING
from recipes.config.quoting import quote, reads_as
from recipes.config.ranges import LENGTHS, RANGES

CONF = Path(recipes.__file__).parent / "conf"

NONSENSE = [
    "train.eval_every=0", "train.eval_every=-1", "sched.warmup=-5", "augment.label_smoothing=1.5", "augment.mix_prob=5",
    "augment.hflip=7", "augment.re_prob=2", "augment.scale=[0.9,0.1]", "augment.scale=[0.5]", "augment.scale=[a,b]",
    "train.ema=1.5", "train.clip_grad=0", "train.clip_grad=-1", "optim.weight_decay=-1", "optim.layer_decay=0",
    "data.crop_pct=0", "sched.cooldown=-5", "data.img_size=0", "data.img_size=[32,0]", "data.eval_batch_size=-2",
    "seed=-1", "augment.repeats=0", "train.ema_every=0", "data.workers=-1", "optim.betas=[0.9]", "optim.lr=-1",
    "data.interpolation=foo", "augment.interpolation=foo", "augment.auto_augment=bogus",
    "augment.auto_augment=rand-mx9-n2-mstdoops9x", "data.val_fraction=1.5", "hardware.threads=0", "data.mean=[0.5]",
    "task.target_threshold=1.0", "data.crop_pct=87.5", "train.keep=0", "train.epochs=inf", "data.short_side=[]",
    "data.split_seed=4294967296", "model.num_classes=10000001", "data.workers=100000", "data.crop_pct=1e-300",
    "optim.eps=0", "model.drop_rate=1", "hardware.threads=100000", "data.img_size=100000000",
    "data.img_size=[32,65536]", "train.steps=0", "train.accumulate=0", "train.micro_batch=0", "train.save_every=0",
    "train.log_every=0", "data.batch_size=0", "optim.layer_decay_min_scale=2",
]  # fmt: skip


# with task=segment
NONSENSE_OF_A_TASK = [
    "task.jitter=[2.0,0.5]", "task.jitter=[1.0]", "task.jitter=[0.0,1.0]", "task.dropout=1.5", "task.category_cap=0.0",
    "task.channels=0", "task.dropout=1", "task.left_out_weight=-1", "data.things=[a,b]", "data.short_side=[a,b]",
    "task.scales=[a]", "task.scales=[nan]", "task.stride=[8,a]", "data.short_side=true", "task.stride=[32.5,32]",
    "data.short_side=1.5", "data.short_side=[32.5,64]", "data.things=[1.5,3]", "data.img_size=[64.5,64]",
    "data.side_multiple=65536",
]  # fmt: skip


@pytest.mark.parametrize("typed", NONSENSE_OF_A_TASK)
def test_what_makes_no_sense_in_a_task_is_refused(typed):
    key = typed.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"(?s)^{re.escape(key)}=.*: expected "):
        compose(["task=segment", typed])


@pytest.mark.parametrize("typed", NONSENSE)
def test_what_makes_no_sense_is_refused(typed):
    key = typed.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"(?s)^{re.escape(key)}=.*: expected "):
        compose([typed])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["model.name=maxvit_t.tf_in1k"], "maxvit_t has no such tag (did you mean maxvit_t.timm_tf_in1k?): expected "),
        (["model=timm", "model.name=cspresnet50d.ra_in1k"], "cspresnet50d has no such tag: expected cspresnet50d"),
        (["teacher.kind=soft", "teacher.name=resnet10t.a1"], "no such tag (did you mean resnet10t.c3_in1k?): expected"),
    ],
)
def test_a_tag_that_a_model_does_not_have(typed, said):
    with pytest.raises(ConfigError) as error:
        compose(typed)
    assert str(error.value).startswith(f"{typed[-1]}: ") and said in str(error.value)


def test_any_text_can_be_written():
    for letters in itertools.chain(*(itertools.product("a ,\\'\"", repeat=length) for length in range(4))):
        text = "".join(letters)
        assert reads_as(quote("out", text)) == text


NAMES = [
    "a.pth", "my file (1).pth", "a,b.pth", "[best].pth", "{a}.pth", "epoch=3.pth", "it's.pth", 'say "hi".pth', "1e3",
    "007", "~/x.pth", "a#b", "C:\\models\\x.pth", "ends\\", "größe.pth", "a & b; c | d", "-3", "true",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_quoted_where_they_must_be(name):
    typed = quote("model.checkpoint", name)
    assert reads_as(typed) == name
    if typed != f"model.checkpoint={name}":
        assert reads_as(f"model.checkpoint={name}") != name


FINE = [
    "optim.lr=0", "optim.betas=[0.9,0.99,0.999]", "train.clip_grad=null", "augment.auto_augment=3a",
    "data.crop_pct=1.0", "augment.auto_augment=ta_wide", "augment.auto_augment=augmix-m3-w3",
    "augment.auto_augment=original",
    "augment.auto_augment=rand-m9-mstd0.5-inc1", "augment.interpolation=random", "hardware.threads=1",
    "data.workers=0", "train.eval_every=0.1", "data.img_size=[32,64]", "data.val_split=validation",
    "data.crop_pct=1.15", "train.keep=1",
]  # fmt: skip


def test_what_makes_sense_is_not():
    for typed in FINE:
        compose([typed])


def test_every_range_is_of_a_key():
    keys = {*contents.keys("train"), *contents.keys("eval"), "model.drop_path_rate"}
    assert RANGES.keys() <= keys and LENGTHS.keys() <= RANGES.keys()


IDLE = [
    (["data=imagefolder", "data.hub=foo"], "data.hub=foo has no effect here: it needs data.source=arrow or parquet"),
    (["data=imagefolder", "data.num_classes=7"], "but data=imagefolder has folder"),
    (["data.max_pixels=1"], "data.max_pixels=1 has no effect here: it needs image files to decode, and data=digits"),
    (["task=segment", "data.on_bad_image=replace"], "it needs image files to decode, and data=scenes has none"),
    (["task=segment", "data=ade20k", "data.jpeg=full"], "it needs task=classify; images with dense labels are decoded"),
    (["data=cifar10", "data.val_fraction=0.5"], "needs data.source=digits or scenes"),
    (["data.val_split=test"], "data.val_split=test has no effect here"),
    (["data.image_key=null"], "data.image_key=null has no effect here"),
    (["teacher.weight=0.9"], "it needs teacher.kind=soft, hard or feature"),
    (["teacher.pretrained=true"], "it needs teacher.kind="),
    (["sched.milestones=[3]"], "it needs sched.sched=step, but it is cosine"),
    (["sched.gamma=0.5"], "it needs sched.sched=step, but it is cosine"),
    (["sched.power=0.9"], "it needs sched.sched=poly, but it is cosine"),
    (["teacher.kind=hard", "teacher.temperature=4"], "it needs teacher.kind=soft, but it is hard"),
    (["task.target_threshold=0.2"], "it needs task.loss=binary_cross_entropy, but it is cross_entropy"),
    (["recipe=a2", "augment.label_smoothing=0.1"], "it needs task.target_threshold=null: targets above 0.2 count"),
    (["model.weights=ema"], "it needs model.checkpoint="),
    (["task=segment", "data.interpolation=nearest"], "it needs task=classify; in other tasks images are resized to"),
    (["task=detect", "data.crop_pct=0.5"], "it needs task=classify"),
    (["data.short_side=64"], "it needs dense labels, task=segment or detect"),
    (["optim.momentum=0.5"], "it needs an optimiser with momentum, and optim.opt=adamw has none"),
    (["optim=sgd", "optim.betas=[0.9,0.95]"], "with betas, and optim.opt=sgd has none"),
    (["optim.opt=lookahead_lion", "optim.eps=1e-6"], "with eps, and optim.opt=lookahead_lion has none"),
    (["task=segment", "augment.mixup=0.8"], "augmented by the keys of task and by data.hflip"),
    (["task=detect", "augment.scale=[0.1,1.0]"], "it needs task=classify; images with dense labels are augmented"),
    (["task=detect", "augment.hflip=0.3"], "it needs task=classify; images with dense labels are flipped by data"),
    (["augment.cutmix=0", "augment.mixup=0", "augment.mix_prob=0.2"], "augment.mixup or augment.cutmix, but both are"),
    (["augment.switch_prob=0.2"], "it needs a value of augment.cutmix other than 0"),
    (["augment.cutmix=1", "augment.mixup=0", "augment.switch_prob=0.2"], "needs a value of augment.mixup other than 0"),
    (["augment.re_prob=0", "augment.re_mode=const"], "it needs a value of augment.re_prob other than 0"),
    (["train.steps=3", "train.epochs=2"], "train.epochs=2 has no effect here: it needs train.steps=null, but it is 3"),
    (["train.eval_steps=3", "train.eval_every=2"], "it needs train.eval_steps=null, but it is 3"),
    (["train.ema=null", "train.ema_every=2"], "it needs a value of train.ema other than null"),
    (["train.ema=null", "train.ema_warmup=false"], "train.ema_warmup=False has no effect here"),
    (["train.ema=null", "train.ema_evaluated=false"], "it needs a value of train.ema other than null"),
    (["sched.warmup=0", "sched.warmup_lr=1e-5"], "it needs a value of sched.warmup other than 0"),
    (["sched.warmup_ratio=0.1", "sched.warmup_lr=1e-5"], "it needs sched.warmup_ratio=null, but it is 0.1"),
    (["sched.warmup_ratio=0.1", "sched.decay_from=start"], "it needs sched.warmup_ratio=null, but it is 0.1"),
    (["sched.warmup=0", "sched.decay_from=start"], "it needs a value of sched.warmup other than 0"),
    (["sched.warmup=0", "sched.warmup_ratio=0.1"], "it needs a value of sched.warmup other than 0"),
    (["data=imagefolder", "data.cache_gb=8"], "it needs a value of data.cache other than null"),
    (["data=imagefolder", "data.cache=ram", "data.cache_dir=a"], "it needs data.cache=disk, but it is ram"),
    (["task=detect", "data.left_out=['0']"], "it needs task=segment, which leaves these classes out"),
    (["task=segment", "data.left_out=[]", "task.left_out_weight=0.5"], "needs a value of data.left_out other than []"),
    (["task=segment", "task.auxiliary=true"], "it needs a value of task.head other than semantic_fpn"),
    (["task=segment", "task.stride=[8,8]"], "it needs task.inference=slide, but it is whole"),
    (["task=segment", "task.crop=false", "task.category_cap=0.5"], "it needs task.crop=true, but it is false"),
    (
        ["augment.auto_augment=ta_wide", "augment.color_jitter=0.4"],
        "augment.auto_augment=null or 3a, but it is ta",
    ),
    (["sched.sched=constant", "sched.decay_from=start"], "needs a schedule that changes, but sched.sched is constant"),
    (["sched.sched=step", "sched.decay_from=start"], "it needs a value of sched.sched other than step"),
    (["model.drop_path_rate=0.1", "train.drop_path_rate=0.2"], "needs model.drop_path_rate=null, but it is 0.1"),
    (["augment.hflip=0.2", "data.hflip=0.3"], "it needs augment.hflip=${data.hflip}, its default, but that is 0.2"),
    (["augment.vflip=0.2", "data.vflip=0.3"], "it needs augment.vflip=${data.vflip}, its default, but that is 0.2"),
    (["task=detect", "augment.vflip=0.3"], "images with dense labels are flipped by data.vflip"),
    (["optim.layer_decay_min_scale=0.1"], "it needs a value of optim.layer_decay other than null"),
    (["sched.sched=constant", "sched.min_lr=1e-4"], "needs a schedule that changes, but sched.sched is constant"),
    (["sched.sched=constant", "sched.warmup=0", "sched.per=epoch"], "sched.per=epoch has no effect here"),
    (["task=detect", "model.drop_rate=0.5"], "maxvit_t has no dropout but before its classifier"),
]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["predict=a.png", "save_predictions=true"], "predict=a.png answers for images of your own, and save_predicti"),
        (["img_size=64", "data.eval_img_size=40"], "img_size= and data.eval_img_size= both give the size of images"),
        (["img_size=[32,48]", "data.img_size=48"], "img_size= and data.img_size= both give the size of images"),
    ],
)
def test_two_things_of_which_an_evaluation_would_do_one(typed, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose(["run=runs/first", *typed], "eval")
    for fine in (["img_size=48", "data.img_size=48"], ["img_size=48", "data.eval_img_size=null"], ["predict=a.png"]):
        compose(["run=runs/first", *fine], "eval")


UNEVALUATED = [
    (["data.batch_size=8"], "data.batch_size=8 has no effect here: it needs train.py, as only training reads it; in "),
    (["data.batch_size=8"], "in an evaluation there is data.eval_batch_size="),
    (["data.hflip=0.3"], "data.hflip=0.3 has no effect here: it needs train.py, as only training reads it"),
    (["data=imagefolder", "data.jpeg=full"], "data.jpeg=full has no effect here: it needs train.py"),
    (["data=imagefolder", "data.train_split=learn"], "in an evaluation there is data.val_split="),
    (["data=coco", "task=detect", "data.train_json=a.json"], "in an evaluation there is data.val_json="),
    (["seed=3"], "it needs data.on_bad_image=replace: nothing else in an evaluation is random"),
    (["hardware.parallel=fsdp"], "hardware.parallel=fsdp has no effect here: it needs train.py"),
    (["model.drop_rate=0.3"], "model.drop_rate=0.3 has no effect here: it needs train.py"),
    (["task.loss=binary_cross_entropy"], "task.loss=binary_cross_entropy has no effect here: it needs train.py"),
    (["task=segment", "data.hflip=0.3"], "in an evaluation there is task.flip="),
    (["task=segment", "task.jitter=[1,1]"], "in an evaluation there is task.scales="),
    (["task=segment", "task.photometric=false"], "it needs train.py, as only training reads it"),
    (["task=detect", "task.norm_eval=true"], "it needs train.py, as only training reads it"),
]


@pytest.mark.parametrize("typed, said", UNEVALUATED, ids=[" ".join(typed) for typed, _ in UNEVALUATED])
def test_what_only_training_reads_is_refused_in_an_evaluation(typed, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose(["checkpoint=a.pth", *typed], "eval")
    compose(typed)
    groups = [text for text in typed if text.partition("=")[0] in contents.groups()]
    compose(["checkpoint=a.pth", *groups, *(f"++{text}" for text in typed if text not in groups)], "eval")  # of config=


def test_what_only_training_reads_is_said_of_keys_that_there_are():
    tables = [contents.base("train"), contents.base("eval"), contents.hardware_defaults()]
    known = set().union(*tables, *(contents.task_defaults(task) for task in contents.options("task")))
    assert {*TRAINING, *filter(None, TRAINING.values())} <= known


@pytest.mark.parametrize("typed, said", IDLE, ids=[" ".join(typed) for typed, _ in IDLE])
def test_what_nothing_reads_is_refused(typed, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose(typed)


@pytest.mark.parametrize("key", ["optim.", "optim..lr", ".optim.lr", "1", "ünï", "data/", "/data", "optim./lr"])
def test_keys_that_cannot_be(key):
    """Such as from optim.$KEY where the variable is not set."""
    for sign, quoted in (("", ""), ("+", ""), ("~", ""), ("", "'")):
        typed = f"{quoted}{sign}{key}=3{quoted}"
        with pytest.raises(ConfigError, match=rf"^{re.escape(typed)}: {re.escape(key)} is not a key; `.*--cfg job` pr"):
            compose([typed])


def test_no_key_at_all():
    for typed in ("=3", "+=3", "~=3", "~"):
        with pytest.raises(ConfigError, match=rf"^{re.escape(typed)} has no key, .*: expected key=value$"):
            compose([typed])
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr or optim\.opt or"):  # `optim.` is none
        compose(["optim.lr.x=3"])


NO_VALUES = [
    ("seed={a:1}", "seed={a:1} was read as dict: expected a whole number"),
    ("data.val_count={a:1}", "data.val_count={a:1} was read as dict: expected a whole number"),
    ("data.class_names={a:1}", "data.class_names={a:1} was read as dict: expected a single value or a list"),
    ("data.name=null", "data.name=null: expected a string"),
    ("data.source=null", "data.source=null: expected a string"),
]
NO_OPTIONS = [
    ("hydra/launcher=3", "hydra/launcher=3 is not an option of hydra/launcher: expected hydra/launcher=<option>"),
    ("hydra/launcher=[basic,1]", "hydra/launcher=[basic,1] is not an option of hydra/launcher: expected"),
    ("+recipe/by_task=3", "+recipe/by_task=3 is not an option of recipe/by_task: expected recipe/by_task=<option>"),
    ("recipe/by_task=[1]", "recipe/by_task=[1] is not an option of recipe/by_task"),
    ("recipe/by_task=quick_detekt", "unknown recipe/by_task 'quick_detekt' (did you mean quick_detect or"),
    ("optim@x=3", "optim@x=3 is not an option of optim: expected adamw, lamb, recipe, sgd"),
    ("~optim@x=3", "~optim@x=3 is not an option of optim: expected adamw"),
    ("~data=3", "~data=3 would leave out data, which is read: choose another option, data=<option>"),
    ("~recipe", "~recipe would leave out recipe, which is read"),
    ("~hardware", "~hardware would leave out hardware, which is read"),
]


@pytest.mark.parametrize("typed, said", [*NO_VALUES, *NO_OPTIONS])
def test_values_and_options_that_cannot_be(typed, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        compose([typed])


def test_what_a_recipe_of_ones_own_sets_for_a_task(own):
    given = {"searched": [str(own)]}
    assert compose(["recipe/by_task=mine_classify"], **given).train.steps == 5
    assert compose(["recipe/by_task=[mine_classify]"], **given).train.steps == 5
    with pytest.raises(ConfigError, match=r"^unknown recipe/by_task 'mine': expected mine_classify, paper_classify"):
        compose(["recipe/by_task=mine"], **given)


def test_names_that_are_a_number_where_they_are_resolved():
    with pytest.raises(ConfigError, match=r"as \$\{\.\.\.\} gives with text around it: 'name=text-\$\{seed\}'$"):
        compose(["name=${seed}"])
    assert compose(["name=text-${seed}"]).name == "text-0"


def test_nothing_to_freeze_is_refused():
    for typed in ("train.freeze=", "train.freeze=[]"):
        with pytest.raises(ConfigError, match=r"^train\.freeze= is empty: give a name, or leave it out$"):
            compose([typed])
        compose([typed], typed=["train.keep=1"])  # a run that was begun with it goes on


@pytest.mark.parametrize(
    "typed, ends",
    [
        ("model=maxvit_t,nat_m", "this is a single run. For one run each: add -m"),
        ("logger=wandb,tensorboard", "For a list: 'logger=[wandb,tensorboard]'; for one run each: add -m"),
        ("optim.lr=1,2", "this is a single run. Give one value; for one run each: add -m"),
        ("data.jpeg=scaled,full", "this is a single run. For one run each: add -m"),
        ("name=a,b", "For one string: 'name=\"a,b\"'; for one run each: add -m"),
        ("optim.betas=0.9,0.99", "single run. For a list: 'optim.betas=[0.9,0.99]'; for one run each: add -m"),
        ("model.depths=2,2,5,2", "single run. For a list: 'model.depths=[2,2,5,2]'; for one run each: add -m"),
        ("+model.some=1,2", "'+model.some=\"1,2\"'; for a list: '+model.some=[1,2]'; for one run each: add -m"),
        ("~optim.lr", "give it another value"),
    ],
)
def test_errors_suggest_nothing_that_is_refused(typed, ends):
    with pytest.raises(ConfigError) as error:
        compose([typed])
    assert str(error.value).endswith(ends)


def test_several_images_are_a_folder_or_a_pattern():
    with pytest.raises(ConfigError, match=r"run\. For several images: predict=<folder>, or 'predict=<folder>/\*"):
        compose(["model=maxvit_t", "predict=a.png,b.png"], "eval")


def test_what_is_read_is_not():
    compose(["data=imagefolder", "data.val_split=test"])
    compose(["teacher.kind=soft", "teacher.weight=0.9"])
    compose(["sched.sched=step", "sched.milestones=[3]"])
    compose(["sched.sched=poly", "sched.power=0.9", "teacher.kind=soft", "teacher.temperature=4"])
    compose(["recipe=a2", "task.target_threshold=null", "augment.label_smoothing=0.1"])
    compose(["task.loss=binary_cross_entropy", "task.target_threshold=0.2"])
    compose(["optim=sgd", "optim.betas=null"])
    compose(["optim.opt=lookahead_sgd", "optim.momentum=0.8"])
    compose(["model.weights=ema", "model.checkpoint=a.pth"])
    compose(["augment.cutmix=1", "augment.mix_prob=0.2", "augment.switch_prob=0.2", "augment.re_mode=const"])
    compose(["task=segment", "augment.repeats=3", "data.hflip=0.5", "augment.mixup=0.0"])  # the last is the default
    compose(["train.epochs=2", "train.eval_every=2", "train.ema_every=2", "train.ema_warmup=false"])
    compose(["sched.warmup_lr=1e-5", "sched.decay_from=start", "model.drop_rate=0.5"])
    compose(["sched.sched=constant", "sched.warmup=1", "sched.per=epoch", "sched.cooldown=1", "sched.min_lr=1e-4"])
    compose(["augment.auto_augment=3a", "augment.color_jitter=0.4"])
    compose(["data=imagefolder", "data.cache=disk", "data.cache_gb=8", "data.cache_dir=a"])
    compose(
        ["task=segment", "task.auxiliary=false", "task.inference=slide", "task.stride=[8,8]", "data.left_out=['0']"]
    )
    compose(["task=segment", "task.head=fcn", "task.auxiliary=true", "task.category_cap=0.5"])
    compose(["task=segment", "++augment.mixup=0.8"])  # as config= writes a recipe's
    compose(["train.steps=3", "train.epochs=2", "resume=runs/a"])
    compose(["run=runs/a", "data.val_split=test"], "eval")  # its data is another
    for read in (["data.on_bad_image=replace", "seed=3"], ["data.train_split=learn", "data.root=a"]):
        compose(["checkpoint=a.pth", "data=webdataset", *read], "eval")
    compose(["checkpoint=a.pth", "task=segment", "task.auxiliary=false", "hardware.timeout=60"], "eval")
    compose(["data.hflip=0.3", "train.drop_path_rate=0.2", "optim.layer_decay=0.8", "optim.layer_decay_min_scale=0.1"])
    compose(["task=segment", "++augment.hflip=0.2", "data.hflip=0.3"])
    compose(["data=imagefolder", "data.hub=foo", "seed=-1"], typed=["data.root=photos"])  # a run that was begun before


def test_sources_read_what_is_said_of_them():
    """The comment at a key names the sources that read it."""
    lines = (CONF / "common.yaml").read_text().partition("\ndata:\n")[2].splitlines()
    comments = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in lines}
    sources = set().union(*READ.values())
    for key, read in READ.items():
        parts = re.findall(r"(?:^|; )([a-z_, ]+):(?= )", comments[key])
        said = {word for part in parts for word in part.split(", ")}
        assert said & sources == set(read) - ({"tar"} if key == "hub" else set()), key


def test_options_set_what_their_source_reads():
    for option in contents.options("data"):
        own = OmegaConf.load(CONF / "data" / f"{option}.yaml")
        unread = [key for key in own if own.source not in READ.get(key, (own.source,))]
        assert unread == [], option


@pytest.fixture
def own(tmp_path):
    """A folder of one's own configuration files, right and wrong."""
    files = {
        "recipe/right": "# @package _global_\nside: 48\nsizes: {big: 3}\ndata: {img_size: '${side}'}\n"
        "train: {steps: '${sizes.big}'}\nmodel: {act_layer: silu}\n",
        "recipe/mistyped": "# @package _global_\ntrain: {stps: 2}\n",
        "recipe/misplaced": "train: {steps: 2}\n",
        "recipe/by_task/mine_classify": "# @package _global_\ntrain: {steps: 5}\n",
        "recipe/wild": "# @package _global_\ntrain: {clip_grad: -1.0}\n",
        "recipe/strong": "# @package _global_\naugment: {auto_augment: bogus}\n",
        "experiment/misplaced": "train: {stps: 2}\n",
        "experiment/unread": "# @package _global_\nside: 48\n",
        "data/mine": "name: mine\nsource: folder\nrot: here\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


UNREAD = [
    ("recipe=mistyped", "nothing reads train.stps, which one of your files sets (did you mean train.steps"),
    ("recipe=misplaced", "a file in recipe/ that sets keys of other groups must begin with the line `# @package"),
    ("+experiment=misplaced", "nothing reads experiment.train.stps, which one of your files sets"),
    ("+experiment=misplaced", "must begin with the line `# @package _global_`"),
    ("+experiment=unread", "nothing reads side"),
    ("data=mine", "nothing reads data.rot, which one of your files sets (did you mean data.root"),
]


@pytest.mark.parametrize("typed, said", UNREAD)
def test_keys_of_ones_own_files_that_nothing_reads(own, typed, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose([typed], searched=[str(own)])
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose([typed, "resume=auto"], searched=[str(own)])
    # a run that was begun with them goes on
    compose([typed], typed=[], searched=[str(own)])
    compose([typed, "resume=runs/first"], searched=[str(own)])


@pytest.mark.parametrize(
    "recipe, said",
    [
        ("wild", "train.clip_grad=-1.0: expected a number in (0, infinity)"),
        ("strong", "augment.auto_augment=bogus is not a policy that timm reads"),
    ],
)
def test_numbers_of_ones_own_files_that_make_no_sense(own, recipe, said):
    given = {"searched": [str(own)]}
    for typed in ([f"recipe={recipe}"], [f"recipe={recipe}", "resume=auto"]):
        with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
            compose(typed, **given)
    # a run that was begun with them goes on
    compose([f"recipe={recipe}"], typed=["data.root=photos"], **given)
    compose([f"recipe={recipe}", "resume=runs/first"], **given)
    key = said.partition("=")[0]
    assert compose([f"recipe={recipe}", f"{key}=null"], **given).train.epochs == 1


def test_keys_of_ones_own_files_that_are_read(own):
    cfg = compose(["model=timm", "model.name=resnet50", "recipe=right"], searched=[str(own)])
    assert (cfg.data.img_size, cfg.train.steps, cfg.model.act_layer) == (48, 3, "silu")
    assert compose(["+note=first"]).note == "first"
    with pytest.raises(ConfigError, match=r"nothing reads trian\.epochs \(did you mean train\.epochs"):
        compose(["+trian.epochs=2"])
    with pytest.raises(ConfigError, match=r"\+paper\.phse=a: nothing reads paper\.phse \(did you mean paper\.phase"):
        compose(["recipe=paper", "+paper.phse=a"])


def test_a_file_that_is_no_yaml(own):
    (own / "recipe" / "broken.yaml").write_text("train: [\n")
    with pytest.raises(ConfigError, match=r'is not valid YAML: .*in "[^"]*recipe/broken\.yaml", line 2, column 1'):
        compose(["recipe=broken"], searched=[str(own)])
