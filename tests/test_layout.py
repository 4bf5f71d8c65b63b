"""The house rules that a machine can check: import direction, file sizes, public surface."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import kvcompress

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvcompress"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# What each part may import, beside itself. Parts are the modules and packages right under
# kvcompress; a dotted name opens one module of a part. ARCHITECTURE.md draws the same picture.
VALUES = {
    *("atomic", "errors", "head_plan", "plan", "recipe", "registry", "rules", "tokenizer"),
    *("storage", "strict"),
}
MAY_IMPORT = {
    "atomic": set(),
    "errors": set(),
    "tokenizer": set(),
    "strict": set(),
    "checkpoint": {"errors", "strict", "kernels.linear.speed"},
    "head_plan": {"storage"},
    "storage": set(),
    "rules": {"head_plan"},
    "registry": {"errors"},
    "plan": {"errors", "registry", "head_plan", "rules", "strict"},
    "recipe": {"errors", "registry", "head_plan", "plan", "storage", "strict"},
    "tasks": {"errors"},
    "measure": VALUES,
    # they read codes in place, and rank by the one keep rule
    "kernels": {"errors", "plan", "storage", "evict.keepset", "evict.scorers"}
    | {"quant.codec", "quant.codes.rotated"},
    "quant": VALUES,
    "evict": VALUES | {"quant.keystats"},  # the rotary embedding, to undo it
    "accounting": VALUES,
    "profile": VALUES
    | {
        "accounting",
        "evict.finish",
        "evict.keep_set_ladder",
        "evict.score_queries",
        "evict.scorers",
    }
    | {"quant.codec", "quant.keystats", "quant.weights"}
    | {"checkpoint"}
    | {"tasks", "runtime.hf", "runtime.model", "runtime.names"},
    "runtime": VALUES | {"accounting", "evict", "kernels", "quant"},
    "bundle": VALUES
    | {"accounting", "checkpoint", "profile.solve", "profile.source", "profile.store", "quant"}
    | {"evict.scorers", "kernels", "runtime"},
    "evaluate": VALUES
    | {"accounting", "checkpoint.compute", "evict", "measure", "quant", "runtime", "bundle"}
    | {"tasks"},
    "demo": VALUES
    | {"accounting", "checkpoint.compute", "profile", "bundle", "runtime", "evaluate", "quant"}
    | {"tasks"},
    "league": VALUES
    | {"accounting", "measure", "profile", "bundle", "runtime", "evaluate", "quant", "evict"}
    | {"checkpoint.compute"},
    "bench": VALUES | {"accounting", "measure", "evaluate", "evict", "kernels", "quant", "runtime"},
    "cli": VALUES
    | {"checkpoint.compute"}
    | {"accounting", "profile", "bundle", "runtime", "evaluate", "demo", "league", "bench"}
    | {"measure", "quant.keystats", "tasks"},
    "__main__": {"cli"},
}
# The rooms of the runtime: each may import those before it.
ROOMS = (
    *("names", "torch_modes", "store", "prompt", "step", "model", "layer", "recall", "saved"),
    *("cache", "static", "hf", "check", "complete", "conversation", "families"),
)
PUBLIC = {
    "Budget",
    "CompressedCache",
    "HeadPlan",
    "KVCompressError",
    "Plan",
    "Profile",
    "Recipe",
    "Scorer",
    "StaticCompressedCache",
    "__version__",
    "attach",
    "detach",
    "load",
    "new_cache",
    "register_scorer",
    "shape_of",
    "system_span",
    "uniform",
}
HOME = {name: home.partition(".")[2] for name, home in kvcompress._HOME.items()}
# modules of transformers that change from release to release
TRANSFORMERS_INTERNAL = re.compile(
    r"transformers\.(masking_utils|modeling_utils|integrations|models)\b"
)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that the file imports, inside functions too."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "kvcompress":  # a lazy re-export is an import of its home
                found.append((node.lineno, f"kvcompress.{node.attr}"))
    return found


def breaches(source: str, targets: list[tuple[int, str]]) -> list[str]:
    """The imports of part `source` that MAY_IMPORT does not allow."""
    allowed = MAY_IMPORT[source] | {source}
    wrong = []
    for line, name in targets:
        package, _, inner = name.partition(".")
        inner = HOME.get(inner, inner)
        if package != "kvcompress" or not inner or inner.startswith("__"):
            continue
        if not any(inner == place or inner.startswith(f"{place}.") for place in allowed):
            wrong.append(f"line {line}: {source} imports {name}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        pytest.skip("re-exports lazily, see test_public_surface")
    assert part_of(path) in MAY_IMPORT, "a new part needs its line in MAY_IMPORT"
    assert breaches(part_of(path), imports_of(path)) == []


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def graph(files: list[Path]) -> dict[str, set[str]]:
    """Module to the modules that it imports when it runs; what only a type checker reads is none
    of them."""
    modules = {module_of(path) for path in files}
    found: dict[str, set[str]] = {}
    for path in files:
        blocks = [n for n in nodes_of(path) if isinstance(n, ast.If)]
        typing = [n for n in blocks if ast.unparse(n.test) == "TYPE_CHECKING"]
        skipped = {line for n in typing for line in range(n.lineno, (n.end_lineno or 0) + 1)}
        names = {name for line, name in imports_of(path) if line not in skipped}
        targets = {n if n in modules else n.rpartition(".")[0] for n in names} & modules
        found[module_of(path)] = targets - {module_of(path)}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A way from a name back to itself, empty where there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        done.add(name)
        return next(filter(None, (visit(n, [*way, name]) for n in sorted(edges[name]))), [])

    return next(filter(None, (visit(name, []) for name in sorted(edges))), [])


def by_folder(edges: dict[str, set[str]], depth: int) -> dict[str, set[str]]:
    """The same between what lies `depth` names deep."""
    found: dict[str, set[str]] = {}
    for name, targets in edges.items():
        mine = ".".join(name.split(".")[:depth])
        theirs = {".".join(target.split(".")[:depth]) for target in targets}
        found.setdefault(mine, set()).update(theirs - {mine, "kvcompress"})
    return found


def test_no_import_goes_in_a_circle():
    edges = graph(FILES)
    edges["kvcompress"] = set()  # re-exports lazily
    assert circle(edges) == []
    assert circle(by_folder(edges, 2)) == [] and circle(by_folder(edges, 3)) == []


def test_the_rooms_of_the_runtime_stand_in_order():
    rooms = by_folder(
        {n: t for n, t in graph(FILES).items() if n.startswith("kvcompress.runtime.")}, 3
    )
    place = {f"kvcompress.runtime.{room}": number for number, room in enumerate(ROOMS)}
    assert set(rooms) == set(place)
    wrong = [
        f"{room} imports {target}"
        for room, targets in rooms.items()
        for target in targets & set(place)
        if place[target] >= place[room]
    ]
    assert wrong == []


def test_a_circle_is_noticed():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle(by_folder({"k.a.x": {"k.b.y"}, "k.b.y": {"k.a.z"}, "k.a.z": set()}, 2)) != []


def test_the_import_rule_notices_a_breach():
    bad = [(1, "kvcompress.runtime.cache.cache"), (2, "kvcompress.plan.Plan"), (3, "torch.nn")]
    assert breaches("quant", bad) == ["line 1: quant imports kvcompress.runtime.cache.cache"]
    assert breaches("profile", [(4, "kvcompress.quant.codec.encode")]) == []
    assert breaches("profile", [(4, "kvcompress.runtime.cache.cache")]) != []
    assert breaches("profile", [(4, "kvcompress.load"), (5, "kvcompress.__version__")]) == [
        "line 4: profile imports kvcompress.load"
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_transformers_stay_in_hf_files(path):
    if path.name == "hf.py" or path.parent.name == "hf":
        return
    private = [
        f"line {line}: {name}"
        for line, name in imports_of(path)
        if name.startswith("transformers.") and any(p.startswith("_") for p in name.split("."))
    ]
    internal = [
        f"line {line}: {name}"
        for line, name in imports_of(path)
        if TRANSFORMERS_INTERNAL.match(name)
    ]
    assert private + internal == [], "move it to the hf.py or hf/ beside this file"
    assert not any(
        isinstance(node, ast.Attribute) and node.attr == "_attn_implementation"
        for node in nodes_of(path)
    ), "the attention implementation is set in hf/attach.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it by what it does"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unpickles(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"^\s*(import|from) (pickle|dill|cloudpickle|joblib)\b", text, re.MULTILINE
    )
    assert "torch.load(" not in text
    assert "trust_remote_code=True" not in text


def test_every_folder_is_a_package():
    folders = {path.parent for path in FILES}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_public_surface():
    assert set(kvcompress.__all__) == PUBLIC
    assert sorted(kvcompress.__all__) == dir(kvcompress)
    for name in PUBLIC:
        assert getattr(kvcompress, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Engine'"):
        kvcompress.Engine  # noqa: B018


def test_importing_the_package_or_the_program_loads_nothing_heavy():
    code = (
        "import sys, kvcompress, kvcompress.cli.app as app; app.build();"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pins_are_exact_where_a_check_depends_on_the_version():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    dev = data["project"]["optional-dependencies"]["dev"]
    for tool in ("ruff", "mypy"):
        assert any(re.fullmatch(rf"{tool}==[\d.]+", line) for line in dev)
    locked = (ROOT / "locks" / "torch.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==2\.13\.0$", locked, re.MULTILINE)


def test_documents_name_only_recipes_and_files_that_exist():
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in re.findall(r"\brecipes/[a-z0-9-]+\.yaml", text):
            assert (ROOT / name).is_file(), f"{document} names {name}"
        for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / name).exists(), f"{document} links to {name}"


def test_architecture_stays_within_two_pages():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120


# who may call a loader of transformers, or a reader of JSON and YAML, himself
LOADERS = re.compile(r"\.(from_pretrained|from_config)\(")
READERS = re.compile(r"\bjson\.loads?\(|\byaml\.(safe_|full_)?load\(|\byaml\.compose\(")
OWN_LOADERS = {"checkpoint/load.py"}
OWN_READERS = {
    "strict.py",
    "bundle/write.py",  # what transformers and our own process wrote a moment ago
    "kernels/tuning.py",  # a file of the package
    "league/result.py",  # derived keys are left out before the strict schema
    "profile/texts.py",  # lines of somebody's data: a key twice is no fault of ours
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_foreign_files_have_one_loader_and_one_reader(path):
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(PACKAGE).as_posix()
    assert name in OWN_LOADERS or not LOADERS.search(text), "use kvcompress.checkpoint.load"
    assert name in OWN_READERS or not READERS.search(text), "use kvcompress.strict"
    if "model_validate_json(" in text:
        assert name.startswith("league/") or "load_json(" in text, "it takes a key twice: load_json"
