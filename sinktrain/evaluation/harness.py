"""lm-evaluation-harness reads our models by this: every window begins with the sinks, exactly once.

Where its own class for Hugging Face folders loses or doubles a sink token (rolling windows after the first,
contexts that are cut), here the sinks stay and the context gives way. A model without sink tokens gets what
that class gives it: the end-of-text token where a text has nothing before it, and nothing else.

``sinktrain evaluate --tasks`` and ``compare --tasks`` use it; and so does lm-eval's own command line, which
looks for no plugins (0.4.13), once this module has registered the model ``sinktrain``::

    python -m sinktrain.evaluation.harness run --model sinktrain --model_args pretrained=runs/sink \\
        --device cpu --tasks arc_easy

Importing it needs lm-eval (``pip install 'sinktrain[lm-eval]'``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sinktrain.data.tokenizer import Tokenizer
from sinktrain.errors import ModelError
from sinktrain.evaluation.harness_scoring import Window, score, window
from sinktrain.model.checkpoints import load_model
from sinktrain.model.neox import GPTNeoX
from sinktrain.progress import progress_bar
from sinktrain.streaming.decoder import StreamingDecoder
from sinktrain.streaming.text import tokenizer_of

MAX_NEW_TOKENS = 256
"""Of a generated answer, where a task does not say."""
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("sinktrain")
class SinktrainLM(TemplateLM):  # type: ignore[misc]
    """A model of ours, as lm-evaluation-harness asks it.

    Args:
        pretrained: any form of MODEL, or one that is loaded.
        tokenizer: of a loaded one.
        device: CUDA where there is one, otherwise the CPU, when None.
        dtype: of the weights, such as ``float32``; bfloat16 on CUDA and float32 elsewhere when None.
        max_length: tokens that the model reads at once, sinks included; what it was trained on when None.
        batch_size, max_batch_size: lm-eval's, left alone: batches are filled by tokens.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | GPTNeoX,
        tokenizer: Tokenizer | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        self.model = pretrained if isinstance(pretrained, GPTNeoX) else _loaded(pretrained, device, dtype)
        self.tokenizer = tokenizer or tokenizer_of(self.model.config, str(pretrained))
        self.max_length = max_length or self.model.config.network.max_position_embeddings
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def before_text(self) -> list[int]:
        """What stands before a text that has no context, besides the sinks."""
        return [] if self.model.sink_ids else [self.eot_token_id]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of the text alone: sinks are put in front of windows, not of texts."""
        tokens: list[int] = self.tokenizer.encode(string)
        return tokens

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for context, answer in (request.args for request in requests):
            of_both = self._encode_pair(context, answer) if context else ([], self.tok_encode(answer))
            pairs.append(((context, answer), *of_both))
        return self._loglikelihood_tokens(pairs)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return score(self.model, [self._window(context, answer) for _, context, answer in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [self._rolling(*request.args) for request in requests]
        scores = iter(score(self.model, [one for windows in texts for one in windows]))
        return [sum(next(scores)[0] for _ in windows) for windows in texts]

    def _window(self, context: list[int], answer: list[int]) -> Window:
        return window(self.model, context or self.before_text, answer, self.max_length)

    def _rolling(self, text: str) -> list[Window]:
        """Windows in which each token of a text is scored once, cut as lm-eval cuts them."""
        pairs = get_rolling_token_windows(
            self.tok_encode(text),
            prefix_token=self.eot_token_id,
            max_seq_len=self.max_length - len(self.model.sink_ids),
            context_len=1,
        )
        cut = [make_disjoint_window(pair) for pair in pairs]
        return [self._window(context if at else [], answer) for at, (context, answer) in enumerate(cut)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        decoder = StreamingDecoder(
            self.model, len(self.model.sink_ids), self.max_length - len(self.model.sink_ids)
        )
        texts = []
        with progress_bar(total=len(requests), desc="generated", unit="answer") as bar:
            for context, options in (request.args for request in requests):
                decoder.reset()
                texts.append(self._continued(decoder, context, options))
                bar.update()
        return texts

    def _continued(self, decoder: StreamingDecoder, context: str, options: dict[str, Any]) -> str:
        """What follows a context, up to the first of the task's stop words; the decoder evicts nothing."""
        asked: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        room = self.max_length - len(self.model.sink_ids) - asked["max_gen_toks"]
        if room < 1:
            raise ModelError(
                f"{asked['max_gen_toks']} tokens are to be generated, and the model reads {self.max_length} "
                "at once; set a smaller max_gen_toks in the task's generation_kwargs"
            )
        prompt = self.tok_encode(context)[-room:] or self.before_text
        stops = [stop for stop in asked["until"] if stop]
        tokens: list[int] = []
        text = ""
        for token in decoder.generate(
            torch.tensor([prompt], dtype=torch.int64),
            asked["max_gen_toks"],
            temperature=asked.get("temperature", 1.0) if asked["do_sample"] else 0.0,
            seed=0,
            suppress=range(self.tokenizer.vocab_size, self.model.config.vocab_size),
            **{name: asked[name] for name in SAMPLING if name in asked},
        ):
            tokens.append(int(token))
            if tokens[-1] == self.eot_token_id:
                break
            text = self.tokenizer.decode(tokens)
            if any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _loaded(source: str, device: str | None, dtype: str | None) -> GPTNeoX:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(
        source, device, getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
