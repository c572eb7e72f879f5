"""The fields of a config.json that describe no size: those that are harmless, and those that change the function."""

from __future__ import annotations

import re
from typing import Any

from nemo_skymoe.checkpoint.config_values import ConfigValues

_HARMLESS = """
_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
_attn_implementation_internal attn_implementation use_flash_attn use_flash_attention flash_attn use_flash_attention_2
transformers_version transformers.js_config auto_map custom_pipelines license model_name name revision
unsloth_version unsloth_fixed unsloth_version_fixed
use_cache cache_implementation initializer_range initializer_factor init_std init_method_std mup_init
attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop
ffn_dropout residual_dropout embedding_dropout layerdrop classifier_dropout moe_dropout
router_aux_loss_coef router_z_loss_coef aux_loss_alpha router_jitter_noise output_router_logits z_loss_weight
moe_aux_loss_coeff moe_z_loss_coeff seq_aux
pretraining_tp tensor_parallel_size gradient_checkpointing keys_to_ignore_at_inference torchscript use_bfloat16
fp16 bf16 fp32 use_fused_rms_norm use_fused_rope fused_bias_swiglu use_reentrant
return_dict output_hidden_states output_attentions output_scores return_dict_in_generate is_decoder
id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix model_max_length
tokenizer_model_max_length tokenizer_padding_side padding_side max_length min_length max_new_tokens do_sample
early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
chunk_size_feed_forward decoder_start_token_id sep_token_id unk_token_id cls_token_id mask_token_id
max_window_layers original_max_position_embeddings max_sequence_length seq_length seq_len max_seq_len
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Options of running, training or generating, and names: no message is needed."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *(
                "use_sliding_window",
                "is_encoder_decoder",
                "add_cross_attention",
                "tie_encoder_decoder",
                "use_mla",
            ),
            *(
                "qk_layernorm",
                "use_qk_norm",
                "qk_norm",
                "alibi",
                "use_alibi",
                "parallel_attn",
                "use_parallel_residual",
            ),
            *("clip_qkv", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"),
            *(
                "num_shared_experts",
                "n_shared_experts",
                "shared_expert_intermediate_size",
                "first_k_dense_replace",
            ),
            *("mlp_only_layers", "no_rope_layers", "no_rope_layer_interval", "num_nextn_predict_layers"),
            *(
                "kv_lora_rank",
                "q_lora_rank",
                "mtp_num_layers",
                "attention_sinks",
                "attention_chunk_size",
                "pruned_heads",
            ),
            *(
                "cross_attention_hidden_size",
                "scale_depth",
                "dim_model_base",
                "attention_multiplier",
                "norm_after",
            ),
            *(
                "rope_interleaved",
                "layer_norm_eps",
                "rms_norm_add_unit_offset",
                "layernorm_zero_centered_gamma",
            ),
            *("use_dynamic_ntk", "use_logn_attn", "nope_layer_interval", "n_routed_experts"),
            *("vision_config", "audio_config", "attn_temperature_tuning"),
        ),
        (None, False, 0, 0.0),
    ),
    **dict.fromkeys(
        (
            *("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb"),
            *(
                "rope_ratio",
                "residual_scale",
                "routed_scaling_factor",
                "rotary_pct",
                "rope_pct",
                "rotary_percent",
                "decoder_sparse_step",
            ),
        ),
        (None, 1, 1.0),
    ),
    "is_causal": (None, True),
    "norm_topk_prob": (None, True),
    "moe_intermediate_size": (None,),
    "scoring_func": (None, "softmax"),
    "position_embedding_type": (None, "rope", "rotary"),
    "hidden_activation": (None, "silu", "swish"),
    "rope_type": (None, "default"),
    "clip_logits": (None, False),
}
"""Fields of relatives of these models, and the values with which they change nothing."""
_TELLING = re.compile(
    r"soft_?cap|multiplier|alibi|(shared|routed)_expert|qk_?(layer)?norm|logits?_scal|lora_rank|cross_attention"
    r"|residual_scal|dynamic_ntk|logn_attn|attention_sink|(^|_)nope(_|$)|no_rope|(vision|audio|speech)_config"
)


def check(values: ConfigValues) -> None:
    """Pass over what is harmless, and refuse what makes another model of the same tensors.

    Raises:
        CheckpointError: A field of NEUTRAL that was not read, or one that sounds like them, has a value that is not neutral.
    """
    values.known(*HARMLESS)
    for name, value in values.raw.items():
        off = value in (None, False, 0) or value in ("", [], {})
        if name in NEUTRAL and not values.asked(name):
            values.known(name)
            if value in NEUTRAL[name] or (value in ([], {}) and None in NEUTRAL[name]):
                continue
            expected = " or ".join(repr(each) for each in NEUTRAL[name] if each is not None) or "none"
            raise values.wrong(name, f"{expected}: with another value this is a model that has no place here")
        if name not in HARMLESS and not values.asked(name) and _TELLING.search(name) and not off:
            raise values.wrong(name, "none: the model that it makes has no place here")
