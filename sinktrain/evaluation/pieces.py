"""Pieces of text for measurements that need only some of it, a model's own sinks in front.

Axes: text (or stream), piece, token.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinktrain.model.neox import GPTNeoX


def cut_pieces(texts: NDArray[np.int64], length: int, most: int) -> NDArray[np.int64]:
    """Pieces that do not overlap, spread evenly over the texts: the same ones for every model.

    Args:
        texts: int64[text, token].
        length: tokens in a piece, at most those in a text.
        most: pieces wanted; fewer where the texts hold fewer.

    Returns:
        int64[piece, length].
    """
    per_text = texts.shape[1] // length
    pieces = texts[:, : per_text * length].reshape(-1, length)
    return pieces[spread(len(pieces), most)]


def spread(total: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the indices below ``total``, evenly spread: int64[index]."""
    wanted = min(most, total)
    return np.arange(wanted) * total // max(1, wanted)


def with_sinks(model: GPTNeoX, texts: NDArray[np.int64]) -> Tensor:
    """The texts as the model is trained to read them: int64[text, own sinks + token], on the CPU."""
    sinks = np.broadcast_to(np.array(model.sink_ids, dtype=np.int64), (len(texts), len(model.sink_ids)))
    return torch.from_numpy(np.concatenate((sinks, texts), axis=1))
