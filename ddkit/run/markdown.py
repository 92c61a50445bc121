"""Text of others on a Markdown page: the card of a set, the report of a study."""

from __future__ import annotations

import html
import re

from ddkit.text import printable

_INLINE = re.compile(r"([\\`*_\[\]|~$])")
_AT_START = re.compile(r"^([#+=-]|\d+(?=[.)](?: |$)))")
_LINKS = ((re.compile(r":(?=//)"), "&#58;"), (re.compile(r"(?i)(?<=www)\."), "&#46;"), (re.compile("@"), "&#64;"))  # of GitHub's Markdown


def markdown(value: object) -> str:
    r"""Returns `value` as one line of plain text in Markdown, in a paragraph, heading or table, without HTML, links, pictures or code.

    Examples:
        >>> ddkit.markdown("a|b <img src=x>\n# c")
        'a\\|b &lt;img src=x&gt; # c'
    """
    text = html.escape(" ".join(printable(str(value)).split()), quote=False)
    text = _AT_START.sub(lambda found: f"\\{found[1]}" if not found[1].isdigit() else f"{found[1]}\\", _INLINE.sub(r"\\\1", text))
    for pattern, replacement in _LINKS:
        text = pattern.sub(replacement, text)
    return text
