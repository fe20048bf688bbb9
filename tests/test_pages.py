import io
import re
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image

from knlightning.pages import Bar, Card, body_of, facts, gallery, legend, page, table, thumbnail

EVIL = '<script>"&\x1b'
ESCAPED = "&lt;script&gt;&quot;&amp;\\x1b"


def picture(html):
    kind, content = re.search(r'src="data:image/(\w+);base64,([^"]+)"', html).groups()
    return kind, np.array(Image.open(io.BytesIO(b64decode(content))))


@pytest.mark.parametrize(
    "html",
    [
        page(EVIL, ""),
        gallery([Card("", EVIL, [Bar(EVIL, 0.5)], EVIL)]),
        table([{EVIL: EVIL}]),
        facts({EVIL: EVIL}),
        legend([EVIL], [(0, 0, 0)]),
    ],
)
def test_texts_from_outside_are_escaped(html):
    assert ESCAPED in html
    assert "<script>" not in html
    assert "\x1b" not in html


def test_a_page_gives_its_body_back():
    body = "<h1>a</h1>\n<p>b</p>"
    assert body_of(page("title", body)) == body


def test_small_images_are_stored_exactly_and_large_ones_made_small():
    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    kind, pixels = picture(thumbnail(image))
    assert kind == "png"
    assert np.array_equal(pixels, image.permute(1, 2, 0))
    kind, pixels = picture(thumbnail(torch.full((1, 100, 400), 0.5), side=200))
    assert (kind, pixels.shape) == ("jpeg", (50, 200, 3))
    assert abs(int(pixels.mean()) - 128) <= 2


def test_shares_in_tables_are_bars_and_numbers_are_grouped():
    html = table([{"class": "cat", "recall": 0.25, "support": 12345}])
    assert "width:25.0%" in html
    assert ">12,345<" in html
