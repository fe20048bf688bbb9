"""Write the images of a datamodule as shards, which StreamingDataModule reads from a folder or S3.

knl write-shards --data ImageFolderDataModule --data.root FOLDER --out s3://BUCKET/FOLDER
"""

from typing import Any

from lightning.pytorch import LightningDataModule

from knlightning.commands.command import command
from knlightning.commands.names import complete_names
from knlightning.commands.output import say
from knlightning.data.shard_writing import write_shards
from knlightning.data.shards import check_installed
from knlightning.protocols import describe
from knlightning.text import counted


def write(data: LightningDataModule, out: str, images_per_shard: int = 1000) -> None:
    """Write the images of a datamodule as shards, which StreamingDataModule reads from a folder or a storage.

    They are Parquet files OUT/train-00000-of-00012.parquet and so on, likewise for validation and, if its images are
    others, test. Training images come in random order. Files of images are stored as they are, others as PNG. After an
    interrupt the same command goes on.

    Args:
        data: The datamodule, such as ImageFolderDataModule with its root. Its validation images are those by its
            val_split, if it has that.
        out: Folder to write into, or the URL of one, such as s3://BUCKET/FOLDER.
        images_per_shard: How many images a file has. Files of 50 to 500 MB are good.

    Raises:
        ValueError: If the datamodule has no images with one class each, or other files lie there.
    """
    check_installed("knl write-shards")
    splits: dict[str, Any] = {}
    for stage, loader, name in (
        ("fit", "train_dataloader", "train"),
        ("fit", "val_dataloader", "validation"),
        ("test", "test_dataloader", "test"),
    ):
        if name == "train" or getattr(type(data), loader) is not getattr(LightningDataModule, loader):
            if name != "validation":
                data.prepare_data()
                data.setup(stage)
            dataset = getattr(data, loader)().dataset
            if not any(dataset is other for other in splits.values()):
                splits[name] = dataset
    class_names = describe(data).class_names or ()
    for name, dataset in splits.items():
        count = write_shards(dataset, name, out, class_names, images_per_shard, shuffle=name == "train")
        say(f"{out}: {counted(len(dataset), 'image')} of {name} in {counted(count, 'file')}")


def main(args: list[str]) -> None:
    """Run `knl write-shards`; `args` is the command line after it."""
    command(write, "knl write-shards", complete_names(args))
