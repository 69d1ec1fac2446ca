"""What the package promises as a whole: its build, its extension's symbols, its import and its processes."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnnops
from cnnops._lib import C

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(cnnops.__file__).parent
EXTENSION = Path(C.__file__)
X86 = platform.machine() in ("x86_64", "AMD64")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter that finds the same cnnops."""
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def output(code: str, **environment: str) -> str:
    run = python(code, **environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


# The version, and the files beside the extension


def test_the_version_is_the_one_in_pyproject() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    assert version is not None
    assert C.__version__ == version[1]


def test_the_installed_version_is_the_extensions() -> None:
    try:
        installed = importlib.metadata.version("cnnops")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cnnops is not installed: it runs from a source tree")
    assert installed == cnnops.__version__ == C.__version__


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def _parameters(signature: str) -> tuple[str, list[str]]:
    (function,) = ast.parse(signature).body
    assert isinstance(function, ast.FunctionDef)
    return function.name, [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def test_the_stub_lists_what_the_extension_has() -> None:
    extension = dict(
        _parameters(f"def {f.__doc__.splitlines()[0]}: ...") for f in vars(C).values() if inspect.isbuiltin(f)
    )
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    stub = dict(_parameters(ast.unparse(node)) for node in tree.body if isinstance(node, ast.FunctionDef))
    assert stub == extension, (
        "cnnops/_C.pyi does not show the extension as it is: run `make stub` and commit the file. "
        f"Missing: {sorted(extension.keys() - stub.keys())}; gone: {sorted(stub.keys() - extension.keys())}; "
        f"other parameters: {sorted(n for n in stub.keys() & extension.keys() if stub[n] != extension[n])}"
    )


# What the extension links and exports


def test_the_extension_links_no_torch_no_cuda_and_the_plain_libgomp() -> None:
    dynamic = subprocess.run([tool("readelf"), "-d", EXTENSION], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    system = {"libgomp.so.1", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
    assert "libgomp.so.1" in needed
    assert {name for name in needed - system if not name.startswith("ld-linux")} == set()
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), "a path of the build machine is in the extension"


def test_the_extension_exports_its_init_function_only() -> None:
    symbols = subprocess.run(
        [tool("nm"), "-D", "--defined-only", EXTENSION], capture_output=True, text=True, check=True
    )
    functions = {line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-2] == "T"}
    assert functions == {"PyInit__C"}


SOURCES = sorted((REPOSITORY / "csrc" / "cpu").rglob("*.cpp"))


@pytest.mark.skipif(not X86, reason="compiles for AVX-512")
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_a_kernel_source_exports_its_own_namespace_only(source: Path, tmp_path: Path) -> None:
    """With nothing inlined, each helper that would be shared between levels shows. Linkage shows without machine
    code, which -flto leaves out: all sources take 28 CPU seconds instead of 78."""
    flags = re.search(r"set\(CNNOPS_FLAGS_avx512 (.*)\)", (REPOSITORY / "cmake" / "cnnops.cmake").read_text())
    assert flags is not None
    compiled = tmp_path / "kernel.o"
    subprocess.run(
        [tool("g++"), "-std=gnu++20", "-O0", "-Dalways_inline=unused", "-flto", "-fopenmp", "-w", "-c",
         *flags[1].split(), "-DCNNOPS_ISA=avx512", "-DCNNOPS_ISA_avx512=1", "-I", REPOSITORY / "csrc", source,
         "-o", compiled],
        check=True,
    )  # fmt: skip
    nm = subprocess.run([tool("gcc-nm"), "-gC", "--defined-only", compiled], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=2) for line in nm.stdout.splitlines()]
    # DW.ref.* is a pointer to the C++ runtime's exception routine, the same whatever the flags.
    exported = [(kind, name) for _, kind, name in symbols if not name.startswith("DW.ref.")]
    assert any(name.startswith("cnnops::avx512::") for _, name in exported)
    foreign = [(kind, name) for kind, name in exported if kind != "T" or not name.startswith("cnnops::avx512::")]
    assert foreign == [], "the linker would hand these to every instruction set; give them internal linkage"


# Import and OpenMP


def test_import_alone_loads_neither_torch_nor_the_extension() -> None:
    code = "import sys, cnnops; print([m for m in ('torch', 'numpy', 'cnnops._C') if m in sys.modules])"
    assert output(code) == "[]"


USE = """
import torch
from cnnops.functional import avg_pool2d
x = torch.randn(16, 64, 56, 56)
avg_pool2d(x, 2), torch.nn.functional.conv2d(x, torch.randn(64, 64, 3, 3))
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}
print(len(libraries), *libraries)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("first", ["cnnops", "cnnops.functional", "cnnops._lib", "torch"])
def test_one_openmp_runtime_whatever_is_imported_first(first: str) -> None:
    assert output(f"import {first}{USE}").split()[0] == "1"


# Instruction sets

LEVELS = {level["isa"]: level for level in C.isa_levels()}
SELECTED = """
from cnnops._lib import C
print(C.isa_limit(), *sorted({row["isa"] for row in C.kernels() if row["selected"]} - {"cuda"}))
"""


@pytest.mark.parametrize("level", [name for name, level in LEVELS.items() if level["built"] and level["supported"]])
def test_cnnops_isa_caps_the_choice(level: str) -> None:
    limit, *chosen = output(SELECTED, CNNOPS_ISA=level).split()
    assert limit == level
    order = list(LEVELS)
    assert max(order.index(isa) for isa in chosen) == order.index(level)


@pytest.mark.parametrize("value", ["avx1024", "reference"])
def test_an_unknown_cnnops_isa_is_an_error_that_names_the_levels(value: str) -> None:
    run = python(SELECTED, CNNOPS_ISA=value)
    assert run.returncode != 0
    assert f"ValueError: CNNOPS_ISA={value} is not a level; the levels are {', '.join(LEVELS)}" in run.stderr


def test_an_unsupported_cnnops_isa_is_an_error_that_says_why() -> None:
    unusable = [level for level in LEVELS.values() if not (level["built"] and level["supported"])]
    if not unusable:
        pytest.skip("every level can be used here")
    run = python(SELECTED, CNNOPS_ISA=unusable[0]["isa"])
    assert run.returncode != 0
    assert f"cannot be used here: {unusable[0]['reason']}" in run.stderr


# A missing extension is not a broken one


@pytest.fixture
def package_without_extension(tmp_path: Path) -> Path:
    copy = tmp_path / "cnnops"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def import_copy(copy: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", "import cnnops.functional"],
        capture_output=True,
        text=True,
        cwd=copy.parent,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
    )
    assert run.returncode != 0
    return run.stderr.strip().splitlines()[-1]


def test_a_missing_extension_says_how_to_build_it(package_without_extension: Path) -> None:
    message = import_copy(package_without_extension)
    assert message.startswith("ImportError: cnnops: the compiled extension cnnops._C is missing")
    assert "pip install" in message


def test_a_broken_extension_says_what_the_loader_said(package_without_extension: Path) -> None:
    (package_without_extension / EXTENSION.name).write_bytes(b"not a shared object")
    message = import_copy(package_without_extension)
    assert message.startswith("ImportError: cnnops: the compiled extension is there but cannot be loaded: ")
    assert EXTENSION.name in message


# Processes

FORK = """
import os, signal, torch
from cnnops.functional import avg_pool2d
torch.set_num_threads(4)
x = torch.randn(4, 16, 32, 32)
expected = avg_pool2d(x, 2)
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that hangs is ended
    os._exit(0 if torch.equal(avg_pool2d(x, 2), expected) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, torch.equal(avg_pool2d(x, 2), expected))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_after_its_parent_did() -> None:
    assert output(FORK) == "0 True"


class Pooled(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.set_num_threads(4)  # a worker begins with one
        return cnnops.functional.avg_pool2d(torch.full((1, 16, 32, 32), float(index)), 2)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_compute(method: str) -> None:
    cnnops.functional.avg_pool2d(torch.randn(4, 16, 32, 32), 2)
    loader = torch.utils.data.DataLoader(
        Pooled(), batch_size=4, num_workers=2, timeout=60, multiprocessing_context=method
    )
    means = [float(image.mean()) for batch in loader for image in batch]
    assert means == list(range(8))


# The build

CMAKE = pytest.mark.skipif(not (REPOSITORY / "CMakeLists.txt").exists(), reason="needs the source tree")


def configure(build: Path, *options: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("cmake is not installed")
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH", "CMAKE_ARGS")}
    return subprocess.run(
        [cmake, "-S", REPOSITORY, "-B", build, "-DSKBUILD_PROJECT_VERSION=0", f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options],
        capture_output=True,
        text=True,
        env={**environment, "PATH": path},
    )  # fmt: skip


@CMAKE
def test_cuda_on_without_a_compiler_is_a_clear_error(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "as", "ld", "ar", "ranlib", "make", "ninja", "uname"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    run = configure(tmp_path / "build", "-DCNNOPS_CUDA=ON", path=str(tools))
    assert run.returncode != 0
    assert "CNNOPS_CUDA=ON, but no CUDA compiler was found" in " ".join(run.stderr.split())


@CMAKE
def test_an_unknown_value_of_cnnops_cuda_is_an_error(tmp_path: Path) -> None:
    run = configure(tmp_path / "build", "-DCNNOPS_CUDA=MAYBE")
    assert run.returncode != 0
    assert 'CNNOPS_CUDA is AUTO, ON or OFF, not "MAYBE"' in " ".join(run.stderr.split())
