"""The streaming decoder: tokens in, logits for the next one out, for ever, in constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinktrain.errors import StreamError
from sinktrain.files import atomic_path
from sinktrain.model.neox import GPTNeoX
from sinktrain.streaming.blocks import advance
from sinktrain.streaming.blockwise import check_starts_with_sink
from sinktrain.streaming.layout import Layout
from sinktrain.streaming.ring import RingCache
from sinktrain.streaming.sampling import Sampling, sample
from sinktrain.streaming.step import Replayed, make_step

CACHE_STATE = ("start_pos", "age", "tokens", "keys", "values")
"""Tensors of the cache that a state holds, under their names."""


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
        self._next = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self._step = make_step(model, self._cache, self._next)
        self._replayed_step = Replayed(self._step, model.device)

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
            StreamError: no tokens, ids outside the vocabulary, rows or lengths that do not match, or the
                sink missing; no stream has moved then.
        """
        fed = self._checked_rows(rows)
        if tokens.dim() != 2 or len(tokens) != len(fed) or tokens.shape[1] == 0:
            raise StreamError(
                f"prefill takes tokens of shape [{len(fed)}, 1 or more], not {list(tokens.shape)}"
            )
        ends = [tokens.shape[1]] * len(fed) if lengths is None else _checked_lengths(lengths, tokens)
        for end in set(ends):
            alike = [row for row in range(len(fed)) if ends[row] == end]
            self._check_tokens([fed[row] for row in alike], tokens[alike, :end])
        tokens = tokens.to(self.model.device)
        logits = tokens.new_empty((len(fed), self.model.config.vocab_size), dtype=self.model.dtype)
        start = 0
        for end in sorted(set(ends)):  # rows go on together until the first of them ends
            going = [row for row in range(len(fed)) if ends[row] >= end]
            logits[going] = self._feed([fed[row] for row in going], tokens[going, start:end])
            start = end
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token to each stream: int64[batch] -> float[batch, vocab], logits for the next.

        Ids that are on a CUDA device are not looked at, which would wait for it: one outside the
        vocabulary makes its stream's logits NaN, until the row is reset.

        Raises:
            StreamError: not one token for each stream, an id outside the vocabulary, or the sink missing.
        """
        if tokens.shape != self._next.shape:
            raise StreamError(
                f"step takes one token for each stream, int64[{len(self._next)}], not {list(tokens.shape)}"
            )
        if not tokens.is_cuda or self._cache.min_age < len(self.model.sink_ids):
            self._check_tokens(list(range(len(tokens))), tokens[:, None])
        self._next.copy_(tokens)
        return self._advance(self._replayed_step).clone()

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor | None = None,
        max_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        suppress: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Continue the streams: int64[batch] a step, ``max_tokens`` of them or for ever.

        Starts a fresh ``token`` stream with its sink by itself, and never emits a sink. Sampling as
        in ``sinktrain.streaming.sampling.Sampling``; ``seed`` makes it repeatable. The last token
        emitted has not been fed yet: to go on later, begin with it.

        Args:
            tokens: int64[batch, seq], the prompt; may be None where sinks begin the stream.

        Raises:
            StreamError: nothing to continue from, or settings that cannot be sampled with.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        prompt = self._with_sinks(tokens)
        generator = torch.Generator(self.model.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        never = self._never(suppress)

        def draw(logits: Tensor) -> Tensor:
            recent = self._cache.recent_tokens() if repetition_penalty != 1 else None
            return sample(logits, sampling, suppress=never, recent=recent, generator=generator)

        def feed_and_draw() -> Tensor:
            self._next.copy_(draw(self._step()))
            return self._next

        replayed = Replayed(feed_and_draw, self.model.device, generator)
        token = draw(self.prefill(prompt))
        emitted = 0
        while max_tokens is None or emitted < max_tokens:
            yield token
            emitted += 1
            if emitted != max_tokens:
                self._next.copy_(token)
                token = self._advance(replayed).clone()

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
        self._cache.rewind(num_tokens)
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
        layout, batch_size = self.layout, self._cache.batch_size
        twin = StreamingDecoder(
            self.model,
            layout.sinks,
            layout.window,
            batch_size,
            max_rewind=self.max_rewind,
            require_sink=self.require_sink,
        )
        twin.load_state_dict(self._state())
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        """All that the streams remember, copied: tensors alone, which safetensors takes as they are."""
        return {name: value.clone() for name, value in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        """``state_dict`` without copying the cache."""
        return {
            "layout": torch.tensor([self.layout.sinks, self.layout.window, self.max_rewind]),
            "model": fingerprint(self.model),
            "rewindable": torch.tensor(self._rewindable),
            **{name: getattr(self._cache, name) for name in CACHE_STATE},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state of a decoder with the same model, layout, batch size and ``max_rewind``.

        Raises:
            StreamError: not a decoder's state, or one of another decoder; nothing has changed then.
        """
        own = self._state()
        missing = [name for name in own if name not in state]
        if missing:
            raise StreamError(f"this is not the state of a StreamingDecoder: it has no {', '.join(missing)}")
        if _described(state) != _described(own):
            raise StreamError(
                f"the state is of {_described(state)}, the decoder of {_described(own)}; "
                "make it with the same arguments"
            )
        is_alike = all(state[name].shape == own[name].shape for name in own)
        is_alike &= all(state[name].dtype == own[name].dtype for name in own)
        if not is_alike or not torch.equal(state["model"].cpu(), own["model"]):
            raise StreamError(
                "the state is of another model, or of this one in another dtype; load what made the state"
            )
        cache = self._cache
        for name in CACHE_STATE:
            getattr(cache, name).copy_(state[name])
        cache.min_age, cache.max_age = int(cache.age.min()), int(cache.age.max())
        self._rewindable = int(state["rewindable"])

    def save_state(self, path: str | Path) -> None:
        """Write ``state_dict`` into a safetensors file; a reader never sees half of it."""
        with atomic_path(Path(path)) as temporary:
            save_file({name: value.cpu() for name, value in self._state().items()}, temporary)

    def load_state(self, path: str | Path) -> None:
        """Continue from a file of ``save_state``.

        Raises:
            StreamError: there is no such file, it is damaged, or as ``load_state_dict``.
        """
        try:
            state = load_file(path)
        except FileNotFoundError:
            raise StreamError(f"{path} does not exist; give a file that save_state wrote") from None
        except (SafetensorError, OSError) as error:
            raise StreamError(f"{path} is damaged, or no state of a stream: {error}") from error
        self.load_state_dict(state)

    def _checked_rows(self, rows: Sequence[int] | None) -> list[int]:
        batch_size = self._cache.batch_size
        checked = list(range(batch_size) if rows is None else rows)
        if not checked or len(set(checked)) < len(checked) or not set(checked) <= set(range(batch_size)):
            raise StreamError(f"rows must be different numbers from 0 to {batch_size - 1}, not {checked}")
        return checked

    def _check_tokens(self, rows: list[int], tokens: Tensor) -> None:
        vocab_size = self.model.config.vocab_size
        if tokens.is_floating_point():
            raise StreamError(f"tokens are whole numbers, int64, not {tokens.dtype}")
        lowest, highest = (int(end) for end in tokens.aminmax())
        if lowest < 0 or highest >= vocab_size:
            raise StreamError(
                f"token {lowest if lowest < 0 else highest} is outside the vocabulary of {vocab_size} rows; "
                f"use ids from 0 to {vocab_size - 1}"
            )
        # min_age spares a running stream the look at its ages, which would wait for the device.
        if self.require_sink and self._cache.min_age < len(self.model.sink_ids):
            check_starts_with_sink(self.model, tokens.to(self.model.device), self._cache.age[rows])

    def _never(self, suppress: Sequence[int]) -> Tensor:
        """Ids that are not drawn: bool[vocab]."""
        vocab_size, ids = self.model.config.vocab_size, {*self.model.sink_ids, *suppress}
        if not all(0 <= token < vocab_size for token in ids) or len(ids) == vocab_size:
            raise StreamError(f"suppress takes ids from 0 to {vocab_size - 1}, and not all of them")
        never = torch.zeros(vocab_size, dtype=torch.bool, device=self.model.device)
        never[list(ids)] = True
        return never

    def _feed(self, rows: list[int], tokens: Tensor) -> Tensor:
        is_all = rows == list(range(self._cache.batch_size))
        if is_all and tokens.shape[1] == 1:
            self._next.copy_(tokens[:, 0])
            return self._advance(self._replayed_step)
        cache = self._cache if is_all else self._cache.select(rows)
        for block in advance(self.model, tokens, cache):
            hidden = block
        if is_all:
            self._count(tokens.shape[1])
        else:
            self._cache.assign(rows, cache)
            self._rewindable = 0
        return self.model.logits(hidden[:, -1])

    def _advance(self, step: Callable[[], Tensor]) -> Tensor:
        """Take a step, which moves the rows on the device, and keep count of it here."""
        result = step()
        self._cache.shift_bounds(1)
        self._count(1)
        return result

    def _count(self, num_tokens: int) -> None:
        # Counted from the furthest token: what it overwrote cannot be had back by a second rewind.
        self._rewindable = min(self._rewindable + num_tokens, self.max_rewind)

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


def _checked_lengths(lengths: Tensor, tokens: Tensor) -> list[int]:
    given: list[int] = lengths.tolist()
    if len(given) != len(tokens) or not all(1 <= length <= tokens.shape[1] for length in given):
        raise StreamError(f"lengths must be {len(tokens)} numbers from 1 to {tokens.shape[1]}, not {given}")
    return given


def _described(state: Mapping[str, Tensor]) -> str:
    layout = [*state["layout"].flatten().tolist(), "?", "?", "?"]
    streams = state["age"].numel()
    return f"layout {layout[0]}+{layout[1]} with batch_size {streams} and max_rewind {layout[2]}"


def fingerprint(model: GPTNeoX) -> Tensor:
    """What tells a model from others, in the same dtype: uint8[32], of its config and some weights."""
    weights = [parameter.detach().flatten() for parameter in model.parameters()]
    some = torch.cat([weight[:: max(1, len(weight) // 4096)] for weight in weights])
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    digest.update(some.cpu().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
