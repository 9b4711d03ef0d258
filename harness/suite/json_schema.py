"""What a suite file may say as JSON Schema, by which editors complete, explain and check keys while they are typed.

pydantic writes it from the dataclasses of the schema, without the string under a field, which is read from the source.
"""

import ast
import inspect
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from harness.suite import rules, schema, texts


def json_schema(table: type) -> dict[str, Any]:
    """What a TOML file that holds a `table` may say, in JSON Schema."""
    written = TypeAdapter(table).json_schema(schema_generator=SchemaWriter)
    tables = {table.__name__: written, **written.get("$defs", {})}
    for name, one in tables.items():
        for key, said in one["properties"].items():
            said["description"] = _documents()[name, key]
    return {"$schema": SchemaWriter.schema_dialect, **written}


class SchemaWriter(GenerateJsonSchema):
    """pydantic's JSON Schema without null, which TOML has not, and without titles, which repeat the key."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """`X` for `X | None`."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """The schema of a key with its default, where that is a plain value."""
        written = super().default_schema(schema)
        if written.get("default") in (None, []) or isinstance(written["default"], dict):  # says nothing, or all again
            written.pop("default", None)
        return written

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No: an editor shows the key."""
        return False


@cache
def _documents() -> dict[tuple[str, str], str]:
    """The string under every field, by the names of its class and of the field."""
    found = {}
    for module in (schema, rules, texts):
        for table in (node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)):
            for declared, under in zip(table.body, table.body[1:], strict=False):
                match declared, under:
                    case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(said))):
                        found[table.name, key] = inspect.cleandoc(said).replace("\n", " ")
    return found
