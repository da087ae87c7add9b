"""Writes digits.safetensors: scikit-learn's copy of the UCI handwritten digits, as candle reads them.

    pip install scikit-learn==1.9.1 safetensors==0.8.0 && python examples/digits/export.py
"""

import pathlib

import numpy
import sklearn
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

assert sklearn.__version__ == "1.9.1", sklearn.__version__
digits = load_digits()
images = digits.images.astype(numpy.uint8)
assert (images == digits.images).all() and images.shape == (1797, 8, 8) and images.max() == 16
labels = digits.target.astype(numpy.uint8)
save_file(
    {"images": images, "labels": labels},
    pathlib.Path(__file__).with_name("digits.safetensors"),
    {"source": "scikit-learn 1.9.1 load_digits; UCI Optical Recognition of Handwritten Digits; CC BY 4.0"},
)
