"""Text of the running Python, and text files of every kind, whole and broken."""

from __future__ import annotations

import gzip
import importlib
import importlib.metadata
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.data.documents import Corpus, DataError
from sparse_lm.data.sources import stdlib_documents, text_documents


def read(path: Path, **fields) -> Corpus:
    return text_documents(DataConfig(source="text", path=str(path), **fields))


def texts(corpus: Corpus) -> dict[str, bytes]:
    return {document.name: document.data for document in corpus.documents}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "a.txt", b"plain")
    write(tmp_path / "news" / "b.md.gz", b"packed")
    write(tmp_path / "news" / "deep" / "er" / "c.py", b"x = 1\n")
    write(tmp_path / "wiki" / "d.jsonl", b'{"text": "one", "id": 1}\n\n{"text": "two"}\n{"text": ""}')
    write(tmp_path / "wiki" / "e.jsonl.gz", b'{"text": "three \\u20ac"}\n')
    write(tmp_path / "image.png", b"\x89PNG")
    write(tmp_path / ".git" / "f.txt", b"hidden")
    write(tmp_path / "news" / ".g.txt", b"hidden")
    return tmp_path


def test_folder_of_all_kinds(folder):
    corpus = read(folder)
    assert texts(corpus) == {
        "a.txt": b"plain",
        "news/b.md.gz": b"packed",
        "news/deep/er/c.py": b"x = 1\n",
        "wiki/d.jsonl:1": b"one",
        "wiki/d.jsonl:3": b"two",
        "wiki/e.jsonl.gz:1": "three €".encode(),
    }
    assert {d.name.split("/")[0]: d.domain for d in corpus.documents} == {
        "a.txt": "text",
        "news": "news",
        "wiki": "wiki",
    }
    assert corpus.intake.empty == 1
    assert corpus == read(folder)


def test_single_files(tmp_path):
    corpus = read(write(tmp_path / "UPPER.TXT", b"x"))
    assert [(d.name, d.domain) for d in corpus.documents] == [("UPPER.TXT", "text")]
    records = b"\n".join(json.dumps({"body": str(i)}).encode() for i in range(50))
    corpus = read(write(tmp_path / "r.jsonl", records), jsonl_field="body")
    assert [d.data for d in corpus.documents] == [str(i).encode() for i in range(50)]


def test_limit_of_bytes(folder):
    corpus = read(folder, max_bytes=14)
    assert sum(len(d.data) for d in corpus.documents) == 14
    assert {d.domain for d in corpus.documents} == {"text", "news", "wiki"}


def test_text_is_taken_as_it_is(tmp_path):
    write(tmp_path / "bom.txt", b"\xef\xbb\xbfmarked")
    write(tmp_path / "crlf.txt", b"a\r\nb\x00")
    write(tmp_path / "bom.jsonl", b'\xef\xbb\xbf{"text": "record"}\r\n{"text": "second"}\r\n')
    corpus = read(tmp_path, invalid_utf8="error")
    assert texts(corpus) == {
        "bom.txt": b"marked",
        "crlf.txt": b"a\r\nb\x00",
        "bom.jsonl:1": b"record",
        "bom.jsonl:2": b"second",
    }
    assert corpus.intake.nul == 1


def test_one_huge_line(tmp_path):
    line = b"word " * 2_000_000
    assert len(read(write(tmp_path / "a.txt", line)).documents[0].data) == len(line)
    record = b'{"text": "' + line + b'"}'
    assert len(read(write(tmp_path / "a.jsonl", record)).documents[0].data) == len(line)


INVALID = {
    "latin.txt": b"caf\xe9",
    "latin.jsonl": b'{"text": "caf\xe9"}',
    "escape.jsonl": b'{"text": "\\ud800"}',
    "low.jsonl": b'{"text": "\\udce9"}',
}


@pytest.mark.parametrize("name", INVALID)
def test_undecodable_bytes_by_rule(tmp_path, name):
    write(tmp_path / "good.txt", b"good")
    write(tmp_path / name, INVALID[name])
    replaced = read(tmp_path)
    assert replaced.intake.replaced == 1
    assert len(replaced.documents) == 2
    assert any(b"\xef\xbf\xbd" in d.data for d in replaced.documents)
    skipped = read(tmp_path, invalid_utf8="skip")
    assert (skipped.intake.skipped, list(texts(skipped))) == (1, ["good.txt"])
    with pytest.raises(DataError, match=rf"{name}.*is not UTF-8"):
        read(tmp_path, invalid_utf8="error")


BROKEN = [
    (b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
    (b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
    (b'{"text": "a"}\n\n["text"]', r"a\.jsonl, line 3: no text in field 'text' \(found a list\)"),
    (b'{"body": "a", "id": 3}', r"line 1: no text in field 'text' \(found keys body, id\); set data\.jsonl_field"),
    (b'{"text": 5}', r"line 1: no text in field 'text'"),
    (b'{"text": null}', r"line 1: no text in field 'text'"),
]


@pytest.mark.parametrize(("data", "says"), BROKEN, ids=range(len(BROKEN)))
def test_broken_jsonl_names_file_and_line(tmp_path, data, says):
    with pytest.raises(DataError, match=says):
        read(write(tmp_path / "a.jsonl", data))


def test_broken_gzip_names_file_and_line(tmp_path):
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(20_000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz, after line \d+: broken gzip file"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "cut.txt.gz").write_bytes(whole[:-6])
    with pytest.raises(DataError, match=r"cut\.txt\.gz: broken gzip file .* remove it from data\.path"):
        read(tmp_path / "cut.txt.gz")
    (tmp_path / "no.txt.gz").write_bytes(b"never packed")
    with pytest.raises(DataError, match=r"no\.txt\.gz: broken gzip file"):
        read(tmp_path / "no.txt.gz")
    (tmp_path / "bits.txt.gz").write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:])
    with pytest.raises(DataError, match=r"bits\.txt\.gz: broken gzip file"):
        read(tmp_path / "bits.txt.gz")


def test_paths_without_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path=.*no such file"):
        read(tmp_path / "gone")
    write(tmp_path / "a.csv", b"1,2")
    with pytest.raises(ConfigError, match=r"data\.path=.*\*\.txt, \*\.md, \*\.py, \*\.jsonl"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.path=.*expected \.txt"):
        read(tmp_path / "a.csv")
    write(tmp_path / "a.txt", b"")
    write(tmp_path / "b.txt", b"\xff")
    with pytest.raises(ConfigError, match=r"no text in 2 file\(s\): 1 documents are empty, 1 were skipped"):
        read(tmp_path, invalid_utf8="skip")


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return stdlib_documents()


def test_stdlib_has_three_domains_of_text(stdlib):
    sizes: dict[str, int] = {}
    for document in stdlib.documents:
        document.data.decode("utf-8")
        sizes[document.domain] = sizes.get(document.domain, 0) + len(document.data)
    assert set(sizes) == {"code", "docs", "license"}
    assert sizes["code"] > 4_000_000
    assert sizes["docs"] > 800_000
    assert sizes["license"] > 10_000
    assert stdlib.intake.bytes == sum(sizes.values())
    names = {document.name for document in stdlib.documents if document.domain == "code"}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not [n for n in names if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(n.split("/"))]
    licenses = [document.data for document in stdlib.documents if document.domain == "license"]
    assert len(licenses) == len(set(licenses))


def test_stdlib_docs_are_the_docstrings(stdlib):
    docs = {document.name: document.data.decode() for document in stdlib.documents if document.domain == "docs"}
    assert "json.dumps\n\nSerialize ``obj`` to a JSON" in docs["json/__init__.py"]
    assert "argparse.ArgumentParser\n\nObject for parsing" in docs["argparse.py"]


def test_stdlib_limit_is_a_small_corpus_of_all_domains():
    corpus = stdlib_documents(300_000)
    assert corpus.intake.bytes == 300_000
    assert {document.domain for document in corpus.documents} == {"code", "docs", "license"}
    assert corpus == stdlib_documents(300_000)


@pytest.fixture
def fake_python(tmp_path, monkeypatch) -> Path:
    """A Python without distributions, license or topics, whose library is an empty folder."""
    root = tmp_path / "lib"
    root.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(importlib.metadata, "distributions", list)
    real = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: real("no_such_module") if "topics" in name else real(name)
    )
    return root


def test_domains_without_text_are_left_out(fake_python):
    write(fake_python / "a.py", b"x = 1\n")
    write(fake_python / "broken.py", b"print 'old'\n")
    write(fake_python / "test" / "b.py", b'"""Not this."""\n')
    write(fake_python / "pkg" / "site-packages" / "c.py", b'"""Nor this."""\n')
    corpus = stdlib_documents()
    assert texts(corpus) == {"a.py": b"x = 1\n", "broken.py": b"print 'old'\n"}
    assert {document.domain for document in corpus.documents} == {"code"}


def test_docstrings_by_hand(fake_python):
    source = '''"""Top.

    Indented.
    """
class A:
    """Of A."""
    async def f(self):
        "Of f \\ud800."
'''
    write(fake_python / "pkg" / "__init__.py", source.encode())
    docs = [document for document in stdlib_documents().documents if document.domain == "docs"]
    assert [(d.name, d.data) for d in docs] == [
        ("pkg/__init__.py", b"pkg\n\nTop.\n\nIndented.\n\npkg.A\n\nOf A.\n\npkg.A.f\n\nOf f ?.")
    ]


class FakeDistribution:
    def __init__(self, root: Path, record: str | None):
        self.root, self.record = root, record

    def read_text(self, name: str) -> str | None:
        assert name == "RECORD"
        return self.record

    def locate_file(self, path: str) -> Path:
        return self.root / path


def test_licenses_are_found_once_each(fake_python, tmp_path, monkeypatch):
    site = tmp_path / "site"
    write(site / "a-1.dist-info" / "licenses" / "LICENSE.txt", b"MIT")
    write(site / "b-1.dist-info" / "COPYING", b"MIT")
    write(site / "c-1.dist-info" / "NOTICE", b"notice")
    write(site / "c-1.dist-info" / "li,cence" / "Licence", b"BSD")
    write(site / "c" / "license.py", b"code")
    write(tmp_path / "prefix" / "LICENSE.txt", b"PSF")
    records = [
        "a-1.dist-info/licenses/LICENSE.txt,sha256=x,3\na-1.dist-info/RECORD,,\na-1.dist-info/LICENSE.gone,,",
        "b-1.dist-info/COPYING,,\n",
        'c-1.dist-info/NOTICE,,\nc/license.py,,\n"c-1.dist-info/li,cence/Licence",,\n',
        None,
    ]
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda: [FakeDistribution(site, record) for record in records]
    )
    found = stdlib_documents().documents
    assert sorted(document.data for document in found) == [b"BSD", b"MIT", b"PSF", b"notice"]
    assert {document.domain for document in found} == {"license"}


def test_python_without_any_text_is_refused(fake_python):
    with pytest.raises(ConfigError, match=r"data\.source='stdlib': no Python sources .* set data\.source=text"):
        stdlib_documents()
