"""The number of classes in the data of a training."""

from pathlib import Path

from sret_cli.data.folders import folder_classes
from sret_cli.spec.dataset import is_stream
from sret_cli.spec.train import TrainSpec

DIGITS_CLASSES = 10


def dataset_classes(train: TrainSpec) -> int | None:
    """The number of classes in a run's data; None if the model's number decides.

    Raises:
        SretError: the data do not exist or have fewer than two classes.
    """
    if train.dataset == "synthetic":
        return None
    if train.dataset == "digits":
        return DIGITS_CLASSES
    if train.dataset == "folder":
        return len(folder_classes(Path(train.data_dir or "")))
    if is_stream(train.dataset):
        from sret_cli.data.streams import find_shards

        return find_shards(str(train.data_dir), True, train.label_column).classes
    from sret_cli.data.readers import named_source

    source = named_source(train.dataset, train.data_dir, True, train.label_column)
    return len(source.classes)
