import torch

from knlightning.callbacks.contact_sheet import MOST_IMAGES, ContactSheet
from knlightning.protocols import DataDescription


def test_images_are_sorted_and_the_most_probable_classes_named(tmp_path):
    sheet = ContactSheet()
    for name in ("b.png", "a.png"):
        sheet.add(name, torch.rand(3, 4, 4), [("cat", 0.7), ("dog", 0.2), ("owl", 0.06), ("ant", 0.04)])
    sheet.write(tmp_path / "a.html", 2, DataDescription())
    html = (tmp_path / "a.html").read_text()
    assert html.index("a.png") < html.index("b.png")
    assert html.count("70%") == html.count(">cat<") == html.count(">owl<") == 2
    assert "ant" not in html.partition("<main>")[2].replace("figcaption", "")
    assert "are shown" not in html


def test_there_is_room_for_so_many_images_and_a_legend_for_scenes(tmp_path):
    sheet = ContactSheet()
    for number in range(MOST_IMAGES + 1):
        sheet.add(f"{number}.png", torch.zeros(3, 1, 1, dtype=torch.uint8), num_classes=2)
    data = DataDescription(class_names=("road", "sky"), palette=((1, 2, 3), (4, 5, 6)))
    sheet.write(tmp_path / "a.html", MOST_IMAGES + 1, data)
    html = (tmp_path / "a.html").read_text()
    assert html.count("<figure>") == MOST_IMAGES
    assert f"The first {MOST_IMAGES} are shown." in html
    assert "rgb(4, 5, 6)" in html
    assert "sky" in html
