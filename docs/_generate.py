"""Writes what can be had from the code: pictures, tables, the catalogue, the reference.

``conf.py`` calls :func:`build`. Pictures, tables and numbers of the README and of the page on
evidence are committed; they are written by::

    python -m docs._generate
"""

from __future__ import annotations

import inspect
import re
from importlib import resources
from pathlib import Path
from types import ModuleType

from sphinx.ext.napoleon import Config, GoogleDocstring

from docs import (
    catalogue,
    clock,
    costs,
    equal_trials,
    gpu,
    pictures,
    reference,
    rivals,
    scale,
    stages,
    steps,
    suite,
)
from docs import readme as face
from docs.reference import heading

DOCS = Path(__file__).parent
OUT = DOCS / "_generated"
README, EVIDENCE = DOCS.parent / "README.md", DOCS / "singd" / "evidence.md"
OVERVIEW = DOCS / "_static" / "structures.svg"


def write(path: Path, text: str) -> None:
    """Write ``text``, unless it is there already: Sphinx then reads only what changed."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def mathjax() -> None:
    """Copy MathJax, one file with its fonts, out of the package that ships it."""
    source = resources.files("mathjax") / "static" / "mathjax" / "es5" / "tex-svg.js"
    write(OUT / "static" / "tex-svg.js", source.read_text(encoding="utf-8"))


def build() -> None:
    """Everything that the pages include."""
    mathjax()
    rows = costs.rows()
    for name in catalogue.names():
        write(OUT / f"{name}.svg", pictures.growing(name))
    write(OUT / "costs.md", costs.markdown(rows) + "\n")
    write(OUT / "methods.md", rivals.methods() + "\n")
    write(OUT / "equal_bytes.md", rivals.equal_bytes() + "\n")
    write(OUT / "clock.md", clock.markdown() + "\n")
    for name, text in steps.pages().items():
        write(OUT / f"{name}.md", text + "\n")
    for name, text in scale.pages().items():
        write(OUT / f"{name}.md", text + "\n")
    write(OUT / "gpu.md", gpu.section())
    write(OUT / "stages.md", stages.markdown() + "\n")
    write(OUT / "structures.svg", pictures.overview())
    write(DOCS / "structured" / "catalogue.rst", catalogue_page(rows))
    for package in reference.PACKAGES:
        write(DOCS / "api" / f"{package.__name__}.rst", reference.page(package))


# The catalogue -----------------------------------------------------------------------------------


def docstring(thing: object) -> str:
    """A docstring in reStructuredText."""
    return str(GoogleDocstring(inspect.getdoc(thing) or "", Config()))


def catalogue_page(rows: dict[str, list[str]]) -> str:
    parts = [
        heading("Catalogue", "="),
        "Every structure that a spec can name, from the code: one section for each file. The\n"
        "pictures show a member over growing n. Blue places are taken over by the projection\n"
        "``Pi`` as they are, orange ones doubled; one shade is one number in several places.\n"
        "Costs are counted, see :doc:`costs`; those with a star are for each column of X.\n",
    ]
    for module, names in catalogue.modules():
        parts += [section(module), *(entry(name, rows[name]) for name in names)]
    return "\n".join(parts)


def section(module: ModuleType) -> str:
    """The docstring of a structure file."""
    text = inspect.getdoc(module) or ""
    title = re.split(r"[:.,]", text, maxsplit=1)[0].replace("\n", " ")
    return "\n".join([heading(title, "-"), text, ""])


def entry(name: str, cells: list[str]) -> str:
    """One structure: the call, the picture, the docstring, the costs."""
    options = ", ".join(str(p).partition(":")[0] for p in catalogue.signature(name))
    call = f"{name}({options})" if options else name
    out = [heading(f"``{call}``", "~")]
    spec = catalogue.example(name)
    out += [f".. image:: ../_generated/{name}.svg", f"   :alt: {spec} at four sizes", ""]
    out += [] if spec == call else [f"``{spec}``", ""]
    out += [docstring(catalogue.makers()[name]), ""]
    out += [f".. list-table:: Counted for ``{costs.spec(name)}``", "   :header-rows: 1", ""]
    for line in (costs.head()[1:], cells[1:]):
        for place, cell in enumerate(line):
            out.append(f"   {' ' if place else '*'} - {cell.replace('`', '``').replace('*', '★')}")
    return "\n".join(out) + "\n"


# Pages with committed parts ----------------------------------------------------------------------


def filled(text: str, mark: str, content: str) -> str:
    """``text`` with what stands between ``<!-- mark -->`` and ``<!-- /mark -->`` replaced."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    assert re.search(pattern, text, re.S), f"no place for {mark}"
    return re.sub(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S)


def pages() -> dict[Path, str]:
    """The pages with parts that come from results, with those as they should be."""
    results = suite.read()
    parts = {
        README: {
            "why": face.why(results),
            "suite": f"{suite.worst(results)}\n{equal_trials.said()}",
            "structures": face.table(),
            "gpus": face.gpus(),
        },
        EVIDENCE: {
            "suite": suite.evidence(results),
            "options": suite.variants(),
            "burn-in": suite.beside("burn_in=0", "burn_in=0,damping=0.001"),
        },
    }
    texts = {page: page.read_text() for page in parts}
    for page, contents in parts.items():
        for mark, content in contents.items():
            texts[page] = filled(texts[page], mark, content)
    return texts


if __name__ == "__main__":
    for path, image in {OVERVIEW: pictures.overview(), **face.images()}.items():
        write(path, image)
    for path, text in pages().items():
        write(path, text)
