"""Pack a folder of encoded images into one .npz file of uint8 arrays, and unpack it again.

    python -m benchmarks.packed_images FOLDER cifar10.npz

`FOLDER` holds train/<class>/* and test/<class>/*. The encoded files are stored unchanged, one after
the other, so that the 60,000 JPEG copies of CIFAR-10 take less than a third of the size of their
pixels. An output file of more than 60 MiB, the limit for a copy to a rented machine, is refused.
"""

import argparse
from pathlib import Path

import numpy as np

from kd.core.io import atomic_write

LIMIT = 60 * 2**20  # bytes


def pack(folder: Path, file: Path) -> int:
    """Write all images of `folder` into `file`.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: There is no image, or the file would be larger than `LIMIT`.
    """
    paths = sorted(path for split in ("train", "test") for path in (folder / split).glob("*/*"))
    if not paths:
        raise ValueError(f"{folder} holds no images; expected train/<class>/* and test/<class>/*")
    contents = [path.read_bytes() for path in paths]
    with atomic_write(file) as part, open(part, "wb") as out:
        np.savez_compressed(
            out,
            content=np.frombuffer(b"".join(contents), dtype=np.uint8),
            sizes=np.array([len(content) for content in contents]),
            names=np.frombuffer(
                "\n".join(str(path.relative_to(folder)) for path in paths).encode(), dtype=np.uint8
            ),
        )
        out.flush()
        size = out.tell()
        if size > LIMIT:
            raise ValueError(
                f"{file} would take {size / 2**20:.0f} MiB; the limit is {LIMIT >> 20} MiB"
            )
    return size


def unpack(file: Path, folder: Path) -> int:
    """Write the images of `file` into `folder`, which is made.

    Returns:
        The number of images.
    """
    with np.load(file) as arrays:  # plain arrays only: no pickle is read
        content, sizes = arrays["content"].tobytes(), arrays["sizes"].tolist()
        names = arrays["names"].tobytes().decode().splitlines()
    start = 0
    for name, size in zip(names, sizes, strict=True):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{file}: {name!r} leads out of the folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[start : start + size])
        start += size
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.packed_images", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    try:
        size = pack(arguments.folder, arguments.file)
    except ValueError as error:
        raise SystemExit(f"benchmarks.packed_images: {error}") from None
    print(f"{arguments.file}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
