import pytest

from sret_cli.report.columns import FIELDS, heading
from sret_cli.study.where import known_columns


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("train.lr", "Learning rate"),
        ("model.nll", "NLLs"),
        ("model.recursive_slices", "Slices of later passes"),
        ("train.batch_size", "Batch size"),
        ("model.timm_args.patch_size", "Patch size"),
        ("macs", "FLOPs (G)"),
        ("name", "Model"),
        ("labels_sum", "Labels sum"),
        ("_", "_"),
    ],
)
def test_a_field_has_its_name_for_people(column, text):
    assert heading(column) == text


def test_every_name_is_that_of_a_column():
    assert set(FIELDS) - {"model.timm_args"} <= set(known_columns())
