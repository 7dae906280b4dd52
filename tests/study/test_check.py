"""All mistakes of a study file with their lines, and its JSON Schema."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from sret_cli.runtime.errors import SretError
from sret_cli.study.check import find_problems
from sret_cli.study.file import load_study
from sret_cli.study.schema import study_schema

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
WRONG = """# A study with a mistake in nearly every line.
[modle]
[model]
preset = "nano"
mlp_ration = 3
[train]
lr = "fast"
epoch = 3
[grid]
"model.recursion" = [1]
"model.slices" = [1, 0]
[report]
columns = [
  "top9",
]
"""


def test_all_mistakes_are_named_with_their_lines(tmp_path, sret):
    path = tmp_path / "wrong.toml"
    path.write_text(WRONG)
    problems, runs = find_problems(path)
    assert runs == 0
    assert [(problem.line, problem.message[:40]) for problem in problems] == [
        (2, "unknown table [modle]; did you mean 'mod"),
        (5, "[model] unknown key 'mlp_ration'; did yo"),
        (7, "[train] lr = 'fast': input should be a v"),
        (8, "[train] unknown key 'epoch'; did you mea"),
        (10, "[grid] unknown key 'model.recursion'; di"),
        (14, "[report] no column 'top9'; did you mean "),
    ]
    code, out, err = sret("study", "check", path)
    assert (code, err) == (3, f"sret: {path} has 6 mistakes\n")
    assert out.splitlines()[0].startswith(f"{path}:2: unknown table [modle]")


def test_a_wrong_value_of_one_point_is_found(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text('[model]\npreset = "nano"\n[grid]\n"model.recursions" = [1, 0]\n')
    (problem,), _ = find_problems(path)
    assert problem.line == 4
    assert "recursions = 0 (stage 1)" in problem.message
    path.write_text("[model\n")
    (problem,), _ = find_problems(path)
    assert problem.line == 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_have_no_mistakes_and_fit_the_schema(path):
    problems, runs = find_problems(path)
    assert problems == []
    assert runs > 1
    validator = jsonschema.Draft202012Validator(study_schema())
    assert list(validator.iter_errors(tomllib.loads(path.read_text()))) == []


def test_the_schema_is_valid_and_refuses_what_the_tool_refuses(sret):
    code, out, _ = sret("study", "schema")
    assert code == 0
    schema = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    wrong = [
        ".".join(map(str, e.absolute_path)) for e in validator.iter_errors(tomllib.loads(WRONG))
    ]
    assert set(wrong) == {"", "grid", "grid.model.slices.1", "model", "train", "train.lr"}
    completion = schema["properties"]["model"]["properties"]["nll"]
    assert completion["enum"] == ["per_pass", "per_block", "none"]
    assert "description" in completion


def test_files_that_no_study_is_are_refused_before_they_are_parsed(tmp_path):
    path = tmp_path / "large.toml"
    path.write_text("# " + "x" * 1_000_000)
    with pytest.raises(SretError, match="is larger than 1 MB"):
        load_study(path)
    path.write_text("a = " + "[" * 20_000 + "]" * 20_000)
    with pytest.raises(SretError, match="is not a study, which is a TOML file"):
        load_study(path)


def test_more_than_ten_thousand_runs_have_to_be_asked_for(tmp_path):
    path = tmp_path / "many.toml"
    seeds = list(range(101))
    path.write_text(
        f'[model]\npreset = "nano"\n[train]\n[grid]\n"train.seed" = {seeds}\n'
        f'"train.epochs" = {seeds[1:]}\n'
    )
    with pytest.raises(
        SretError, match=r"has 10,100 runs; if you want them, give --max-runs 10100"
    ):
        load_study(path)
