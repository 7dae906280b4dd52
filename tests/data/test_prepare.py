import random

import numpy as np
import pytest
import torch
from PIL import Image

from sret_cli.data.augment import Erasing, temporarily_seeded
from sret_cli.data.decode import to_eight_bits
from sret_cli.data.loader import load_batches
from sret_cli.data.order import Batches, BatchPlan
from sret_cli.data.prepare import load_data
from sret_cli.data.sources import digits
from sret_cli.data.sources import test_folder as read_test_folder
from sret_cli.data.sources import train_folder as read_train_folder
from sret_cli.runtime.errors import LoaderLost, SretError, as_loader_lost
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.train import TrainSpec

NANO = PRESETS["nano"]


def spec_of(folder, **values):
    return TrainSpec(dataset="folder", data_dir=str(folder), batch_size=4, epochs=2, **values)


def test_digits_are_1797_scans_split_once_and_for_all():
    train, test = (source.images for source in digits())
    assert (len(train.targets), len(test.targets)) == (1437, 360)
    assert sorted(set(test.targets)) == list(range(10))
    assert test.images[0].shape == (8, 8)
    assert test.images[0].max() == 255


def test_a_sample_is_a_function_of_seed_epoch_and_index(folder):
    train = spec_of(folder, color_jitter=0.4)
    samples = load_data(train, NANO)[0].samples
    image, target = samples[3, 5, 0]
    random.random(), np.random.rand(), torch.rand(1)
    again, _ = load_data(train, NANO)[0].samples[3, 5, 0]
    assert torch.equal(image, again)
    assert target == 0
    assert not torch.equal(image, samples[4, 5, 0][0])
    assert not torch.equal(image, samples[3, 5, 1][0])
    other_seed = load_data(spec_of(folder, color_jitter=0.4, seed=1), NANO)[0].samples
    assert not torch.equal(image, other_seed[3, 5, 0][0])


def test_batches_do_not_depend_on_the_number_of_workers(folder):
    batches = []
    for workers in (0, 2):
        loader, _ = load_data(spec_of(folder), NANO, workers)
        batches.append([batch for epoch in (0, 1) for batch in loader.epoch(epoch)])
    assert len(batches[0]) == len(batches[1]) == 2 * 4
    for (x, target), (y, other) in zip(*batches, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(target, other)


class Breaks:
    """A loader with some processes that gives one batch, and then an error."""

    def __init__(self, error, workers):
        self.error, self.num_workers = error, workers

    def __iter__(self):
        yield "a batch"
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        *(ConnectionResetError(104, "Connection reset by peer"), BrokenPipeError(32, "Broken")),
        *(ConnectionRefusedError(111, "Connection refused"), FileNotFoundError(2, "No such file")),
        *(EOFError(), RuntimeError("Pin memory thread exited unexpectedly")),
        RuntimeError("DataLoader worker (pid(s) 42) exited unexpectedly"),
    ],
)
def test_whatever_breaks_as_a_process_of_the_loader_dies_is_known_as_its_death(error):
    batches = load_batches(Breaks(error, workers=2))
    assert next(batches) == "a batch"
    with pytest.raises(RuntimeError) as broken:
        next(batches)
    found = as_loader_lost(broken.value)
    assert isinstance(found, LoaderLost)
    assert (found.code, found.status) == (7, "loader_lost")


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (EOFError("Caught EOFError in DataLoader worker process 0."), 2),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 1."), 2),
        (ConnectionResetError(104, "Connection reset by peer"), 0),
        (PermissionError(13, "Permission denied"), 2),
        (RuntimeError("shapes differ"), 2),
    ],
)
def test_errors_of_the_data_set_itself_are_no_death_of_a_process(error, workers):
    with pytest.raises(type(error)) as raised:
        list(load_batches(Breaks(error, workers)))
    assert raised.value is error
    assert as_loader_lost(error) is None


def test_every_epoch_has_an_order_of_its_own_and_takes_each_image_once(folder):
    loader, _ = load_data(spec_of(folder), NANO)
    orders = []
    for epoch in (0, 1):
        loader.batches.epoch = epoch
        orders.append([index for batch in loader.batches for _, index, _ in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(16))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_starts_at_a_later_batch_is_the_end_of_the_whole_one(folder, workers):
    loader, _ = load_data(spec_of(folder, color_jitter=0.4, reprob=0.5), NANO, workers)
    whole, rest = list(loader.epoch(1)), list(loader.epoch(1, start=3))
    assert (len(whole), len(rest)) == (4, 1)
    assert torch.equal(whole[3][0], rest[0][0])
    assert torch.equal(whole[3][1], rest[0][1])


def test_batches_before_the_start_are_not_decoded(folder):
    for image in (folder / "train").glob("*/*"):
        image.write_bytes(b"no image")
    loader, _ = load_data(spec_of(folder), NANO)
    assert list(loader.epoch(0, start=4)) == []


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_batch_holds_the_same_samples_whatever_the_number_of_ranks(folder, world_size):
    train = spec_of(folder, reprob=0.5)
    whole = [x for x, _ in load_data(train, NANO)[0].epoch(0)]
    ranks = [load_data(train, NANO, 0, rank, world_size)[0] for rank in range(world_size)]
    shares = [[x for x, _ in loader.epoch(0)] for loader in ranks]
    assert [len(x) for x in shares[0]] == [4 // world_size] * 4
    places = {2: [[0, 3], [1, 2]], 4: [[0], [1], [2], [3]]}[world_size]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        for own, part in zip(places, parts, strict=True):
            assert torch.equal(batch[own], part)


def test_each_part_of_a_batch_is_shared_out_by_itself_and_no_pair_of_mixup_torn_apart():
    def keys(rank, world_size):
        batches = Batches(
            8,
            BatchPlan(batch_size=8, seed=0, accumulation=2, rank=rank, world_size=world_size),
        )
        return [index for _, index, _ in next(iter(batches))]

    whole = keys(0, 1)
    assert keys(0, 2) == [whole[place] for place in (0, 3, 4, 7)]
    assert keys(1, 2) == [whole[place] for place in (1, 2, 5, 6)]


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(folder):
    with pytest.raises(SretError, match="4 does not divide among 3 processes; use 6"):
        load_data(spec_of(folder), NANO, 0, 0, 3)


def test_each_test_image_goes_to_one_rank(folder):
    (folder / "test" / "dog" / "7.jpg").unlink()
    loaders = [load_data(spec_of(folder), NANO, 0, rank, 2)[1] for rank in (0, 1)]
    targets = [[target.tolist() for _, target in loader.epoch(0)] for loader in loaders]
    assert targets == [
        [[0, 0], [0, 0], [1, 1], [1, 1]],
        [[0, 0], [0, 0], [1, 1], [1]],
    ]


def test_repeated_images_follow_on_each_other_in_an_epoch_of_the_same_length(folder):
    loader, _ = load_data(spec_of(folder, aug_repeats=3), NANO)
    keys = [key for batch in loader.batches for key in batch]
    assert len(keys) == 16
    assert [repeat for _, _, repeat in keys] == [0, 1, 2] * 5 + [0]
    assert len({index for _, index, _ in keys}) == 6
    assert keys[0][1] == keys[1][1] == keys[2][1]
    first, second, *_ = next(iter(loader.epoch(0)))[0]
    assert not torch.equal(first, second)


def test_images_are_eight_bits_and_normalised_later(folder):
    for name in ("train", "test"):
        for image in (folder / name).glob("*/*"):
            Image.new("RGB", (16, 16), (255, 0, 128)).save(image.with_suffix(".png"))
            image.unlink()
    loader, _ = load_data(spec_of(folder), NANO)
    x, _ = next(iter(loader.epoch(0)))
    assert x.dtype == torch.uint8
    assert x[0, :, 0, 0].tolist() == [255, 0, 128]
    # (1 - 0.485) / 0.229, -0.456 / 0.224 and (128 / 255 - 0.406) / 0.225
    expected = pytest.approx([2.24891, -2.03571, 0.42649], abs=1e-5)
    assert loader.normalize(x)[0, :, 5, 5].tolist() == expected


def test_random_erasing_fills_a_rectangle_with_normal_noise():
    erase = Erasing(1.0, (0.5,), (0.1,))
    image = torch.full((1, 200, 200), 7, dtype=torch.uint8)
    with temporarily_seeded("a"):
        erased = erase(image)
    changed = erased != 7
    rows, columns = changed[0].any(1).nonzero(), changed[0].any(0).nonzero()
    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert 0.02 * 40_000 < changed.sum() <= area < 0.34 * 40_000
    noise = (erased[changed] / 255 - 0.5) / 0.1
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    with temporarily_seeded("a"):
        assert torch.equal(erase(image), erased)
    assert torch.equal(Erasing(0.0, (0.5,), (0.1,))(image), image)


def test_randaugment_can_be_drawn_at_its_greatest_magnitude(folder):
    samples = load_data(spec_of(folder, auto_augment="rand-m10-inc1"), NANO)[0].samples
    for epoch in range(100):  # some of which keep no bit of the colours
        image, _ = samples[epoch, 0, 0]
        assert image.shape == (3, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_left_out_and_counted_on_demand(folder, workers, capsys):
    for path in (folder / "train" / "dog" / "3.jpg", folder / "test" / "cat" / "0.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    loader, test = load_data(spec_of(folder, on_bad_image="skip"), NANO, workers)
    for epoch in (0, 1):
        assert sorted(len(x) for x, _ in loader.epoch(epoch)) == [3, 4, 4, 4]
    assert [len(target) for _, target in test.epoch(0)] == [3, 4, 4, 4]
    assert len(loader.bad_images) == len(test.bad_images) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "dog/3.jpg" in said[0] and said[0].endswith("it is left out")


def test_a_batch_of_which_no_image_can_be_read_stops(folder):
    for image in (folder / "train").glob("*/*"):
        image.write_bytes(b"no image")
    loader, _ = load_data(spec_of(folder, on_bad_image="skip"), NANO)
    with pytest.raises(SretError, match="not an image"):
        list(loader.epoch(0))


def test_evaluation_takes_every_image_in_order(folder):
    _, test = load_data(spec_of(folder), NANO)
    targets = torch.cat([target for _, target in test.epoch(0)])
    assert targets.tolist() == [0] * 8 + [1] * 8


def test_training_drops_the_last_batch_that_is_not_full_but_never_the_only_one(folder):
    loader, test = load_data(spec_of(folder).with_values(batch_size=5), NANO)
    assert [len(x) for x, _ in loader.epoch(0)] == [5, 5, 5]
    assert [len(x) for x, _ in test.epoch(0)] == [5, 5, 5, 1]
    loader, _ = load_data(spec_of(folder).with_values(batch_size=100), NANO)
    assert [len(x) for x, _ in loader.epoch(0)] == [16]


def test_loading_leaves_the_random_states_of_the_process_alone(folder):
    loader, _ = load_data(spec_of(folder), NANO)
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(1), random.random()
    torch.manual_seed(0)
    random.seed(0)
    list(loader.epoch(0))
    assert (torch.rand(1), random.random()) == expected


def test_seeded_draws_the_same_for_the_same_text():
    draws = []
    for text in ("a", "a", "b"):
        with temporarily_seeded(text):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named(folder, workers):
    path = folder / "train" / "dog" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])
    loader, _ = load_data(spec_of(folder), NANO, workers)
    with pytest.raises(SretError, match=r"cannot read .*dog/3\.jpg: .*[Tt]runcated") as refused:
        list(loader.epoch(0))
    assert refused.value.code == 4


def test_a_text_that_calls_itself_an_image_is_named(folder):
    (folder / "test" / "cat" / "0.jpg").write_text("no image")
    _, test = load_data(spec_of(folder), NANO)
    with pytest.raises(SretError, match=r"cat/0\.jpg: not an image"):
        list(test.epoch(0))


def test_classes_are_numbered_alike_in_both_splits(folder):
    for image in (folder / "test" / "cat").iterdir():
        image.unlink()
    (folder / "test" / "cat").rmdir()
    test = read_test_folder(folder).images
    assert set(test.targets) == {1}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "test").rename(f / "tset"), r"has no test/ and no val/"),
        (lambda f: (f / "test" / "cat").rename(f / "test" / "cow"), "has the class 'cow'"),
        (
            lambda f: [p.unlink() for p in (f / "train" / "cat").iterdir()],
            "no images of class 'cat'",
        ),
        (lambda f: [p.unlink() for p in (f / "test").glob("*/*")], "no images in .*test"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_says_why(folder, spoil, message):
    spoil(folder)
    with pytest.raises(SretError, match=message) as refused:
        load_data(spec_of(folder), NANO)
    assert refused.value.code == 4


def test_images_in_folders_of_a_class_belong_to_the_class_and_hidden_ones_to_none(folder):
    deep = folder / "train" / "cat" / "dog"
    deep.mkdir()
    (folder / "train" / "cat" / "7.jpg").rename(deep / "7.jpg")
    (folder / "train" / "dog" / "._0.jpg").write_bytes(b"no image")
    (folder / "train" / ".cache").mkdir()
    train = read_train_folder(folder).images
    assert len(train.targets) == 16
    numbers = dict(zip(train.images, train.targets, strict=True))
    assert {path.split("/")[-2]: number for path, number in numbers.items()}["dog"] == 1
    assert [number for path, number in numbers.items() if "/cat/" in path] == [0] * 8


def test_sixteen_bits_are_scaled_and_not_clipped(folder):
    path = folder / "train" / "cat" / "0.png"
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(path)
    train = read_train_folder(folder)
    pixels = np.asarray(train.open(train.images.images.index(str(path)), "RGB")[0])
    assert (pixels[0, 0, 0], pixels[8, 0, 0], pixels[15, 15, 0]) == (0, 128, 255)
    with pytest.raises(ValueError, match="pixels of mode F have no known range"):
        to_eight_bits(Image.fromarray(np.full((4, 4), 0.5, np.float32)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_odd_modes_are_converted(folder, mode):
    path = folder / "train" / "cat" / ("9.jpg" if mode == "CMYK" else "0.png")
    Image.new(mode, (8, 8)).save(path)
    train = read_train_folder(folder)
    assert train.open(train.images.images.index(str(path)), "RGB")[0].mode == "RGB"


def test_models_of_one_channel_get_grey_images(folder):
    loader, _ = load_data(spec_of(folder), NANO.with_values(in_chans=1))
    assert next(iter(loader.epoch(0)))[0].shape == (4, 1, 16, 16)
    with pytest.raises(SretError, match="in_chans = 2"):
        load_data(spec_of(folder), NANO.with_values(in_chans=2))
