"""Commands on ComfyUI: install and uninstall the nodes, write a recipe as a workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alkahest.cli.shared import WORKFLOWS, app, example, exit_on_error

group = typer.Typer(help="ComfyUI nodes: put them into a ComfyUI, take them out again.", no_args_is_help=True)
app.add_typer(group, name="nodes", rich_help_panel=WORKFLOWS, epilog=example("alkahest nodes install ~/ComfyUI"))
ComfyUI = Annotated[Path, typer.Argument(metavar="COMFYUI", help="The folder that ComfyUI's main.py lies in.")]


@group.command("install")
def nodes_install(comfyui: ComfyUI) -> None:
    """Register Alkahest's nodes in a ComfyUI; restart it afterwards."""
    with exit_on_error():
        from alkahest.nodes.install import find_lacking, install

        print(f"installed in {install(comfyui)}; restart ComfyUI")
        python, missing = find_lacking(comfyui)
        if missing:
            command = f"{python or 'python'} -m pip install {' '.join(missing)}"
            print(f"Multiplier, Supplement LoRA and Recipe Save also need, with ComfyUI's Python: {command}")


@group.command("uninstall")
def nodes_uninstall(comfyui: ComfyUI) -> None:
    """Remove them again."""
    with exit_on_error():
        from alkahest.nodes.install import uninstall

        print(f"removed {uninstall(comfyui)}")


@group.command("package", epilog=example("alkahest nodes package NODES --publisher NAME --repository https://..."))
def nodes_package(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder, outside a git checkout.")],
    publisher: Annotated[str, typer.Option(help="Your publisher id on registry.comfy.org, without the @.")],
    repository: Annotated[str, typer.Option(help="Public address of the source.")],
) -> None:
    """Write the folder that ComfyUI's registry takes: cd there and run comfy node publish."""
    with exit_on_error():
        from alkahest.nodes.registry import write_package

        print(f"wrote {write_package(folder, publisher=publisher, repository=repository)}")
