"""The site is built strictly and loads nothing from elsewhere; its pages, run from top to bottom, do what they say."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest
import timm
import torch
from PIL import Image

import ops
import pages
import zoo
from docs import draw, render
from pages import ROOT, blocks, edited
from zoo.releases import RELEASES, UNRELEASED
from zoo.releases import render as render_releases

MARKS = {"models", "variants", "releases", "recipe", "speed", "signature"}
RUN = [path for path in pages.PAGES if any(block.how for block in blocks(path))]


def released_file(folder):
    """A file as torchvision's of maxvit_t is, with other weights."""
    layout = zoo.checkpoint.layouts_of(zoo.registry.class_of("maxvit_t_tv"))[0]
    torch.save(layout.to_theirs(timm.create_model("maxvit_t_tv").state_dict()), folder / "maxvit_t-bc5ab103.pth")


def photos(folder):
    """A folder of photographs of two classes, and one beside it."""
    for split in ("train", "val"):
        for shade, name in ((60, "cats"), (200, "dogs")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(4):
                image = Image.new("RGB", (80, 64), (shade, 10 * i, 90))
                image.save(folder / "photos" / split / name / f"{i}.jpg")
    image.save(folder / "cat.jpg")


def code(folder):
    """A copy of the code."""
    for name in ("zoo", "ops", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "eval.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)


def tree(folder):
    """A copy of the code, with what the pages speak of beside it."""
    code(folder)
    released_file(folder)
    photos(folder)


def run(block, folder):
    """Do with a block what its comment says."""
    if block.how == "file":
        (folder / block.what).parent.mkdir(exist_ok=True)
        (folder / block.what).write_text(block.text)
    elif block.how == "edit":
        (folder / block.what).write_text(edited((folder / block.what).read_text(), block.text))
    elif block.language == "python":
        child([sys.executable, "-c", block.text], folder)
    else:
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True) + shlex.split(block.what)
            child(["bash", "-c", shlex.join(words)], folder)


def child(command, folder):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_page_from_top_to_bottom(path, tmp_path):
    tree(tmp_path)
    for block in blocks(path):
        if block.how:
            run(block, tmp_path)


def test_quick_start_trains_and_evaluates(tmp_path):
    tree(tmp_path)
    first = [block for block in blocks(ROOT / "docs" / "quickstart.md") if block.how][:2]
    assert [block.commands()[0][1] for block in first] == ["train.py", "eval.py"]
    for block in first:
        run(block, tmp_path)


def test_every_block_has_a_way_to_be_run():
    for path in pages.PAGES:
        text, found = path.read_text(), blocks(path)
        assert len(re.findall(r"^\s*```", text, re.M)) == 2 * len(found), f"a fenced block of {path} is not understood"
        comments = re.findall(r"^<!-- (?:(?:run|file|edit)\b.*|/?(\w+)) -->$", text, re.M)
        assert len(re.findall("^<!--", text, re.M)) == len(comments) and set(comments) <= {"", *MARKS}, (
            f"a comment in {path} is unknown"
        )
        assert sum(comment == "" for comment in comments) == sum(bool(block.how) for block in found), path
        for block in found:
            assert block.language in ("bash", "python", "text") or block.how in ("file", "edit"), block


@pytest.mark.parametrize("path", [path for path in RUN if pages.changes(blocks(path))], ids=lambda path: path.stem)
def test_changes_of_the_tree_still_apply(path, tmp_path):
    """And what they make of it is linted as the tree is."""
    code(tmp_path)
    changes = [block for block in blocks(path) if block.how in ("file", "edit")]
    for block in changes:
        run(block, tmp_path)
    pytest.importorskip("ruff")
    changed = sorted({block.what for block in changes if block.what.endswith(".py")})
    for command in (["check"], ["format", "--check"]):
        child([sys.executable, "-m", "ruff", *command, "--no-cache", *changed], tmp_path)


def test_a_change_that_does_not_apply_is_an_error():
    assert edited("a\nb\n", " a\n-b\n+c\n") == "a\nc\n"
    with pytest.raises(ValueError, match="expected once"):
        edited("a\nb\n", "-c\n+d\n")


def test_a_page_without_its_marks(tmp_path):
    page, marks = tmp_path / "strips.md", {"variants": "", "speed": ""}
    wanted = "these marks, each on a line: <!-- variants --> <!-- /variants -->, <!-- speed --> <!-- /speed -->"
    with pytest.raises(ValueError, match=f"strips.md: .*No such file.*{wanted}"):
        render.filled(page, marks)
    page.write_text("<!-- variants -->\n<!-- /variants -->\n")
    with pytest.raises(ValueError, match=f"strips.md: expected the lines <!-- speed -->.*{wanted}"):
        render.filled(page, marks)


def test_a_family_without_weights(monkeypatch):
    monkeypatch.setitem(render.FAMILIES, "strips", "Strips")
    assert "Strips" not in render_releases(RELEASES, UNRELEASED)
    assert render.releases("strips") == "No weights are known.\n"


def test_tables_are_in_step():
    assert not [path.name for path, text in render.pages().items() if path.read_text() != text], "run `make docs`"


def test_figures_are_in_step():
    found = {path.name: path.read_text() for path in draw.IMAGES.glob("block-*.svg")}
    assert found == draw.figures(), "run `make docs`"


def test_titles_of_figures_end_inside_of_them():
    for name, text in draw.figures().items():
        width = int(re.search(r'width="(\d+)"', text)[1])
        titles = re.findall(r'<text x="(\d+)" y="\d+" font[^>]*>([^<]*)', text)
        assert titles and [title for x, title in titles if int(x) + 7 * len(title) > width] == [], name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """What a page loads without being asked, and what it links to."""

    def __init__(self):
        super().__init__()
        self.loads, self.links = [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and attrs.get("src"):
            self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("rel") != "canonical":
            self.loads.append(attrs["href"])
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])


def read(page):
    parser = Loaded()
    parser.feed(page.read_text())
    return parser


def test_site_loads_nothing_from_elsewhere(site):
    built = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(built) > 25
    for page in built:
        for address in read(page).loads:
            place = urlsplit(address)
            assert not place.scheme and not place.netloc, f"{page.name} loads {address}"
            assert (page.parent / place.path).is_file(), f"{page.name} loads {address}, which is not there"
    for sheet in (*site.rglob("*.css"), *site.rglob("*.svg")):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text()), sheet


def test_site_is_read_from_a_folder(site):
    """Links lead to files, so that no server is needed."""
    for page in site.rglob("*.html"):
        for address in read(page).links if page.name != "404.html" else ():
            place = urlsplit(address)
            if not place.scheme and place.path:
                assert (page.parent / place.path).is_file(), f"{page.name} links to {address}"


def test_every_family_and_op_has_a_page():
    assert {path.stem for path in (ROOT / "docs" / "families").glob("*.md")} == {"index", *render.FAMILIES}
    functions = {name for names, _ in render.OPS.values() for name in names}
    assert functions | {"implementation", "unpack"} == set(ops.__all__)


@pytest.mark.parametrize("kind, found", [("families", render.FAMILIES), ("ops", render.OPS)])
def test_pages_of_families_and_ops_are_named(kind, found):
    contents = (ROOT / "mkdocs.yml").read_text()
    assert [key for key in found if f": {kind}/{key}.md\n" not in contents] == [], "mkdocs.yml names every page"
    index = (ROOT / "docs" / kind / "index.md").read_text()
    assert [key for key in found if f"({key}.md)" not in index] == [], f"docs/{kind}/index.md has a row for each"


def test_every_family_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [key for key in render.FAMILIES if f"(docs/families/{key}.md)" not in text] == []
