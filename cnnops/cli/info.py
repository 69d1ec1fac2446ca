"""``cnnops info``."""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show the build, the CPU's instruction sets, threads, devices, and the kernels chosen.

    An instruction-set level that is not used is shown with the reason; CNNOPS_ISA=avx2, for one, caps the choice.
    """
    from .. import info as describe

    found = describe()
    if as_json:
        import json

        click.echo(json.dumps(found, indent=2))
    else:
        from ._console import console

        console().print(found)
