"""The order of the rooms: at import time a module imports only what stands before its own room, and in no circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lineas"
ROOMS = (
    ("_version", "_checks", "_names", "_lazy", "_warn", "_process", "_core", "_threads"),
    ("maps",),
    ("arrays",),
    ("inputs",),
    ("hooks",),
    ("fitting",),
    ("evaluation", "export"),
    ("serving",),
    ("notebook",),
    ("__init__",),
    ("demo",),
    ("cli_fold", "cli_torchrun"),
    ("cli",),
    ("__main__",),
)
NO_TORCH = ("maps", "arrays", "notebook", "cli", "cli_fold", "cli_torchrun")
# Imports of lineas inside functions, and lazy methods: module, and what it asks for when it is called.
LAZY = {
    "arrays.gaussian": ["hooks.affine"],
    "cli": ["demo.run", "inputs.files", "inputs.prompts"],
    "demo.run": ["notebook.plot"],
    "evaluation.classifier": ["inputs.frozen"],
    "evaluation.llm_judge": ["inputs.call", "inputs.frozen", "inputs.tokenize"],
    "evaluation.report_figure": ["notebook.plot"],
    "evaluation.result": ["evaluation.report", "notebook.plot"],
    "export.vllm.plugin": ["export.vllm.modules"],
    "fitting.result": ["evaluation.diagnose", "notebook.plot"],
    "maps.affine": ["hooks.affine"],
    "maps.files": ["maps.hub"],
    "maps.path": ["notebook.plot"],
    "maps.records": ["maps.files"],
    "maps.steering": [
        "evaluation.calibrate",
        "evaluation.diagnose",
        "export.diffusers_lora",
        "export.fold",
        "export.gguf.folding",
        "export.lora",
        "hooks.attach",
        "hooks.gating",
        "maps.files",
        "maps.hub",
        "maps.vectors",
    ],
    "maps.vectors": ["hooks.modules"],
    "serving.command": ["serving.app"],
}


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path) or "__init__": ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def rank(module):
    room = module.split(".")[0]
    return next(k for k, rooms in enumerate(ROOMS) if room in rooms)


def targets(module, node):
    """The modules of lineas that an import statement of `module` asks for, and other packages as they are."""
    if isinstance(node, ast.Import):
        return [alias.name.removeprefix("lineas.") if alias.name != "lineas" else "__init__" for alias in node.names]
    parts = [] if module == "__init__" else module.split(".")
    if f"{module}.__init__" in {name_of(path) + ".__init__" for path in PACKAGE.rglob("__init__.py")}:
        parts = [*parts, "__init__"] if module != "__init__" else ["__init__"]
    if node.level:
        base = parts[: len(parts) - node.level] if module != "__init__" else []
        base = [*base, *(node.module.split(".") if node.module else [])]
    elif (node.module or "").split(".")[0] == "lineas":
        base = node.module.split(".")[1:]
    else:
        return [node.module]
    found = ".".join(base)
    names = [".".join([*base, alias.name]) for alias in node.names]
    known = [name for name in names if name in SOURCES or name == "_core"]
    return [*known, *([found or "__init__"] if len(known) < len(names) else [])]


def is_checking(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def imports(module, *, lazy):
    """What a module imports when it is imported, or in its functions."""
    found = []

    def visit(node, inside):
        if is_checking(node):
            for child in node.orelse:
                visit(child, inside)
            return
        if isinstance(node, ast.Import | ast.ImportFrom) and inside == lazy:
            found.extend(targets(module, node))
        if lazy and isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("lazy_method", "lazy_import"):
            first = node.args[0]
            found.extend([first.value] if isinstance(first, ast.Constant) else [])
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.Lambda))

    visit(SOURCES[module], False)
    return found


def own(names):
    return [name for name in names if name in SOURCES or name in ("_core", "__init__")]


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_what_stands_before_its_room(module):
    for name in own(imports(module, lazy=False)):
        same_room = name.split(".")[0] == module.split(".")[0] or rank(name) == rank(module) == 0
        assert same_room or rank(name) < rank(module)


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(own(imports(module, lazy=False))) - {module} for module in SOURCES}
    while graph:
        free = [module for module, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for module in free:
            del graph[module]


@pytest.mark.parametrize("module", [name for name in SOURCES if name.split(".")[0] in NO_TORCH])
def test_rooms_without_a_model_do_not_import_torch(module):
    assert not {"torch", "transformers"} & {str(name).split(".")[0] for name in imports(module, lazy=False)}


def test_lazy_imports_are_those_that_are_listed():
    found = {module: sorted(set(own(imports(module, lazy=True)))) for module in SOURCES}
    assert {module: names for module, names in found.items() if names} == LAZY
