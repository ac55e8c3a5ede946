"""report.html of a prepared folder: whole, offline, and harmless whatever the documents hold."""

import json
import re
from html.parser import HTMLParser

import pytest

from tests.tools.finished import document, finish
from thriftlab.data.prepare.report import bars
from thriftlab.data.prepare.report.clusters import LARGEST, MEMBERS, OTHERS, clusters, differing
from thriftlab.data.prepare.report.documents import open_documents
from thriftlab.data.prepare.report.page import template, write_report

EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)><a href='https://example.org/'>a</a> ]]> --> </pre></details>"
    '</body> <style>*{display:none}</style> " onmouseover="alert(3) &lt;b&gt; &amp; <svg onload=alert(4)>'
)
VOID = {"meta"}


class Page(HTMLParser):
    """Tags with their attributes, checked for balance, and the text in them by tag."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append((tag, []))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open[-1:]:
            next(text for name, text in reversed(self.texts) if name == tag).append(data)

    def all(self, tag):
        return ["".join(text) for name, text in self.texts if name == tag]


def rows():
    found, evil = [], 0
    for k in range(60):
        for source in ("web", "books"):
            scores = {"score": k / 64, "trigram": k / 8, "pool": k // 15}
            text = f"{EVIL if k % 9 == 0 else 'plain'} {source} {k}"
            found.append(
                document(
                    source,
                    f"{EVIL if k == 1 else 'a'}:{source}{k}",
                    text,
                    split=("train", "validation")[k < 2],
                    **scores,
                )
            )
    for k in range(30):
        found.append(document("web", f"r:{k}", f"{EVIL} rule {k}", "rules", f"rule-{'<b>' if k % 3 else 'c'}"))
    for root in range(27):
        for k in range(1 + root % 3 + 7 * (root == 5)):
            text = f"plain web {root} and {EVIL} {k}"
            found.append(document("books", f"n:{root}-{k}", text, "near", "near duplicate", of=f"a:web{root + 10}"))
            evil += 1
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["texts kept", "no texts"])
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "data"
    made = finish(folder, rows(), keep_text=request.param)
    path = write_report(folder, "a <name>")
    assert path == folder / "report.html"
    return folder, made, path.read_text(), request.param


def test_the_page_is_whole_and_loads_nothing(prepared):
    page = Page(prepared[2])
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "img",
        "a",
        "link",
        "iframe",
        "object",
        "form",
        "base",
        "image",
    }
    assert [tag for tag, _ in page.tags].count("style") == 1
    for tag, attributes in page.tags:
        assert not {key for key in attributes if key.startswith("on") or key in ("src", "href", "srcset", "action")}, (
            tag
        )
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not re.search(r"url\(|@import|https?:", template())
    assert page.all("title")[0] == "What was prepared: a <name>"


def test_documents_are_shown_to_the_letter(prepared):
    _, made, text, kept = prepared
    shown = set(Page(text).all("pre"))
    samples = [row["text"] for row in made if row["stage"] == "rules"]
    assert sum(each in shown for each in samples) == 30  # two rules, 20 and 10 samples
    assert text.count("<script>") == 0 and text.count("&lt;script&gt;") > 40


def test_twenty_samples_of_each_reason_in_turns(tmp_path):
    made = [
        document(source, f"{source}:{k}", f"text {source} {k}", "rules", "short")
        for source in ("web", "books")
        for k in range(30)
    ]
    finish(tmp_path / "data", [*made, *rows()])
    text = write_report(tmp_path / "data").read_text()
    part = text[text.index("short <small>rules") :].split("<h2>")[0].split("</details></details>")[0]
    shown = re.findall(r"<code>(\w+)/", part)
    assert shown == ["web", "books"] * 10


def test_the_table_of_stages(prepared):
    cells = Page(prepared[2]).all("td")
    web = cells.index("web")
    assert cells[web + 1 : web + 9] == ["90", "90", "60", "60", "60", "60", "58", "2"]
    small = Page(prepared[2]).all("small")
    assert any(each.startswith("66.7%, ") for each in small)
    assert re.search(r'style="--part: 66\.7%"', prepared[2])


def test_the_largest_clusters_and_some_others(prepared):
    folder, made, text, kept = prepared
    total, found = clusters(open_documents(folder))
    sizes = {}
    for row in made:
        if row["stage"] == "near":
            sizes[row["of"]] = sizes.get(row["of"], 1) + 1
    assert total == len(sizes) == 27 and len(found) == LARGEST + OTHERS
    largest = sorted(sizes.values(), reverse=True)[:LARGEST]
    assert [cluster.size for cluster in found[:LARGEST]] == largest and largest[0] == 11
    roots = [cluster.members[0]["number"] for cluster in found]
    assert len(set(roots)) == len(roots)
    by_number = {row["number"]: row for row in made}
    for cluster in found:
        first, *others = cluster.members
        assert cluster.size == sizes[first["number"]] and len(cluster.members) == min(cluster.size, MEMBERS)
        assert first["text"] == by_number[first["number"]]["text"]
        for row in others:
            assert by_number[row["number"]]["of"] == first["number"]
            assert row["text"] == (by_number[row["number"]]["text"] if kept else "")
    assert clusters(open_documents(folder)) == (total, found)
    assert "27 clusters; the 20 largest and 5 others" in text and "and 5 more" in text


def test_words_that_differ_are_marked(prepared):
    assert differing("a b  c d", "a x  c d") == [(False, "a "), (True, "b"), (False, "  c d")]
    assert "".join(piece for _, piece in differing(EVIL, "a b")) == EVIL
    if prepared[3]:
        assert any("<script>" in each for each in Page(prepared[2]).all("mark"))


def test_tokens_by_source_and_pool(prepared):
    _, made, text, _ = prepared
    cells = Page(text).all("td")
    start = len(cells) - 1 - cells[::-1].index("books")  # the last table but that of edits, which has no books
    mine = [row for row in made if row["source"] == "books" and row["split"] == "train"]
    pools = [sum(row["tokens"] for row in mine if row["pool"] == pool) for pool in range(4)]
    assert cells[start + 1 : start + 6] == [f"{n:,}" for n in [*pools, sum(pools)]]


def test_one_source_without_scores_or_duplicates(tmp_path):
    made = [document("web", f"a:{k}", f"text {k}", split=("train", "validation")[k == 0]) for k in range(5)]
    finish(tmp_path / "data", made, units={})
    page = Page(write_report(tmp_path / "data").read_text())
    assert page.all("h2") == [
        "Documents after each stage",
        "Lengths and scores",
        "Tokens to train on",
        "Lines that rules edited",
    ]
    assert page.all("th")[-6:-3] == ["source", "tokens", ""] and "5 of 5 documents stayed (100.0%)" in "".join(
        page.all("p")
    )


def test_a_histogram_draws_its_counts_and_cuts():
    svg = bars.histogram("t", [0, 1, 2, 4, 8], [1, 0, 4, 2], [3, 100, -1])
    heights = [float(each) for each in re.findall(r' height="([\d.]+)"', svg)]
    assert [round(height / max(heights), 2) for height in heights] == [0.25, 1.0, 0.5]
    left, right = bars.LEFT, bars.WIDTH - bars.RIGHT
    cuts = [float(each) for each in re.findall(r'class="cut" x1="([\d.]+)"', svg)]
    assert cuts == [pytest.approx(left + (right - left) * 2.5 / 4, abs=0.06), right, left]
    assert re.findall(r"<title>(.*?)</title>", svg)[0] == "0 to 1: 1"
    assert 'aria-label="&lt;b&gt;"' in bars.histogram("<b>", [0, 1], [0], [])


def test_bars_are_shares_of_a_whole():
    widths = [float(each) for each in re.findall(r' width="([\d.]+)"', bars.shares("t", ["a", "b", "c"], [1, 0, 3]))]
    assert widths == [250, 750]
    assert "<rect" not in bars.shares("t", ["a"], [0])
    labels = [bars.short(n) for n in (0, 0.25, 512, 1536, 2.5e6, 3e9)]
    assert labels == ["0", "0.25", "512", "1.54k", "2.5M", "3G"]


def test_the_page_is_a_function_of_the_folder(prepared):
    folder, _, text, _ = prepared
    assert write_report(folder, "a <name>").read_text() == text
    assert json.loads((folder / "manifest.json").read_text())["format"] == 1
