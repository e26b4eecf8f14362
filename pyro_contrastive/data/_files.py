"""Reading files of arrays, with errors that say what is wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

__all__ = ["read_arrays"]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an npz or npy file.

    Args:
        path: The file.

    Returns:
        The arrays of an npz file by name; that of an npy file under the empty name.

    Raises:
        ValueError: If the file is not readable as either.
    """
    try:
        file = np.load(path)
        return {"": file} if isinstance(file, np.ndarray) else {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable npz or npy file: {str(error).splitlines()[0]}") from error
