"""Pages of the site that are made from other files of the repository."""

import base64
import json
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The files outside of docs/ that have a page, by the name of the page.
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of files outside of docs/, and of notebooks."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    for notebook in pathlib.Path(config.docs_dir).glob("*.ipynb"):
        text, images = notebook_page(notebook)
        page = f"{notebook.stem}.md"
        files.append(File.generated(config, page, content=text))
        for name, content in images.items():
            files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Points links at the pages that the site has for files."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    for name, source in PAGES.items():
        markdown = re.sub(
            rf"\]\((\.\./)?(docs/)?{re.escape(source)}", f"]({name}", markdown
        )
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    # A note for the tests, not for readers.
    markdown = markdown.replace("```python\n# slow\n", "```python\n")
    return re.sub(r"\]\((\w+)\.ipynb\)(?!{)", r"](\1.md)", markdown)


def notebook_page(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """Returns the Markdown of a notebook, and its images by name."""
    parts = []
    images = {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(images) + 1}.png"
                images[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above]({name})")
                continue
            text = output.get("text", data.get("text/plain", ""))
            text = _ANSI.sub("", "".join(text)).strip("\n")
            text = "\n".join(line.rstrip() for line in text.splitlines())
            if text:
                parts.append(f"```{{.text .output}}\n{text}\n```")
    parts.append(
        f"[Download this page as a notebook]({path.name}){{ download }}"
    )
    return "\n\n".join(parts) + "\n", images
