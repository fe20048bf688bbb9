import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from standins import write_cityscapes

from knlightning.data import CityscapesDataModule
from knlightning.data.samplers import SeededIndex

# as the benchmark's own table has them
TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip
NAME = "{city}_{number:06d}_000019_{kind}.png"


@pytest.fixture
def root(tmp_path):
    """Six training images of 64x32 pixels, as many to validate on, and four to test on."""
    write_cityscapes(tmp_path / "data")
    return tmp_path / "data"


def module(root, **arguments):
    return CityscapesDataModule(root, **{"crop_size": (16, 24), "batch_size": 2, "num_workers": 0, **arguments})


def ready(root, stage="fit", **arguments):
    data = module(root, **arguments)
    data.setup(stage)
    return data


def image(root, split, city, number):
    return root / "leftImg8bit" / split / city / NAME.format(city=city, number=number, kind="leftImg8bit")


def labels(root, split, city, number):
    return root / "gtFine" / split / city / NAME.format(city=city, number=number, kind="gtFine_labelIds")


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path)))


def of_red(images):
    """The labels that belong to the red of uint8 images that are not interpolated."""
    table = torch.full((256,), 255, dtype=torch.uint8)
    for number, label in TRAIN_IDS.items():
        table[7 * number] = label
    return table[images[:, 0].long()]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("crop_size", (0, 8), "a height and a width of at least 1"),
        ("crop_size", (8,), "a height and a width of at least 1"),
        ("scale_range", (0.0, 1.0), "two factors above 0, the smaller one first"),
        ("scale_range", (2.0, 0.5), "two factors above 0, the smaller one first"),
        ("scale_range", (0.5, float("inf")), "two factors above 0, the smaller one first"),
        ("scale_step", 0.0, "a number above 0, or null for any factor in scale_range"),
        ("eval_batch_size", 0, "a whole number at least 1, or null for batch_size"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, argument, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"{argument} must be {allowed}, got {value!r}")):
        module(tmp_path, **{argument: value})


def test_classes_ids_and_colours_are_those_of_the_benchmark():
    data = CityscapesDataModule
    assert dict(zip(data.label_ids, range(19), strict=True)) == TRAIN_IDS
    assert len(data.class_names) == len(data.palette) == len({*data.palette}) == 19
    known = {"road": (128, 64, 128), "pole": (153, 153, 153), "car": (0, 0, 142), "bicycle": (119, 11, 32)}
    assert {name: colour for name, colour in zip(data.class_names, data.palette, strict=True) if name in known} == known
    assert (data.ignore_index, data.image_size) == (255, (1024, 2048))


def test_listing_is_sorted_and_ids_are_mapped_exactly(root):
    (root / "leftImg8bit" / "val" / "c" / ("._" + image(root, "val", "c", 0).name)).write_bytes(b"of another system")
    (root / "leftImg8bit" / "val" / "c" / "notes.png").write_bytes(b"no image of the set")
    data = ready(root, "validate")
    batches = list(data.val_dataloader())
    assert [tuple(batch[0].shape) for batch in batches] == [(1, 3, 32, 64)] * 6
    for batch, (city, number) in zip(batches, [(c, n) for c in "cd" for n in range(3)], strict=True):
        ids = pixels(labels(root, "val", city, number))
        expected = torch.tensor([[TRAIN_IDS.get(int(value), 255) for value in row] for row in ids])
        assert {*ids.flatten().tolist()} == {*range(34), 255}
        assert batch[1].dtype == torch.uint8
        assert torch.equal(batch[0][0], pixels(image(root, "val", city, number)).permute(2, 0, 1))
        scaled, targets = data.on_after_batch_transfer(batch, 0)
        assert targets.dtype == torch.int64
        assert torch.equal(targets[0], expected)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        torch.testing.assert_close(scaled, (batch[0] / 255 - mean) / std)
        torch.testing.assert_close(data.displayable(scaled), batch[0] / 255)


def test_crops_have_their_height_first_and_images_and_labels_go_together(root):
    data = ready(root, scale_range=(1.0, 1.0))
    batches = list(data.train_dataloader())
    assert [(tuple(x.shape), tuple(y.shape)) for x, y in batches] == [((2, 3, 16, 24), (2, 16, 24))] * 3
    for images, targets in batches:
        assert torch.equal(of_red(images), targets)
    # every image once, cut out of it somewhere or out of its mirror image
    order = [draw.image for draw in data.train_dataloader().sampler]
    assert sorted(order) == list(range(6))
    whole = [pixels(image(root, "train", city, n)).permute(2, 0, 1) for city in "ab" for n in range(3)]
    for crop, number in zip(torch.cat([x for x, _ in batches]), order, strict=True):
        views = whole[number].unfold(1, 16, 1).unfold(2, 24, 1)
        found = [(views == part.view(3, 1, 1, 16, 24)).flatten(3).all(3).all(0).any() for part in (crop, crop.flip(-1))]
        assert sum(map(int, found)) == 1


def test_half_of_the_images_are_mirrored_and_crops_lie_everywhere(root):
    dataset = ready(root, scale_range=(1.0, 1.0), crop_size=(30, 64)).train_dataloader().dataset
    whole = pixels(image(root, "train", "a", 0)).permute(2, 0, 1)
    possible = [whole[:, top : top + 30] for top in range(3)]
    possible += [crop.flip(-1) for crop in possible]
    seen = Counter()
    for epoch in range(120):
        varied, _ = dataset[SeededIndex(0, epoch, 0, 0)]
        seen[next(number for number, crop in enumerate(possible) if torch.equal(crop, varied))] += 1
    assert sorted(seen) == list(range(6))
    assert min(seen.values()) >= 8


@pytest.mark.parametrize(
    ("scale_range", "step", "num_draws"), [((0.5, 2.1), 0.1, 100), ((0.5, 2.0), None, 150), ((0.5, 0.75), 0.25, 10)]
)
def test_scales_and_padding(root, scale_range, step, num_draws):
    # a crop larger than any image shows all of it, at the top left of what is black and does not count
    data = ready(root, scale_range=scale_range, scale_step=step, crop_size=(80, 160))
    dataset = data.train_dataloader().dataset
    everything = torch.full_like(dataset[0][1], 3)
    dataset.label_of_number[:] = 3  # so that what does not count is the padding
    heights = set()
    for epoch in range(num_draws):
        picture, targets = dataset[SeededIndex(1, epoch, 0, 0)]
        rows, columns = (targets == 3).any(1).sum().item(), (targets == 3).any(0).sum().item()
        heights.add(rows)
        mirrored = bool((targets[0] == 255)[0])
        inside = targets.flip(-1) if mirrored else targets
        assert (inside[:rows, :columns] == 3).all()
        assert (picture[:, targets == 255] == 0).all()
        assert abs(columns - 2 * rows) <= 1
    if step is None:
        assert 16 <= min(heights) <= 17
        assert 63 <= max(heights) <= 64
        assert len(heights) > 40
    else:
        steps = round((scale_range[1] - scale_range[0]) / step)
        assert heights == {round(32 * (scale_range[0] + step * k)) for k in range(steps + 1)}
    assert torch.equal(dataset[0][1], everything)


def test_a_scaled_image_is_interpolated_and_its_labels_are_not(root):
    data = ready(root, scale_range=(2.0, 2.0), crop_size=(64, 128))
    dataset = data.train_dataloader().dataset
    picture, targets = dataset[SeededIndex(0, 0, 0, 0)]
    whole, known = dataset[0]
    if not torch.equal(targets[::2, ::2], known):  # mirrored
        picture, targets = picture.flip(-1), targets.flip(-1)
    assert torch.equal(targets, known.repeat_interleave(2, 0).repeat_interleave(2, 1))
    expected = torch.nn.functional.interpolate(whole[None].double(), scale_factor=2, mode="bilinear")[0]
    assert (picture - expected).abs().max() <= 1


def test_every_part_of_the_draw_varies_the_image_and_nothing_else_does(root):
    first, second = (ready(root).train_dataloader().dataset for _ in range(2))
    source = image(root, "train", "a", 0)
    for number in (1, 2):
        shutil.copy(source, image(root, "train", "a", number))
        shutil.copy(labels(root, "train", "a", 0), labels(root, "train", "a", number))
    draws = [SeededIndex(s, e, i, r) for s in range(2) for e in range(2) for i in range(2) for r in range(2)]
    before = torch.get_rng_state()
    varied = [first[draw] for draw in draws]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({picture.numpy().tobytes() for picture, _ in varied}) == 16
    torch.manual_seed(5)
    assert same([second[draw] for draw in reversed(draws)], varied[::-1])


def test_the_last_batch_is_left_out_unless_it_is_full(root):
    loader = ready(root, batch_size=4).train_dataloader()
    assert len(loader) == 1
    assert [len(images) for images, _ in loader] == [4]
    with pytest.raises(
        ValueError,
        match=r"^batch_size must be at most 6, the number of training images for .*, got 7\. A batch",
    ):
        ready(root, batch_size=7).train_dataloader()


def broken(root, stage="fit", **arguments):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ready(root, stage, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(("split", "city", "stage"), [("train", "a", "fit"), ("val", "d", "test")])
def test_what_is_wrong_with_the_files_is_told_before_a_stage_begins(root, split, city, stage):
    picture, mask = image(root, split, city, 1), labels(root, split, city, 1)
    good = {path: path.read_bytes() for path in (picture, mask)}

    def message(**arguments):
        found = broken(root, stage, **arguments)
        for path, content in good.items():
            path.write_bytes(content)
        return found

    mask.unlink()
    assert f"1 of the 6 images in {root / 'leftImg8bit' / split} have no label file in" in (found := message())
    assert f"{root / 'gtFine' / split}: {city}/{mask.name}." in found
    Image.new("L", (32, 64)).save(mask)
    assert f"{mask}: has 32x64 pixels, and its image {picture} 64x32." in message()
    Image.new("RGB", (64, 32)).save(mask)
    assert f"{mask}: must have one channel of 8 bits, with a number for each pixel; is RGB." in message()
    for path in (picture, mask):
        path.write_bytes(b"no image")
        assert f"{path}: cannot be read as an image" in message()
    ids = np.array(Image.open(mask))
    ids[3, 5:7], ids[9, 9] = 34, 254
    Image.fromarray(ids).save(mask)
    assert (
        f"{mask}: 3 pixels have numbers without a label: 34, 254. Numbers with a label are 0 to 33, 255." in message()
    )
    mask.write_bytes(good[mask][:-40])
    assert f"{mask}: cannot be read as an image" in message()
    ready(root, stage)


def test_unknown_ids_are_found_when_read_if_they_are_not_looked_for(root):
    mask = labels(root, "val", "c", 2)
    Image.new("L", (64, 32), 99).save(mask)
    data = ready(root, check_labels=False)
    with pytest.raises(ValueError, match=rf"{mask.name}: 2048 pixels have numbers without a label: 99\."):
        list(data.val_dataloader())


def test_a_damaged_image_is_named_when_it_is_read(root):
    for split, city in (("train", "b"), ("val", "c")):
        path = image(root, split, city, 0)
        path.write_bytes(path.read_bytes()[:-100])
    data = ready(root)
    for loader, name in ((data.train_dataloader(), "b_000000"), (data.val_dataloader(), "c_000000")):
        with pytest.raises(ValueError, match=f"{name}_000019_leftImg8bit.png: cannot be read as an image"):
            list(loader)


def test_unusable_folders_are_named(root, tmp_path):
    assert f"There is no folder {tmp_path / 'nowhere' / 'leftImg8bit' / 'train'}." in broken(tmp_path / "nowhere")
    for path in (root / "leftImg8bit" / "val").rglob("*.png"):
        path.rename(path.with_suffix(".PNG"))
    assert f"There are no images CITY/*_leftImg8bit.png in {root / 'leftImg8bit' / 'val'}." in broken(root)


def test_images_of_several_sizes_are_evaluated_one_by_one_only(root):
    for kind, path in (("RGB", image(root, "val", "d", 0)), ("L", labels(root, "val", "d", 0))):
        Image.new(kind, (40, 50)).save(path)
    for stage in ("fit", "test"):
        message = broken(root, stage, eval_batch_size=2)
        assert message == (
            "eval_batch_size must be 1 where images differ in size, got 2. There are "
            f"{image(root, 'val', 'c', 0)} (64x32) and {image(root, 'val', 'd', 0)} (40x50)."
        )
    shapes = [tuple(images.shape[2:]) for images, _ in ready(root, "test").test_dataloader()]
    assert shapes == [(32, 64)] * 3 + [(50, 40)] + [(32, 64)] * 2
    for kind, path in (("RGB", image(root, "train", "a", 0)), ("L", labels(root, "train", "a", 0))):
        Image.new(kind, (40, 50)).save(path)
    data = ready(root, val_split=0.5, split_seed=1)  # crops have one size whatever the images have
    assert [images.shape[2:] for images, _ in data.train_dataloader()] == [(16, 24)]


def test_the_validation_images_serve_for_testing_and_predictions_are_made_on_the_test_images(root):
    data = ready(root, "test", eval_batch_size=4)
    assert [len(images) for images, _ in data.test_dataloader()] == [4, 2]
    assert same(list(ready(root, eval_batch_size=4).val_dataloader()), list(data.test_dataloader()))
    Image.new("RGB", (10, 20)).save(image(root, "test", "f", 1))
    data.setup("predict")
    batches = list(data.predict_dataloader())
    expected = [image(root, "test", city, number) for city in "ef" for number in range(2)]
    assert [paths for _, paths in batches] == [[str(path)] for path in expected]
    for (images, _), path in zip(batches, expected, strict=True):
        assert torch.equal(images[0], pixels(path).permute(2, 0, 1))
    data = ready(root, "predict", predict_dir=root / "leftImg8bit" / "val" / "c")
    assert len(list(data.predict_dataloader())) == 3
    shutil.rmtree(root / "leftImg8bit" / "test")
    assert "There is no folder" in broken(root, "predict")


def test_a_part_of_each_city_can_be_held_out(root):
    shutil.rmtree(root / "leftImg8bit" / "val")
    data = ready(root, val_split=2 / 3)
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    names = [sorted(Path(part.path_of(place)).name[:8] for place in range(len(part))) for part in (train, val)]
    assert sorted(names[0] + names[1]) == [f"{city}_{number:06d}" for city in "ab" for number in range(3)]
    assert Counter(name[0] for name in names[0]) == {"a": 1, "b": 1}
    assert Counter(name[0] for name in names[1]) == {"a": 2, "b": 2}
    images, targets = next(iter(data.val_dataloader()))
    assert torch.equal(of_red(images), targets)


def test_ranks_share_images_and_the_check_of_the_labels(root):
    seen, found = [], []
    mask = labels(root, "val", "c", 1)
    good = mask.read_bytes()
    Image.new("L", (64, 32), 99).save(mask)
    for rank in range(2):
        data = module(root)
        data.trainer = SimpleNamespace(
            world_size=2,
            global_rank=rank,
            current_epoch=0,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        try:
            data.setup("test")
        except ValueError as error:
            found.append((rank, str(error)))
            mask.write_bytes(good)
            data.setup("test")
        seen += [batch[0] for batch in data.test_dataloader()]
    assert [rank for rank, _ in found] == [1]  # the second image is the second process's to look at
    assert len(seen) == 6
    assert len({picture.numpy().tobytes() for picture in seen}) == 6
