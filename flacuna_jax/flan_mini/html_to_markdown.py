"""Converts the HTML of answers in chat pages to Markdown.

Chat exports hold answers as the page rendered them: paragraphs, lists, tables, and code in a box with a language label
and a "Copy code" button. Training wants what the model wrote before it was rendered. FastChat's clean_sharegpt.py uses
markdownify for this, and so do we; only the box needs more.
"""

import re
from typing import Any

from bs4 import Tag
from bs4.exceptions import ParserRejectedMarkup
from markdownify import ATX, MarkdownConverter

_STARTS = re.compile(r"\s*<(?:div|p|pre|ol|ul|h[1-6]|table|blockquote|section|article)(?:\s[^>]*)?>", re.IGNORECASE)
_ENDS = re.compile(r"</(?:div|p|pre|ol|ul|h[1-6]|table|blockquote|section|article)>\s*$", re.IGNORECASE)
_LANGUAGE = re.compile(r"(?:language|lang)-([\w+#-]+)")
_LABEL = re.compile(r"[\w+#-]{1,20}")
# A paragraph is one line, and nothing is escaped: models write `a_b` and `2 * 3`.
_OPTIONS: dict[str, Any] = {
    "heading_style": ATX,
    "bullets": "-",
    "wrap": True,
    "wrap_width": None,
    "table_infer_header": True,
    "autolinks": False,
    "escape_asterisks": False,
    "escape_underscores": False,
    "escape_misc": False,
}


def is_html(text: str) -> bool:
    """Whether a text is a rendered answer: it begins and ends with block-level markup.

    Text about HTML begins with words, or is the user's own code, and is not changed.
    """
    return bool(_STARTS.match(text) and _ENDS.search(text))


def html_to_markdown(html: str) -> str:
    """Markdown of rendered HTML. Unknown elements give their text; unclosed ones end with the document.

    Raises:
      ValueError: the parser rejects the markup, or elements are nested more deeply than Python can recurse.
    """
    try:
        return str(_Converter(**_OPTIONS).convert(html)).strip()
    except (ParserRejectedMarkup, RecursionError) as error:
        raise ValueError(f"not readable as HTML: {type(error).__name__}") from None


class _Converter(MarkdownConverter):
    """Knows code boxes, and leaves out what belongs to the page."""

    def convert_pre(self, box: Tag, text: str, parent_tags: set[str]) -> str:
        del text, parent_tags
        for line_break in box.find_all("br"):
            line_break.replace_with("\n")
        code, language = box.find("code"), ""
        if isinstance(code, Tag):
            code.extract()
            found = _LANGUAGE.search(str(code.get("class", "")))
            label = box.get_text().replace("Copy code", "").strip()
            language = found[1] if found else label if _LABEL.fullmatch(label) else ""
        lines, fence = (code or box).get_text().strip("\n"), "```"
        while fence in lines:
            fence += "`"
        return f"\n\n{fence}{language}\n{lines}\n{fence}\n\n"

    def convert_td(self, cell: Tag, text: str, parent_tags: set[str]) -> str:
        return str(super().convert_td(cell, text.replace("|", "\\|"), parent_tags))  # type: ignore[misc]  # not in its stubs

    convert_th = convert_td

    def convert_br(self, *_: Any, **__: Any) -> str:
        return "\n"

    def _nothing(self, *_: Any, **__: Any) -> str:
        return ""

    convert_button = convert_form = convert_head = convert_select = convert_svg = _nothing
    convert_textarea = convert_title = _nothing
