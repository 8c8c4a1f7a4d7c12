"""What MkDocs asks while it builds: files of the repository's root as pages, links as they are right on both sides.

Pages are written to be read in the repository too, where a link leads to any file. On the site a link to a file that
is a page leads to the page; of a link to any other file the text is left.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ("checkpoints.md", "CHANGELOG.md", "CONTRIBUTING.md")  # of the root
LINK = re.compile(r"(?<!!)\[([^][]+)\]\(([^()#:\s]+)(#[^()\s]*)?\)")


def on_files(files, config):
    """Add the pages of the root."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text("utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links and strokes as this page needs them."""
    folder = "" if page.file.src_uri in PAGES else "docs"
    here = posixpath.join(folder, posixpath.dirname(page.file.src_uri))
    text = LINK.sub(lambda link: _link(link, here, page.file.src_uri), markdown)
    return re.sub(r"~~(.+?)~~", r"<del>\1</del>", text)


def _link(link, here, page):
    """A link from the folder `here` of the repository; where nothing is, it stays, and a strict build refuses it."""
    text, target, anchor = link[1], link[2], link[3] or ""
    path = posixpath.normpath(posixpath.join(here, target))
    uri = path.removeprefix("docs/") if path.startswith("docs/") else path if path in PAGES else None
    if uri is not None:
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page) or '.')}{anchor})"
    return text if (ROOT / path).exists() else link[0]
