import torch

from knlightning.callbacks.mistakes import Mistake, WorstMistakes, mistakes_gallery, side_by_side, small
from knlightning.protocols import DataDescription


def test_the_worst_of_all_batches_are_kept():
    badness = torch.rand(200, generator=torch.Generator().manual_seed(0))
    badness[::3] = 0  # no mistakes
    worst = WorstMistakes(10)
    drawn = 0
    for start in range(0, 200, 17):
        batch = badness[start : start + 17]
        found = worst.candidates(batch)
        drawn += len(found)
        worst.add([Mistake(float(batch[i]), start + i, torch.zeros(3, 2, 2)) for i in found])
    assert [mistake.place for mistake in worst.kept] == badness.topk(10).indices.tolist()
    assert drawn < 60  # not every mistake is drawn


def test_images_that_are_right_are_no_mistakes():
    assert WorstMistakes(3).candidates(torch.zeros(5)) == []
    assert WorstMistakes(0).candidates(torch.ones(5)) == []


def test_large_images_are_made_small():
    assert small(torch.rand(5, 600, 300)).shape == (3, 256, 128)
    assert small(torch.rand(2, 6, 3)).shape == (1, 6, 3)
    assert torch.equal(small(torch.full((1, 2, 2), 0.2)), torch.full((1, 2, 2), 51, dtype=torch.uint8))


def test_true_and_predicted_classes_stand_beside_the_image():
    data = DataDescription(palette=((255, 0, 0), (0, 255, 0)))
    labels, predicted = torch.tensor([[0, 1], [255, 1]]), torch.tensor([[0, 0], [1, 1]])
    drawn = side_by_side(torch.zeros(3, 2, 2), labels, predicted, data, 2)
    assert drawn.shape == (3, 2, 8)  # with gaps of one pixel
    assert drawn[:2, :, 3:5].tolist() == [[[255, 0], [0, 0]], [[0, 255], [0, 255]]]
    assert drawn[:2, :, 6:].tolist() == [[[255, 255], [0, 0]], [[0, 0], [0, 255]]]


def test_gallery_names_image_label_and_predictions():
    mistake = Mistake(0.9, 3, torch.zeros(3, 2, 2, dtype=torch.uint8), 1, [0, 1], [0.9, 0.1])
    html = mistakes_gallery([("a.png", mistake)], ["cat", "dog"])
    assert "is dog" in html
    assert "a.png" in html
    assert html.index(">cat<") < html.index("90%") < html.index(">dog<") < html.index("10%")
    assert "every image was right" in mistakes_gallery([], ["cat", "dog"])
