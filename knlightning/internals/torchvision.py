"""What is used of torchvision and not documented there. Tried with torchvision 0.29."""

from torchvision.datasets import CIFAR10, CIFAR100, folder
from torchvision.datasets.utils import check_integrity, download_url

IMG_EXTENSIONS = (*folder.IMG_EXTENSIONS, ".gif")
"""The suffixes of image files that torchvision's ImageFolder reads, and that of GIF."""

__all__ = ["CIFAR10", "CIFAR100", "IMG_EXTENSIONS", "check_integrity", "download_url"]

# CIFAR10, CIFAR100: their class attributes name the files of the dataset and their checksums, its address and its
# checksum:
#   base_folder, filename, meta, test_list, tgz_md5, train_list, url
# folder.IMG_EXTENSIONS: the suffixes of image files that ImageFolder reads.
# check_integrity: says whether a file is there and has a checksum.
# download_url: downloads a file, unless it is there with its checksum, and checks it.
