"""What the site needs beside its extensions: formulas without JavaScript, and links out of docstrings."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"\$`([^`]+)`\$")
ROLE = re.compile(r":(?:class|func|mod|meth):<code>(~?)([\w.]+)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write formulas, in the notation that GitHub draws too, as MathML, which browsers draw by themselves."""
    markdown = BLOCK.sub(lambda found: convert(found[1].strip(), display="block"), markdown)
    return INLINE.sub(lambda found: convert(found[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn the cross-references of docstrings into links where the API page has their target."""
    return ROLE.sub(_link, html)


def _link(role: re.Match[str]) -> str:
    name = role[2].rsplit(".", 1)[-1] if role[1] else role[2]
    return f'<autoref identifier="{role[2]}" optional><code>{name}</code></autoref>'
