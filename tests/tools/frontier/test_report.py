"""The report as text: what it holds, and what cannot break out of it."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.frontier.axes import decimal_ticks, power, power_ticks
from tools.frontier.command import Options, run
from tools.frontier.markup import escape, script_json, source_hash
from tools.frontier.styles import PALETTE, styles


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    run(Options(output=str(output), runs=str(sweep), bootstrap=10))
    return (output / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def tags(page):
    parser = Tags()
    parser.feed(page)
    return parser.found


def test_nothing_external_and_no_inline_style_or_handler(page):
    for tag, attributes in tags(page):
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert not {"src", "href", "xlink:href", "srcset"} & set(attributes)
    assert "url(" not in page
    assert "@import" not in page


def test_the_policy_allows_exactly_the_two_inline_texts(page):
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]*)"', page).group(1))
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
    script = re.search(r"<script>(.*?)</script>", page, re.S).group(1)
    assert policy.startswith("default-src 'none'")
    assert f"style-src {source_hash(style)};" in policy
    assert policy.endswith(f"script-src {source_hash(script)}")


def test_no_markup_of_a_run_s_name_survives(page, evil):
    assert "<script>document.title" not in page
    assert "<img" not in page
    assert escape(evil.replace("\u202e", "\ufffd")) in page


def test_the_embedded_fit_is_the_fit(page):
    text = re.search(r'id="fit-json">(.*?)</script>', page, re.S).group(1)
    fit = json.loads(text)
    assert set(fit["architectures"]) == {"decllm", "redllm", "entp"}


def test_the_pictures_are_well_formed_titled_and_described(page):
    pictures = re.findall(r'<svg class="plot".*?</svg>', page, re.S)
    assert len(pictures) == 2 + 11
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert [child.tag for child in root][:2] == ["title", "desc"]
        for mark in root.iter("g"):
            if "mark" in mark.get("class", ""):
                assert mark.get("aria-label").split() == mark.find("title").text.split()
    ids = [attributes["id"] for _, attributes in tags(page) if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "words",
    [
        "only 3 model sizes; 5 are needed",
        "Finetuning",
        "flan_heldout",
        "decllm-micro-flan",
        "-0.7602",  # what finetuning changed
        "Unigram entropy",
        "total parameters, tied weights once",
        "model_causal",
        "2.13.0",
        "ffffffffffffffff",
        "aaaaaaaaaaaaaaaa",
    ],
)
def test_it_says(page, words):
    assert words in html.unescape(page)


@given(st.recursive(st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
def test_embedded_json_cannot_end_its_element(value):
    text = script_json(value)
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == value


@given(st.text())
def test_escaped_text_is_only_text(text):
    assert not set(escape(text)) & set("<>\"'")
    assert html.unescape(escape(text)) == html.unescape(html.unescape(escape(text))) or "&" in text


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("scheme", "page_colour"), [("light", "#ffffff"), ("dark", "#14171b")])
def test_every_colour_contrasts_with_its_page(scheme, page_colour):
    for style in PALETTE:
        low, high = sorted((luminance(getattr(style, scheme)), luminance(page_colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_architectures_keep_their_looks_and_no_two_share_one():
    assert styles(["ared", "redllm"])["redllm"] == styles(["redllm", "decllm"])["redllm"]
    six = styles(["decllm", "x", "y", "entp", "redllm", "ared"])
    assert len({s.marker for s in six.values()}) == len({s.light for s in six.values()}) == 6


@given(st.floats(1e-3, 1e6), st.floats(1.001, 1e3), st.integers(2, 12))
def test_ticks_are_within_and_few(low, factor, most):
    high = low * factor
    ticks = decimal_ticks(low, high, most)
    assert len(ticks) <= most + 1
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert len(power_ticks(low, high, most)) <= most


def test_powers_read_as_powers():
    assert power(1e12) == "10¹²"
    assert power(2e-3) == "2×10⁻³"
    assert power(9.9999999e11) == "10¹²"
