"""A JSON Schema of study files, by which editors complete and check them."""

from typing import Any

from pydantic import TypeAdapter

from sret_cli.cost.budget import TWIN_KINDS
from sret_cli.spec.backbone import BackboneSpec
from sret_cli.spec.model import PER_STAGE, ModelSpec
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.train import TrainSpec
from sret_cli.study.keys import SHORTHANDS, STRUCTURE
from sret_cli.study.view import FigureSpec, ReportSpec

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
QUANTITY: Schema = {"type": ["number", "string"]}
VALUES: dict[str, Schema] = {
    "preset": {"type": "string", "enum": [*PRESETS]},
    "layers": {"type": "integer", "minimum": 1},
    "params": QUANTITY,
    "macs": QUANTITY,
    "twin": {"type": "string", "enum": [*TWIN_KINDS]},
}


def study_schema() -> Schema:
    """The schema of a study file."""
    definitions: Schema = {}
    model = {
        **_fields(BackboneSpec, definitions),
        **_fields(ModelSpec, definitions),
        **{key.name: {**VALUES[key.name], "description": key.meaning} for key in SHORTHANDS},
    }
    train = _fields(TrainSpec, definitions)
    report = _fields(ReportSpec, definitions)
    report["figures"] = {
        "type": "array",
        "items": _table(_fields(FigureSpec, definitions), required=["kind"]),
    }
    axes = {f"model.{key}": value for key, value in model.items()}
    axes |= {f"train.{key}": value for key, value in train.items()}
    lists = {key: _list_of(value) for key, value in axes.items()}
    name = {"type": "string", "description": "Name of the run."}
    meanings = {key.name.strip("[]"): key.meaning for key in STRUCTURE}
    tables = {
        "twins": {"type": "array", "items": VALUES["twin"], "uniqueItems": True},
        "baselines": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "model": _table(model),
        "train": _table(train),
        "grid": _axes(lists),
        "zip": _axes(lists),
        "runs": {"type": "array", "items": _axes({**axes, "name": name}), "minItems": 1},
        "report": _table(report),
    }
    described = {key: {**value, "description": meanings[key]} for key, value in tables.items()}
    return {
        "$schema": DIALECT,
        "title": "A study of sret",
        **_table(described),
        "minProperties": 1,
        "$defs": definitions,
    }


def _table(properties: Schema, required: list[str] | None = None) -> Schema:
    found: Schema = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    return found if required is None else {**found, "required": required}


def _axes(properties: Schema) -> Schema:
    timm: Schema = {r"^model\.timm_args\.[A-Za-z_][A-Za-z0-9_]*$": {}}
    return {**_table(properties), "patternProperties": timm}


def _list_of(value: Schema) -> Schema:
    told = {"description": value["description"]} if "description" in value else {}
    return {"type": "array", "minItems": 1, "items": value, **told}


def _fields(spec: type[Any], definitions: Schema) -> Schema:
    """The fields of a spec as properties; one value may stand for all stages."""
    found = TypeAdapter(spec).json_schema(ref_template="#/$defs/{model}")
    definitions |= found.get("$defs", {})
    properties: Schema = found["properties"]
    for name, value in properties.items():
        value.pop("title", None)
        if spec is ModelSpec and name in PER_STAGE:
            told = {"description": value.pop("description", "")}
            properties[name] = {"anyOf": [value.get("items", {}), value], **told}
        if value.get("type") == "array" and "prefixItems" in value:
            value.pop("items", None)
    return properties
