"""What the site is built from beyond docs/: the folders' READMEs, pictures of results, and one section a method.

MkDocs calls the functions `on_*` (`hooks` in mkdocs.yml, run by `make docs`). Links that lead out of docs/ are mapped
to the page that shows the file; a link to any other file of the repository becomes its name. A link to nothing fails.
A method's section is made of its yaml (`conf/method`), the docstring of its module, and `docs/methods.yaml`, which has
an idea in short and an equation for those that are there; a method without an entry shows its docstring's own words.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "conf/README.md": "configuration.md",
    "experiments/README.md": "campaigns.md",
    "results/README.md": "exported.md",
    "findings/README.md": "libraries.md",
    "benchmarks/README.md": "benchmarks.md",
    "analysis/AUDIT.md": "audit.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
"""Files outside of docs/ that are pages of the site."""
MADE_OF = {"docs/methods.yaml": "methods.md"}
"""Files that a page of the site is made of: a link to such a file leads to the page on the site, and to the file in a
clone, which has no such page."""
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<to>[^)\s]+)\)")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*`)", re.M | re.S)


class DeadLink(Exception):
    """A link to a file that is not there."""


# --- links --------------------------------------------------------------------------------------------


def source_of(uri: str) -> str:
    """The repository's path of a page of the site."""
    return next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")


def page_of(path: str) -> str | None:
    """The site's path of a file of the repository; None if the site does not hold it."""
    if path in PAGES or path in MADE_OF:
        return PAGES.get(path) or MADE_OF[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.startswith("results/") and path.endswith(".png") else None


def mapped(text: str, uri: str) -> str:
    """The page's Markdown with its links as the site needs them; raises DeadLink."""
    here = posixpath.dirname(source_of(uri))

    def change(match: re.Match) -> str:
        to, anchor = match["to"].partition("#")[::2]
        if re.match(r"[a-z]+:", match["to"]) or not to:
            return match[0]
        path = posixpath.normpath(posixpath.join(here, to))
        page = page_of(path)
        if not (ROOT / path).exists():
            raise DeadLink(f"{source_of(uri)}: {match['to']}")
        if page is None:
            return f"`{match['text'].strip('[]')}`" if "`" not in match["text"] else match["text"].strip("[]")
        relative = posixpath.relpath(page, posixpath.dirname(uri) or ".")
        return f"{match['text']}({relative}{'#' + anchor if anchor else ''})"

    parts = CODE.split(text)  # every second part is code, which holds no links
    return "".join(part if k % 2 else LINK.sub(change, part) for k, part in enumerate(parts))


def pictures(text: str, uri: str) -> set[str]:
    """The pictures of results that a page shows, as paths of the repository."""
    here = posixpath.dirname(source_of(uri))
    found = {posixpath.normpath(posixpath.join(here, to)) for to in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)}
    return {path for path in found if path.startswith("results/")}


# --- the methods --------------------------------------------------------------------------------------


def methods() -> list[str]:
    """Names of conf/method in the order of the tables, newcomers last."""
    from analysis import paper

    return sorted((p.stem for p in (ROOT / "conf" / "method").glob("*.yaml")), key=paper.method_order)


def settings(name: str) -> dict[str, Any]:
    """The method's yaml with those that it is based on below it; keys of Hydra left out."""
    content = yaml.safe_load((ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            merged = settings(base)
    for key, value in content.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def comments(name: str) -> dict[str, str]:
    """Key -> what its yaml, or the yaml that it is based on, says beside its value; ` ` for the file's first line."""
    text = (ROOT / "conf" / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    found = {}
    for base in content.get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            found |= comments(base)
    group = ""
    for line in text.splitlines():
        key = re.match(r"( *)([\w]+):(?:\s|$)", line)
        if key:
            group = group if key[1] else key[2]
            said = re.search(r"\s#\s*(.*)$", line)
            found[f"{group}.{key[2]}" if key[1] else key[2]] = said[1] if said else ""
    found[" "] = text.splitlines()[0].lstrip("# ")
    return found


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots, `_target_` and `name` left out."""
    found = {}
    for key, value in content.items():
        if key in ("_target_", "name"):
            continue
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def docstring(target: str) -> str:
    """Of the module that `_target_` names."""
    path = ROOT / Path(*target.split(".")[:-1]).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def split(text: str) -> tuple[str, str, str]:
    """Title line, body, and the section `Deviations:` of a module's docstring."""
    head, _, deviations = text.partition("\nDeviations:")
    title, _, body = head.partition("\n")
    return title.strip(), body.strip(), deviations.strip()


def section(name: str, short: dict[str, dict]) -> str:
    """One method: idea, equation, keys, deviations."""
    from analysis import paper

    content, said, entry = settings(name), comments(name), short.get(name, {})
    title, body, deviations = split(docstring(content["_target_"]))
    based = entry.get("like")
    parts = [f"## {paper.method_label(name)} {{ #{name} }}", f"`method={name}`. {said[' ']}"]
    parts.append(" ".join(entry["idea"].split()) if "idea" in entry else f"{title}\n\n{paragraphs(body)}")
    if "equation" in entry:
        parts.append(f"```text\n{entry['equation'].strip()}\n```")
    if keys := flat(content):
        rows = [
            f"| `method.{key}` | `{shown(value)}` | {cell(said.get(last(key), ''))} |" for key, value in keys.items()
        ]
        table = "\n".join(["| key | value | what the yaml says |", "|---|---|---|", *rows])
        parts.append(folded("Keys", table))
    if based:
        parts.append(f"Paper, deviations: [{paper.method_label(based)}](#{based}).")
    else:
        about = "\n\n".join(
            p for p in (paragraphs(body), f"**Deviations**\n\n{deviations}" if deviations else "") if p
        )
        if about:
            parts.append(folded("Paper and deviations", about))
    return "\n\n".join(parts)


def folded(title: str, body: str) -> str:
    return f'<details markdown="1"><summary>{title}</summary>\n\n{body}\n\n</details>'


def last(key: str) -> str:
    """`weight.energy` as `comments` names it: a group and a key."""
    return ".".join(key.split(".")[-2:])


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def paragraphs(text: str) -> str:
    """A docstring's text as Markdown: what looks like HTML is escaped."""
    return text.replace("<", "&lt;")


def methods_page() -> str:
    """One section a method of conf/method, so that a new one appears by itself."""
    short = yaml.safe_load((ROOT / "docs" / "methods.yaml").read_text(encoding="utf-8"))
    start = (
        "# The methods\n\nOne section a defence: the idea, the equation, its keys with their values and where these "
        "come from, and where the code departs from the paper. L is the loss on the task, W the weights, W_0 those of "
        "the aligned model, dW = W - W_0. How to add one: [add a method](add_a_method.md)."
    )
    return "\n\n".join([start, *(section(name, short) for name in methods())]) + "\n"


# --- what MkDocs calls --------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures that do not lie in docs/."""
    from mkdocs.structure.files import File

    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "methods.md", content=methods_page()))
    texts = {f.src_uri: f.content_string for f in files if f.src_uri.endswith(".md")}
    for path in sorted(set().union(*(pictures(text, uri) for uri, text in texts.items()))):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site needs them."""
    from mkdocs.exceptions import PluginError

    try:
        return mapped(markdown, page.file.src_uri)
    except DeadLink as error:
        raise PluginError(f"dead link in {error}") from None
