"""Tool declarations against the vendor's, text for text, and schemas that have no TypeScript form."""

import pytest

from kimi_lite.text.typescript import UnsupportedSchema, declare_tools, sort_keys

HEAD = "# Tools\n\n## functions\nnamespace functions {\n"


def tool(name: str, parameters: object = None, **more: object) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def declare(*tools: dict) -> str:
    return declare_tools(sort_keys(list(tools)))


def fields(text: str) -> str:
    """The body of the only function `f` in a declaration."""
    return text.removeprefix(HEAD + "type f = (_: ").removesuffix(") => any;\n}\n")


GET_WEATHER = tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            "city": {"type": "string", "description": "City name"},
            "days": {"type": "integer", "minimum": 1, "maximum": 7, "description": "Forecast days"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "opt": {
                "type": "object",
                "properties": {"b": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "a": {"type": "boolean"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
        "required": ["city"],
    },
    description="Get weather information.\nCall when asked.",
)


def test_vector_get_weather_and_noargs() -> None:
    assert declare(GET_WEATHER, tool("noargs", {}, description="No args")) == (
        "# Tools\n\n## functions\nnamespace functions {\n// Get weather information.\n// Call when asked.\n"
        "type get_weather = (_: {\n  // City name\n  city: string,\n  // Forecast days\n  // maximum: 7, minimum: 1\n"
        "  days?: number,\n  opt?: {\n    a: boolean,\n    b?: string | null,\n    [k: string]: never\n  },\n"
        '  tags?: Array<string>,\n  // Default: "c"\n  unit?: "c" | "f"\n}) => any;\n// No args\n'
        "type noargs = (_: {}) => any;\n}\n"
    )


def test_vector_documented_items() -> None:
    items = {"type": "string", "maxLength": 5, "description": "one item"}
    schema = {"type": "array", "description": "list", "minItems": 1, "maxItems": 3, "items": items}
    assert declare(tool("arr_doc", {"type": "object", "properties": {"items": schema}, "required": ["items"]})) == (
        HEAD + "type arr_doc = (_: {\n  // list\n  // maxItems: 3, minItems: 1\n  items: Array<\n    // one item\n"
        "    // maxLength: 5\n    string\n  >\n}) => any;\n}\n"
    )


def test_vector_definitions() -> None:
    node = {
        "type": "object",
        "description": "a node",
        "properties": {"v": {"type": "number"}, "next": {"$ref": "#/$defs/Node"}},
        "required": ["v"],
    }
    root = {"$ref": "#/$defs/Node", "description": "root node"}
    schema = {"type": "object", "$defs": {"Node": node}, "properties": {"root": root}, "required": ["root"]}
    assert declare(tool("defs", schema, description="l1\n\nl3")) == (
        HEAD + "// a node\ninterface Node {\n  v: number,\n  next?: Node\n}\n// l1\n\n// l3\n"
        "type defs = (_: {\n  // root node\n  root: Node\n}) => any;\n}\n"
    )


def test_vector_self_reference() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "child": {"$ref": "#"}},
        "required": ["name"],
    }
    assert declare(tool("selfref", schema)) == (
        HEAD + "interface parameters {\n  child?: parameters,\n  name: string\n}\ntype selfref = (_: parameters) => "
        "any;\n}\n"
    )


def test_vector_swarm_tools() -> None:
    def strings(*names: str) -> dict:
        return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": list(names)}

    text = declare(
        tool("create_subagent", strings("name", "system_prompt")), tool("assign_task", strings("agent", "prompt"))
    )
    assert "type create_subagent = (_: {\n  name: string,\n  system_prompt: string\n}) => any;\n" in text
    assert "type assign_task = (_: {\n  agent: string,\n  prompt: string\n}) => any;\n" in text


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": ["string", "object", "array", "integer"]}, "x?: string | {} | Array<any> | number"),
        ({"enum": ["a", 1, None, True]}, 'x?: "a" | 1 | None | True'),
        ({"type": ["integer", "null"], "enum": [1, None]}, "x?: 1 | None"),
        ({}, "x?: any"),
        (True, "x?: any"),
        (False, "x?: null"),
        ({"type": "array"}, "x?: Array<any>"),
        ({"type": "object", "additionalProperties": True}, "x?: {\n    [k: string]: any\n  }"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "x?: {\n    [k: string]: number\n  }"),
        ({"type": "integer", "default": 3}, "// Default: 3\n  x?: number"),
        ({"type": "boolean", "default": False}, "// Default: False\n  x?: boolean"),
        ({"type": "array", "default": ["é"]}, '// Default: ["é"]\n  x?: Array<any>'),
        ({"type": "string", "pattern": "^a", "minLength": 1}, "// minLength: 1, pattern: ^a\n  x?: string"),
        ({"type": "string", "default": None}, "x?: string"),
    ],
)
def test_types(schema: object, text: str) -> None:
    assert fields(declare(tool("f", {"type": "object", "properties": {"x": schema}}))) == "{\n  " + text + "\n}"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/definitions/X"},
        {"$ref": "#/$defs/Missing"},
        {"type": "date"},
        {"description": "no type"},
        {"type": "string", "enum": [1]},
        {"anyOf": 3},
        {"type": "array", "items": [1]},
        "string",
        {"type": "object", "properties": {"y": {"type": "string"}}, "required": "y"},
        {"type": {}},
    ],
)
def test_schemas_without_typescript_form(schema: object) -> None:
    with pytest.raises(UnsupportedSchema):
        declare(tool("f", {"type": "object", "properties": {"x": schema}}))


def test_only_functions_count() -> None:
    assert declare({"type": "builtin_function", "function": {"name": "search"}}) == ""
    assert declare_tools([]) == ""
    with pytest.raises(UnsupportedSchema):
        declare({"type": "function"})


def test_keys_are_sorted_at_every_depth() -> None:
    assert str(sort_keys([{"b": [{"d": 1, "c": 2}], "a": 0}])) == "[{'a': 0, 'b': [{'c': 2, 'd': 1}]}]"
