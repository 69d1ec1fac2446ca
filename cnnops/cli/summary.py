"""``cnnops summary``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import nn


@click.command()
@click.argument("model")
@click.option(
    "--input", "size", default="3,224,224", show_default=True, metavar="C,H,W", help="Size of one input image."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images in the batch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def summary(model: str, size: str, batch: int, as_json: bool) -> None:
    """Show a model's layers: output shapes, parameters, multiply-adds, receptive fields.

    MODEL is module:callable or file.py:callable, where the callable returns a torch.nn.Module, for example
    torchvision.models:resnet50. The module or file is imported, and so runs its code.
    """
    try:
        sizes = tuple(int(part) for part in size.split(","))
    except ValueError:
        raise click.BadParameter(f"{size!r} is not numbers with commas between them", param_hint="--input") from None
    found = _load(model)
    from .. import summary as describe

    result = describe(found, sizes, batch=batch)
    if as_json:
        import json

        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        from ._console import console

        console().print(result)


def _load(path: str) -> nn.Module:
    import importlib
    import importlib.util
    import os
    import sys

    import torch

    place, separator, name = path.rpartition(":")
    if not separator or not place or not name:
        raise click.BadParameter(f"{path!r} is not module:callable or file.py:callable", param_hint="MODEL")
    # As with `python -m`: modules in the current directory are found.
    sys.path.insert(0, os.getcwd())
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(os.path.basename(place)[:-3], place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where dataclasses and pickle look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (ImportError, OSError) as error:
        raise click.BadParameter(f"cannot import {place}: {error}", param_hint="MODEL") from error
    finally:
        sys.path.pop(0)
    factory = getattr(module, name, None)
    if factory is None:
        raise click.BadParameter(f"{place} has no {name!r}", param_hint="MODEL")
    model = factory if isinstance(factory, torch.nn.Module) else factory()
    if not isinstance(model, torch.nn.Module):
        raise click.BadParameter(f"{path} gave a {type(model).__name__}, not a torch.nn.Module", param_hint="MODEL")
    return model
