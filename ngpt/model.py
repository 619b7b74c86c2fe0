"""The PyTorch nGPT model in transformers' form: the reference that every engine is compared with. Its parts are in `layers`.

Shapes in docstrings: B batch, T tokens, E hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .config import NGPTConfig
from .layers import (
    CACHE,
    NGPTAttention,
    NGPTDecoderLayer,
    NGPTRotaryEmbedding,
    ResearchPositionCode,
    one_cache,
    scales,
    unit_norm,
    wide,
)

logger = logging.get_logger(__name__)
_REFUSED = (
    "head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "token_type_ids",
    "cross_attn_head_mask",
    "layer_past",
)


def _refuse_foreign(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for an argument of other architectures that would change the result and that nGPT has no place for.

    Tokenizers in general use return token_type_ids: they are let through where they are all zero. Everything else goes on to
    transformers' mask, attention and loss functions.
    """
    types = kwargs.pop("token_type_ids", None)
    given = [name for name in _REFUSED if kwargs.pop(name, None) is not None]
    if types is not None and bool(types.any()):
        given.append("token_type_ids")
    if given:
        raise ValueError(f"nGPT takes no {', '.join(given)}; leave it out")


class NGPTPreTrainedModel(PreTrainedModel):
    """Shared declarations; a fresh model starts on the hypersphere with its scales at their initial constants."""

    config: NGPTConfig
    sz: nn.Linear | None  # the class with a language-model head has it
    config_class = NGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # transformers records both on request, output_hidden_states and output_attentions, as it does for its own models.
    _can_record_outputs = {"hidden_states": NGPTDecoderLayer, "attentions": NGPTAttention}
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Steps along the sphere are small: bfloat16 would keep 8 bits of them.
    _keep_in_fp32_modules_strict = ["attn_alpha", "mlp_alpha"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if (constant := getattr(module, "_initial_constant", None)) is not None:
            init.constant_(module.weight, constant)
        elif isinstance(module, nn.Linear | nn.Embedding):
            # Columns of the output projections have unit norm, rows of every other matrix.
            draw = torch.empty_like(module.weight, dtype=torch.float32).normal_(0.0, 1.0)
            axis = 0 if getattr(module, "_unit_columns", False) else 1
            draw = draw / torch.linalg.vector_norm(draw, dim=axis, keepdim=True)
            init.copy_(module.weight, draw.to(module.weight.dtype))
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, NGPTDecoderLayer):
            init.constant_(module.attn_alpha, self.config.initializer_range)
            init.constant_(module.mlp_alpha, self.config.initializer_range)
        elif isinstance(module, NGPTRotaryEmbedding):
            build = module.default_frequencies
            if module.rope_type != "default":
                build = ROPE_INIT_FUNCTIONS[module.rope_type]
            inv_freq, _ = build(module.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)
        elif isinstance(module, ResearchPositionCode):
            exponents = torch.arange(0, self.config.heads[2], 2, dtype=torch.float32) / self.config.heads[2]
            init.copy_(module.inv_freq, 10000.0**-exponents)

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As PreTrainedModel's, with the result still nGPT: new rows of the table and of the head have unit norm, and sz follows.

        New entries of sz are the mean of the old ones (their initial constant with mean_resizing=False). Token ids of the
        configuration that a smaller vocabulary no longer has become null, with a warning.
        """
        before = self.get_input_embeddings().weight.shape[0]
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size, head = table.weight.shape[0], self.get_output_embeddings()
        table.weight[before:] = unit_norm(table.weight[before:]).to(table.weight.dtype)
        if head is not None and head.weight is not table.weight:
            head.weight[before:] = unit_norm(head.weight[before:]).to(head.weight.dtype)
            if self.config.sz_folded:  # rows of such a head have the scales for norms
                lengths = torch.linalg.vector_norm(wide(head.weight[:before]), dim=-1)
                head.weight[before:] *= lengths.mean() if mean_resizing else self.config.sz_init_value
        if (old := getattr(self, "sz", None)) is not None and size != before:
            mean = wide(old.weight).mean().item() if mean_resizing else self.config.initializer_range
            new = scales(size, self.config.initializer_range).to(old.weight).requires_grad_(old.weight.requires_grad)
            new.weight.fill_(mean)
            new.weight[:before] = old.weight[:size]
            self.sz = new
        if size < before:
            for config in filter(None, (self.config, getattr(self, "generation_config", None))):
                _drop_token_ids(config, size)
        return table


def _drop_token_ids(config: Any, size: int) -> None:
    """Set ids of special tokens that are not below `size` to None, saying so."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, key, None)
        kept = [i for i in ids if i < size] if isinstance(ids, list) else ids if ids is None or ids < size else None
        kept = None if kept == [] else kept
        if kept != ids:
            logger.warning(f"{key} {ids} of {type(config).__name__} is outside the vocabulary of {size}: now {kept}")
            setattr(config, key, kept)


class NGPTModel(NGPTPreTrainedModel):
    """The stack of decoder layers without a head. Its last hidden state has unit norm already, so there is no final norm.

    Args:
        config (`NGPTConfig`):
            The shape of the network. Weights are random; ``from_pretrained`` reads those of a checkpoint.
    """

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([NGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        layers: Any = self.layers
        for layer in layers:
            layer.self_attn.o_proj._unit_columns = layer.mlp.down_proj._unit_columns = True
        self.rotary_emb = (NGPTRotaryEmbedding if config.position_code == "rope" else ResearchPositionCode)(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of token ids.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Token ids. Exactly one of ``input_ids`` and ``inputs_embeds`` is given.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*):
                1 for tokens, 0 for padding. All are tokens unless given.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Positions. Unless given, a token's position is the number of real tokens before it in its row, so a batch
                that is padded on the left needs none.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier tokens; the new ones are added to it.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, E)`, *optional*):
                Embeddings in the place of token ids. Nothing normalizes them.
            use_cache (`bool`, *optional*):
                Whether to return the cache; ``config.use_cache`` unless given.
            cache (`Cache`, *optional*):
                Another name of ``past_key_values``: transformers 5.24 renamed it.
            **kwargs:
                ``output_hidden_states``, ``output_attentions`` (weights exist under ``attn_implementation="eager"`` alone),
                ``return_dict`` and ``is_causal`` mean what they mean in transformers' Llama. The rest goes to the attention
                function.

        Returns:
            `BaseModelOutputWithPast`: ``last_hidden_state`` of shape `(B, T, E)` and unit norm, the cache, and what was
            asked for beside.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``; two different caches; an argument that means
                something in other architectures only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        _refuse_foreign(kwargs)
        config, past = self.config, one_cache(past_key_values, cache)
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past is None:
            past = DynamicCache(config=config)
        if position_ids is None:
            position_ids = self._positions(h, attention_mask, past)
        mask = create_causal_mask(
            config=config, inputs_embeds=h, attention_mask=attention_mask, position_ids=position_ids, **{CACHE: past}
        )
        position_embeddings = self.rotary_emb(h, position_ids)
        for layer in self.layers[: config.num_hidden_layers]:
            h = layer(
                h,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: past},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=h, **{CACHE: past if use_cache else None})

    @staticmethod
    def _positions(h: Tensor, attention_mask: Tensor | None, past: Cache | None) -> Tensor:
        tokens, seen = h.shape[1], past.get_seq_length() if past is not None else 0
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] >= tokens:
            real = attention_mask.long()
            counted = (real.cumsum(-1) - 1).masked_fill(real == 0, 1)
            if isinstance(seen, int) and attention_mask.shape[1] == seen + tokens:
                return counted[:, -tokens:]
        return (torch.arange(tokens, device=h.device) + seen).unsqueeze(0)


class NGPTForCausalLM(NGPTPreTrainedModel, GenerationMixin):
    """nGPT with its language-model head: logits = lm_head(h) * sz * sz_init_value / r (paper section 2.1).

    With config.sz_folded the rows of lm_head hold that factor and there is no sz, for engines that apply lm_head themselves.

    Args:
        config (`NGPTConfig`):
            The shape of the network. Weights are random; ``from_pretrained`` reads those of a checkpoint.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        self.model = NGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.sz = None if config.sz_folded else scales(config.vocab_size, config.initializer_range)
        self.sz_scale = config.sz_init_value / config.initializer_range
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of token ids and, given labels, their loss.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Token ids. Exactly one of ``input_ids`` and ``inputs_embeds`` is given.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*):
                1 for tokens, 0 for padding. All are tokens unless given.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Positions; the number of real tokens before each token unless given.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier tokens; the new ones are added to it.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, E)`, *optional*):
                Embeddings in the place of token ids.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
                The tokens themselves, -100 where no loss is wanted. The loss function shifts them by one.
            use_cache (`bool`, *optional*):
                Whether to return the cache; ``config.use_cache`` unless given.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
                How many of the last positions get logits, 0 for all; or which positions.
            cache (`Cache`, *optional*):
                Another name of ``past_key_values``.
            **kwargs:
                Those of `NGPTModel.forward`, and those of the loss: ``shift_labels``, ``ignore_index``, ``num_items_in_batch``.

        Returns:
            `CausalLMOutputWithPast`: ``logits`` of shape `(B, kept, V)`, ``loss`` if there are labels, and what
            `NGPTModel.forward` returns.

        Raises:
            ValueError: as `NGPTModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: one_cache(past_key_values, cache)},
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        h = outputs.last_hidden_state
        h = h if isinstance(keep, slice) and logits_to_keep == 0 else h[:, keep, :]
        logits = self.lm_head(h)
        if self.sz is not None:
            logits = logits * (self.sz(h.new_ones(1)) * self.sz_scale)
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


class NGPTForSequenceClassification(GenericForSequenceClassification, NGPTPreTrainedModel):
    """One score per label from the last real token's hidden state, as transformers' Llama has it."""


class NGPTForTokenClassification(GenericForTokenClassification, NGPTPreTrainedModel):
    """One score per label from every token's hidden state, as transformers' Llama has it."""
