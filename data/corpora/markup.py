"""Markup to plain text: HTML, wiki text, Perl's pod, mail, dictionaries in dictd's format.

Enough for clean training text, and no more: what a reader would not read (navigation, tables of contents, references,
signatures) goes, paragraphs and preformatted text stay. One surprise: HTML may leave elements open and close what was
never opened, so what is left out ends with the closing tag of its own name, counted.
"""

import email
import gzip
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from html.parser import HTMLParser

DROPPED = {"head", "script", "style", "noscript", "nav", "header", "footer", "button", "select", "svg", "title"}
DROPPED_CLASSES = {"navheader", "navfooter", "book-navigation", "toc", "headerlink", "footer", "navigation"}
PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "dl", "blockquote", "section", "hr"}
VOID = {"br", "hr", "img", "input", "link", "meta"}  # never closed
LINES = {"br", "div", "li", "tr", "dt", "dd", "center", "form"}


def decode(data: bytes) -> str:
    """UTF-8, or else the encoding that no bytes contradict."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text: str) -> str:
    """Unix line ends, no blanks at the end of lines, one empty line at most."""
    lines = re.sub(r"\r\n?", "\n", text.replace("\0", "")).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(map(str.rstrip, lines))).strip()


def plain(data: bytes) -> str:
    return tidy(decode(data))


# --- HTML ------------------------------------------------------------------------------------------------------------


def page(data: bytes) -> str:
    return shown(decode(data))


def shown(markup: str) -> str:
    """What a browser shows of HTML."""
    parser = _Page()
    parser.feed(markup)
    parser.close()
    return tidy("".join(parser.pieces))


class _Page(HTMLParser):
    """Collects text in `pieces`; blanks run together outside of <pre>, as a browser shows them."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = ["\n"]
        self.dropped, self.depth = "", 0  # name of the element that is left out; how many of that name are open
        self.preformatted = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self.depth = 0  # whatever was left open before
        if self.depth:
            self.depth += tag == self.dropped
        elif tag in DROPPED or tag not in VOID and _marks(attributes) & DROPPED_CLASSES:
            self.dropped, self.depth = tag, 1
        else:
            self.preformatted += tag == "pre"
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.depth:
            self.depth -= tag == self.dropped
        else:
            self.preformatted -= tag == "pre" and self.preformatted > 0
            self._break("" if tag == "br" else tag)  # <br/> is both, and one break

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.pieces.append(data if self.preformatted else self._run_together(data))

    def _break(self, tag: str) -> None:
        if tag in PARAGRAPHS or tag in LINES:
            self.pieces.append("\n\n" if tag in PARAGRAPHS else "\n")
        elif tag in ("td", "th"):
            self.pieces.append(self._run_together(" "))

    def _run_together(self, data: str) -> str:
        data = re.sub(r"\s+", " ", data)
        last = next((piece for piece in reversed(self.pieces) if piece), "")
        return data.lstrip() if last[-1].isspace() else data


def _marks(attributes: list[tuple[str, str | None]]) -> set[str]:
    return {word for name, value in attributes if name in ("class", "role") and value for word in value.split()}


# --- wiki text -------------------------------------------------------------------------------------------------------

_WIKI_DROPPED = re.compile(
    r"<!--.*?-->|<ref[^<>]*/>|<ref\b.*?</ref>|<(gallery|math|source|timeline|imagemap|table)\b.*?</\1>", re.DOTALL
)
_WIKI_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)  # templates and tables
_WIKI_LISTS = re.compile(  # sections that only point elsewhere
    r"^=+ *(?:References|Notes|Footnotes|Sources|Bibliography|See also|External links|Further reading) *=+ *$"
    r"(?:.(?!^=))*",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)


def articles(dump: str) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of the articles in MediaWiki's XML, without redirections."""
    for element in re.findall(r"<page>(.*?)</page>", dump, re.DOTALL):
        title, text = (re.search(rf"<{tag}\b[^>]*>(.*?)</{tag}>", element, re.DOTALL) for tag in ("title", "text"))
        if title and text and not text[1].lstrip().upper().startswith("#REDIRECT"):
            name = html.unescape(title[1])
            yield name, tidy(f"{name}\n\n{wiki(html.unescape(text[1]))}")


def wiki(text: str) -> str:
    text = _WIKI_DROPPED.sub("", text)
    while (fewer := _WIKI_INNERMOST.sub("", text)) != text:
        text = fewer
    text = re.sub(r"\[\[(?:File|Image|Category|[a-z][a-z-]+):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)  # links show their last part
    text = re.sub(r"\[(?:https?|ftp)://\S+ ?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"</?[a-z][^<>]*>", "", re.sub(r"'{2,}", "", text)))
    text = re.sub(r"(?m)^[*#:;]+[ .,]*$", "", _WIKI_LISTS.sub("", text))
    return re.sub(r"(?m)^=+ *(.*?) *=+ *$", r"\1", text)


# --- pod -------------------------------------------------------------------------------------------------------------

_POD_ESCAPES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}


def pod(data: bytes) -> str:
    """Perl's documentation (perlpod): commands start a paragraph, codes are X<text> or X<< text >>."""
    text = re.sub(r"(?m)^=(?:over|back|cut|pod|encoding|for|begin|end)\b.*$", "", decode(data))
    text = re.sub(r"(?m)^=(?:head\d|item)[ \t]*", "", text)
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    escapes = re.compile(r"E<(\w+)>")
    kept = [match[1] for match in escapes.finditer(text)]  # put back last: they spell angle brackets
    text = escapes.sub("\0", text)
    codes = re.compile(r"[BCFILS](?:<<+\s+((?:(?!\s>>).)*?)\s+>>+|<([^<>]*)>)", re.DOTALL)
    while (fewer := codes.sub(lambda match: _pod_shown(match[0][0], match[1] or match[2] or ""), text)) != text:
        text = fewer
    escaped = iter(kept)
    return tidy(re.sub("\0", lambda _: _pod_escape(next(escaped)), text))


def _pod_shown(code: str, content: str) -> str:
    return content.split("|")[0] if code == "L" else content


def _pod_escape(name: str) -> str:
    return _POD_ESCAPES.get(name) or (chr(int(name, 0)) if name.isdecimal() else html.unescape(f"&{name};"))


# --- mail ------------------------------------------------------------------------------------------------------------

_MAIL_END = re.compile(r"(?m)^(?:-- ?|_{40,}|-{40,}\n\s*This sf\.net .*|-+ Yahoo! Groups Sponsor .*)$")
_SIGNATURE = re.compile(r"-----BEGIN PGP SIGNATURE-----.*?(?:-----END PGP SIGNATURE-----|\Z)", re.DOTALL)
_LIST = re.compile(r"(?m)^\S*/mailman/listinfo/\S*$")
_SIGNED = re.compile(r"-----BEGIN PGP SIGNED MESSAGE-----\n(?:\w+: .*\n)*")


def mail(data: bytes) -> str:
    """Subject and text, without headers, attachments, signatures and the footers of mailing lists."""
    message = email.message_from_bytes(data)
    parts: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in message.walk():
        if (kind := part.get_content_type()) in parts:
            text = _content(part)
            markup = kind == "text/html" or re.search(r"</?(?:html|body|table)\b|<br>", text, re.IGNORECASE)
            parts[kind].append(shown(text) if markup else tidy(text))
    body = "\n\n".join(filter(None, parts["text/plain"] or parts["text/html"]))
    body = _MAIL_END.split(_SIGNED.sub("", _SIGNATURE.sub("", body)))[0]
    return tidy(f"{_subject(message)}\n\n{_LIST.sub('', body)}")


def _content(part: Message) -> str:
    payload = part.get_payload(decode=True)
    data = payload if isinstance(payload, bytes) else b""
    try:
        return data.decode(part.get_content_charset("utf-8"))
    except (LookupError, UnicodeDecodeError):  # a charset that is none, or is not this one
        return decode(data)


def _subject(message: Message) -> str:
    """The words of the subject; as it was sent where it breaks the rules."""
    subject = str(message["subject"] or "")
    try:
        return " ".join(str(make_header(decode_header(subject))).split())
    except (LookupError, ValueError, HeaderParseError):
        return subject


# --- dictionaries ----------------------------------------------------------------------------------------------------

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def entries(files: Mapping[str, bytes]) -> Iterator[str]:
    """The entries of dictd databases, NAME.index and NAME.dict.dz, in their order.

    A line of the index is headword, offset and length, tabulated, numbers in base 64; headwords share entries, and
    those that begin with 00- tell of the dictionary itself.
    """
    for name in filter(lambda name: name.endswith(".index"), files):
        content = gzip.decompress(files[name.removesuffix("index") + "dict.dz"])
        lines = (line.split("\t") for line in files[name].decode().splitlines())
        spans = {(_number(offset), _number(size)) for word, offset, size, *_ in lines if not word.startswith("00-")}
        for start, size in sorted(spans):
            yield tidy(re.sub(r"\{([^{}]*)\}", r"\1", decode(content[start : start + size])))


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value


def group(texts: Iterable[str], size: int = 2000, gap: str = "\n\n") -> Iterator[str]:
    """Texts in a row made into documents of at least `size` characters; the last may be shorter."""
    held: list[str] = []
    for text in texts:
        held.append(text)
        if sum(map(len, held)) >= size:
            yield gap.join(held)
            held = []
    if held:
        yield gap.join(held)
