"""The folder of a training run of OAT, which in the end has the result and the model."""

from __future__ import annotations

from vlattn.errors import InputError
from vlattn.runtime.run_folder import RunFolder

MODEL = "model.safetensors"


class TrainFolder(RunFolder):
    """Files of one run. The model is written before the result."""

    def before_checkpoint(self, begun: bool) -> None:
        if not begun:
            raise InputError(f"resume: {str(self.path)!r} holds no run; leave resume out to start one there")
        self.cut_log(0)  # cut off before its first checkpoint
