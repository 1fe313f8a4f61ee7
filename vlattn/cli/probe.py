"""`vlattn probe`: how much a frozen backbone knows, read out by attentive heads. One file per command."""

from __future__ import annotations

import typer

from vlattn.cli.probe_knn import knn
from vlattn.cli.probe_layers import layers
from vlattn.cli.probe_show import show
from vlattn.cli.probe_sweep import sweep
from vlattn.cli.probe_train import train

app = typer.Typer(no_args_is_help=True, help="Train and compare attentive probes on frozen backbones.")
for command in (train, sweep, layers, show, knn):
    app.command()(command)
