"""`vlattn gaze`: where people look next. One file per command, gaze_*.py."""

from __future__ import annotations

import typer

from vlattn.cli.gaze_eval import evaluate
from vlattn.cli.gaze_predict import predict
from vlattn.cli.gaze_score import score
from vlattn.cli.gaze_show import show
from vlattn.cli.gaze_train import train

app = typer.Typer(no_args_is_help=True, help="Predict scanpaths over objects, and score them against people's.")
# Models need torch and scoring must not: commands import it when they run.
for command in (train, predict, score, show):
    app.command()(command)
app.command("eval")(evaluate)
