"""Converts the HTML of answers in chat pages to Markdown.

Chat exports contain answers as the page rendered them: paragraphs, lists, tables, and code in a box with a language
label and a "Copy code" button. Training needs the text that the model wrote.
"""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_BLOCKS = {"p", "div", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "table", "blockquote", "pre"}
_STARTS = re.compile(r"\s*<(?:div|p|pre|ol|ul|h[1-6]|table|blockquote|section|article)(?:\s[^>]*)?>", re.IGNORECASE)
_ENDS = re.compile(r"</(?:div|p|pre|ol|ul|h[1-6]|table|blockquote|section|article)>\s*$", re.IGNORECASE)
_MARKS = {"strong": "**", "b": "**", "em": "*", "i": "*", "del": "~~", "s": "~~"}
_IGNORED = {"button", "script", "style", "svg", "form", "textarea", "select", "head", "title"}
_VOID = {"br", "hr", "img", "input", "wbr", "meta", "link", "source", "col"}


def is_html(text: str) -> bool:
    """Whether a text is a rendered answer: it begins and ends with block-level markup.

    Text about HTML begins with words, or is the user's own code, and is not changed.
    """
    return bool(_STARTS.match(text) and _ENDS.search(text))


def html_to_markdown(html: str) -> str:
    """Markdown of rendered HTML. Unknown elements become their text; unclosed ones end with the document."""
    converter = _Converter()
    converter.feed(html)
    converter.close()
    return converter.finish()


@dataclass
class _List:
    ordered: bool
    number: int = 1


@dataclass
class _Pre:
    language: str = ""
    label: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    in_code: bool = False
    has_code: bool = False


@dataclass
class _Table:
    rows: list[list[str]] = field(default_factory=list)


class _Converter(HTMLParser):
    """Collects text in a stack of buffers; an element that wraps its content (a quote, a cell) has a buffer."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._buffers: list[list[str]] = [[]]
        self._lists: list[_List] = []
        self._pre: _Pre | None = None
        self._tables: list[_Table] = []
        self._links: list[str] = []
        self._ignored = 0
        self._inline_code = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _IGNORED:
            self._ignored += 1
        if self._ignored:
            return
        values = {name: value or "" for name, value in attrs}
        if self._pre is not None:
            self._start_in_pre(tag, values)
            return
        if tag in _BLOCKS:
            self._break()
        match tag:
            case "br":
                self._write("\n")
            case "hr":
                self._write("---")
                self._break()
            case "h1" | "h2" | "h3" | "h4" | "h5" | "h6":
                self._write("#" * int(tag[1]) + " ")
            case "pre":
                self._pre = _Pre()
            case "code" | "kbd" | "samp":
                self._write("`")
                self._inline_code = True
            case "ul" | "ol":
                start = values.get("start", "")
                self._break(lines=1 if self._lists else 2)
                self._lists.append(_List(tag == "ol", int(start) if start.isdigit() else 1))
            case "li" | "blockquote" | "td" | "th":
                self._buffers.append([])
            case "table":
                self._tables.append(_Table())
            case "tr":
                if self._tables:
                    self._tables[-1].rows.append([])
            case "a":
                self._links.append(values.get("href", ""))
                if self._links[-1]:
                    self._write("[")
            case "img":
                self._write(f"![{values.get('alt', '')}]({values.get('src', '')})")
            case _ if tag in _MARKS:
                self._write(_MARKS[tag])

    def handle_endtag(self, tag: str) -> None:
        if tag in _IGNORED:
            self._ignored = max(0, self._ignored - 1)
            return
        if self._ignored or tag in _VOID:
            return
        if self._pre is not None:
            self._end_in_pre(tag)
            return
        match tag:
            case "code" | "kbd" | "samp":
                self._write("`")
                self._inline_code = False
            case "ul" | "ol":
                if self._lists:
                    self._lists.pop()
                self._break(lines=1 if self._lists else 2)
            case "li":
                self._end_item()
            case "blockquote":
                quoted = self._pop().splitlines()
                self._write("\n".join(f"> {line}".rstrip() for line in quoted))
            case "td" | "th":
                cell = self._pop().replace("\n", " ").replace("|", "\\|")
                if self._tables and self._tables[-1].rows:
                    self._tables[-1].rows[-1].append(cell)
                else:
                    self._write(cell)
            case "table":
                self._end_table()
            case "a":
                if self._links and (href := self._links.pop()):
                    self._write(f"]({href})")
            case _ if tag in _MARKS:
                self._write(_MARKS[tag])
        if tag in _BLOCKS:
            self._break()

    def handle_data(self, data: str) -> None:
        if self._ignored:
            return
        if self._pre is not None:
            (self._pre.code if self._pre.in_code else self._pre.label).append(data)
        elif self._inline_code:
            self._write(data)
        else:
            text = re.sub(r"[ \t\r\n]+", " ", data)
            if self._at_line_start():
                text = text.lstrip(" ")
            self._write(text)

    def finish(self) -> str:
        if self._pre is not None:
            self._end_in_pre("pre")
        while len(self._buffers) > 1:
            self._write_up(self._pop())
        text = "".join(self._buffers[0])
        return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() if "```" not in text else _tidy(text)

    def _start_in_pre(self, tag: str, values: dict[str, str]) -> None:
        assert self._pre is not None
        if tag == "code":
            self._pre.in_code = self._pre.has_code = True
            found = re.search(r"(?:language|lang)-([\w+#-]+)", values.get("class", ""))
            self._pre.language = found[1] if found else self._pre.language
        elif tag == "br":
            self.handle_data("\n")

    def _end_in_pre(self, tag: str) -> None:
        assert self._pre is not None
        if tag == "code":
            self._pre.in_code = False
        if tag != "pre":
            return
        pre, self._pre = self._pre, None
        label = "".join(pre.label).replace("Copy code", "").strip()
        code = "".join(pre.code) if pre.has_code else "".join(pre.label)
        language = pre.language or (label if pre.has_code and re.fullmatch(r"[\w+#-]{1,20}", label) else "")
        fence = "```"
        while fence in code:
            fence += "`"
        self._break()
        self._write(f"{fence}{language}\n{code.strip(chr(10))}\n{fence}")
        self._break()

    def _end_item(self) -> None:
        text = self._pop()
        if not self._lists:
            self._write(text)
            return
        current = self._lists[-1]
        mark = f"{current.number}. " if current.ordered else "- "
        current.number += 1
        indented = text.replace("\n", "\n" + " " * len(mark)) if text else ""
        self._break(lines=1)
        self._write(re.sub(r"\n +(?=\n|$)", "\n", mark + indented))

    def _end_table(self) -> None:
        table = self._tables.pop() if self._tables else _Table()
        rows = [row for row in table.rows if row]
        if not rows:
            return
        width = max(map(len, rows))
        lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * width)
        self._write("\n".join(lines))

    def _pop(self) -> str:
        """The innermost buffer's text; "" for a closing tag without an opening one."""
        return "".join(self._buffers.pop()).strip() if len(self._buffers) > 1 else ""

    def _write_up(self, text: str) -> None:
        self._break(lines=1)
        self._write(text)

    def _write(self, text: str) -> None:
        if text:
            self._buffers[-1].append(text)

    def _tail(self) -> str:
        return "".join(self._buffers[-1][-3:])

    def _at_line_start(self) -> bool:
        tail = self._tail()
        return not tail or tail.endswith("\n")

    def _break(self, lines: int = 2) -> None:
        """Ends the line, with `lines` line breaks in total, unless the text is empty."""
        tail = self._tail()
        if not tail.strip():
            return
        have = len(tail) - len(tail.rstrip("\n"))
        self._write("\n" * max(0, lines - have))


def _tidy(text: str) -> str:
    """Trims blank lines outside of code boxes."""
    parts = re.split(r"(^```+[^\n]*\n.*?^```+$|^ +```+[^\n]*\n.*?^ +```+$)", text, flags=re.MULTILINE | re.DOTALL)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", parts[index]))
    return "".join(parts).strip()
