"""Saving a factored or resized model: `config.json` says what is, and the directory appears whole.

Three routes lead back from a checkpoint. With the plugin imported, ``from_pretrained`` finds the
quantizer ``cur``. Without it, ``trust_remote_code=True`` finds the same quantizer in the files that
are shipped beside the weights. With neither, transformers only *warns* about an unknown quantizer
and would fill the missing weights with noise; so `config.json` also names, as
``transformers_weights``, a weights file that does not exist and whose name is the remedy. Our
quantizer takes that entry away.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cur_modifier.checkpoint.files import put_text
from cur_modifier.checkpoint.remote_code import FOLDER, auto_classes, ship
from cur_modifier.checkpoint.resized import differences, resized_fields
from cur_modifier.forms.base import factored_layers
from cur_modifier.forms.schema import QUANT_METHOD, ModuleSpec, Producer, Schema, checksum

__all__ = ["annotate", "schema_of", "wrap_save_pretrained"]

TRIPWIRE = "this-checkpoint-needs-import-cur_modifier-or-trust_remote_code.safetensors"
# What transformers calls the weights of a model: an earlier save's are not to be mixed with ours.
# Modules of ours that lie beside them are an earlier version's.
_STALE = re.compile(
    r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    rf"|cur_(layout|factored|quantizer)\.py|modeling_cur\.py|{FOLDER}"
)


def schema_of(model: nn.Module) -> Schema:
    """The schema of the factored modules in ``model``, and of the resized ones if it is marked as
    resized.

    Raises:
        ValueError: factors that are not fitted yet, as after an interrupted oneshot; a module that
            uses a factor of one that is not in the model any more; or a size that no checkpoint
            can record.
    """
    factored = factored_layers(model)
    found = differences(model)
    names = {module: name for name, module in factored.items()}
    modules = {}
    for name, module in factored.items():
        if module.dense is not None:
            raise ValueError(
                f"{name} has no fitted factors yet: the compression did not finish. Run oneshot to "
                "its end before saving."
            )
        modules[name] = ModuleSpec(
            form=module.form,
            rank=module.rank,
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.effective_bias() is not None,
            resized=name in found.factored,
            **module.variant(names),
        )
    return Schema(
        producer=_producer(),
        modules=modules,
        resized=dict(found.dense),
        norms=dict(found.norms),
        attributes=dict(found.integers),
    )


def annotate(
    directory: Path,
    schema: Schema,
    model_class: type,
    fields: Mapping[str, int] | None = None,
) -> None:
    """Describe the model in ``directory/config.json`` and ship the code that reads it.

    A compressed-tensors section moves inside ours, untouched. Where nothing is factored or resized,
    it stays where it is, and nothing of ours does.

    Args:
        fields: of the text config, with their values.
    """
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    changed = {name: value for name, value in (fields or {}).items() if text.get(name) != value}
    if changed:
        text.update(changed)
        put_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    section = config.get("quantization_config") or {}
    inner = (
        section.get("compressed_tensors")
        if section.get("quant_method") == QUANT_METHOD
        else section
    )
    if not (schema.modules or schema.has_own_sizes):
        _make_ordinary(path, config, inner)
        return
    files = {file.name: checksum(file) for file in sorted(directory.glob("*.safetensors"))}
    schema = schema.model_copy(update={"compressed_tensors": inner or None, "files": files})
    config["quantization_config"] = schema.write()
    config["transformers_weights"] = TRIPWIRE
    if _is_of_transformers(model_class):
        forms = {module.form for module in schema.modules.values()}
        reference = ship(directory, model_class, forms)
        config["auto_map"] = dict.fromkeys(auto_classes(model_class), reference)
    put_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _make_ordinary(path: Path, config: dict[str, Any], inner: dict[str, Any] | None) -> None:
    """Remove entries of ours, which a model has that was loaded from a checkpoint of ours."""
    code = {k: v for k, v in config.get("auto_map", {}).items() if f"{FOLDER}/" not in str(v)}
    replaced = {"quantization_config": inner, "auto_map": code}
    ordinary = {key: value for key, value in config.items() if key not in replaced}
    ordinary |= {key: value for key, value in replaced.items() if value}
    if ordinary != config:
        put_text(path, json.dumps(ordinary, indent=2, sort_keys=True) + "\n")


def wrap_save_pretrained(model: nn.Module, files: Mapping[str, str] | None = None) -> None:
    """Make ``model.save_pretrained`` write a factored checkpoint, all of it or nothing.

    Where a stage has called :func:`~cur_modifier.checkpoint.resized.mark_resized`, it also records
    the sizes that the model's config does not give.

    The files are written to a hidden sibling directory, which takes the place of ``save_directory``
    when complete. A mount point can't be replaced: there they are written to a hidden directory
    inside, and renamed one by one, ``config.json`` last. All other files (a tokenizer's) are kept.

    Args:
        files: text files to put beside the weights, by name; read when the model is saved. Where a
            second stage brings others of the same name, those are numbered.
    """
    inner: Any = model.save_pretrained
    if isinstance(inner, _SaveWhole):
        inner.brought.append(files or {})
        return
    model.save_pretrained = _SaveWhole(model, inner, files or {})  # type: ignore[assignment]


class _SaveWhole:
    """The ``save_pretrained`` of a factored or resized model.

    Attributes:
        brought: text files to put beside the weights.
    """

    def __init__(self, model: nn.Module, inner: Any, files: Mapping[str, str]) -> None:
        update_wrapper(self, inner)
        self._model = model
        self._inner = inner
        self._packs = bool(getattr(inner, "_overridden", False))  # as llm-compressor's does
        self.brought = [files]

    @property
    def _overridden(self) -> bool:
        """What llm-compressor asks before it wraps a ``save_pretrained``.

        Around ours it would write its own config.json over what we say in ours, so it is put
        inside.
        """
        if not self._packs:
            self._inner, self._packs = _compressing(self._model, self._inner), True
        return True

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As transformers' or llm-compressor's, all or nothing."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "push_to_hub=True would upload the files before they are complete. Save to a "
                "directory, then run `hf upload <repository> <directory>`."
            )
        model = self._model
        schema = schema_of(model)
        if not self._packs:
            _pack(model)
        target = Path(save_directory).resolve()
        if target.is_file():
            raise ValueError(f"{target} is a file; give save_pretrained a directory.")
        partial = _partial(target)
        source = _is_source()
        if source and partial.exists():
            shutil.rmtree(partial)
        try:
            with _without_own_code(model):
                self._inner(str(partial), **kwargs)
            if source:
                annotate(partial, schema, _plain_class(model), resized_fields(model))
                for name, text in _numbered(self.brought).items():
                    (partial / name).write_text(text)
        except BaseException:
            if source:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if source:
            try:
                _replace(partial, target)
            except OSError as error:
                raise OSError(
                    f"the checkpoint is complete, but can't all be put at {target} ({error}). What "
                    f"is not there is in {partial}: move it from there before you save again."
                ) from error


def _compressing(model: Any, inner: Any) -> Any:
    """``inner`` as llm-compressor wraps it."""
    from llmcompressor.transformers.compression.compressed_tensors_utils import (
        modify_save_pretrained,
    )

    ours, model.save_pretrained = model.save_pretrained, inner
    try:
        modify_save_pretrained(model)
        return model.save_pretrained
    finally:
        model.save_pretrained = ours


def _numbered(brought: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """All files; ``report-2.html`` is the second that is another ``report.html``."""
    found: dict[str, str] = {}
    for files in brought:
        for name, text in files.items():
            path, number = Path(name), 1
            while found.setdefault(name, text) != text:
                number += 1
                name = f"{path.stem}-{number}{path.suffix}"
    return found


def _partial(target: Path) -> Path:
    """Where to write what will be at ``target``, on the same file system."""
    if target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK)):
        return target / ".incomplete"
    return target.with_name(f".{target.name}.incomplete")


def _replace(new: Path, target: Path) -> None:
    """Put the files of ``new`` in the place of what an earlier save left at ``target``. That is
    never lost before it is replaced."""
    if new.parent == target:
        _replace_files(new, target)
        return
    previous = target.with_name(f".{target.name}.previous")
    if target.exists():
        for entry in target.iterdir():
            if _STALE.fullmatch(entry.name) or (new / entry.name).exists():
                continue
            if entry.is_dir():
                shutil.copytree(entry, new / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, new / entry.name, follow_symlinks=False)
        shutil.rmtree(previous, ignore_errors=True)  # of a save that was killed
        os.rename(target, previous)
    try:
        os.rename(new, target)
    except BaseException:
        if previous.exists():
            os.rename(previous, target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _replace_files(new: Path, target: Path) -> None:
    """Rename the files of ``new``, which lies in ``target``. Until the last one, which has their
    checksums, is there, every reader refuses the checkpoint."""
    names = {file.name for file in new.iterdir()}
    for name in sorted(names, key=lambda name: name == "config.json"):
        if (target / name).is_dir():  # of code that an earlier save shipped
            shutil.rmtree(target / name)
        os.replace(new / name, target / name)
    for entry in target.iterdir():
        if _STALE.fullmatch(entry.name) and entry.name not in names:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    new.rmdir()


def _pack(model: nn.Module) -> None:
    """Pack quantized factors that a forward pass has unpacked, as their saved config says they
    are."""
    if not any(getattr(m, "quantization_scheme", None) is not None for m in model.modules()):
        return
    from compressed_tensors.compressors import ModelCompressor

    ModelCompressor.from_pretrained_model(model).compress_model(model, skip_compressed=True)


@contextmanager
def _without_own_code(model: nn.Module) -> Iterator[None]:
    """transformers copies the modules of a model that was loaded from remote code, beside the
    weights. Those that read a factored model we ship ourselves."""
    if not _is_of_transformers(_plain_class(model)):
        yield  # nor is it ours to ship
        return
    owner: Any = next(c for c in type(model).__mro__ if "_auto_class" in vars(c))
    before = owner._auto_class
    owner._auto_class = None
    try:
        yield
    finally:
        owner._auto_class = before


def _plain_class(model: nn.Module) -> type:
    """The class that transformers itself ships, below a remote-code subclass of the same name."""
    return next(
        (c for c in type(model).__mro__ if _is_of_transformers(c)),
        type(model),
    )


def _is_of_transformers(model_class: type) -> bool:
    return model_class.__module__.startswith("transformers.models.")


def _is_source() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _producer() -> Producer:
    try:
        return Producer(name="cur_modifier", version=version("cur-modifier"))
    except PackageNotFoundError:
        return Producer(name="cur_modifier")
