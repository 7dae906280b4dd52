import json
import tarfile

import pytest
from helpers import NANO, add, data_spec, levels, png

from sret_cli.data.prepare import load_data
from sret_cli.data.streams import find_shards
from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError
from sret_cli.study.resolve import resolve_run
from sret_cli.weights.store import save_model


def write_columns(path, count=4, **columns):
    """A parquet file of images of the levels 1, 2 … and of columns: (type, values)."""
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn

    images = [{"bytes": png(level + 1), "path": None} for level in range(count)]
    kinds = {name: kind for name, (kind, _) in columns.items()}
    values = {name: values for name, (_, values) in columns.items()}
    features = Features({"image": ImageColumn(), **kinds})
    Dataset.from_dict({"image": images, **values}, features).to_parquet(path)


def write_splits(folder, **columns):
    for split in ("train", "test"):
        write_columns(folder / f"{split}-0.parquet", **columns)


def test_of_several_columns_of_classes_label_is_trained_on_unless_another_is_chosen(hugging_face):
    from datasets import ClassLabel

    fine = ClassLabel(names=["tabby", "siam", "collie", "pug"]), [0, 1, 2, 3]
    write_splits(hugging_face, fine=fine, label=(ClassLabel(names=["cat", "dog"]), [0, 0, 1, 1]))
    for values, classes, targets in (
        ({}, ("cat", "dog"), [0, 0, 1, 1]),
        ({"label_column": "fine"}, ("tabby", "siam", "collie", "pug"), [0, 1, 2, 3]),
    ):
        train = data_spec("hfds", hugging_face, **values)
        assert resolve_run("s", {}, train.model_dump()).model.num_classes == len(classes)
        loader, test = load_data(train, NANO)
        assert loader.classes == test.classes == classes
        assert sorted(levels(loader)) == levels(test) == list(enumerate(targets, 1))


def test_several_columns_of_classes_without_a_label_are_named_with_the_remedy(hugging_face):
    from datasets import ClassLabel, Value

    kind = ClassLabel(names=["a", "b"])
    write_splits(
        hugging_face,
        fine=(kind, [0, 1, 0, 1]),
        coarse=(kind, [0, 0, 1, 1]),
        width=(Value("float32"), [1.0, 2.0, 3.0, 4.0]),
    )
    with pytest.raises(
        SretError, match="columns of classes, fine, coarse, none .* label; choose one"
    ) as refused:
        load_data(data_spec("hfds", hugging_face), NANO)
    assert refused.value.code == 4
    assert "train.label_column" in str(refused.value)
    for wrong, what in (("width", "holds neither numbers nor names"), ("breed", "is not one")):
        with pytest.raises(
            SretError, match=f"'{wrong}' {what}.*train.label_column .*: fine, coarse"
        ):
            load_data(data_spec("hfds", hugging_face, label_column=wrong), NANO)
    loader, _ = load_data(data_spec("hfds", hugging_face, label_column="coarse"), NANO)
    assert sorted(levels(loader)) == [(1, 0), (2, 0), (3, 1), (4, 1)]


def test_columns_without_a_known_name_or_type_are_chosen_by_the_field(hugging_face):
    from datasets import Value

    write_splits(hugging_face, species=(Value("string"), ["cat10", "cat2", "Ape", "cat2"]))
    with pytest.raises(SretError, match="choose one by train.label_column .*: species$") as refused:
        load_data(data_spec("hfds", hugging_face), NANO)
    assert refused.value.code == 4
    loader, test = load_data(data_spec("hfds", hugging_face, label_column="species"), NANO)
    assert loader.classes == test.classes == ("Ape", "cat2", "cat10")
    assert sorted(levels(loader)) == levels(test) == [(1, 2), (2, 1), (3, 0), (4, 1)]


def test_names_of_test_images_are_matched_with_those_to_train_on(hugging_face, capsys):
    from datasets import ClassLabel, Value

    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        label = ClassLabel(names=names), [0, 0, 0, 1]
        write_columns(hugging_face / f"{split}-0.parquet", label=label)
    loader, test = load_data(data_spec("hfds", hugging_face), NANO)
    assert loader.classes == test.classes == ("cat", "dog")
    assert levels(test) == [(1, 1), (2, 1), (3, 1), (4, 0)]
    text = hugging_face / "text"
    text.mkdir()
    for split, names in (("train", "abab"), ("test", "abac")):
        write_columns(text / f"{split}-0.parquet", label=(Value("string"), list(names)))
    with pytest.raises(SretError, match="holds the class 'c', which the training"):
        load_data(data_spec("hfds", text), NANO)


def test_parquet_files_that_number_classes_differently_are_refused(hugging_face):
    from datasets import ClassLabel

    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        label = ClassLabel(names=names), [0, 0, 0, 1]
        write_columns(hugging_face / f"train-{number}.parquet", label=label)
    with pytest.raises(
        SretError, match="number the classes of label differently, first the class 0"
    ):
        load_data(data_spec("hfds", hugging_face), NANO)


def test_a_column_of_classes_is_chosen_where_there_are_columns_alone(tmp_path):
    with pytest.raises(SretError, match="dataset = 'tar' has no columns to choose from"):
        data_spec("tar", tmp_path, label_column="label")


def write_shard(path, **samples):
    """A shard whose samples have an image of a level each, and other files."""
    with tarfile.open(path, "w") as tar:
        for number, (name, files) in enumerate(samples.items(), 1):
            add(tar, f"{name}.png", png(number))
            for extension, text in files.items():
                add(tar, f"{name}.{extension}", text.encode())


@pytest.mark.parametrize("column", ["txt", "species"])
def test_names_of_classes_in_shards_are_read_from_the_chosen_files_or_field(tmp_path, column):
    pytest.importorskip("webdataset")

    def named(name):
        return {"txt": name} if column == "txt" else {"json": json.dumps({"species": name})}

    train = {"a": named("cat10"), "b": named("cat2"), "c": named("Ape"), "d": named("cat2")}
    write_shard(tmp_path / "train-0.tar", **train)
    write_shard(tmp_path / "val-0.tar", a=named("cat10"))
    spec = data_spec("wds", tmp_path, label_column=column)
    assert resolve_run("s", {}, spec.model_dump()).model.num_classes == 3
    loader, test = load_data(spec, NANO)
    assert loader.class_list.names == test.classes == ("Ape", "cat2", "cat10")
    assert sorted(levels(loader)) == [(1, 2), (2, 1), (3, 0), (4, 1)]
    assert levels(test) == [(1, 2)]
    write_shard(tmp_path / "val-0.tar", a=named("emu"))
    find_shards.cache_clear()
    with pytest.raises(SretError, match="have the class 'emu', which the training"):
        load_data(spec, NANO)


def test_labels_of_shards_that_are_no_numbers_say_what_to_do(tmp_path):
    pytest.importorskip("webdataset")
    write_shard(tmp_path / "train-0.tar", a={"cls": "cat"}, b={"cls": "dog"})
    write_shard(tmp_path / "val-0.tar", a={"cls": "dog"})
    with pytest.raises(SretError, match="holds 'cat', .*train.label_column = \"cls\"") as refused:
        load_data(data_spec("wds", tmp_path), NANO)
    assert refused.value.code == 4
    loader, test = load_data(data_spec("wds", tmp_path, label_column="cls"), NANO)
    assert loader.classes == ("cat", "dog")
    assert levels(test) == [(1, 1)]
    with pytest.raises(
        SretError, match="neither files .breed nor files .json with a field 'breed'"
    ):
        load_data(data_spec("wds", tmp_path, label_column="breed"), NANO)
    write_shard(tmp_path / "train-0.tar", a={"cls": "cat"}, b={"cls": "7"})
    find_shards.cache_clear()
    with pytest.raises(SretError, match=r"has both numbers \(7\) and names \('cat'\) of classes"):
        load_data(data_spec("wds", tmp_path, label_column="cls"), NANO)


def test_a_run_is_evaluated_by_another_column(hugging_face, sret, tiny, tmp_path):
    from datasets import ClassLabel

    model = tiny.with_values(num_classes=2)
    save_model(build_model(model), tmp_path / "model", {"classes": ["b", "a"]})
    kind = ClassLabel(names=["a", "b"])
    write_splits(hugging_face, x=(kind, [0, 0, 1, 1]), y=(kind, [1, 1, 1, 1]))
    flags = ("eval", tmp_path / "model", "--dataset", "hfds", "--data-dir", hugging_face)
    flags = (*flags, "--workers", 0, "--json")
    code, _, error = sret(*flags)
    assert (code, "choose one by train.label_column" in error) == (4, True)
    code, out, _ = sret(*flags, "--label-column", "y")
    (row,) = json.loads(out)
    assert [(line["class"], line["test_images"]) for line in row["per_class"]] == [("b", 4)]
