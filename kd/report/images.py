"""Compare runs image by image, from the outputs for the test images that each run keeps.

The spread over seeds says how a result varies with training. The spread over images, computed here,
says how it would vary with another test set of the same size and distribution.
"""

import json
import math
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from scipy import stats

from kd.core.errors import first_line
from kd.core.execution import MAX_OUTPUTS_MB
from kd.runs.directory import TEST_OUTPUTS, printable

Bools = NDArray[np.bool_]

Z95 = 1.96  # half-width of a normal 95 % interval, in standard errors


# ---- the file


class Outputs(NamedTuple):
    """The outputs of one run for the test images.

    Attributes:
        labels: The true classes, int32 [n].
        predictions: The predicted classes, int32 [n].
        logits: Float16 [n, classes], or None if they were not kept.
        classes: The names of the classes.
    """

    labels: NDArray[np.int32]
    predictions: NDArray[np.int32]
    logits: NDArray[np.float16] | None
    classes: tuple[str, ...]


def load_outputs(folder: Path) -> tuple[Outputs | None, str]:
    """Load the outputs for the test images from a run's directory.

    Returns:
        (outputs, "") if the file is valid, (None, problem) if it is not, and (None, "") if there is
        no such file.
    """
    path = folder / TEST_OUTPUTS
    try:
        if not _is_present(path):
            return None, ""
        with safe_open(path, framework="numpy") as file:
            return _read(file), ""
    except OSError as error:
        problem = error.strerror or first_line(error)
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
        problem = first_line(error)
    return None, f"{TEST_OUTPUTS} is damaged: {problem}"


def _is_present(path: Path) -> bool:
    """Return whether the file exists.

    Raises:
        ValueError: It is not a regular file, or is larger than any that kd writes.
        OSError: It cannot be examined.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        raise ValueError("it is not a regular file")
    if status.st_size > 1e6 * MAX_OUTPUTS_MB:
        raise ValueError(f"it is larger than {MAX_OUTPUTS_MB:g} MB")
    return True


def _read(file: Any) -> Outputs:
    """Read an opened safetensors file; shapes and types are checked before any tensor is loaded.

    Raises:
        ValueError: The contents are not those of a file that kd writes.
    """
    classes = _class_names(file.metadata() or {})
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    actual = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    shape = actual.get("labels", ("", []))[1]
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError("labels should have the shape [n]")
    expected = {"labels": ("I32", shape), "predictions": ("I32", shape)}
    if "logits" in actual:
        expected["logits"] = ("F16", [*shape, len(classes)])
    for name in sorted(set(expected) | set(actual)):
        if actual.get(name) != expected.get(name):
            raise ValueError(
                f"{name} should be {_describe(expected.get(name))}, got "
                f"{_describe(actual.get(name))}"
            )
    arrays = {name: file.get_tensor(name) for name in expected}
    for name in ("labels", "predictions"):
        if arrays[name].min() < 0 or arrays[name].max() >= len(classes):
            raise ValueError(f"{name} should be 0 to {len(classes) - 1}")
    logits = arrays.get("logits")
    if logits is not None and not np.isfinite(logits).all():
        raise ValueError("logits should be finite")
    return Outputs(arrays["labels"], arrays["predictions"], logits, classes)


def _class_names(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the classes as valid Unicode.

    Raises:
        ValueError: The metadata does not list them.
    """
    names = json.loads(metadata.get("classes", "null"))
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError("the metadata should list the names of the classes")
    return tuple(map(printable, names))


def _describe(tensor: tuple[str, list[int]] | None) -> str:
    """Return dtype and shape of a tensor as text."""
    return f"{tensor[0]} {tensor[1]}" if tensor else "absent"


# ---- accuracy over images


def correctness(outputs: Outputs) -> Bools:
    """Return whether each image was classified correctly: bool [n]."""
    return np.equal(outputs.predictions, outputs.labels)


def check_same_images(outputs: Sequence[Outputs]) -> None:
    """Check that runs were tested on the same images, as far as labels and class names show.

    Raises:
        ValueError: There is no run, or labels or class names differ.
    """
    if not outputs:
        raise ValueError("there are no outputs to compare")
    first = outputs[0]
    for other in outputs[1:]:
        if other.classes != first.classes:
            raise ValueError("the runs were tested on different classes")
        if not np.array_equal(other.labels, first.labels):
            raise ValueError("the runs were tested on different images: their labels differ")


def correctness_of_runs(outputs: Sequence[Outputs]) -> Bools:
    """Return whether each run classified each image correctly: bool [runs, n].

    Raises:
        ValueError: The runs were not tested on the same images.
    """
    check_same_images(outputs)
    return np.stack([correctness(run) for run in outputs])


def image_interval(correct: Bools) -> float:
    """Compute the uncertainty of the accuracy of these runs that is due to the sample of images.

    Args:
        correct: Whether each run classified each image correctly, bool [runs, n].

    Returns:
        Half-width of the 95 % interval of the mean accuracy over new images, as a fraction.
    """
    return _half_width(correct.mean(axis=0))


def image_difference(a: Bools, b: Bools) -> tuple[float, float]:
    """Compare the accuracies of two methods on the same images.

    Args:
        a: Whether each run of the first method classified each image correctly, bool [runs, n].
        b: The same of the second method, for the same n images; the number of runs can differ.

    Returns:
        The accuracy of `a` minus that of `b`, as a fraction, and the half-width of its 95 %
        interval over new images.

    Raises:
        ValueError: The numbers of images differ.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the numbers of images differ: {a.shape[1]} and {b.shape[1]}")
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(difference.mean()), _half_width(difference)


def compare_outputs(a: Sequence[Outputs], b: Sequence[Outputs]) -> tuple[float, float]:
    """Compare the accuracies of two methods, given the outputs of their runs.

    Returns:
        The same as `image_difference`.

    Raises:
        ValueError: A method has no run, or not all runs were tested on the same images.
    """
    if not a or not b:
        raise ValueError("there are no outputs to compare")
    check_same_images([*a, *b])
    return image_difference(correctness_of_runs(a), correctness_of_runs(b))


def _half_width(values: NDArray[np.float64]) -> float:
    """Return the half-width of the normal 95 % interval of the mean of values [n].

    It is at least 3 / n: of an event that happened for none of n images, this is the upper limit of
    the 95 % interval of its probability (rule of three).
    """
    n = len(values)
    normal = Z95 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return max(normal, min(3 / n, 1.0))


class McNemar(NamedTuple):
    """The exact test of McNemar (1947) for two runs on the same images.

    Attributes:
        only_a: The number of images that only the first run classified correctly.
        only_b: The number of images that only the second run classified correctly.
        p: The two-sided p-value of equal accuracies, from the binomial distribution.
    """

    only_a: int
    only_b: int
    p: float


def mcnemar(a: Bools, b: Bools) -> McNemar:
    """Test whether two runs have the same accuracy.

    Args:
        a: Whether the first run classified each image correctly, bool [n].
        b: The same of the second run, for the same images.

    Raises:
        ValueError: The shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"the numbers of images differ: {len(a)} and {len(b)}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_a + only_b
    p = float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
    return McNemar(only_a, only_b, p)


# ---- classes


def per_class(
    labels: NDArray[np.integer[Any]],
    correct_mean: NDArray[np.floating[Any]],
    classes: Sequence[str],
) -> pd.DataFrame:
    """Compute the accuracy of each class.

    Args:
        labels: The true classes, integers [n], 0 to len(classes) - 1.
        correct_mean: The fraction of runs that classified each image correctly, [n].
        classes: The names of the classes.

    Returns:
        One row per class, in their order: `class`, its number of `images` and the `accuracy`, as a
        fraction; NaN for a class without images.
    """
    images = np.bincount(labels, minlength=len(classes))
    correct = np.bincount(labels, weights=correct_mean, minlength=len(classes))
    accuracy = np.divide(correct, images, out=np.full(len(classes), np.nan), where=images > 0)
    return pd.DataFrame({"class": list(classes), "images": images, "accuracy": accuracy})


def confusions(outputs: Sequence[Outputs], top: int = 5) -> pd.DataFrame:
    """Find which classes are most often taken for which others.

    Args:
        outputs: The outputs of the runs of one method.
        top: Maximum number of rows.

    Returns:
        One row per pair of classes, most frequent first: `true`, `predicted` and the `share` of the
        images of the true class that was predicted so, as a fraction, averaged over runs.

    Raises:
        ValueError: The runs were not tested on the same images.
    """
    check_same_images(outputs)
    classes, labels = outputs[0].classes, outputs[0].labels.astype(np.int64)
    cells = np.concatenate([labels * len(classes) + run.predictions for run in outputs])
    wrong = np.concatenate([~correctness(run) for run in outputs])
    pairs, counts = np.unique(cells[wrong], return_counts=True)
    true, predicted = np.divmod(pairs, len(classes))
    images = np.bincount(labels, minlength=len(classes))
    share = counts / (len(outputs) * images[true])
    order = np.argsort(-share, kind="stable")[:top]
    return pd.DataFrame(
        {
            "true": [classes[i] for i in true[order]],
            "predicted": [classes[i] for i in predicted[order]],
            "share": share[order],
        }
    )
