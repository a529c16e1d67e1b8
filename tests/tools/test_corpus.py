import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path, PurePosixPath
from unittest import mock

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.options import UserError
from tools import corpus_rows
from tools.corpus import find_inputs, source_of_path, source_of_row, told_alike, told_once
from tools.corpus_rows import Document, Reject, Row, parse_row, read_documents, read_rows
from tools.corpus_streams import Reading

lines = st.lists(
    st.one_of(
        st.text(max_size=30).map(lambda text: json.dumps({"text": text})),
        st.sampled_from(["", "  ", "{bad", "[1]", '{"text": 3}', '{"other": "x"}', "\r"]),
    ),
    max_size=20,
)


@settings(deadline=None)
@given(lines=lines, ending=st.booleans(), step=st.integers(1, 60))
def test_ranges_that_tile_a_file_give_every_row_once(tmp_path_factory, lines, ending, step):
    path = tmp_path_factory.getbasetemp() / "tiles.jsonl"
    content = "\n".join(lines).encode() + (b"\n" if ending else b"")
    path.write_bytes(content)
    whole = list(read_rows(path))
    tiled = [
        row
        for begin in range(0, max(1, len(content)), step)
        for row in read_rows(path, begin, begin + step)
    ]
    assert tiled == whole
    assert len(whole) == sum(bool(line.strip()) for line in lines)
    for row in whole:
        line = content[row.offset :].split(b"\n")[0]
        if isinstance(row, Row):
            assert json.loads(line) == row.fields


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_frames_and_members_follow_one_another(tmp_path, suffix):
    halves = [b'{"text": "one"}\n{"te', b'xt": "two"}\n']
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"".join(pack(half) for half in halves))
    texts = [(d.text, d.offset) for d in read_documents(path) if isinstance(d, Document)]
    assert texts == [("one", 0), ("two", 16)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_cut_archive_names_the_file(tmp_path, suffix):
    rows = b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(5000))
    packed = gzip.compress(rows) if suffix.endswith("gz") else zstandard.compress(rows)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"x\.jsonl.*to its end"):
        list(read_rows(path))
    path.write_bytes(b"garbage" + packed)
    with pytest.raises(UserError, match=r"x\.jsonl"):
        list(read_rows(path))


def test_gzip_members_may_be_padded_but_have_no_flags_that_the_format_forbids(tmp_path):
    member = gzip.compress(b'{"text": "one"}\n')
    path = tmp_path / "x.jsonl.gz"
    # More padding than is read at once.
    path.write_bytes(member + bytes(10_000) + member + bytes(5_000))
    assert [row.text for row in read_documents(path)] == ["one", "one"]
    for content in (member + b"garbage", member[:3] + b"\x80" + member[4:], bytes(9) + member):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.jsonl\.gz.*to its end"):
            list(read_documents(path))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "plain"}', ("plain", 0)),
        (r'{"text": "pair \ud83d\ude00"}', ("pair 😀", 0)),
        (r'{"text": "lone \ud83d, \ude00"}', ("lone \ufffd, \ufffd", 2)),
        ('{"text": "x", "score": NaN}', ("x", 0)),
        ('{"text": ""}', "empty"),
        ('{"text": null}', "no text"),
        ("{}", "no text"),
        ("[]", "bad JSON"),
        ("nonsense", "bad JSON"),
        ("[" * 100_000, "bad JSON"),
        (b'{"text": "\xff"}', "bad JSON"),
    ],
)
def test_what_a_line_gives(tmp_path, line, expected):
    (tmp_path / "x.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    (row,) = read_documents(tmp_path / "x.jsonl")
    if isinstance(row, Reject):
        assert row.reason == expected
    else:
        assert (row.text, row.replaced_surrogates) == expected


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=12), limit=st.integers(1, 30))
def test_rows_over_the_limit_are_told_and_nothing_else_moves(tmp_path_factory, lengths, limit):
    path = tmp_path_factory.getbasetemp() / "limit.jsonl"
    lines = [b"7" * length + b"\n" for length in lengths]
    path.write_bytes(b"".join(lines))
    offsets = [sum(map(len, lines[:index])) for index in range(len(lines))]
    expected = [
        (offset, "row too long" if len(line) - 1 > limit else "bad JSON")
        for offset, line in zip(offsets, lines, strict=True)
        if not line.isspace()
    ]
    found = [(row.offset, row.reason) for row in read_rows(path, max_row_bytes=limit)]
    assert found == expected


json_values = st.recursive(
    st.one_of(st.integers(), st.text(st.sampled_from('ab,[{"\\n:é'))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('a,[{"\\')), inner),
    max_leaves=20,
)


def signs_between_values(line):
    """Letter by letter."""
    count, inside, escaped = 0, False, False
    for letter in line:
        if escaped:
            escaped = False
        elif inside:
            inside, escaped = letter != '"', letter == "\\"
        else:
            inside = letter == '"'
            count += letter in "[{,"
    return count


@settings(deadline=None, max_examples=200)
@given(value=json_values, ascii=st.booleans(), limit=st.integers(0, 12), part=st.integers(1, 9))
def test_rows_of_too_many_values_are_told_by_what_stands_outside_of_texts(
    value, ascii, limit, part
):
    line = json.dumps({"text": "x", "meta": value}, ensure_ascii=ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_rows, "MAX_VALUES", limit)
        patch.setattr(corpus_rows, "_PART_BYTES", part)
        found = parse_row(line.encode(), 7)
    if signs_between_values(line) > limit:
        assert found == Reject(7, "too many values")
    else:
        assert found == Row(json.loads(line), 7)


def test_a_byte_order_mark_costs_no_row():
    line = '{"text": "words"}'.encode("utf-8-sig")
    assert parse_row(line, 0) == Row({"text": "words"}, 0)
    assert parse_row(line, 9) == Reject(9, "bad JSON")


def test_a_long_text_may_hold_any_number_of_commas():
    text = ",[{" * corpus_rows.MAX_VALUES
    assert parse_row(json.dumps({"text": text}).encode(), 0) == Row({"text": text}, 0)
    row = b'{"text": "x", "meta": [' + b"0," * corpus_rows.MAX_VALUES + b"0]}"
    assert parse_row(row, 0) == Reject(0, "too many values")


def test_only_utf_8_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    # json.loads would guess UTF-16 and find a row that no other reader of JSONL finds.
    path.write_bytes('{"text": "guess"}'.encode("utf-16-le").replace(b"\n", b"") + b"\n")
    assert [row.reason for row in read_documents(path)] == ["bad JSON"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_the_position_runs_to_the_end_of_the_file(tmp_path, suffix):
    generator = random.Random(0)
    rows = b"".join(b'{"text": "%x"}\n' % generator.getrandbits(4000) for _ in range(2000))
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(pack(rows))
    reading = Reading()
    seen = [reading.stored_bytes() for _ in read_documents(path, reading=reading)]
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert seen[-1] <= path.stat().st_size
    assert seen[-1] > 0.5 * path.stat().st_size


@given(st.lists(st.binary(max_size=30), max_size=20), st.integers(1, 200), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_what_is_read_of_a_range_is_told_by_its_bytes_alone(tmp_path_factory, lines, step, buffer):
    """However the lines lie in it."""
    path = tmp_path_factory.mktemp("range") / "x.jsonl"
    content = b"\n".join(lines)
    path.write_bytes(content)
    with mock.patch("tools.corpus_streams._READ_BYTES", buffer * 7):
        for begin in range(0, max(1, len(content)), step):
            end = min(begin + step, len(content))
            reading = Reading(begin, end)
            for _ in read_rows(path, begin, end, max_row_bytes=20, reading=reading):
                pass
            assert reading.digest() == xxhash.xxh3_64_hexdigest(content[begin:end])
    assert reading.changed == path.stat().st_ctime_ns


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_what_is_read_of_a_packed_file_is_told_by_its_stored_bytes(tmp_path, suffix):
    pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"".join(pack(random.Random(i).randbytes(300_000)) for i in range(3)))
    reading = Reading()
    for _ in read_rows(path, reading=reading):
        pass
    assert reading.digest() == xxhash.xxh3_64_hexdigest(path.read_bytes())


def test_a_frame_that_unpacks_to_much_is_read_piece_by_piece(tmp_path):
    path = tmp_path / "bomb.jsonl.zst"
    compressor = zstandard.ZstdCompressor().compressobj()
    packed = [compressor.compress(bytes(1 << 20)) for _ in range(600)]
    path.write_bytes(b"".join(packed) + compressor.flush())
    assert path.stat().st_size < 100_000
    code = (
        "import sys; from pathlib import Path; from tools.corpus_rows import read_rows\n"
        "print([row.reason for row in read_rows(Path(sys.argv[1]))])\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    reasons, peak = done.stdout.splitlines()
    assert reasons == "['row too long']"
    assert int(peak) < 420 << 10  # KiB


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("c4/c4-train.00000-of-01024.jsonl", "c4"),
        ("common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst", "common_crawl"),
        ("github/filtered_0a.sampled.jsonl", "github"),
        ("arxiv/arxiv_023827.jsonl", "arxiv"),
        ("wikipedia/wiki.jsonl", "wikipedia"),
        ("book/book.jsonl", "book"),
        ("stackexchange/stackexchange.jsonl", "stackexchange"),
        ("sample/arxiv_sample.jsonl", "arxiv"),
        ("sample/book_sample.jsonl", "book"),
        ("sample/c4_sample.jsonl", "c4"),
        ("sample/cc_2019-30_sample.jsonl", "common_crawl"),
        ("sample/github_sample.jsonl", "github"),
        ("sample/stackexchange_sample.jsonl", "stackexchange"),
        ("sample/wikipedia_sample.jsonl", "wikipedia"),
        ("train/chunk1/example_train_0.jsonl.zst", None),
        ("github/mine/deep/down/x.jsonl", None),
    ],
)
def test_the_source_a_path_tells(path, source):
    assert source_of_path(PurePosixPath("/data") / path) == source


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"meta": {"redpajama_set_name": "RedPajamaC4"}}, "c4"),
        ({"meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}}, "common_crawl"),
        ({"meta": {"redpajama_set_name": "RedPajamaStackExchange"}}, "stackexchange"),
        ({"red_pajama_subset": "book"}, "book"),
        ({"meta": {"redpajama_set_name": "../../etc"}}, "______etc"),
        ({"meta": {"redpajama_set_name": 3}}, None),
        ({"meta": None}, None),
        ({}, None),
    ],
)
def test_the_source_a_row_tells_is_a_safe_name(row, source):
    assert source_of_row(row) == source


def test_inputs_are_found_by_glob_or_folder_in_an_order_of_their_own(tmp_path):
    for name in ("b/x.jsonl", "a/y.jsonl.zst", "a/SHA256SUMS", "a/z.txt", "out/rejects.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    expected = ["a/y.jsonl.zst", "b/x.jsonl"]
    for patterns in ([str(tmp_path)], [f"{tmp_path}/**/*"], [f"{tmp_path}/b", f"{tmp_path}/a/*"]):
        found = find_inputs(patterns, exclude=tmp_path / "out")
        assert [file.name for file in found] == expected
    with pytest.raises(UserError, match=r"input=.*none.*matches no file"):
        find_inputs([f"{tmp_path}/none/*.jsonl"])
    with pytest.raises(UserError, match="matches no file"):
        find_inputs([f"{tmp_path}/a/*.txt"])


def test_no_folder_that_a_glob_matches_is_dropped(tmp_path):
    for name in ("in/a.jsonl", "in/github/b.jsonl", "in/c4/en/c.jsonl.gz", "other/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "in/.hidden").mkdir()
    (tmp_path / "in/.hidden/e.jsonl").write_text("{}\n")
    (tmp_path / "in/c4/en/linked").symlink_to(tmp_path / "other")
    (tmp_path / "other/loop").symlink_to(tmp_path / "in")
    seen = ["in/a.jsonl", "in/c4/en/c.jsonl.gz", "in/github/b.jsonl", "other/d.jsonl"]
    for pattern in ("in/*", "in/**/*", "i*", "in/**"):
        assert [file.name for file in find_inputs([f"{tmp_path}/{pattern}"])] == seen
    found = find_inputs([f"{tmp_path}/in"])
    assert [file.name for file in found] == ["in/.hidden/e.jsonl", *seen]
    found = find_inputs([f"{tmp_path}/in/g*"])
    assert [file.path for file in found] == [tmp_path / "in/github/b.jsonl"]


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"input='.*/b\.jsonl': is a link to nothing"):
        find_inputs([str(tmp_path)])


def test_a_probe_tells_a_change_at_either_end(tmp_path):
    path = tmp_path / "x.jsonl"
    content = bytearray(b"x" * 300_000)
    probes = set()
    for position in (None, 0, 299_999):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 0
        path.write_bytes(changed)
        probes.add(find_inputs([str(path)])[0].probe())
    assert len(probes) == 3


def test_links_keep_their_names_and_a_file_counts_once(tmp_path):
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshot" / "arxiv"
    folder.mkdir(parents=True)
    for name in ("part_0.jsonl.zst", "part_1.jsonl"):
        (tmp_path / "blobs" / f"0a1b{name[5]}").write_bytes(name.encode())
        (folder / name).symlink_to(tmp_path / "blobs" / f"0a1b{name[5]}")
    (folder / "again.jsonl").symlink_to(folder / "part_1.jsonl")
    found = find_inputs([str(tmp_path / "snapshot")])
    assert [file.name for file in found] == ["again.jsonl", "part_0.jsonl.zst"]
    assert [file.splittable for file in found] == [True, False]
    assert {source_of_path(file.path) for file in found} == {"arxiv"}
    assert found[0].other_names == (str(folder / "part_1.jsonl"),)
    assert told_once(found) == (
        f"1 more name of files that are read once, first {folder}/part_1.jsonl (the same file as "
        f"{folder}/again.jsonl)"
    )
    assert found[1].other_names == ()
    assert told_once(found[1:]) is None


def test_a_file_of_two_hard_links_or_two_globs_counts_once(tmp_path):
    for name in ("github", "mirror"):
        (tmp_path / name).mkdir()
    (tmp_path / "github/a.jsonl").write_text("{}\n")
    (tmp_path / "mirror/a.jsonl").hardlink_to(tmp_path / "github/a.jsonl")
    (tmp_path / "mirror/b.jsonl").write_text("{}\n")
    found = find_inputs([f"{tmp_path}/*", f"{tmp_path}/mirror/*.jsonl", str(tmp_path / "github")])
    assert [file.name for file in found] == ["github/a.jsonl", "mirror/b.jsonl"]
    assert [len(file.other_names) for file in found] == [1, 0]
    assert f"first {tmp_path}/mirror/a.jsonl (the same file as" in str(told_once(found))


def test_a_file_that_is_numbered_anew_counts_once(tmp_path, monkeypatch):
    from tools import corpus

    (tmp_path / "a.jsonl").write_text("{}\n")
    numbers = iter(range(9))
    monkeypatch.setattr(corpus, "_identity", lambda path, field: (0, next(numbers), 3, 0))
    found = find_inputs([str(tmp_path), f"{tmp_path}/*.jsonl"])
    assert [file.name for file in found] == ["a.jsonl"]


def test_what_looks_like_a_copy_is_told(tmp_path):
    row = b'{"text": "a text"}\n'
    contents = {"a.jsonl": row, "b.jsonl": row, "c.jsonl": row * 2, "d.jsonl": b"", "e.jsonl": b""}
    contents["c.jsonl.zst"] = zstandard.compress(row * 2)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = find_inputs([str(tmp_path)])
    assert told_alike(found, [file.probe() for file in found]) == (
        f"2 inputs look like a copy of another, first {tmp_path}/b.jsonl of {tmp_path}/a.jsonl: "
        "leave out what repeats, or give --dedup exact"
    )
    some = [file for file in found if file.name in ("a.jsonl", "c.jsonl", "d.jsonl", "e.jsonl")]
    assert told_alike(some, [file.probe() for file in some]) is None


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"input='.*/b\.jsonl': is a pipe"):
        find_inputs([str(tmp_path)])


def test_a_folder_that_may_not_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    for name in ("in/a.jsonl", "in/closed/b.jsonl", "in/lost+found/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    access = os.access
    closed = ("closed", "lost+found")
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name not in closed and access(path, mode)
    )
    for pattern in ("in", "in/**/*.jsonl", "in/*/*.jsonl", "in/**"):
        with pytest.raises(UserError, match=r"input='.*/in/closed': this folder cannot be read"):
            find_inputs([f"{tmp_path}/{pattern}"])
    closed = ("lost+found",)
    assert [file.name for file in find_inputs([f"{tmp_path}/in"])] == ["a.jsonl", "closed/b.jsonl"]


def test_what_is_there_by_the_very_name_is_no_glob(tmp_path):
    for name in ("[a].jsonl", "a.jsonl"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in find_inputs([f"{tmp_path}/[a].jsonl"])] == ["[a].jsonl"]
