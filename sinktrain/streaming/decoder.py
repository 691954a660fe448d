"""The streaming decoder: tokens in, logits for the next one out, for ever, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sinktrain.errors import StreamError
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.blockwise import check_starts_with_sink
from sinktrain.streaming.layout import Layout
from sinktrain.streaming.ring import RingCache, advance
from sinktrain.streaming.sampling import check_sampling, sample

STATE_NAMES = ("layout", "start_pos", "rewindable", "min_age", "max_age", "age", "keys", "values")


class StreamingDecoder:
    """Streams of one model under a layout: sinks pinned, the newest ``window`` tokens kept.

    Args:
        model: from ``sinktrain.load_model``.
        sinks: slots at the front that are never reused.
        window: newest other tokens kept, the current one included.
        batch_size: streams decoded side by side.
        start_pos: stream position of the first token.
        max_rewind: how many tokens ``rewind`` can take back; costs as many slots.
        require_sink: refuse a ``token`` model's stream that does not start with its sink.

    Raises:
        StreamError: layout empty or beyond the positions that the model was trained on, no stream to
            decode, or a negative ``max_rewind``.
    """

    def __init__(
        self,
        model: GPTNeoX,
        sinks: int,
        window: int,
        batch_size: int = 1,
        start_pos: int = 0,
        max_rewind: int = 0,
        require_sink: bool = True,
    ) -> None:
        if batch_size < 1 or max_rewind < 0:
            raise StreamError(
                f"batch_size is {batch_size} and max_rewind {max_rewind}; use 1 or more, and 0 or more"
            )
        self.model = model
        self.layout = Layout(sinks, window)
        self.layout.check_fits(model.config.network.max_position_embeddings)
        self.max_rewind = max_rewind
        self.require_sink = require_sink
        self._cache = RingCache(model, self.layout, batch_size, start_pos, spare_slots=max_rewind)
        self._rewindable = 0

    @property
    def stream_pos(self) -> Tensor:
        """Tokens that came before in each stream, sinks and ``start_pos`` included: int64[batch]."""
        return self._cache.age + self._cache.start_pos

    @property
    def cache_bytes(self) -> int:
        return self._cache.num_bytes

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, rows: Sequence[int] | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Feed any number of tokens; equals feeding them one by one.

        Args:
            tokens: int64[rows, seq].
            rows: streams to feed; all when None. The others stand still.
            lengths: int64[rows], tokens of each row that count; all when None.

        Returns:
            float[rows, vocab]: logits for the token after each row's last.

        Raises:
            StreamError: no tokens, rows or lengths that do not match, or the sink missing; no stream
                has moved then.
        """
        tokens = tokens.to(self.model.device)
        fed = self._checked_rows(rows)
        if tokens.dim() != 2 or len(tokens) != len(fed) or tokens.shape[1] == 0:
            raise StreamError(
                f"prefill takes tokens of shape [{len(fed)}, 1 or more], not {list(tokens.shape)}"
            )
        parts = [(fed, tokens)] if lengths is None else _ragged_parts(fed, tokens, lengths.tolist())
        for part_rows, part in parts:
            self._check_sink(part_rows, part)
        logits = [self._feed(part_rows, part) for part_rows, part in parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token to each stream: int64[batch] -> float[batch, vocab], logits for the next."""
        if tokens.dim() != 1:
            raise StreamError(f"step takes one token for each stream, int64[batch], not {list(tokens.shape)}")
        return self.prefill(tokens[:, None])

    def generate(
        self,
        tokens: Tensor | None = None,
        max_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        suppress: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Continue the streams: int64[batch] a step, ``max_tokens`` of them or for ever.

        Starts a fresh ``token`` stream with its sink by itself, and never emits a sink. Sampling as
        in ``sinktrain.streaming.sampling.sample``; ``seed`` makes it repeatable. The last token
        emitted has not been fed yet: to go on later, begin with it.

        Args:
            tokens: int64[batch, seq], the prompt; may be None where sinks begin the stream.

        Raises:
            StreamError: nothing to continue from, or settings that cannot be sampled with.
        """
        check_sampling(temperature, top_k, top_p)
        prompt = self._with_sinks(tokens)
        generator = torch.Generator(self.model.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        never = [*self.model.sink_ids, *suppress]
        logits = self.prefill(prompt)
        emitted = 0
        while max_tokens is None or emitted < max_tokens:
            token = sample(logits, temperature, top_k, top_p, never, generator)
            yield token
            emitted += 1
            if emitted != max_tokens:
                logits = self.step(token)

    def rewind(self, num_tokens: int) -> None:
        """Take back the last tokens of every stream, as if they had not been fed.

        Raises:
            StreamError: more than ``max_rewind`` before the furthest token, or than were fed to all
                streams together since the last reset.
        """
        if not 0 <= num_tokens <= self._rewindable:
            raise StreamError(
                f"cannot rewind {num_tokens} tokens; at most {self._rewindable} here "
                f"(max_rewind={self.max_rewind})"
            )
        self._cache.grow(-num_tokens)
        self._rewindable -= num_tokens

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Begin new streams in some rows, or in all.

        Raises:
            StreamError: rows that do not exist.
        """
        self._cache.reset(self._checked_rows(rows))
        self._rewindable = 0

    def fork(self) -> StreamingDecoder:
        """An independent decoder in the same state."""
        twin = StreamingDecoder(
            self.model,
            self.layout.sinks,
            self.layout.window,
            self._cache.batch_size,
            self._cache.start_pos,
            self.max_rewind,
            self.require_sink,
        )
        twin.load_state_dict(self.state_dict())
        return twin

    def state_dict(self) -> dict[str, Any]:
        """All that the streams remember, as tensors and numbers; a copy."""
        cache = self._cache
        return {
            "layout": str(self.layout),
            "start_pos": cache.start_pos,
            "rewindable": self._rewindable,
            "min_age": cache.min_age,
            "max_age": cache.max_age,
            "age": cache.age.clone(),
            "keys": cache.keys.clone(),
            "values": cache.values.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of a decoder with the same layout, batch size and ``max_rewind``.

        Raises:
            StreamError: not a decoder's state, or one of another layout or shape.
        """
        cache = self._cache
        missing = [name for name in STATE_NAMES if name not in state]
        if missing:
            raise StreamError(f"this is not the state of a StreamingDecoder: it has no {', '.join(missing)}")
        if state["layout"] != str(self.layout) or state["keys"].shape != cache.keys.shape:
            raise StreamError(
                f"the state is of layout {state['layout']} and shape {list(state['keys'].shape)}, the "
                f"decoder of {self.layout} and {list(cache.keys.shape)}; make it with the same arguments"
            )
        cache.start_pos, self._rewindable = state["start_pos"], state["rewindable"]
        cache.min_age, cache.max_age = state["min_age"], state["max_age"]
        for name in ("age", "keys", "values"):
            getattr(cache, name).copy_(state[name])

    def _checked_rows(self, rows: Sequence[int] | None) -> list[int]:
        batch_size = self._cache.batch_size
        checked = list(range(batch_size) if rows is None else rows)
        if not checked or len(set(checked)) < len(checked) or not set(checked) <= set(range(batch_size)):
            raise StreamError(f"rows must be different numbers from 0 to {batch_size - 1}, not {checked}")
        return checked

    def _check_sink(self, rows: list[int], tokens: Tensor) -> None:
        # min_age spares a running stream the look at its ages, which would wait for the device.
        if self.require_sink and self._cache.min_age < len(self.model.sink_ids):
            check_starts_with_sink(self.model, tokens, self._cache.age[rows])

    def _feed(self, rows: list[int], tokens: Tensor) -> Tensor:
        is_all = rows == list(range(self._cache.batch_size))
        cache = self._cache if is_all else self._cache.select(rows)
        for block in advance(self.model, tokens, cache):
            hidden = block
        if not is_all:
            self._cache.assign(rows, cache)
        # Counted from the furthest token: what it overwrote cannot be had back by a second rewind.
        self._rewindable = min(self._rewindable + tokens.shape[1], self.max_rewind) if is_all else 0
        return self.model.logits(hidden[:, -1])

    def _with_sinks(self, tokens: Tensor | None) -> Tensor:
        batch_size = self._cache.batch_size
        given = torch.empty((batch_size, 0), dtype=torch.int64) if tokens is None else tokens.cpu()
        if given.dim() != 2 or len(given) != batch_size:
            shape = list(given.shape)
            raise StreamError(f"generate takes a prompt of shape [{batch_size}, seq], not {shape}")
        sinks = torch.tensor(self.model.sink_ids, dtype=torch.int64).expand(batch_size, -1)
        is_fresh = not bool(self._cache.age.any())
        if is_fresh and not torch.equal(given[:, : sinks.shape[1]], sinks):
            given = torch.cat((sinks, given), dim=1)
        if given.shape[1] == 0:
            raise StreamError("nothing to continue from; give generate a prompt of one token or more")
        return given


def _ragged_parts(rows: list[int], tokens: Tensor, lengths: list[int]) -> list[tuple[list[int], Tensor]]:
    """Each row by itself, cut to its length."""
    if len(lengths) != len(rows) or not all(1 <= length <= tokens.shape[1] for length in lengths):
        raise StreamError(f"lengths must be {len(rows)} numbers from 1 to {tokens.shape[1]}, not {lengths}")
    each = zip(rows, tokens, lengths, strict=True)
    return [([row], row_tokens[None, :length]) for row, row_tokens, length in each]
