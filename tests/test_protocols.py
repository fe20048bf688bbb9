from dataclasses import fields
from pathlib import Path

import pytest
import torch
from standins import RandomData
from torch import nn

from knlightning.callbacks import Seeding
from knlightning.data import CityscapesDataModule, DigitScenesDataModule, DigitsDataModule
from knlightning.nn import make_norm
from knlightning.privacy import DifferentialPrivacy
from knlightning.protocols import (
    ChecksBefore,
    DataDescription,
    KeepsLedger,
    batch_independent,
    describe,
    has_batch_norm,
    is_batch_independent,
    stretched,
)

KNOWN = {
    "class_names": ("cat", "dog"),
    "num_classes": 2,
    "image_size": (4, 6),
    "scaling": "standard",
    "mean": (0.5,),
    "std": (0.2,),
    "predict_dir": Path("images"),
    "hparams": {"eval_resize": 7},
    "palette": ((1, 2, 3), (4, 5, 6)),
    "label_ids": (7, 33),
    "displayable": torch.neg,
}


class Data:
    pass


def datamodule(**attributes):
    data = Data()
    vars(data).update(attributes)
    return data


def test_all_is_read():
    description = describe(datamodule(**KNOWN))
    assert vars(description) == KNOWN
    assert describe(description) == description
    assert describe(datamodule(predict_dir="images")).predict_dir == Path("images")


@pytest.mark.parametrize("name", KNOWN)
def test_each_attribute_does_without_the_others(name):
    assert describe(datamodule(**{name: KNOWN[name]})) == DataDescription(**{name: KNOWN[name]})


@pytest.mark.parametrize(
    "data", [None, datamodule(), datamodule(class_names=(), num_classes=0, palette=[], label_ids=None), RandomData()]
)
def test_nothing_is_known_of_other_datamodules(data):
    description = describe(data)
    assert {value for name, value in vars(description).items() if name != "hparams"} == {None, stretched}
    assert not description.hparams


def test_what_has_no_truth_value_can_be_read():
    mean = torch.ones(3)
    assert describe(datamodule(mean=mean, class_names=torch.ones(3).numpy())).mean is mean


@pytest.mark.parametrize(("num_classes", "names"), [(2, ("cat", "dog")), (3, ["0", "1", "2"]), (1, ["0"])])
def test_classes_are_named_by_their_numbers_if_the_names_do_not_fit(num_classes, names):
    assert describe(datamodule(**KNOWN)).names(num_classes) == names
    assert describe(None).names(num_classes) == [str(number) for number in range(num_classes)]


def test_stretched_fills_the_range_of_each_image():
    images = torch.stack([torch.tensor([[[-1.0, 3.0]]]), torch.tensor([[[5.0, 5.0]]])])
    assert stretched(images).tolist() == [[[[0.0, 1.0]]], [[[0.0, 0.0]]]]


def test_our_classes_have_what_the_protocols_say(tmp_path):
    every = {field.name for field in fields(DataDescription)}
    for data in (DigitScenesDataModule(), CityscapesDataModule(tmp_path)):
        assert {name for name in every if hasattr(data, name)} == every
    assert {name for name in every if hasattr(DigitsDataModule(), name)} == every - {"palette", "label_ids"}
    assert issubclass(DifferentialPrivacy, ChecksBefore)
    assert isinstance(DifferentialPrivacy(1.0), KeepsLedger)
    assert not isinstance(Seeding(), KeepsLedger)
    assert not issubclass(Seeding, ChecksBefore)


class Marked:
    @batch_independent("inner")
    def outer(self):
        return self.inner()

    @batch_independent()
    def inner(self):
        pass


class OtherInner(Marked):
    def inner(self):
        pass


class OtherOuter(Marked):
    def outer(self):
        return super().outer()


def test_a_mark_is_that_of_the_very_method_and_of_all_that_it_calls():
    assert is_batch_independent(Marked().outer, Marked())
    for other in (OtherInner(), OtherOuter()):
        assert not is_batch_independent(other.outer, other)
    own = Marked()
    own.inner = print
    assert not is_batch_independent(own.outer, own)
    assert is_batch_independent(Marked.inner)
    assert not is_batch_independent(None)


@pytest.mark.parametrize("norm", ["batch", "sync_batch", "layer", "group", "instance", "positional", "none"])
def test_batch_normalization_is_found_wherever_it_is(norm):
    assert has_batch_norm(nn.Sequential(nn.Sequential(make_norm(norm, 32)))) == norm.endswith("batch")
