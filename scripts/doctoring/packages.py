"""Packages: which are there, in a version that is taken, and whether they can be imported at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from scripts.doctoring.findings import Finding, guarded, isolated
from scripts.doctoring.requirements import Requirement, requirements

_VENDOR = {"tensorrt": " --extra-index-url https://pypi.nvidia.com", "tensorrt-llm": " --extra-index-url https://pypi.nvidia.com"}
_SLOW = {"tensorrt-llm": 300.0}  # seconds that its import may take
_ALTERNATIVES = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime-openvino"), "onnxruntime-gpu": ()}
_IMPORT = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
told = {"version": str(getattr(module, "__version__", ""))}
if sys.argv[1] == "torch":
    told["more"] = f"built for CUDA {module.version.cuda}" if module.version.cuda else "for the CPU"
    if module.version.cuda:
        told["more"] += ", sees a GPU" if module.cuda.is_available() else ", sees no GPU"
elif sys.argv[1] == "onnxruntime":
    told["providers"] = module.get_available_providers()
    told["more"] = ", ".join(told["providers"])
print(json.dumps(told))
"""


def of_extra(extra: str, *, needed: bool, imports: bool = True, but: Iterable[str] = ()) -> list[Finding]:
    """A finding for each package of an extra ("": of the distribution itself). imports: try to import each, in a process of its
    own; otherwise only what is installed is looked up. but: names that are left out."""
    wanted = [requirement for requirement in requirements(extra) if requirement.name not in but]

    def look(requirement: Requirement) -> Finding:
        name = requirement.name
        return guarded(_group(extra), name, lambda: package(requirement, extra, needed=needed, imports=imports))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(look, wanted))


def package(requirement: Requirement, extra: str, *, needed: bool, imports: bool = True, provider: str = "") -> Finding:
    """One package; `provider`: of ONNX Runtime, which it must have."""
    name, group = requirement.name, _group(extra)
    remedy = f"pip install '{requirement.line}'{_VENDOR.get(extra, '')}" + (f"  (extra {extra})" if extra else "")
    installed = next((found for other in (name, *_ALTERNATIVES.get(name, ())) if (found := _version(other))), None)
    if installed is None and (not requirement.module or not _there(requirement.module)):
        return Finding(group, name, "missing", "not installed", requirement.versions, remedy, needed)
    if installed is not None and not requirement.takes(installed):
        return Finding(group, name, "unfit", installed, requirement.versions, remedy, needed)
    if not imports or not requirement.module:
        return Finding(group, name, "good", installed or "found", requirement.versions, needed=needed)
    answer = isolated(_IMPORT, requirement.module, limit=_SLOW.get(name, 60.0))
    if answer.trouble:
        found = f"{installed or 'found'}, but cannot be imported: {answer.trouble}"
        return Finding(group, name, "unfit", found, requirement.versions, remedy, needed)
    version = installed or answer.value["version"]
    if not requirement.takes(version):  # of a copy that is not installed as a package
        return Finding(group, name, "unfit", version or "a version that it does not tell", requirement.versions, remedy, needed)
    found = f"{version} {answer.value.get('more', '')}".strip()
    if provider and provider not in answer.value.get("providers", ()):
        return Finding(group, name, "unfit", found, f"{requirement.versions} with {provider}", remedy, needed)
    return Finding(group, name, "good", found, requirement.versions, needed=needed)


def runtime(extra: str, provider: str, *, imports: bool) -> list[Finding]:
    """ONNX Runtime's packages, its runtime with the execution provider that a target names first. Engines for a GPU are built
    without that, and are not run here then."""
    found = of_extra(extra, needed=True, imports=imports, but=("onnxruntime", "onnxruntime-gpu"))
    for requirement in requirements(extra):
        if requirement.name.startswith("onnxruntime"):
            needed = provider.startswith("CPU")
            look = lambda asked=requirement: package(asked, extra, needed=needed, imports=imports, provider=provider)  # noqa: E731, B023
            found.append(guarded(_group(extra), requirement.name, look))
    return found


def _group(extra: str) -> str:
    return f"packages of the extra {extra}" if extra else "packages"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False
