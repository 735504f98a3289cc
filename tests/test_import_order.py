"""The rooms of the package import downwards only, without circles (docs/architecture.md)."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import vidlada

PACKAGE = Path(vidlada.__file__).parent
# From top to bottom: a room may import the rooms of later rows, and those of its own row that need it not.
ROWS = [
    ["__main__"],
    ["cli"],
    ["batch"],
    ["serve"],
    ["bench", "evaluation"],
    ["__init__"],
    ["loading"],
    ["api"],
    ["conversation", "data_engine", "info", "training"],
    ["checkpoint", "engine", "media"],
    ["decoding", "processor"],
    ["model"],
    [
        "fetch",
        "generation",
        "h264",
        "images",
        "messages",
        "shapes",
        "tiling",
        "transport",
        "truncation",
        "video",
        "video_decoding",
        "video_index",
        "video_losses",
    ],
    ["files", "settings"],
    ["errors", "letters", "machine", "markdown", "noise", "scores"],
]
ROW = {room: number for number, row in enumerate(ROWS) for room in row}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= (inner & FILES.keys()) or {node.module}
    return {name for name in found if name.split(".")[0] == "vidlada"} & FILES.keys() - {module}


def test_every_room_has_its_row():
    assert {room(module) for module in FILES} <= ROW.keys()


def test_rooms_import_downwards_only():
    upwards = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports(module)
        if room(module) != room(other) and ROW[room(other)] < ROW[room(module)]
    ]
    assert not upwards


def test_no_circles():
    TopologicalSorter({module: imports(module) for module in FILES}).prepare()  # raises CycleError
    rooms: dict[str, set[str]] = {name: set() for name in ROW}
    for module in FILES:
        rooms[room(module)] |= {room(other) for other in imports(module)} - {room(module)}
    TopologicalSorter(rooms).prepare()


def test_the_architecture_page_names_every_room():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([\w/]+(?:\.py|/))`", page)}
    assert ROW.keys() - {"__init__", "__main__"} <= named
    paths = {file.relative_to(PACKAGE).as_posix() for file in FILES.values()}
    known = paths | {path.rpartition("/")[2] for path in paths} | {"alternate.py"}
    mentioned = set(re.findall(r"`([\w/]+\.py)`", page)) - known
    assert all((PACKAGE.parent / name).is_file() for name in mentioned), mentioned
