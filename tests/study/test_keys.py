import re
from pathlib import Path

import pytest

from sret_cli.spec.backbone import BackboneSpec
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.train import TrainSpec
from sret_cli.study.file import TABLES, load_study
from sret_cli.study.keys import BACKBONE, MODEL, REPORT, STUDY, TRAIN, study_keys, with_reference
from sret_cli.study.resolve import MODEL_KEYS
from sret_cli.study.view import ReportSpec

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "studies.md"


def keys_of(table):
    return {key.name: key for key in study_keys() if key.table == table}


def test_the_reference_in_the_docs_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert with_reference(page) == page, "run `python -m sret_cli.study.keys docs/studies.md`"


def test_every_table_and_field_has_a_key_with_a_meaning():
    assert {name.strip("[]") for name in keys_of(STUDY)} == set(TABLES)
    assert set(keys_of(MODEL)) == set(MODEL_KEYS)
    for table, spec in ((MODEL, ModelSpec), (BACKBONE, BackboneSpec), (TRAIN, TrainSpec)):
        assert set(spec.model_fields) <= set(keys_of(table))
    assert set(keys_of(REPORT)) == set(ReportSpec.model_fields)
    assert all(len(key.meaning.split()) > 1 and key.type for key in study_keys())


@pytest.mark.parametrize(
    ("table", "name", "words", "default"),
    [
        (MODEL, "img_size", "whole number from 1 to 16,384", "224"),
        (MODEL, "blocks", "whole number, at least 1, or a list of one for each stage", "[2, 5, 3]"),
        (MODEL, "stem_strides", "3 whole numbers from 1 to 2", "[2, 2, 2]"),
        (MODEL, "order", "list of lists of whole numbers, each at least 0", "–"),
        (MODEL, "mlp_ratio", "number, above 0 and at most 64", "3.0"),
        (MODEL, "loop", '"internal" or "external"', '"internal"'),
        (BACKBONE, "share", '"all" or whole number, at least 1', "1"),
        (BACKBONE, "timm_args", "table", "{}"),
        (TRAIN, "recompute", '"none", "pass", "auto" or whole number, at least 1', '"none"'),
        (TRAIN, "warmup_lr", "number, at least 0", "–"),
        (TRAIN, "scale", "2 numbers, each above 0 and at most 1", "[0.5, 1]"),
        (TRAIN, "decay_milestones", "list of whole numbers, each at least 1", "[30, 60]"),
        (TRAIN, "reset_head", "true or false", "false"),
        (REPORT, "y", "list of texts", '["top1_percent", "macs"]'),
    ],
)
def test_types_and_defaults_are_words_and_toml(table, name, words, default):
    key = keys_of(table)[name]
    assert (key.type, key.default) == (words, default)


def test_the_study_in_the_docs_has_the_runs_that_the_page_counts(folder):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for split in ("train", "test"):
        (folder / "photos").mkdir(exist_ok=True)
        (folder / split).rename(folder / "photos" / split)
    (folder / "my-study.toml").write_text(text, encoding="utf-8")
    runs = load_study(folder / "my-study.toml").runs
    twins = [run for run in runs if "twin" in run.name]
    baselines = [run for run in runs if isinstance(run.model, BackboneSpec)]
    assert (len(runs), len(twins), len(baselines)) == (24 + 16 + 4, 16, 4)
