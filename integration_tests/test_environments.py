"""`import cur_modifier` works beside llm-compressor, beside vLLM, and with neither."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def _run(python: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300)


def test_compress_environment() -> None:
    done = _run(
        sys.executable,
        "import cur_modifier\n"
        "from llmcompressor.modifiers.factory import ModifierFactory\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'cur' in AUTO_QUANTIZER_MAPPING\n"
        "assert ModifierFactory._registered_registry['CURModifier'] is cur_modifier.CURModifier\n",
    )
    assert done.returncode == 0, done.stderr


def test_neither_llmcompressor_nor_transformers() -> None:
    done = _run(
        sys.executable,
        "import sys, importlib.util as u\n"
        "real = u.find_spec\n"
        "hidden = {'llmcompressor', 'transformers', 'mlflow', 'vllm'}\n"
        "u.find_spec = lambda name, *a: None if name in hidden else real(name, *a)\n"
        "import cur_modifier, cur_modifier.linalg, cur_modifier.forms.row_id\n"
        "import cur_modifier.forms.schema\n"
        "assert not hidden & set(sys.modules), hidden & set(sys.modules)\n"
        "try:\n"
        "    cur_modifier.CURModifier\n"
        "except ImportError as error:\n"
        "    assert 'cur-modifier[compress]' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.serve
def test_serve_environment() -> None:
    python = os.environ.get("CUR_SERVE_PYTHON")
    if not python or not os.path.exists(python):
        pytest.skip("no serving environment; `make test` makes it and sets CUR_SERVE_PYTHON")
    done = _run(
        python,
        "import cur_modifier, vllm\n"
        "from importlib.metadata import version\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'cur' in AUTO_QUANTIZER_MAPPING\n"
        "assert version('vllm').startswith('0.')\n",
    )
    assert done.returncode == 0, done.stderr
