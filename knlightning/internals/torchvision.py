"""What is used of torchvision and not documented there. Tried with torchvision 0.29."""

from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive

__all__ = ["CIFAR10", "CIFAR100", "IMG_EXTENSIONS", "download_and_extract_archive"]

# CIFAR10, CIFAR100: their class attributes name the files of the dataset, its address and its checksum:
#   base_folder, filename, meta, test_list, tgz_md5, train_list, url
# IMG_EXTENSIONS: the suffixes of image files that ImageFolder reads.
# download_and_extract_archive: downloads a file, checks it and unpacks it.
