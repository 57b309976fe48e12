"""MNIST (LeCun, Cortes, Burges) and Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747): 70,000 pictures each."""

from io import BytesIO
from pathlib import Path

from noctule.data.arrays import make_parts
from noctule.data.dataset import Dataset
from noctule.data.idx import parse_idx
from noctule.data.published import Published, PublishedFile, read_published


def _pictures(name: str, address: str, *sha256s: str) -> Published:
    kinds = (
        ("train-images-idx3-ubyte.gz", 47_040_016),
        ("train-labels-idx1-ubyte.gz", 60_008),
        ("t10k-images-idx3-ubyte.gz", 7_840_016),
        ("t10k-labels-idx1-ubyte.gz", 10_008),
    )
    files = (PublishedFile(path, size, sha256) for (path, size), sha256 in zip(kinds, sha256s, strict=True))
    return Published(name, address, tuple(files))


MNIST = _pictures(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
FASHION_MNIST = _pictures(
    "fashion-mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)


def read_pictures(
    published: Published, *, data_dir: Path | None = None, mirror: str | None = None
) -> dict[str, Dataset]:
    """The 60,000 train and the 10,000 test pictures of 28 x 28, pixels scaled to 0 .. 1."""
    contents = read_published(published, data_dir=data_dir, mirror=mirror)
    arrays = [
        parse_idx(BytesIO(content), name=file.name) for content, file in zip(contents, published.files, strict=True)
    ]
    return make_parts({"train": (arrays[0], arrays[1]), "test": (arrays[2], arrays[3])}, name=published.name)
