"""vlattn: work on the attention of vision-language models people already run."""

from pathlib import Path as _Path

# In a checkout, assets/, configs/, eval/ and kernels/ sit beside this package; in a wheel they are inside it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__version__ = "0.1.0"
