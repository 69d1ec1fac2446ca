"""The command line: ``cnnops info``, ``cnnops summary``, ``cnnops bench``.

Each command imports what it needs when it runs: ``--help`` needs click alone, and never torch.
"""

from __future__ import annotations

import click

from .bench import bench
from .info import info
from .summary import summary


class _Cnnops(click.Group):
    """Shows what cnnops raises for a user to read (a missing extension, a bad CNNOPS_ISA) without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ImportError, ValueError) as error:
            if _is_for_users(error):
                raise click.ClickException(str(error)) from error
            raise


def _is_for_users(error: Exception) -> bool:
    text = str(error)
    return text.startswith(("cnnops: ", "CNNOPS_")) or type(error).__name__ == "SuiteError"


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import cnnops

        click.echo(f"cnnops {cnnops.__version__}")
        ctx.exit()


@click.group(cls=_Cnnops, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def main() -> None:
    """Kernels for convolutional networks, as drop-in PyTorch operators."""


main.add_command(info)
main.add_command(summary)
main.add_command(bench)
