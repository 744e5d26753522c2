"""Images of handwritten digits, which the demo and the studies show.

digits.npz holds the 1,797 images of the test part of E. Alpaydin and C. Kaynak, *Optical
Recognition of Handwritten Digits* (UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0), in the order in which scikit-learn has them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the images, of shape [1797, 8, 8] with values from 0 to 16, and what they show."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        return file["images"], file["labels"].astype(np.int64)
