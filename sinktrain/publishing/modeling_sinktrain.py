"""GPT-NeoX whose attention has a sink that stock GPT-NeoX has no place for, in transformers 4.57 and 5.

transformers runs this file when it is told to ``trust_remote_code``. The network is its own but for the
attention, which asks its sink for two things: a score that joins the softmax with no token and no value, and
a scale of each head's output. ``config.sink["kind"]`` names the sink.

Axes: batch, seq, head, head_size, hidden; keys are the tokens in the cache and those of seq.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXModel, GPTNeoXPreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, apply_rotary_pos_emb
from transformers.utils import can_return_tuple


class Sink(nn.Module):
    """What a layer's attention has besides; here nothing."""

    def null_score(self) -> Tensor | None:
        """float[head]: it joins the softmax of every query, and nothing is added for it."""
        return None

    def output_scale(self, hidden: Tensor) -> Tensor | None:
        """From the layer's normalised input, [batch, seq, hidden]: [batch, seq, head], for heads' outputs."""
        return None


class SinkLogit(Sink):
    """One learned logit per head in the softmax's denominator."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(config.num_attention_heads))

    def null_score(self) -> Tensor:
        return self.score


class OutputGate(Sink):
    """A sigmoid gate on each head's output."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)

    def output_scale(self, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(hidden))


SINKS = {"logit": SinkLogit, "gate": OutputGate}


class SinktrainConfig(GPTNeoXConfig):
    model_type = "sinktrain_gpt_neox"


class SinktrainAttention(GPTNeoXAttention):
    def __init__(self, config: SinktrainConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sink = SINKS[config.sink["kind"]](config)

    def forward(
        self, hidden_states, attention_mask=None, layer_past=None, position_embeddings=None, **kwargs
    ):
        heads = self.query_key_value(hidden_states).unflatten(-1, (-1, 3 * self.head_size)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)  # each [batch, head, seq, head_size]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            place = {"cache_position": kwargs.get("cache_position")}  # which 5 keeps to itself
            key, value = layer_past.update(key, value, self.layer_idx, place)
        weights = self.weights(query @ key.transpose(2, 3) * self.scaling, attention_mask)
        mixed = (weights @ value).transpose(1, 2)
        scale = self.sink.output_scale(hidden_states)
        if scale is not None:
            mixed = mixed * scale.unsqueeze(-1)
        return self.dense(mixed.flatten(2)), weights

    def weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax over the keys and the null score: [batch, head, seq, keys] to the same."""
        if mask is not None:
            scores = scores + mask[..., : scores.shape[-1]]
        null_score = self.sink.null_score()
        if null_score is not None:
            null = null_score[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat((null.to(scores.dtype), scores), dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        weights = nn.functional.dropout(weights, self.attention_dropout, self.training)
        return weights if null_score is None else weights[..., 1:]


class SinktrainForCausalLM(GPTNeoXPreTrainedModel, GenerationMixin):
    config_class = SinktrainConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config: SinktrainConfig) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        for index, layer in enumerate(self.gpt_neox.layers):
            layer.attention = SinktrainAttention(config, index)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.embed_out

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.embed_out = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        outputs = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.embed_out(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
