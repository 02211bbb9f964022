"""Formulas of the pages as MathML, which browsers typeset without a script.

mkdocs calls `on_page_content` with the HTML of every page (see `hooks` in mkdocs.yml).
"""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexToMathML

# What pymdownx.arithmatex makes of $…$ and $$…$$.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_TAG = re.compile(r"\\tag\{((?:[^{}$]|\$[^$]*\$)*)\}")
_TEX = LatexToMathML(fancy_error=False)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with MathML in place of TeX.

    Raises:
        math_core.LatexError: a formula with a command that MathML has no counterpart of.
    """
    return _FORMULA.sub(lambda found: formula(html.unescape(found[2]), display=found[1] == "div"), content)


def formula(tex: str, *, display: bool) -> str:
    r"""TeX as MathML; of a displayed formula, its `\tag` beside it.

    MathML Core has no tags: they are text, in which $…$ is a formula again.
    """
    tag = _TAG.search(tex)
    if not display or tag is None:
        mathml: str = _TEX.convert_with_local_state(tex.strip(), displaystyle=display)
        return mathml
    parts = tag[1].split("$")
    words = "".join(formula(part, display=False) if i % 2 else html.escape(part) for i, part in enumerate(parts))
    bare = formula(tex[: tag.start()] + tex[tag.end() :], display=True)
    return f'<div class="formula">{bare}<span>({words})</span></div>'
