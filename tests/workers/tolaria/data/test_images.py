"""Images: each source to prepared data and batches of them, and what is no image data, each in a sentence."""

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from esper.platform.data_spec import ImageSpec
from esper.platform.errors import UserError
from esper.platform.spec import RunSpec
from esper.workers.tolaria.data import ImageData, ensure, image_sources, open_data, prepare, sources
from esper.workers.tolaria.data.prepared import FILE
from tests.pipelines.helpers import Harm

CPU = torch.device("cpu")
LABELS = np.arange(60) % 10
CIFAR10 = Path(__file__).parents[5] / "shared" / "data" / "cifar10" / "cifar10_5k.npz"


def images(n: int, size: int = 32, channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, size, size, channels), and labels of ten classes, (n,)."""
    draws = np.random.default_rng(seed)
    return draws.integers(0, 256, (n, size, size, channels), np.uint8), np.arange(n) % 10


def npz(path: Path, **arrays: np.ndarray) -> Path:
    """60 training and 20 test images, with some of the arrays replaced."""
    (train, labels), (test, test_labels) = images(60), images(20, seed=1)
    usual = {"train_images": train, "train_labels": labels, "test_images": test, "test_labels": test_labels}
    np.savez(path, **{name: array for name, array in (usual | arrays).items() if array is not None})
    return path


def spec_of(data: dict, size: int = 8, channels: int = 1) -> RunSpec:
    host = {"kind": "resnet", "image_size": size, "image_channels": channels}
    return RunSpec.checked({"host": host, "data": {"kind": "images", **data}}, "the spec")


def test_digits_are_prepared_whole_and_mapped_by_whoever_opens_them(digits):
    """Every digit is in one of the splits, equal ones in one only; nothing is copied, and it pickles as its path."""
    assert isinstance(digits, ImageData)
    manifest = digits.manifest
    assert (manifest.vocab_size, manifest.size, manifest.channels) == (10, 8, 1)
    assert manifest.counts == {"train": 1437, "valid": 360}
    pixels = {split: {image.tobytes() for image in digits.arrays[split][0]} for split in ("train", "valid")}
    assert not pixels["train"] & pixels["valid"]
    assert int(max(array.max() for array, _ in digits.arrays.values())) == 255
    assert not digits.arrays["train"][0].flags.writeable
    assert isinstance(digits.arrays["train"][0], np.memmap)
    pickled = pickle.dumps(digits)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).manifest == manifest


def test_an_epoch_has_each_image_of_its_slice_once_and_batches_depend_on_seed_and_step_alone(digits):
    spec = spec_of({"batch_size": 31})
    batches = digits.batches(spec, 3, (0.25, 0.75), CPU)
    low, high = int(0.25 * 1437), int(0.75 * 1437)
    epochs = -(-(high - low) // 31)
    inputs, targets = (torch.cat(parts)[: high - low] for parts in zip(*map(batches.at, range(epochs)), strict=True))
    expected, classes = digits.examples("train", np.arange(low, high), CPU)
    assert inputs.shape == (high - low, 1, 8, 8)
    assert sorted(image.sum().item() for image in inputs) == sorted(image.sum().item() for image in expected)
    assert torch.equal(targets.bincount(), classes.bincount())
    again = digits.batches(spec, 3, (0.25, 0.75), CPU)
    for step in (40, 7, 0, 16, 17):  # in any order, over the end of an epoch too
        assert all(map(torch.equal, again.at(step), batches.at(step)))
    assert not torch.equal(batches.at(0)[0], digits.batches(spec, 4, (0.25, 0.75), CPU).at(0)[0])
    whole = digits.examples("train", np.arange(1437), CPU)[0]
    assert whole.mean().item() == pytest.approx(0, abs=1e-4)
    assert whole.std().item() == pytest.approx(1, abs=1e-3)


@given(st.integers(0, 3), st.booleans(), st.integers(0, 2000))
def test_a_moved_image_is_a_window_of_itself_in_a_border_of_zeros(digits, crop, flip, step):
    plain, labels = digits.batches(spec_of({"batch_size": 8}), 0, (0, 1), CPU).at(step)
    moved, same = digits.batches(spec_of({"batch_size": 8, "crop": crop, "flip": flip}), 0, (0, 1), CPU).at(step)
    assert torch.equal(labels, same)
    assert moved.is_contiguous()
    for before, after in zip(plain, moved, strict=True):
        padded = torch.nn.functional.pad(before, (crop,) * 4)
        windows = [padded[:, y : y + 8, x : x + 8] for y in range(2 * crop + 1) for x in range(2 * crop + 1)]
        assert any(torch.equal(after, window) for each in windows for window in (each, each.flip(2))[: 1 + flip])


def test_flips_and_shifts_are_all_drawn(digits):
    draws = digits.batches(spec_of({"batch_size": 16, "crop": 1, "flip": True}), 0, (0, 1), CPU)
    shifts, flips = zip(*map(draws._moves.at, range(100)), strict=True)
    assert np.unique(np.concatenate(shifts), axis=0).tolist() == [[y, x] for y in range(3) for x in range(3)]
    assert np.concatenate(flips).mean() == pytest.approx(0.5, abs=0.05)


def test_held_out_examples_are_the_same_for_every_seed_and_cap(digits):
    spec = spec_of({})
    inputs, targets = digits.held_out(90, spec, CPU)
    assert inputs.shape == (90, 1, 8, 8)
    assert torch.equal(targets, torch.from_numpy(digits.arrays["valid"][1][::4].astype(np.int64)))
    assert len(digits.held_out(10**6, spec, CPU)[1]) == 360


def test_npz_keeps_its_split_and_is_averaged_down(tmp_path):
    path = npz(tmp_path / "a.npz")
    made = open_data(ensured(tmp_path, source=str(path), size=16, max_images=40))
    assert made.manifest.counts == {"train": 40, "valid": 20}
    expected = images(20, seed=1)[0].reshape(20, 16, 2, 16, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    assert np.abs(by_label(*made.arrays["valid"]) - by_label(expected, LABELS[:20])).max() <= 0.5
    grey = npz(tmp_path / "b.npz", train_images=images(60, 8, 1)[0][..., 0], test_images=None, test_labels=None)
    made = open_data(ensured(tmp_path, source=str(grey), valid_fraction=0.25))
    assert made.manifest.counts == {"train": 44, "valid": 16}
    assert made.manifest.channels == 1


def by_label(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images in an order that no shuffling changes: by class, then by content."""
    return pixels[sorted(range(len(labels)), key=lambda i: (labels[i], pixels[i].mean()))]


def test_a_test_set_with_classes_in_turn_is_picked_from_evenly(tmp_path):
    test = images(400, 8)
    path = npz(tmp_path / "a.npz", train_images=images(60, 8)[0], test_images=test[0], test_labels=test[1])
    data = open_data(ensured(tmp_path, source=str(path)))
    assert len(data.held_out(40, spec_of({}, 8, 3), CPU)[1].unique()) > 7  # each tenth of them would be of one class


def ensured(cache: Path, **data) -> Path:
    """Made once, and found the second time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPER_CACHE", str(cache / "cache"))
        folder = ensure(ImageSpec(**data))
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert ensure(ImageSpec(**data)) == folder
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
        assert ensure(ImageSpec(source=str(folder))) == folder
    return folder


def test_jpeg_files_in_a_row_are_decoded(tmp_path):
    pixels = np.repeat(np.arange(0, 200, 10, dtype=np.uint8), 32 * 32 * 3).reshape(20, 32, 32, 3)
    files = []
    for image in pixels:
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=95)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    row = {"train_jpeg": np.concatenate(files), "train_offsets": offsets, "train_labels": np.arange(20) % 10}
    np.savez(tmp_path / "a.npz", **row)
    train, held = image_sources.find(str(tmp_path / "a.npz")).load()
    assert held is None
    assert np.abs(train.pixels.transpose(0, 2, 3, 1).astype(int) - pixels).max() <= 1


class Python2(pickle._Pickler):  # pyright: ignore[reportAttributeAccessIssue]
    """As Python 2 pickled: its strings are bytes."""

    def save_string(self, value: bytes | str) -> None:
        content = value if isinstance(value, bytes) else value.encode()
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(value)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}  # pyright: ignore


def batch(path: Path, content: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        Python2(file, 2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return path


@pytest.fixture
def cifar(tmp_path) -> Path:
    """The python version's folder, of 60 training and 20 test images."""
    for i, (name, n) in enumerate([("data_batch_1", 30), ("data_batch_2", 30), ("test_batch", 20)]):
        pixels, labels = images(n, seed=i)
        rows = pixels.transpose(0, 3, 1, 2).reshape(n, 3072)
        batch(tmp_path / "cifar" / name, {"data": rows, "labels": labels.tolist(), "batch_label": "batch"})
    return tmp_path / "cifar"


def test_cifars_python_batches_are_read(cifar, tmp_path):
    assert b"numpy.core.multiarray" in (cifar / "test_batch").read_bytes()
    train, held = image_sources.find(str(cifar)).load()
    assert np.array_equal(train.pixels[30:].transpose(0, 2, 3, 1), images(30, seed=1)[0])
    assert train.labels.tolist() == [*range(10)] * 6
    made = open_data(ensured(tmp_path, source=str(cifar)))
    pixels, labels = made.arrays["valid"]
    assert np.array_equal(by_label(pixels.transpose(0, 2, 3, 1), labels), by_label(*images(20, seed=2)))
    assert held is not None


@pytest.mark.parametrize("function", [os.system, eval, pickle.loads, np.load, np.fromfile, getattr, print])
def test_no_code_of_a_pickle_is_run(cifar, function, tmp_path):
    content = {"data": Harm(function, "touch " + str(tmp_path / "harmed")), "labels": []}
    (cifar / "data_batch_2").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(UserError, match=r"data_batch_2 cannot be read as images \(UnpicklingError: it asks for "):
        image_sources.find(str(cifar)).load()
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps([1]), pickle.dumps({b"data": 3}), b"(" * 10_000])
def test_a_damaged_batch_is_refused(cifar, content):
    (cifar / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=r"test_batch cannot be read as images \(.*\): unpack the python version"):
        image_sources.find(str(cifar)).load()


def test_the_hubs_format_streams_through_datasets(tmp_path, monkeypatch):
    """The very call that reads the hub, on local files in its layout."""
    for split, n in {"train": 40, "test": 20}.items():
        files = []
        for image in images(n)[0]:
            Image.fromarray(image).save(file := io.BytesIO(), "PNG")
            files.append({"bytes": file.getvalue(), "path": None})
        table = pa.table({"img": files, "label": images(n)[1]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet")
    features = "[{name: img, dtype: image}, {name: label, dtype: int64}]"
    (tmp_path / "README.md").write_text(f"---\ndataset_info: {{features: {features}}}\n---\n")
    monkeypatch.setattr(image_sources, "CIFAR10", str(tmp_path))
    train, held = image_sources.find("cifar10").load()
    assert np.array_equal(train.pixels.transpose(0, 2, 3, 1), images(40)[0])
    assert held is not None
    assert held.labels.tolist() == images(20)[1].tolist()


def test_without_a_hub_it_is_said_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.3)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cifar10 needs the Hugging Face hub.*give --data an \.npz"):
        ensure(ImageSpec(source="cifar10"))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"train_images": images(60)[0].astype(float)}, "are float64: give them as uint8"),
        ({"train_images": images(60)[0][:, :16]}, "are 16 × 32 × 3: they must be square"),
        ({"train_images": images(60, channels=4)[0]}, "are 32 × 32 × 4: they must be square, in 1 or 3 channels"),
        ({"train_images": images(60, 16)[0]}, "training and test images of 16 × 16 × 3 and 32 × 32 × 3"),
        ({"train_images": images(60)[0].reshape(60, -1)}, r"cannot be read as images \(ValueError: images of shape"),
        ({"train_images": None}, r"cannot be read as images \(KeyError"),
        ({"train_images": np.array([None] * 60)}, r"cannot be read as images \(ValueError: Object arrays"),
        ({"train_labels": LABELS - 1}, "has labels from -1 to 8: number the classes from 0"),
        ({"train_labels": LABELS * 10**6}, "has labels from 0 to 9000000: number the classes from 0"),
        ({"train_labels": LABELS * 2}, "has 10 classes in training, and labels up to 18: number two classes"),
        ({"train_labels": LABELS % 9}, "has 9 classes in training, and labels up to 9: number two classes"),
        ({"train_labels": LABELS * 0, "test_labels": LABELS[:20] * 0}, "has 1 classes in training"),
        ({"train_labels": LABELS[:-1]}, r"has int64 labels of shape \(59,\) for 60 images"),
        ({"train_labels": LABELS / 2}, "has float64 labels"),
        ({"test_images": images(20)[0][:0], "test_labels": LABELS[:0]}, "are 32 × 32 × 3: they must"),
    ],
)
def test_what_is_no_set_of_images_is_refused(tmp_path, arrays, words):
    with pytest.raises(UserError, match=words) as error:
        prepare(ImageSpec(source=str(npz(tmp_path / "a.npz", **arrays))), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_source_is_refused(tmp_path, text_file):
    for source, words in (
        ("digit", "unknown source 'digit'.*Did you mean 'digits'"),
        (str(text_file), "holds no images: give an .npz file, a folder of CIFAR-10's"),
        (str(tmp_path), "holds no images: give an .npz file, a folder of CIFAR-10's"),
    ):
        with pytest.raises(UserError, match=words):
            image_sources.find(source)
    (tmp_path / "a.npz").write_bytes(b"PK\3\4 no zip")
    with pytest.raises(UserError, match=r"a.npz cannot be read as images \(.*\): give an .npz file with train_images"):
        image_sources.find(str(tmp_path / "a.npz")).load()
    with pytest.raises(UserError, match=r"data\.size is 5, but the images of .* are 32 pixels wide: take a divisor"):
        prepare(ImageSpec(source=str(npz(tmp_path / "b.npz")), size=5), tmp_path / "out")


def test_images_of_another_size_are_refused(digits):
    with pytest.raises(UserError, match=r"were made 8 pixels wide, data\.size=4 was asked for"):
        ensure(ImageSpec(source=str(digits.path), size=4))
    with pytest.raises(UserError, match="images of digits are 8 × 8 × 1, and the host takes 8 × 8 × 3"):
        digits.check(spec_of({}, 8, 3))


def test_classes_are_those_of_the_source_however_few_images_are_kept(tmp_path):
    path = npz(tmp_path / "a.npz", train_labels=LABELS % 2, test_labels=LABELS[:20] * 0)
    assert open_data(ensured(tmp_path, source=str(path), max_images=1)).manifest.classes == 2


def test_text_is_no_data_for_a_resnet(shards):
    with pytest.raises(UserError, match="holds prepared text, and the preset is for images"):
        open_data(shards).batches(spec_of({}), 0, (0, 1), CPU)


@pytest.mark.parametrize(
    ("damage", "verified"),
    [
        (lambda folder: (folder / "train-pixels.npy").unlink(), False),
        (lambda folder: (folder / "train-pixels.npy").write_bytes(b"\x93NUMPY"), False),
        (lambda folder: np.save(folder / "train-labels.npy", np.zeros(1437)), False),
        (lambda folder: np.save(folder / "train-pixels.npy", np.zeros((1437, 1, 8, 9), np.uint8)), False),
        (lambda folder: np.save(folder / "valid-pixels.npy", np.zeros((360, 1, 8, 8), np.uint8)), True),
        (lambda folder: sign(folder, np.full(360, 10, np.uint16)), True),  # a class that it has not
        (lambda folder: rewrite(folder, mean=[1.0, 2.0]), False),
        (lambda folder: rewrite(folder, deviation=[0.0]), False),
        (lambda folder: (folder / "train-pixels.npy").write_bytes(b"\x93NUMPY\1\0\x03\0('\n"), False),
    ],
)
def test_damaged_images_are_refused(digits, tmp_path, damage, verified):
    folder = shutil.copytree(digits.path, tmp_path / "out")
    damage(folder)
    for verify in {True, verified}:
        with pytest.raises(UserError, match=f"{folder}.* cannot be used as prepared images .*esper prepare"):
            open_data(folder, verify=verify)


def rewrite(folder: Path, **changes: object) -> None:
    values = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(values | changes))


def sign(folder: Path, labels: np.ndarray) -> None:
    """Replace the held-out classes, and give the manifest their checksum."""
    np.save(folder / "valid-labels.npy", labels)
    values = json.loads((folder / FILE).read_text())
    values["splits"]["valid"]["labels"] = hashlib.sha256((folder / "valid-labels.npy").read_bytes()).hexdigest()
    (folder / FILE).write_text(json.dumps(values))


@pytest.mark.skipif(not CIFAR10.exists(), reason=f"needs CIFAR-10 in {CIFAR10}")
def test_real_cifar_images_are_as_they_were_measured(tmp_path):
    """The class's names and counts are told in its SOURCE.md."""
    data = open_data(ensured(tmp_path, source=str(CIFAR10), size=16))
    assert data.manifest.counts == {"train": 4000, "valid": 1000}
    counts = {split: np.bincount(labels) for split, (_, labels) in data.arrays.items()}
    assert (counts["train"].min(), counts["train"].max()) == (366, 422)
    assert (counts["valid"].min(), counts["valid"].max()) == (86, 112)
    assert data.manifest.mean == pytest.approx([125.3, 123.0, 113.9], abs=3)  # of all 50,000
