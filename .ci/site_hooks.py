"""Hooks of mkdocs: README.md is a page of the site, and links that leave docs/ become text there."""

import os.path
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

README = "commands.md"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def relinked(markdown: str, source: Path, docs: Path, home: str) -> str:
    """The Markdown of a page of the site, of links that work where the source is in the repository.

    What is not there is left as it is, for mkdocs to complain of.

    Args:
        source: the file that the Markdown is of. docs: the folder of the site's pages.
        home: the page's place in that folder.
    """
    readme = (docs.parent / "README.md").resolve()

    def relink(link: re.Match[str]) -> str:
        path = (source.parent / link["target"]).resolve()
        if path.is_dir() and (path / "README.md").exists() and path.is_relative_to(docs):
            path = path / "README.md"
        if path == readme:
            path = docs / README
        elif not path.exists():
            return link[0]
        elif path.is_dir() or not path.is_relative_to(docs):
            return link["text"]
        target = Path(os.path.relpath(path, (docs / home).parent)).as_posix()
        return f"{link['image']}[{link['text']}]({target}{link['anchor'] or ''})"

    return LINK.sub(relink, markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md."""
    files.append(File.generated(config, README, abs_src_path=str(Path(config.docs_dir).parent / "README.md")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend the links; README.md has a title of its own among the other pages."""
    source = Path(page.file.abs_src_path or "")
    if page.file.src_uri == README:
        markdown = re.sub(r"\A# .*", f"# {page.title}", markdown)
    return relinked(markdown, source, Path(config.docs_dir), page.file.src_uri)
